"""Classifies the latents of a functaset.

    python -m experiments.classify_functa \\
        --config=experiments/configs/classify_functa.py:VARIANT \\
        --config.functaset=runs/meta_learn/digits/functaset.npz

Times do not include the making of the functaset.

Variants:
  digits: a regularized MLP on the latents of meta_learn's digits variant; 99 % in 15
    seconds on two cores (results/classify_functa_digits).
  smoke: the digits variant for 4 epochs, to check that the command runs.
  best: a wide, strongly regularized MLP on the latents of meta_learn's cifar10_cpu
    variant; 60 % in 5 minutes on two cores (results/classify_functa_best).
  report_mlp1: the first MLP of the report (256 and 128 units) on the raw latents of
    CIFAR-10, 600 epochs of Adam, accuracy every 100 epochs; 52 % in 4 minutes on two
    cores (results/classify_functa_report_mlp1).
  report_mlp2: the second MLP of the report (256, 128 and 64 units), otherwise as
    report_mlp1; 53 % in 5 minutes on two cores (results/classify_functa_report_mlp2).
  report_mlp1_decay: report_mlp1 with weight decay 1e-4 in the gradient, 500 epochs;
    54 % in 4 minutes on two cores (results/classify_functa_report_mlp1_decay).

The MLPs of the report end in logits. With --config.double_softmax they end in a softmax
before the softmax of the loss, as in the report's code.
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
    # Fields of functa.classifier.MLP.
    "model": {"hidden_sizes": (512, 512), "activation": "relu"},
    "double_softmax": False,
    # All combinations of these values are trained at once. The validation accuracy
    # selects one of them, and its epoch.
    "candidates": {
        "learning_rate": (1e-3,),
        "weight_decay": (0.01,),
        "dropout_rate": (0.3,),
        # Standard deviation of Gaussian noise on the latents. With `normalize` its unit
        # is the standard deviation of each entry.
        "noise_std": (0.3,),
        # Largest weight of the other example in functa.classifier.mixup.
        "mixup": (0.0,),
        "label_smoothing": (0.1,),
        # Decay of the moving average of the weights. The average is evaluated; 0: none.
        "ema_decay": (0.99,),
    },
    # decoupled: AdamW, on the kernels only. l2: weight_decay * params is added to the
    # gradient of all parameters, as in PyTorch's Adam.
    "weight_decay_type": "decoupled",
    "schedule": "cosine",
    # Share of the training images that is held out for validation. With 0 all images
    # are used for training, and the last epoch is kept.
    "validation_fraction": 0.1,
    # Whether to log the test accuracy during training. It is always measured at the
    # end.
    "log_test": False,
    "num_epochs": 150,
    "batch_size": 64,
    "log_every": 5,
    "checkpoint_every": 50,
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
    "report_mlp1": {
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
    },
    "report_mlp2": {
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
        "model.hidden_sizes": (256, 128, 64),
        "normalize": False,
        "num_epochs": 600,
        "schedule": "constant",
        "validation_fraction": 0.0,
        "weight_decay_type": "l2",
    },
    "report_mlp1_decay": {
        "batch_size": 128,
        "candidates.dropout_rate": (0.0,),
        "candidates.ema_decay": (0.0,),
        "candidates.label_smoothing": (0.0,),
        "candidates.noise_std": (0.0,),
        "candidates.weight_decay": (0.0001,),
        "checkpoint_every": 100,
        "functaset": "runs/meta_learn/cifar10_cpu/functaset.npz",
        "log_every": 100,
        "log_test": True,
        "model.hidden_sizes": (256, 128),
        "normalize": False,
        "num_epochs": 500,
        "schedule": "constant",
        "validation_fraction": 0.0,
        "weight_decay_type": "l2",
    },
}
RULES = {
    "seeds": settings.SEEDS,
    "num_epochs": settings.at_least(1),
    "batch_size": settings.at_least(1),
    "log_every": settings.at_least(1),
    "checkpoint_every": settings.at_least(1),
    "schedule": settings.one_of("constant", "cosine"),
    "weight_decay_type": settings.one_of("decoupled", "l2"),
    "validation_fraction": settings.within("[0, 1)"),
    "candidates.learning_rate": settings.each(settings.at_least(0)),
    "candidates.weight_decay": settings.each(settings.at_least(0)),
    "candidates.noise_std": settings.each(settings.at_least(0)),
    "candidates.mixup": settings.each(settings.at_least(0)),
    "candidates.dropout_rate": settings.each(settings.within("[0, 1)")),
    "candidates.label_smoothing": settings.each(settings.within("[0, 1)")),
    "candidates.ema_decay": settings.each(settings.within("[0, 1)")),
}

get_config = functools.partial(settings.build, "classify_functa", BASE, VARIANTS)
