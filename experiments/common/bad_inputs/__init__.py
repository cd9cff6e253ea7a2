"""Inputs that a command must refuse, and some that it must accept; for stress.

A case is a command, its arguments, and words of which the answer must contain one.
`{NAME}` in an argument is a file or folder that `make_files` wrote, or a run that
`stress` trained. The cases of single fields are derived from the configurations.
"""

from experiments.common.bad_inputs.cases import COMMANDS, RUNS, Case, make_cases
from experiments.common.bad_inputs.files import Evil, make_files

__all__ = [
    "COMMANDS",
    "RUNS",
    "Case",
    "Evil",
    "make_cases",
    "make_files",
]
