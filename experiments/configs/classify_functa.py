"""Classifies the latents of a functaset.

    python -m experiments.classify_functa \
        --config=experiments/configs/classify_functa.py:VARIANT \
        --config.functaset=runs/meta_learn/digits/functaset.npz

The table of variants, results and times is in the README.
"""

from ml_collections import ConfigDict, config_dict

VARIANTS = (
    *("digits", "smoke", "best"),
    *("report_mlp1", "report_mlp2", "report_mlp1_decay"),
)


def get_config(variant: str = "digits") -> ConfigDict:
    """Settings of one variant.

    Args:
      variant:
        digits: a regularised MLP on the latents of meta_learn's digits; seconds.
        smoke: the same for 4 epochs, to see that everything runs.
        best: a wide, strongly regularised MLP for the latents of CIFAR-10.
        report_mlp1, report_mlp2: the two MLPs of the report, 600 epochs of Adam on raw
          latents, accuracy every 100 epochs. They end in logits; with
          --config.double_softmax in a softmax under the softmax of the loss, as the
          report's code does.
        report_mlp1_decay: the first with weight decay 1e-4 in the gradient, 500 epochs.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is none of {', '.join(VARIANTS)}.")
    config = ConfigDict()
    config.experiment = "classify_functa"
    config.variant = variant
    config.seed = 0
    config.tensorboard = False

    config.functaset = "runs/meta_learn/digits/functaset.npz"
    # Hash of the weights behind the latents; taken from the file. A run can then not
    # be resumed with other latents.
    config.params_sha256 = config_dict.placeholder(str)
    # (latent - mean) / std of the training split.
    config.normalize = True

    # Further fields of functa.classifier.MLP.
    config.model = ConfigDict({"hidden_sizes": (512, 512), "activation": "relu"})
    config.double_softmax = False

    # All combinations of these values are trained side by side; the validation part
    # chooses one of them, and its epoch.
    config.candidates = ConfigDict(
        {
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
        }
    )
    # decoupled: AdamW, on the kernels. l2: added to the gradient of everything, as
    # PyTorch's Adam does.
    config.weight_decay_type = "decoupled"
    config.schedule = "cosine"
    # Share of the images of the training split that is kept from training. 0 trains
    # on all and takes the last epoch.
    config.validation_fraction = 0.1
    # Also logs the accuracy on the test split, which else is looked at once, at the
    # end.
    config.log_test = False
    config.num_epochs = 150
    config.batch_size = 64
    config.log_every = 5
    config.checkpoint_every = 50

    if variant == "smoke":
        config.functaset = "runs/meta_learn/smoke/functaset.npz"
        config.model.hidden_sizes = (32,)
        config.candidates.dropout_rate = (0.0, 0.3)
        config.num_epochs = 4
        config.log_every = 1
        config.checkpoint_every = 2
    elif variant == "best":
        config.functaset = "runs/meta_learn/cifar10_cpu/functaset.npz"
        config.candidates.dropout_rate = (0.2, 0.4)
        config.candidates.noise_std = (0.3, 0.6)
        config.candidates.ema_decay = (0.998,)
        config.num_epochs = 40
        config.batch_size = 256
        config.log_every = 2
        config.checkpoint_every = 4
    elif variant.startswith("report"):
        config.functaset = "runs/meta_learn/cifar10_cpu/functaset.npz"
        sizes = (256, 128, 64) if variant == "report_mlp2" else (256, 128)
        config.model.hidden_sizes = sizes
        config.normalize = False
        decay = 1e-4 if variant == "report_mlp1_decay" else 0.0
        config.candidates.update({name: (0.0,) for name in config.candidates})
        config.candidates.update({"learning_rate": (1e-3,), "weight_decay": (decay,)})
        config.weight_decay_type = "l2"
        config.schedule = "constant"
        config.validation_fraction = 0.0
        config.log_test = True
        config.num_epochs = 500 if variant == "report_mlp1_decay" else 600
        config.batch_size = 128
        config.log_every = 100
        config.checkpoint_every = 100
    return config
