"""Commands: everything that touches files, data sets, devices and plots."""
