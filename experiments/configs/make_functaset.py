"""Encodes a data set into a functaset with the weights of a finished run.

    python -m experiments.make_functaset \
        --config=experiments/configs/make_functaset.py:VARIANT \
        --config.run=runs/meta_learn/digits

The file is <workdir>/functaset.npz. The table of variants, results and times is in the
README.
"""

from ml_collections import ConfigDict, config_dict

VARIANTS = ("digits", "smoke", "cifar10_cpu", "cifar10_flip")


def get_config(variant: str = "digits") -> ConfigDict:
    """Settings of one variant.

    Args:
      variant:
        digits: both splits of the digits, and 3 augmented copies of the training split.
        smoke: the first 32 images of each split, by the smoke run of meta_learn.
        cifar10_cpu: CIFAR-10 by the run of that name, each image once.
        cifar10_flip: the same with one copy that is cropped and mirrored at random.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is none of {', '.join(VARIANTS)}.")
    config = ConfigDict()
    config.experiment = "make_functaset"
    config.variant = variant
    # Of the augmentation.
    config.seed = 0

    # The run of meta_learn or import_functa whose weights and inner loop are used.
    config.run = "runs/meta_learn/digits"
    # Hash of these weights; taken from the run. Latents of other weights are not added
    # to a file that was begun.
    config.params_sha256 = config_dict.placeholder(str)
    # As in meta_learn; that of the run if no name is given.
    config.dataset = ConfigDict()
    config.dataset.name = config_dict.placeholder(str)
    config.dataset.data_dir = config_dict.placeholder(str)
    config.splits = ("train", "test")
    # The first images of each split; 0 means all.
    config.num_images = 0
    # How often the training split is encoded. Copies after the first are enlarged by a
    # quarter and cropped at random and, with `flip`, mirrored at random.
    config.copies = 1
    config.flip = False
    # Images fitted at once. On a CPU few of them fit the cache and are the fastest.
    config.batch_size = 8

    if variant == "digits":
        config.copies = 4
    elif variant == "smoke":
        config.run = "runs/meta_learn/smoke"
        config.num_images = 32
        config.copies = 2
    else:
        config.run = "runs/meta_learn/cifar10_cpu"
        if variant == "cifar10_flip":
            config.copies = 2
            config.flip = True
    return config
