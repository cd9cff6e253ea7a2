"""Classifies the latents of a functaset.

    python -m experiments.classify_functa \\
        --config=experiments/configs/classify_functa.py:VARIANT \\
        --config.functaset=runs/meta_learn/digits/functaset.npz

Times do not include the making of the functaset.

Variants:
  digits: a regularized MLP on the latents of meta_learn's digits variant; 99 % in 17
    seconds a seed on two cores (results/classify_functa_digits).
  smoke: the digits variant for 4 epochs, to check that the command runs.
  best: a wide, strongly regularized MLP on the latents of meta_learn's cifar10_cpu
    variant; 59 % in 14 minutes on two cores (results/classify_functa_best).
  report_mlp1: the first MLP of the student report (256 and 128 units) on the raw
    latents of CIFAR-10, 600 epochs of Adam, accuracy every 100 epochs; 52 % in 4
    minutes on two cores (results/classify_functa_report_mlp1).
  report_mlp2: its second MLP (256, 128 and 64 units), otherwise as report_mlp1; 53 % in
    5 minutes on two cores (results/classify_functa_report_mlp2).
  report_mlp1_decay: report_mlp1 with weight decay 1e-4 in the gradient, 500 epochs;
    54 % in 4 minutes on two cores (results/classify_functa_report_mlp1_decay).

  digits_spatial: the MLP of digits on the grids of latents of meta_learn's
    digits_spatial variant, as one vector (results/classify_functa_digits_spatial).
  digits_spatial_vit: a Vision Transformer of 4 layers on the same grids
    (results/classify_functa_digits_spatial_vit).
  fashion_mnist: the same Vision Transformer on the grids of meta_learn's fashion_mnist
    variant; 88 % in 15 minutes on two cores (results/classify_functa_fashion_mnist).
  speech: the same Vision Transformer on the 40 cells of each second of speech of
    meta_learn's speech variant. The classes are five languages with one speaker each.
    results/ has no run of it.
  furniture: the same on the 4x4x4 cells of meta_learn's furniture variant; results/ has
    no run of it.
  smoke_spatial: the digits_spatial_vit variant for 2 epochs, to check that it runs.
  cifar10_spatial_cpu: a ConvNeXt of 6 blocks on the grids of latents of
    make_functaset's cifar10_spatial_cpu variant; 84.5 % in 20 minutes on two cores
    (results/classify_functa_cifar10_spatial_cpu).
  cifar10_spatial_cpu_vit: a Vision Transformer of 6 layers on the same grids; about as
    long.
  cifar10_spatial_cpu_mlp: an MLP on the same grids, as one vector.
  cifar10_spatial: a larger ConvNeXt, of 8 blocks, on the grids of make_functaset's
    cifar10_spatial variant. It needs a GPU.

The controls of a grid of latents use the same head on the same images:

    --config.features=patches      all pixels of each cell
    --config.features=patch_pca    as many principal components as channels
    --config.functaset=PATH        latents after one inner step, for example a functaset
                                   of make_functaset with --config.inner.num_steps=1

These MLPs end in logits. With --config.double_softmax they end in a softmax
before the softmax of the loss, as in the code of the student report.
"""

import functools

from experiments.common import settings

BASE = {
    "seeds": (0,),
    "tensorboard": False,
    # The functaset to classify; {seed} in its path is replaced by the seed of the run.
    "functaset": "runs/meta_learn/digits/functaset.npz",
    # Latents are (latent - mean) / std, with mean and std of the training split.
    "normalize": True,
    # What is classified: latents; or, as controls for grids of latents, the images of
    # the functaset, cut into the cells of the grid: patches (all pixels of a cell) or
    # patch_pca (as many principal components as a cell has channels).
    "features": "latents",
    # Directory of the images, for the controls; see experiments/common/data.py.
    "data_dir": settings.Optional(str),
    # Sides of the window of the grid that the network sees: a random one in training,
    # the central one in evaluation. () is the whole grid.
    "crop": (),
    # type: mlp, or for grids of latents vit or convnext (experiments/networks/heads.py).
    # The other entries are the fields of the network.
    "model": settings.Open(type="mlp", hidden_sizes=(512, 512), activation="relu"),
    "double_softmax": False,
    # All combinations of these values are trained at once. The validation accuracy
    # selects one of them, and its epoch.
    "candidates": {
        "learning_rate": (1e-3,),
        "weight_decay": (0.01,),
        "dropout_rate": (0.3,),
        # Standard deviation of Gaussian noise on the latents. With `normalize` its unit
        # is the standard deviation of each entry or, in grids, of each channel.
        "noise_std": (0.3,),
        # Largest weight of the other example in functa.classifier.mixup. At 0.5 all
        # weights in [0, 1] are equally likely.
        "mixup": (0.0,),
        "label_smoothing": (0.1,),
        # Decay of the moving average of the weights. The average is evaluated; 0: none.
        "ema_decay": (0.99,),
    },
    # decoupled: AdamW, on the kernels only. l2: weight_decay * params is added to the
    # gradient of all parameters, as in PyTorch's Adam.
    "weight_decay_type": "decoupled",
    # Share of the batches that are mixed by CutMix on the grid instead of mixup.
    "cutmix": 0.0,
    # adam, or muon for the matrices of the blocks and adam for all other parameters.
    "optimizer": "adam",
    # Largest norm of the gradient; 0: no limit.
    "clip_norm": 0.0,
    # Epochs during which the learning rate rises linearly.
    "warmup_epochs": 0.0,
    "schedule": "cosine",
    # Changes during the training, as in train_vit: ((start as a share of the epochs,
    # {field: value}), ...). Fields are cutmix, model.token_drop, model.dropout_rate and
    # model.drop_path_rate.
    "stages": (),
    # Share of the training images that is held out for validation. With 0 all images
    # are used for training, and the last epoch is kept.
    "validation_fraction": 0.1,
    # Whether to log the test accuracy during training. It is always measured at the
    # end.
    "log_test": False,
    # Number of training images whose accuracy is logged; 0: all.
    "num_measured": 0,
    # An epoch takes each image once, in one of its copies.
    "num_epochs": 150,
    "batch_size": 64,
    # The gradient is the mean over groups of this many images, which are mixed among
    # themselves; 0 makes the whole batch one group. On a CPU a group should fit the
    # cache.
    "images_per_group": 0,
    "log_every": 5,
    "checkpoint_every": 50,
}
_DIGITS_VIT = {
    "batch_size": 128,
    "candidates.dropout_rate": (0.0,),
    "candidates.learning_rate": (2e-3,),
    "candidates.mixup": (0.2,),
    "candidates.noise_std": (0.1,),
    "candidates.weight_decay": (0.05,),
    "functaset": "runs/meta_learn/digits_spatial/functaset.npz",
    "model": {
        "type": "vit",
        "hidden_size": 64,
        "num_layers": 4,
        "num_heads": 4,
        "mlp_dim": 128,
        "dropout_rate": 0.0,
        "drop_path_rate": 0.0,
        "token_drop": 0.1,
    },
    "num_epochs": 60,
    "warmup_epochs": 2.0,
}
_CIFAR10_SPATIAL = {
    "batch_size": 128,
    "candidates.dropout_rate": (0.0,),
    "candidates.ema_decay": (0.998,),
    "candidates.noise_std": (0.1,),
    "checkpoint_every": 1,
    "clip_norm": 1.0,
    # The encoded images are padded by one cell on each side.
    "crop": (8, 8),
    "functaset": "runs/make_functaset/cifar10_spatial_cpu/functaset.npz",
    "log_every": 1,
    "num_epochs": 30,
    "num_measured": 5000,
    "warmup_epochs": 1.0,
}
_REPORT = {
    "batch_size": 128,
    "candidates.dropout_rate": (0.0,),
    "candidates.ema_decay": (0.0,),
    "candidates.label_smoothing": (0.0,),
    "candidates.noise_std": (0.0,),
    "candidates.weight_decay": (0.0,),
    "checkpoint_every": 100,
    "functaset": "runs/meta_learn/cifar10_cpu/functaset.npz",
    "log_every": 100,
    "log_test": True,
    "model.hidden_sizes": (256, 128),
    "normalize": False,
    "num_epochs": 600,
    "schedule": "constant",
    "validation_fraction": 0.0,
    "weight_decay_type": "l2",
}
# The heads that read the grid.
_CIFAR10_GRID = _CIFAR10_SPATIAL | {
    "candidates.learning_rate": (4e-3,),
    "candidates.weight_decay": (0.05,),
    "candidates.mixup": (0.2,),
    "cutmix": 0.5,
    "optimizer": "muon",
}
VARIANTS = {
    "digits": {},
    "smoke": {
        "candidates.dropout_rate": (0.0, 0.3),
        "checkpoint_every": 2,
        "functaset": "runs/meta_learn/smoke/functaset.npz",
        "log_every": 1,
        "model.hidden_sizes": (32,),
        "num_epochs": 4,
    },
    "best": {
        "batch_size": 256,
        "candidates.dropout_rate": (0.2, 0.4),
        "candidates.ema_decay": (0.998,),
        "candidates.noise_std": (0.3, 0.6),
        "checkpoint_every": 4,
        "functaset": "runs/meta_learn/cifar10_cpu/functaset.npz",
        "log_every": 2,
        "num_epochs": 40,
    },
    "report_mlp1": _REPORT,
    "report_mlp2": _REPORT | {"model.hidden_sizes": (256, 128, 64)},
    "report_mlp1_decay": _REPORT
    | {"candidates.weight_decay": (0.0001,), "num_epochs": 500},
    # The noise was chosen by cross-validation on the training images.
    "digits_spatial": {
        "candidates.noise_std": (0.7,),
        "functaset": "runs/meta_learn/digits_spatial/functaset.npz",
    },
    "digits_spatial_vit": _DIGITS_VIT,
    "speech": _DIGITS_VIT
    | {"functaset": "runs/meta_learn/speech/functaset.npz", "num_epochs": 30},
    "furniture": _DIGITS_VIT | {"functaset": "runs/meta_learn/furniture/functaset.npz"},
    "fashion_mnist": _DIGITS_VIT
    | {
        "candidates.ema_decay": (0.998,),
        "checkpoint_every": 1,
        "functaset": "runs/meta_learn/fashion_mnist/functaset.npz",
        "log_every": 1,
        "num_epochs": 8,
        "num_measured": 5000,
        "warmup_epochs": 1.0,
    },
    "smoke_spatial": _DIGITS_VIT
    | {
        "checkpoint_every": 1,
        "functaset": "runs/meta_learn/smoke_spatial/functaset.npz",
        "log_every": 1,
        "model.hidden_size": 16,
        "model.mlp_dim": 32,
        "model.num_layers": 2,
        "num_epochs": 2,
        "warmup_epochs": 1.0,
    },
    "cifar10_spatial_cpu_vit": _CIFAR10_GRID
    | {
        "model": {
            "type": "vit",
            "hidden_size": 128,
            "num_layers": 6,
            "num_heads": 4,
            "mlp_dim": 256,
            "dropout_rate": 0.0,
            "drop_path_rate": 0.0,
            "token_drop": 0.5,
        },
        # Half of the cells cost half the time. The last epochs see all of them.
        "stages": ((0.85, {"model.token_drop": 0.0, "cutmix": 0.0}),),
    },
    # So few epochs need a shorter average of the weights, and CutMix without mixup.
    "cifar10_spatial_cpu": _CIFAR10_GRID
    | {
        "batch_size": 256,
        "candidates.ema_decay": (0.99,),
        "candidates.mixup": (0.0,),
        "images_per_group": 32,
        "model": {
            "type": "convnext",
            "widths": (96, 192),
            "depths": (3, 3),
            "drop_path_rate": 0.0,
            "layer_scale": 0.1,
            "token_drop": 0.0,
            "activation": "relu",
            "product_dtype": "bfloat16",
        },
        "num_epochs": 24,
    },
    "cifar10_spatial": _CIFAR10_GRID
    | {
        "batch_size": 512,
        "checkpoint_every": 20,
        "functaset": "runs/make_functaset/cifar10_spatial/functaset.npz",
        "log_every": 5,
        "model": {
            "type": "convnext",
            "widths": (192, 384),
            "depths": (4, 4),
            "drop_path_rate": 0.2,
            "layer_scale": 1e-6,
            "token_drop": 0.1,
            "activation": "gelu",
        },
        "num_epochs": 80,
        "warmup_epochs": 2.0,
    },
    "cifar10_spatial_cpu_mlp": _CIFAR10_SPATIAL
    | {
        "batch_size": 256,
        "candidates.dropout_rate": (0.2, 0.4),
        "candidates.noise_std": (0.3, 0.6),
        "clip_norm": 0.0,
        "num_epochs": 40,
        "num_measured": 0,
        "warmup_epochs": 0.0,
    },
}
RULES = {
    "num_epochs": settings.whole(1),
    "images_per_group": settings.whole(0),
    "model.type": settings.one_of("mlp", "vit", "convnext"),
    "features": settings.one_of("latents", "patches", "patch_pca"),
    "crop": settings.each(settings.whole(1), empty=True),
    "cutmix": settings.within("[0, 1]"),
    "optimizer": settings.one_of("adam", "muon"),
    "clip_norm": settings.at_least(0),
    "warmup_epochs": settings.at_least(0),
    "num_measured": settings.whole(0),
    "schedule": settings.one_of("constant", "cosine"),
    "weight_decay_type": settings.one_of("decoupled", "l2"),
    "validation_fraction": settings.within("[0, 1)"),
    "candidates.learning_rate": settings.each(settings.at_least(0)),
    "candidates.weight_decay": settings.each(settings.at_least(0)),
    "candidates.noise_std": settings.each(settings.at_least(0)),
    "candidates.mixup": settings.each(settings.within("[0, 1]")),
    "candidates.dropout_rate": settings.each(settings.within("[0, 1)")),
    "candidates.label_smoothing": settings.each(settings.within("[0, 1)")),
    "candidates.ema_decay": settings.each(settings.within("[0, 1)")),
}

get_config = functools.partial(settings.build, "classify_functa", BASE, VARIANTS)
