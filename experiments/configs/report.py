"""Writes one page with every table and figure of the student report, theirs and ours.

    python -m experiments.report --config=experiments/configs/report.py:VARIANT

The command prints for each table and figure which runs it needs, whether they are
finished, and how long the run in results/ took. It writes report.html, which contains
the figures, report.md, and with `evidence` docs/report.md.

    --config.run=all                              runs what is missing, in order
    --config.run=train_lbi/mnist,prune_lbi/mnist  runs these, and what they need

A run COMMAND/VARIANT is in the folder runs/COMMAND/VARIANT, as if that command had been
started. It resumes.

Variants:
  report: the runs in runs/ and, for those that are not finished there, in results/;
    seconds, if nothing is run.
  smoke: runs everything with tiny networks on the digits of scikit-learn, in the run
    folder, to check that the commands run; its numbers mean nothing. No download; a few
    minutes on two cores.
"""

import functools

from experiments.common import report, settings

BASE = {
    # What is run: names COMMAND/VARIANT, or "all" for what is missing.
    "run": (),
    # The folder of the runs; None is the run folder.
    "folder": settings.Optional(str, "runs"),
    # Whether the runs in results/ count too.
    "evidence": True,
    # Whether to run the smoke variant of each command, with the fields of SMOKE.
    "smoke": False,
}
VARIANTS = {
    "report": {},
    "smoke": {"run": ("all",), "folder": None, "evidence": False, "smoke": True},
}
_VGG = {
    "image_size": 32,
    "model": {
        "type": "VGG",
        "batch_norm": True,
        "stages": ((4,), (4,), (8, 8), (8, 8), (8, 8)),
        "hidden": (8, 8),
    },
}
# Fields in which a run differs from the smoke variant of its command: the keys of the
# summary must be those of the report.
SMOKE = {
    "fit_image": {
        "dataset.name": "digits",
        "log_every": 4,
        "mosaic": (1, 1, 1, 1, 3),
        "num_images": (2, 1, 1, 1, 1),
        "num_steps": (20,),
        "resolution": (32, 64, 96, 128, 32),
        "snapshot_steps": (4, 8, 12, 16),
    },
    "classify_functa": {"log_test": True, "num_epochs": 6},
    "prune_vit": {
        "methods": {"max": (0.2, 0.3, 0.4)},
        "timing.methods": (),
        "tuning.methods": {"dense": (0.0,), "max": (0.2, 0.3, 0.4)},
    },
    "prune_vit/cifar10_cpu_segments": {
        "methods": {
            f"{prefix}segment_{number}": (0.333,)
            for prefix in ("", "heads_")
            for number in (1, 2, 3)
        },
        "timing.batch_sizes": (),
        "timing.gradient_batch_size": 0,
        "tuning.methods": {},
        "tuning.num_epochs": 0,
    },
    "probe_landscape": {"learning_rates": (1e-4, 5e-4, 1e-3, 2e-3)},
    "train_lbi/cifar10_narrow": _VGG,
    "train_lbi/cifar10_report": _VGG,
    "train_lbi/cifar10": _VGG | {"methods": ("dessilbi",)},
}
# A paragraph of the page.
SMOKE_TEXT = (
    "A smoke run: the commands ran with tiny networks, few steps and the digits of "
    "scikit-learn. The rows have the names of the report's settings; the numbers of "
    "ours mean nothing."
)
RUNS = tuple(report.list_runs())
RULES = {
    "run": settings.Rule(
        f"all or names of {', '.join(RUNS)}",
        lambda values: set(split(values)) <= {"all", *RUNS},
    ),
}


def split(values: tuple[str, ...]) -> list[str]:
    """The names in a tuple of names or of lists separated by commas."""
    return [name.strip() for value in values for name in value.split(",")]


get_config = functools.partial(settings.build, "report", BASE, VARIANTS)
