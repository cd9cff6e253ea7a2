"""Counts what bad inputs, kills and flipped bits do to the commands.

    python -m experiments.stress --config=experiments/configs/stress.py:VARIANT

Variants:
  all: inputs, kills and flips for all commands.
  inputs: every bad input of experiments/common/bad_inputs, and some good ones; 25
    minutes on two cores (results/stress_inputs). This variant and the next two test the
    commands that the runs in results/ tested, without generate_functa and
    compare_pruning.
  kills: runs that are killed in training and in writing, then resumed and compared.
  flips: one bit at a time in checkpoints and functasets.
  smoke: a few inputs and one killed run of meta_learn, to check that the command runs.
"""

import functools

from experiments.common import settings

_RECORDED = (
    *("meta_learn", "make_functaset", "classify_functa", "compress_functa"),
    "fit_image",
    *("train_lbi", "prune_lbi", "probe_landscape", "train_vit", "prune_vit"),
)
BASE = {
    # Seed of the times of the kills and the positions of the bits.
    "seed": 0,
    "commands": (*_RECORDED, "generate_functa", "compare_pruning"),
    "inputs": {
        # n: every n-th input is tried; 0: none.
        "every": 1,
        "num_processes": 2,
        # Seconds after which an input counts as a hang.
        "timeout": 600,
    },
    "kills": {
        # Killed runs of each command, and kills of each run before it may finish.
        "num_runs": 2,
        "num_per_run": 5,
    },
    "num_flips": 20,
}
_NONE = {
    "commands": _RECORDED,
    "inputs.every": 0,
    "kills.num_runs": 0,
    "num_flips": 0,
}
VARIANTS = {
    "all": {},
    "inputs": {**_NONE, "inputs.every": 1},
    "kills": {**_NONE, "kills.num_runs": 2},
    "flips": {**_NONE, "num_flips": 20},
    "smoke": {
        "commands": ("meta_learn",),
        "inputs.every": 40,
        "inputs.num_processes": 1,
        "kills.num_runs": 1,
        "kills.num_per_run": 2,
        "num_flips": 2,
    },
}
RULES = {
    "commands": settings.distinct(settings.one_of(*BASE["commands"])),
    "inputs.every": settings.whole(0),
    "inputs.num_processes": settings.whole(1),
    "inputs.timeout": settings.whole(1),
    "kills.num_runs": settings.whole(0),
    "kills.num_per_run": settings.whole(1),
    "num_flips": settings.whole(0),
}

get_config = functools.partial(settings.build, "stress", BASE, VARIANTS)
