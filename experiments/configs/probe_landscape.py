"""Measures the landscape of a network with and without batch normalization.

    python -m experiments.probe_landscape \\
        --config=experiments/configs/probe_landscape.py:VARIANT

The main result is a ratio: the width of the envelope of the training losses over the
learning rates without batch normalization, divided by the width with it.

Variants:
  digits: a small VGG on the digits of scikit-learn; 1.2 in 2 minutes on two cores
    (results/probe_landscape_digits).
  smoke: the digits variant for 2 epochs on 128 images, to check that the command runs.
  deep_linear: a linear network of 25 layers on the digits; 1.04 in half a minute
    on two cores (results/probe_landscape_deep_linear).
  cifar10_cpu: VGG-A with a quarter of the channels on CIFAR-10, 3 epochs, two seeds;
    1.2 in 49 minutes on two cores (results/probe_landscape_cifar10_cpu).
  cifar10_subset: the same network on 5,000 images, 30 epochs, two seeds, without the
    surface. Every run except those at the smallest rate without normalization fits the
    images; 3.8 in 55 minutes on two cores (results/probe_landscape_cifar10_subset).
  cifar10: VGG-A on CIFAR-10, 20 epochs as in the student report. It needs a GPU;
    results/ has no run of it.
  own: a residual network and a Vision Transformer from a file on the digits, as an
    example for networks of your own; Adam's preconditioned sharpness and the spectral
    density are measured too. A few minutes on two cores; results/ has no run of it.
  smoke_own: the own variant for 2 epochs on 128 images.
  story: a trained network on the latents of a functaset, measured without training; the
    command story uses it.

A network of your own, trained and measured on any data set:

    --config.network=PATH.py:make_network   see experiments/networks/custom.py;
                                            PATH.py:first,second measures several
    --config.loss=PATH.py:loss              loss(logits, labels) -> scalar
    --config.num_epochs=0                   measures it without training
"""

import functools

from experiments.common import settings

BASE = {
    "tensorboard": False,
    # bn: with batch normalization; plain: without it. Each network is trained at every
    # learning rate with every seed.
    "networks": ("bn", "plain"),
    # Functions of a Python file, in place of `networks` and `model`: PATH.py:function,
    # and the keywords with which they are called (experiments/networks/custom.py).
    "network": settings.Optional(str),
    "network_options": settings.Open(),
    # PATH.py:function of logits (B, K) and labels (B,); None is the cross-entropy.
    "loss": settings.Optional(str),
    "learning_rates": (1e-4, 5e-4, 1e-3, 2e-3),
    "seeds": (0,),
    # name: a labeled data set of experiments/common/data.py; data_dir: its directory.
    "dataset": settings.dataset("cifar10"),
    # Number of training and test images, from the first on; 0 uses all.
    "num_train": 0,
    "num_test": 0,
    # Smaller images are enlarged by an integer factor and padded.
    "image_size": 32,
    # type: VGG or DeepLinear. Other fields are those of the module in
    # experiments.networks, except batch_norm.
    "model": settings.Open(type="VGG"),
    # Pattern of the parameter paths whose gradients are compared between steps.
    # For a network of your own the default is none.
    "last_layer": settings.Optional(str, "^fc3/kernel$"),
    # Any optimizer of optax, with one of the learning rates above.
    "optimizer": {"name": "adam", "options": settings.Open()},
    # 0 measures the networks without training them.
    "num_epochs": 20,
    "batch_size": 128,
    "checkpoint_every": 780,
    # Steps between probes along the gradient. A probe uses the batch of the next step.
    "probe_every": 39,
    # eta: multiples of the gradient (not of the learning rate). The largest is the one
    # of Santurkar et al.; beyond it the network without normalization breaks
    # down.
    "step_sizes": tuple(0.4 / 2**k for k in reversed(range(8))),
    # Statistics of batch normalization in a probe: batch (those of the batch, as in
    # training), frozen (the running ones) or recalibrated (those of the images of
    # `sharpness`, computed at each point).
    "bn_mode": "batch",
    # Largest eigenvalues of the Hessian on the first num_images training images, every
    # `every` steps (0: never), with num_steps Lanczos steps.
    "sharpness": {
        "every": 390,
        "num_images": 512,
        "num_eigenvalues": 2,
        "num_steps": 15,
        # Whether to measure those of the preconditioned Hessian too; for adam, adamw,
        # nadam and nadamw.
        "preconditioned": False,
    },
    # Density of all eigenvalues after the training, on the images of `sharpness`:
    # random vectors (0: none), and Lanczos steps of each.
    "spectrum": {"num_samples": 0, "num_steps": 40},
    # Losses on a square around the trained network of the first seed at this learning
    # rate: (size, size) points from -span to span, on the first num_images training
    # images. Batch normalization uses the statistics of each chunk. A size of 0 skips
    # the surface.
    "surface": {
        "learning_rate": 1e-3,
        "size": 51,
        "span": 1.0,
        "num_images": 10_000,
        "chunk_size": 500,
    },
}

_SMALL_VGG = {"type": "VGG", "stages": ((8,), (16,), (16, 16)), "hidden": (32, 32)}
_DIGITS = {
    "dataset.name": "digits",
    "num_epochs": 15,
    "batch_size": 64,
    "checkpoint_every": 110,
    "probe_every": 11,
    "sharpness.every": 110,
    "sharpness.num_images": 256,
    "surface.size": 25,
    "surface.num_images": 500,
    "surface.chunk_size": 250,
}
_QUARTER_VGG = {
    "seeds": (0, 1),
    "model": {
        "type": "VGG",
        "stages": ((16,), (32,), (64, 64), (128, 128), (128, 128)),
        "hidden": (128, 128),
    },
    "checkpoint_every": 390,
    "sharpness.num_images": 256,
    "surface.size": 25,
    "surface.num_images": 1000,
}
_SMOKE = {
    "learning_rates": (1e-3, 2e-3),
    "num_train": 128,
    "num_test": 100,
    "batch_size": 32,
    "num_epochs": 2,
    "checkpoint_every": 4,
    "probe_every": 2,
    "step_sizes": (0.1, 0.4),
    "sharpness.every": 4,
    "sharpness.num_images": 32,
    "sharpness.num_steps": 3,
    "surface.size": 3,
    "surface.num_images": 64,
    "surface.chunk_size": 32,
}
_OWN = _DIGITS | {
    "image_size": 8,
    "network": "experiments/networks/examples.py:make_residual,make_vit",
    "learning_rates": (1e-3, 4e-3),
    "sharpness.every": 22,
    "sharpness.preconditioned": True,
    "spectrum.num_samples": 4,
}
VARIANTS = {
    "digits": _DIGITS | {"image_size": 16, "model": _SMALL_VGG},
    "smoke": _DIGITS | {"image_size": 16, "model": _SMALL_VGG} | _SMOKE,
    "deep_linear": _DIGITS
    | {
        "image_size": 8,
        "model": {"type": "DeepLinear", "depth": 25, "width": 64},
        "last_layer": "^fc25/kernel$",
    },
    "cifar10_cpu": _QUARTER_VGG | {"num_epochs": 3},
    "cifar10_subset": _QUARTER_VGG
    | {
        "num_train": 5000,
        "num_test": 2000,
        "num_epochs": 30,
        "probe_every": 195,
        "surface.size": 0,
    },
    "cifar10": {},
    "own": _OWN,
    "smoke_own": _OWN | _SMOKE | {"spectrum.num_samples": 1, "spectrum.num_steps": 4},
    "story": {
        "batch_size": 128,
        "dataset.name": "functaset",
        "image_size": 0,
        "learning_rates": (1e-3,),
        "network": "experiments/networks/examples.py:make_trained_vit",
        "num_epochs": 0,
        "sharpness.every": 1,
        "sharpness.num_images": 512,
        "sharpness.num_steps": 20,
        "spectrum.num_samples": 2,
        "surface.chunk_size": 256,
        "surface.num_images": 512,
        "surface.size": 11,
    },
}

RULES = {
    "networks": settings.distinct(settings.one_of("bn", "plain")),
    "learning_rates": settings.distinct(settings.above(0)),
    "step_sizes": settings.each(settings.above(0)),
    "num_epochs": settings.whole(0),
    "probe_every": settings.whole(1),
    "image_size": settings.whole(0, 2**16),
    "bn_mode": settings.one_of("batch", "frozen", "recalibrated"),
    "sharpness.every": settings.whole(0),
    "sharpness.num_images": settings.whole(1),
    "sharpness.num_eigenvalues": settings.whole(1),
    "sharpness.num_steps": settings.whole(1),
    "spectrum.num_samples": settings.whole(0),
    "spectrum.num_steps": settings.whole(1),
    "surface.size": settings.Rule(
        "0, or from 2 to 65536",
        lambda v: v == 0 or settings.whole(2, 2**16).holds(v),
    ),
    "surface.span": settings.above(0),
    "surface.num_images": settings.whole(1),
    "surface.chunk_size": settings.whole(1),
}

get_config = functools.partial(settings.build, "probe_landscape", BASE, VARIANTS)
