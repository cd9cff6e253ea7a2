"""Commands: all code that uses files, data sets, devices and plots."""
