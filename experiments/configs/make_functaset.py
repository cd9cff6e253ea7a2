"""Encodes a data set into a functaset with the weights of a finished run.

    python -m experiments.make_functaset \\
        --config=experiments/configs/make_functaset.py:VARIANT \\
        --config.run=runs/meta_learn/digits

The file is <workdir>/functaset.npz. The table of variants, results and times is in the
README.

Variants:
  digits: both splits of the digits, and 3 augmented copies of the training split.
  smoke: the first 32 images of each split, by the smoke run of meta_learn.
  cifar10_cpu: CIFAR-10 by the run of that name, each image once.
  cifar10_flip: the same with one copy that is cropped and mirrored at random.
"""

import functools

from experiments.common import settings

BASE = {
    # Of the augmentation.
    "seed": 0,
    # The run of meta_learn or import_functa whose weights and inner loop are used.
    "run": "runs/meta_learn/digits",
    # As in meta_learn; that of the run if no name is given.
    "dataset": {
        "name": settings.Optional(str),
        "data_dir": settings.Optional(str),
    },
    "splits": ("train", "test"),
    # The first images of each split; 0 means all.
    "num_images": 0,
    # How often the training split is encoded. Copies after the first are enlarged by a
    # quarter and cropped at random and, with `flip`, mirrored at random.
    "copies": 1,
    "flip": False,
    # Images fitted at once. On a CPU few of them fit the cache and are the fastest.
    "batch_size": 8,
}
VARIANTS = {
    "digits": {"copies": 4},
    "smoke": {"copies": 2, "num_images": 32, "run": "runs/meta_learn/smoke"},
    "cifar10_cpu": {"run": "runs/meta_learn/cifar10_cpu"},
    "cifar10_flip": {"copies": 2, "flip": True, "run": "runs/meta_learn/cifar10_cpu"},
}
RULES = {
    "splits": settings.each(settings.one_of("train", "test")),
    "num_images": settings.at_least(0),
    "copies": settings.at_least(1),
    "batch_size": settings.at_least(1),
    "seed": settings.at_least(0),
}

get_config = functools.partial(settings.build, "make_functaset", BASE, VARIANTS)
