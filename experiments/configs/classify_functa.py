"""Classifies the latents of a functaset.

    python -m experiments.classify_functa \\
        --config=experiments/configs/classify_functa.py:VARIANT \\
        --config.functaset=runs/meta_learn/digits/functaset.npz

Variants:
  digits: a regularised MLP on the latents of meta_learn's digits; seconds.
  smoke: the same for 4 epochs, to see that everything runs.
  best: a wide, strongly regularised MLP for the latents of CIFAR-10.
  report_mlp1, report_mlp2: the two MLPs of the report, 600 epochs of Adam on raw
    latents, accuracy every 100 epochs. They end in logits; with
    --config.double_softmax in a softmax under the softmax of the loss, as the
    report's code does.
  report_mlp1_decay: the first with weight decay 1e-4 in the gradient, 500 epochs.
"""

import functools

from experiments.common import settings

BASE = {
    "seeds": (0,),
    "tensorboard": False,
    # The file to classify; {seed} in its path is replaced by the seed of the run.
    "functaset": "runs/meta_learn/digits/functaset.npz",
    # (latent - mean) / std of the training split.
    "normalize": True,
    # Further fields of functa.classifier.MLP.
    "model": {"hidden_sizes": (512, 512), "activation": "relu"},
    "double_softmax": False,
    # All combinations of these values are trained side by side; the validation part
    # chooses one of them, and its epoch.
    "candidates": {
        "learning_rate": (1e-3,),
        "weight_decay": (0.01,),
        "dropout_rate": (0.3,),
        # Of Gaussian noise on the latents, in standard deviations of each entry
        # if they are normalised.
        "noise_std": (0.3,),
        # Largest weight of the other example: functa.classifier.mixup.
        "mixup": (0.0,),
        "label_smoothing": (0.1,),
        # Moving average of the weights, which is what is evaluated; 0 is none.
        "ema_decay": (0.99,),
    },
    # decoupled: AdamW, on the kernels. l2: added to the gradient of everything, as
    # PyTorch's Adam does.
    "weight_decay_type": "decoupled",
    "schedule": "cosine",
    # Share of the images of the training split that is kept from training. 0 trains
    # on all and takes the last epoch.
    "validation_fraction": 0.1,
    # Also logs the accuracy on the test split, which else is looked at once, at the
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
