"""Compresses the latents of a functaset and compares the result with image codecs.

    python -m experiments.compress_functa \\
        --config=experiments/configs/compress_functa.py:VARIANT

It needs the range coder of constriction (pip install constriction). The field and its
functaset are those of a run of meta_learn.

Variants:
  digits: the grids of latents of meta_learn's digits_spatial variant, compared with
    JPEG and the principal components of whole images and of their cells; 2.9 bits per
    pixel at 30 dB in seconds (results/compress_functa_digits). WebP and
    JPEG 2000 are left out: images of 8x8 pixels are smaller than a macroblock of WebP,
    and the packet headers of JPEG 2000 outweigh their content.
  smoke: the digits variant with the smoke_spatial run of meta_learn, 64 training and 16
    test images and two steps, to check that the command runs.
  cifar10_spatial_cpu: the grids of latents of meta_learn's cifar10_spatial_cpu variant,
    first 1,000 test images, compared with JPEG, WebP, JPEG 2000 and principal
    components of patches of 8x8 and 4x4 pixels; 1.5 bits per pixel at 30 dB in 22
    minutes on two cores (results/compress_functa_cifar10_spatial_cpu).

With a finished run of classify_functa on the same latents, the accuracy on what is
decoded is measured too:

    --config.classifier=runs/classify_functa/digits_spatial
"""

import functools

from experiments.common import settings
from functa import compression

BASE = {
    "tensorboard": False,
    # The run of meta_learn or import_functa whose weights decode the latents.
    "run": "runs/meta_learn/digits_spatial",
    "functaset": "runs/meta_learn/digits_spatial/functaset.npz",
    # Directory of the images; see experiments/common/data.py.
    "data_dir": settings.Optional(str),
    # Images of each split, from the first on; 0 uses all. The quantizer and the
    # probabilities are fitted to the training images.
    "num_train_images": 10000,
    "num_images": 0,
    # Further iterations of L-BFGS for each latent of both splits before it is
    # quantized.
    "further_steps": 0,
    # Steps of the quantizer. With a step D the squared error of an image is about
    # D^2 / 12 for each number of its latent, for images in [0, 1].
    "steps": (0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.05, 0.03, 0.02, 0.012, 0.006),
    # slopes: the steps of the channels are such that all have the same share of this
    # error. deviation: they are proportional to the deviations of the channels.
    "scales": "slopes",
    # Keywords of functa.compression.fit_entropy_model.
    "model": {"family": "histogram", "predict": True, "num_groups": 8},
    # Grids of the patches whose principal components are a control.
    "klt_grids": ((1, 1), (2, 2)),
    # Qualities of the codecs of Pillow: 0 to 100; for jpeg2000 a PSNR in dB. () leaves
    # a codec out.
    "codecs": {
        "jpeg": (5, 10, 20, 30, 50, 70, 80, 85, 90, 95),
        "webp": (),
        "jpeg2000": (),
    },
    # PSNR in dB at which the summary compares the bits per pixel.
    "target_psnr": 30.0,
    # Run of classify_functa whose accuracy on the decoded latents is measured.
    "classifier": settings.Optional(str),
    # Bits per number of a latent at which the summary states the lost accuracy.
    "accuracy_bits": 6.0,
    # Images rendered at once. On a CPU small batches are fastest: they fit the cache.
    "batch_size": 8,
}
_CIFAR10 = "runs/meta_learn/cifar10_spatial_cpu"
_SMOKE = "runs/meta_learn/smoke_spatial"
VARIANTS = {
    "digits": {},
    "smoke": {
        "codecs.jpeg": (10, 90),
        "functaset": f"{_SMOKE}/functaset.npz",
        "klt_grids": ((2, 2),),
        "num_images": 16,
        "num_train_images": 64,
        "run": _SMOKE,
        "steps": (0.3, 0.1),
    },
    "cifar10_spatial_cpu": {
        "codecs.webp": (1, 10, 25, 40, 50, 60, 70, 80, 90, 95),
        "codecs.jpeg2000": (20, 24, 28, 30, 32, 36, 40),
        "functaset": f"{_CIFAR10}/functaset.npz",
        "klt_grids": ((4, 4), (8, 8)),
        "num_images": 1000,
        "run": _CIFAR10,
    },
}
RULES = {
    "num_train_images": settings.whole(0),
    "num_images": settings.whole(0),
    "further_steps": settings.whole(0),
    "steps": settings.distinct(settings.above(0)),
    "scales": settings.one_of("slopes", "deviation"),
    "model.family": settings.one_of(*compression.FAMILIES),
    "model.num_groups": settings.whole(1, 64),
    "klt_grids": settings.each(
        settings.Rule(
            "(h, w) with integers of at least 1",
            lambda v: len(v) == 2 and all(type(n) is int and n >= 1 for n in v),
        ),
        empty=True,
    ),
    "codecs.jpeg": settings.each(settings.whole(1, 100), empty=True),
    "codecs.webp": settings.each(settings.within("[0, 100]"), empty=True),
    "codecs.jpeg2000": settings.each(settings.within("[1, 100]"), empty=True),
    "target_psnr": settings.within("[0, 100]"),
    "accuracy_bits": settings.above(0),
}

get_config = functools.partial(settings.build, "compress_functa", BASE, VARIANTS)
