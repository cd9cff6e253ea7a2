"""Commands: the code that uses files, data sets, devices and plots."""

import sys

if sys.argv[:1] == ["-m"]:  # python -m experiments.NAME: its imports take seconds

    def _interrupted(kind, error, trace):
        if issubclass(kind, KeyboardInterrupt):
            print("error: interrupted before the start.", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = _interrupted
