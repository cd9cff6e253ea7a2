"""The tables of docs/results.md, docs/report.md, docs/benchmarks.md and the README.

A row is (quantity, published number or "", folder or group, key, format); see
`experiments.results` for the last three. Only published numbers are typed here. Their
source, unless a caption names another, is the student report "NN Final Project Report"
(W. Wang and S. Wang), whose experiments the commands redo.
"""

# Variants that nobody has run yet, by the name their folder will have.
PLANNED = {
    "meta_learn_cifar10": "`meta_learn`, `cifar10` (GPU)",
    "train_vit_cifar10": "`train_vit`, `cifar10` (GPU)",
    "prune_vit_cifar10": "`prune_vit`, `cifar10` (GPU)",
    "train_vit_finetune_b16": "`train_vit`, `finetune_b16` (GPU)",
    "prune_vit_b16": "`prune_vit`, `b16` (GPU)",
    "train_lbi_cifar10_report": "`train_lbi`, `cifar10_report` (GPU)",
    "train_lbi_cifar10": "`train_lbi`, `cifar10` (GPU)",
    "prune_lbi_cifar10_report": "`prune_lbi`, `cifar10_report` (GPU)",
    "prune_lbi_cifar10": "`prune_lbi`, `cifar10` (GPU)",
    "probe_landscape_cifar10": "`probe_landscape`, `cifar10` (GPU)",
}

_RATES = ("0.0001", "0.0005", "0.001", "0.002")
_SHARES = (20, 40, 60, 80)
_LBI = (("Adam", "adam"), ("DessiLBI", "dessilbi"), ("DessiLBI+Adam", "dessilbi_adam"))


def _series(label, points, published, folder, key, form, first=0):
    """One row a point; `key` is a list in the summary, read from index `first`."""
    published = published or [""] * len(points)
    return [
        (label.format(point), text, folder, f"{key}.{index}", form)
        for index, (point, text) in enumerate(
            zip(points, published, strict=True), first
        )
    ]


def _epochs(folder, published, split="test"):
    points = [100 * (i + 1) for i in range(len(published))]
    return _series(
        f"{split} accuracy at epoch {{}} (%)",
        points,
        published,
        folder,
        f"{split}_accuracy_per_epoch",
        "%.2f",
    )


_FIT_STEPS = _series(
    "PSNR after {} steps (dB)",
    (100, 200, 400, 800, 2000),
    ("15.68", "22.02", "29.06", "37.99", "55.47"),
    "fit_image_report",
    "32x32_psnr",
    ".2f",
)
_FIT_WORST = _series(
    "PSNR of the worst image after {} steps (dB)",
    (100, 200, 400, 800, 2000),
    None,
    "fit_image_report",
    "32x32_psnr_min",
    ".2f",
)
_FIT_SIZES = [
    (
        f"PSNR at {n}x{n}, {steps} steps (dB)",
        text,
        "fit_image_report",
        f"{n}x{n}_psnr.{index}",
        ".2f",
    )
    for steps, index, texts in (
        (800, 3, ("37.99", "38.46", "34.38", "36.45")),
        (2000, 4, ("55.47", "50.12", "44.34", "42.96")),
    )
    for n, text in zip((32, 64, 96, 128), texts, strict=True)
]
_FUNCTA = [
    (
        "PSNR after 3 latent steps, 10,000 test images (dB)",
        "",
        "meta_learn_cifar10_cpu",
        "test_psnr",
        ".2f",
    ),
    (
        "PSNR after 3 latent steps, first 64 test images (dB)",
        "",
        "meta_learn_cifar10_cpu",
        "further_psnr_start",
        ".2f",
    ),
    (
        "PSNR after 200 latent steps, first 64 test images (dB)",
        "about 27 (latent 512, 5,000 steps)",
        "meta_learn_cifar10_cpu",
        "further_psnr",
        ".2f",
    ),
]
_MLP1 = ("41.09", "42.30", "44.13", "43.77", "43.46", "43.76")
_MLP2 = ("42.20", "42.19", "43.54", "43.24", "43.13", "43.07")
_DECAY = ("41.56", "42.87", "42.51", "42.73", "43.21")
_MLP1_TRAIN = ("48.70", "57.30", "61.71", "64.85", "66.36", "68.28")
_MLP2_TRAIN = ("49.94", "56.00", "59.85", "62.97", "65.03", "66.28")
_DECAY_TRAIN = ("45.79", "50.17", "53.31", "53.69", "55.29")


def _pruned(folder, key, label, published):
    return [
        (f"{label}, ratio {r} (%)", text, folder, f"rows.{name}.{key}", "%.2f")
        for r, name, text in zip(
            ("0", "0.2", "0.3", "0.4"),
            ("dense_0", "max_0.2", "max_0.3", "max_0.4"),
            published,
            strict=True,
        )
    ]


_TABLE6 = ("98.1", "97.8", "97.4", "96.2")
_TABLE7 = ("98.1", "98.2", "98.0", "97.8")


def _optimizers(folder, published):
    return [
        (f"{label}: test accuracy (%)", text, folder, f"{key}_test_accuracy", "%.2f")
        for (label, key), text in zip(_LBI, published, strict=True)
    ]


def _removed(folder, published, rule, label):
    return _series(
        f"{{}} % of conv3's filters removed, {label}: test accuracy (%)",
        _SHARES,
        published,
        folder,
        f"one_layer.{rule}",
        "%.2f",
        first=1,
    )


def _layers(folder, layers, published, rule, label):
    published = published or [""] * len(layers)
    return [
        (
            f"80 % of {name} removed, {label}: test accuracy (%)",
            text,
            folder,
            f"each_layer.{name}.{rule}",
            "%.2f",
        )
        for name, text in zip(layers, published, strict=True)
    ]


_MNIST_OPTIMIZERS = ("98.77", "99.02", "98.92")
_VGG_OPTIMIZERS = ("80.30", "80.57", "80.66")
_MNIST_CONV3 = ("98.68", "98.53", "97.72", "93.42")
_VGG_CONV3 = ("67.52", "34.54", "14.67", "10.36")
_LENET = ("conv1", "conv2", "conv3", "fc1", "fc2")
_MNIST_LAYERS = ("89.42", "85.59", "93.42", "98.67", "98.05")
_CONVS = tuple(f"conv{i}" for i in range(1, 9))
_VGG_CONVS = ("10.05", "11.52", "10.36", "58.49", "72.38", "", "", "")
_VGG_DENSE = ("72.84", "80.34", "80.32")
_AUTHORS = "authors' rule"


def _compressed(folder):
    return [
        ("parameters removed (%)", "", folder, "compressed.removed_params", "%.1f"),
        (
            "multiply-adds, compressed over dense (%)",
            "",
            folder,
            "compressed.compressed_multiply_adds:compressed.dense_multiply_adds",
            "%.1f",
        ),
        (
            "compressed network: test accuracy (%)",
            "",
            folder,
            "compressed.accuracy",
            "%.2f",
        ),
        (
            "128 images forward, dense (ms)",
            "",
            folder,
            "compressed.dense_milliseconds",
            ".1f",
        ),
        (
            "128 images forward, compressed (ms)",
            "",
            folder,
            "compressed.compressed_milliseconds",
            ".1f",
        ),
    ]


def _probes(folder, quantity, label, form=".4g", published=""):
    return [
        (
            f"{label}, learning rate {rate}, {name} batch normalization",
            published,
            folder,
            f"{network}.rate{rate}.{quantity}",
            form,
        )
        for network, name in (("plain", "without"), ("bn", "with"))
        for rate in _RATES
    ]


def _bands(folder, at_the_end=False):
    end = "_at_the_end" if at_the_end else ""
    when = " in the last epoch" if at_the_end else ""
    rows = [
        (
            f"width of the band{when}, {name} batch normalization (nats)",
            "",
            folder,
            f"{network}.envelope_width{end}",
            ".3f",
        )
        for network, name in (("plain", "without"), ("bn", "with"))
    ]
    ratio = (
        f"ratio of the two widths{when}",
        "",
        folder,
        f"envelope_width_ratio{end}",
        ".2f",
    )
    return [*rows, ratio]


_PREDICTIVENESS = "largest distance of gradients along the gradient"
_BETA = "effective beta"

_RESULTS = [
    (
        "Functa on the digits",
        "1,797 images of 8x8 pixels, 359 of them for testing; latent of 64 entries; "
        "3 latent steps.",
        [
            ("test PSNR (dB)", "", "meta_learn_digits", "test_psnr", ".2f"),
            (
                "test PSNR, derivative products in bfloat16 (dB)",
                "",
                "meta_learn_digits_bfloat16",
                "test_psnr",
                ".2f",
            ),
            (
                "test accuracy from the latents (%)",
                "",
                "classify_functa_digits*",
                "test_accuracy",
                "%.2f",
            ),
        ],
        (),
    ),
    (
        "Functa on CIFAR-10",
        "SIREN of width 128 and depth 5, latent of 256 entries.",
        [
            *_FUNCTA,
            (
                "PSNR after 3 latent steps, derivative products in bfloat16 (dB)",
                "",
                "meta_learn_cifar10_cpu_bfloat16",
                "test_psnr",
                ".2f",
            ),
            (
                "test accuracy from the latents (%)",
                "43.54",
                "classify_functa_best",
                "test_accuracy",
                "%.2f",
            ),
            (
                "the network of the paper: test PSNR (dB)",
                "",
                "meta_learn_cifar10",
                "test_psnr",
                ".2f",
            ),
        ],
        (
            (
                "Test images after 0, 1, 2 and 3 latent steps",
                "meta_learn_cifar10_cpu/figures/over_inner_steps.png",
            ),
        ),
    ),
    (
        "The report's classifiers",
        "Latents of `meta_learn_cifar10_cpu`; no early stopping. The rows of a variant "
        "follow one another.",
        [
            *_epochs("classify_functa_report_mlp1", _MLP1),
            *_epochs("classify_functa_report_mlp2", _MLP2),
            *_epochs("classify_functa_report_mlp1_decay", _DECAY),
        ],
        (),
    ),
    (
        "One SIREN per image, by steps",
        "32x32 pixels; mean over 8 images.",
        [
            *_FIT_STEPS,
            *_FIT_WORST,
            (
                "our recipe, PSNR after 100 steps (dB)",
                "15.68",
                "fit_image_best",
                "32x32_psnr.0",
                ".2f",
            ),
        ],
        (),
    ),
    (
        "One SIREN per image, by size",
        "The number of steps is held fixed in each half.",
        _FIT_SIZES,
        (),
    ),
    (
        "One SIREN per image, a photograph",
        "342x512 pixels, last step of the run.",
        [("PSNR (dB)", "", "fit_image_photo", "342x512_psnr.5", ".2f")],
        (),
    ),
    (
        "Vision Transformers",
        "Trained from scratch. The published number is of ViT-B/16, "
        "pre-trained on ImageNet-21k, at 224 pixels.",
        [
            (
                "digits, 4 layers of width 64: test accuracy (%)",
                "",
                "train_vit_digits",
                "test_accuracy",
                "%.2f",
            ),
            (
                "CIFAR-10, 7 layers of width 128: test accuracy (%)",
                "98.1",
                "train_vit_cifar10_cpu",
                "test_accuracy",
                "%.2f",
            ),
            (
                "CIFAR-10, 9 layers of width 192: test accuracy (%)",
                "98.1",
                "train_vit_cifar10",
                "test_accuracy",
                "%.2f",
            ),
            (
                "CIFAR-10, ViT-B/16 fine-tuned: test accuracy (%)",
                "98.1",
                "train_vit_finetune_b16",
                "test_accuracy",
                "%.2f",
            ),
        ],
        (),
    ),
    (
        "Pruned Vision Transformers",
        "Patches dropped by cumulative maxima of the "
        "attention; 10,000 test images of CIFAR-10.",
        [
            *_pruned("prune_vit_cifar10_cpu", "accuracy", "not fine-tuned", _TABLE6),
            *_pruned(
                "prune_vit_cifar10_cpu",
                "tuned_accuracy",
                "one epoch fine-tuned",
                _TABLE7,
            ),
            *[
                (
                    f"four epochs with RandAugment and distillation, {label} (%)",
                    text,
                    "prune_vit_cifar10_cpu_tuned",
                    f"rows.{row}.tuned_accuracy",
                    "%.2f",
                )
                for label, text, row in (
                    ("scores, ratio 0.4", "97.8", "max_0.4"),
                    ("random patches, ratio 0.4", "", "random_0.4"),
                    ("lower resolution, ratio 0.4", "", "resolution_0.4"),
                    ("the whole network", "", "dense_0"),
                )
            ],
            *[
                (
                    f"masked against compact, `{s}`: largest difference of logits",
                    "",
                    "prune_vit_cifar10_cpu",
                    f"parity.{s}.largest_difference_of_logits",
                    ".1g",
                )
                for s in ("drop", "skip", "zero")
            ],
            (
                "ViT-B/16, ratio 0.4 (%)",
                "96.2",
                "prune_vit_b16",
                "rows.max_0.4.accuracy",
                "%.2f",
            ),
        ],
        (
            (
                "Accuracy against multiply-adds",
                "prune_vit_cifar10_cpu/figures/accuracy_and_cost.png",
            ),
        ),
    ),
    (
        "DessiLBI: LeNet on MNIST",
        "20 epochs; our settings, then the report's.",
        [
            *_optimizers("train_lbi_mnist", _MNIST_OPTIMIZERS),
            *[
                (
                    f"{label}, on its support: test accuracy (%)",
                    "",
                    "train_lbi_mnist",
                    f"{key}_sparse_test_accuracy",
                    "%.2f",
                )
                for label, key in _LBI[1:]
            ],
            *[
                (
                    f"{label}: groups in the support (%)",
                    "",
                    "train_lbi_mnist",
                    f"{key}_density",
                    "%.1f",
                )
                for label, key in _LBI[1:]
            ],
            *_optimizers("train_lbi_mnist_report", _MNIST_OPTIMIZERS),
        ],
        (),
    ),
    (
        "DessiLBI: LeNet pruned",
        "DessiLBI's network, no training after the pruning unless "
        "a row says so; our settings, then the report's.",
        [
            row
            for name in ("prune_lbi_mnist", "prune_lbi_mnist_report")
            for row in (
                *_removed(name, _MNIST_CONV3, "official", _AUTHORS),
                *_layers(name, _LENET, _MNIST_LAYERS, "official", _AUTHORS),
                *_compressed(name),
            )
        ],
        (
            (
                "Accuracy against the share of filters removed",
                "prune_lbi_mnist/figures/accuracy_against_sparsity.png",
            ),
        ),
    ),
    (
        "DessiLBI: VGG-A with batch normalization on CIFAR-10",
        "No augmentation. `cifar10_short` has all channels and 8 epochs, and "
        "`cifar10_narrow` a "
        "quarter of the channels and 10 epochs; the report has 20 epochs.",
        [
            (
                "DessiLBI, all channels: test accuracy (%)",
                "80.57",
                "train_lbi_cifar10_short",
                "test_accuracy",
                "%.2f",
            ),
            (
                "DessiLBI, all channels, on its support: test accuracy (%)",
                "",
                "train_lbi_cifar10_short",
                "sparse_test_accuracy",
                "%.2f",
            ),
            *_optimizers("train_lbi_cifar10_narrow", _VGG_OPTIMIZERS),
            (
                "20 epochs, the report's settings: test accuracy (%)",
                "80.57",
                "train_lbi_cifar10_report",
                "",
                "",
            ),
        ],
        (),
    ),
    (
        "DessiLBI: VGG-A pruned",
        "No training after the pruning unless a row says so.",
        [
            *_removed("prune_lbi_cifar10_short", _VGG_CONV3, "official", _AUTHORS),
            *_removed(
                "prune_lbi_cifar10_short", None, "connected", "with batch normalization"
            ),
            *_removed("prune_lbi_cifar10_short", None, "recalibrated", "recalibrated"),
            *_layers(
                "prune_lbi_cifar10_short", _CONVS, _VGG_CONVS, "official", _AUTHORS
            ),
            *_layers(
                "prune_lbi_cifar10_short", _CONVS, None, "recalibrated", "recalibrated"
            ),
            *_layers(
                "prune_lbi_cifar10_short",
                ("fc1", "fc2", "fc3"),
                _VGG_DENSE,
                "official",
                _AUTHORS,
            ),
            *_compressed("prune_lbi_cifar10_short"),
            *_removed(
                "prune_lbi_cifar10_narrow",
                _VGG_CONV3,
                "recalibrated",
                "quarter network, recalibrated",
            ),
            *_compressed("prune_lbi_cifar10_narrow"),
        ],
        (
            (
                "The narrow VGG: accuracy against the share of filters removed",
                "prune_lbi_cifar10_narrow/figures/accuracy_against_sparsity.png",
            ),
        ),
    ),
    *[
        (
            f"The loss landscape: {title}",
            f"{caption} Gradients are compared along the "
            "gradient on one batch (Santurkar et al. 2018, arXiv 1805.11604). The "
            "largest "
            "over the steps, after the first epoch.",
            [
                *_probes(name, "test_accuracy", "test accuracy (%)", "%.1f"),
                *_probes(name, "gradient_predictiveness", _PREDICTIVENESS),
                *_probes(name, "effective_beta", _BETA),
                *_bands(name),
                *(_bands(name, True) if name.endswith("subset") else ()),
            ],
            (
                (
                    f"{title}: along the gradient",
                    f"{name}/figures/along_the_gradient.png",
                ),
                (f"{title}: band of losses", f"{name}/figures/loss_envelope.png"),
            ),
        )
        for name, title, caption in (
            (
                "probe_landscape_cifar10_cpu",
                "CIFAR-10",
                "A quarter of VGG-A, 3 epochs.",
            ),
            (
                "probe_landscape_cifar10_subset",
                "5,000 images of CIFAR-10",
                "A quarter of VGG-A, 30 epochs.",
            ),
            ("probe_landscape_digits", "digits", "A small VGG, 15 epochs."),
            (
                "probe_landscape_deep_linear",
                "deep linear network",
                "25 linear layers on the digits.",
            ),
        )
    ],
]

_NO_COUNTERPART = "The report's figure shows the method; there is nothing to measure."
_REPORT = [
    (
        "Table 1: PSNR at different training steps",
        "Image size 32x32. Theirs is one image, ours the mean of 8.",
        _FIT_STEPS,
        (),
    ),
    (
        "Figures 1 and 2: reconstructions at different training steps",
        "32x32.",
        (),
        (
            (
                "Reconstructions at 32x32",
                "fit_image_report/figures/reconstructions_32x32.png",
            ),
        ),
    ),
    ("Table 2: PSNR at different image sizes", "800 and 2,000 steps.", _FIT_SIZES, ()),
    (
        "Section 1.2: shared parameters",
        "The report's latent has 512 entries, ours 256.",
        _FUNCTA,
        (),
    ),
    (
        "Figures 3 to 6: reconstructions with shared parameters",
        "Test images.",
        (),
        (
            (
                "Best and worst reconstructions",
                "meta_learn_cifar10_cpu/figures/best_and_worst.png",
            ),
        ),
    ),
    (
        "Figure 7: reconstructions with different inner steps",
        "Test images.",
        (),
        (
            (
                "Test images after 0, 1, 2 and 3 latent steps",
                "meta_learn_cifar10_cpu/figures/over_inner_steps.png",
            ),
        ),
    ),
    (
        "Table 3: accuracy using MLP1",
        "No weight decay.",
        [
            *_epochs("classify_functa_report_mlp1", _MLP1),
            *_epochs("classify_functa_report_mlp1", _MLP1_TRAIN, "train"),
        ],
        (),
    ),
    (
        "Table 4: accuracy using MLP2",
        "No weight decay.",
        [
            *_epochs("classify_functa_report_mlp2", _MLP2),
            *_epochs("classify_functa_report_mlp2", _MLP2_TRAIN, "train"),
        ],
        (),
    ),
    (
        "Table 5: accuracy using MLP1 with weight decay",
        "Weight decay 1e-4.",
        [
            *_epochs("classify_functa_report_mlp1_decay", _DECAY),
            *_epochs("classify_functa_report_mlp1_decay", _DECAY_TRAIN, "train"),
        ],
        (),
    ),
    (
        "Figures 8 to 12: Transformer, LassoNet, pruning pipeline, ViT, CP-ViT",
        _NO_COUNTERPART,
        (),
        (),
    ),
    (
        "Figure 13: distribution of the informativeness of patches",
        "Theirs is ViT-B/16, ours the small ViT on CIFAR-10.",
        (),
        (
            (
                "Informativeness of the patches",
                "prune_vit_cifar10_cpu/figures/informativeness.png",
            ),
        ),
    ),
    (
        "Figure 14: attention probabilities",
        "The small ViT on CIFAR-10.",
        (),
        (("Attention of each layer", "prune_vit_cifar10_cpu/figures/attention.png"),),
    ),
    (
        "Table 6: CP-ViT without fine-tuning",
        "Theirs is ViT-B/16 at 224 pixels, "
        "pre-trained; ours the small ViT, from scratch.",
        [
            *_pruned("prune_vit_cifar10_cpu", "accuracy", "test accuracy", _TABLE6),
            *_pruned("prune_vit_b16", "accuracy", "ViT-B/16", _TABLE6),
        ],
        (),
    ),
    (
        "Table 7: CP-ViT with fine-tuning",
        "Ours is fine-tuned for one epoch.",
        [
            *_pruned(
                "prune_vit_cifar10_cpu", "tuned_accuracy", "test accuracy", _TABLE7
            ),
            *_pruned("prune_vit_b16", "tuned_accuracy", "ViT-B/16", _TABLE7),
        ],
        (),
    ),
    (
        "Figure 15: gradient predictiveness",
        "The report compares consecutive steps on "
        "different batches (first figure); Santurkar et al. compare along one gradient "
        "(second figure and table). The report gives curves only.",
        _probes(
            "probe_landscape_cifar10_cpu",
            "gradient_predictiveness",
            _PREDICTIVENESS,
            published="curve",
        ),
        (
            (
                "Gradients of consecutive steps",
                "probe_landscape_cifar10_cpu/figures/consecutive_steps.png",
            ),
            (
                "Along the gradient",
                "probe_landscape_cifar10_cpu/figures/along_the_gradient.png",
            ),
        ),
    ),
    (
        "Figure 16: effective beta-smoothness",
        "The report gives curves only.",
        _probes(
            "probe_landscape_cifar10_cpu", "effective_beta", _BETA, published="curve"
        ),
        (
            (
                "Beta against the step size",
                "probe_landscape_cifar10_cpu/figures/beta_profile.png",
            ),
        ),
    ),
    (
        "Table 8: test accuracy of the optimizers on MNIST",
        "LeNet, 20 epochs; the report's settings, then ours.",
        [
            *_optimizers("train_lbi_mnist_report", _MNIST_OPTIMIZERS),
            *_optimizers("train_lbi_mnist", _MNIST_OPTIMIZERS),
        ],
        (),
    ),
    (
        "Figure 17: training and test accuracy on MNIST",
        "The report's settings.",
        (),
        (("Accuracy over the epochs", "train_lbi_mnist_report/figures/accuracy.png"),),
    ),
    (
        "Table 9: test accuracy of the optimizers on CIFAR-10",
        "Theirs is VGG-A, 20 epochs; ours has a quarter of the channels and 10 epochs.",
        [
            *_optimizers("train_lbi_cifar10_narrow", _VGG_OPTIMIZERS),
            *_optimizers("train_lbi_cifar10_report", _VGG_OPTIMIZERS),
        ],
        (),
    ),
    (
        "Figure 18: training and test accuracy on CIFAR-10",
        "The quarter network.",
        (),
        (
            (
                "Accuracy over the epochs",
                "train_lbi_cifar10_narrow/figures/accuracy.png",
            ),
        ),
    ),
    (
        "Table 10: LeNet, conv3 pruned",
        "DessiLBI; the report's settings, then ours.",
        [
            row
            for name in ("prune_lbi_mnist_report", "prune_lbi_mnist")
            for row in (
                ("nothing removed: test accuracy (%)", "98.7", name, "dense", "%.2f"),
                *_removed(name, _MNIST_CONV3, "official", _AUTHORS),
            )
        ],
        (),
    ),
    (
        "Table 11: LeNet, 80 % of one layer pruned",
        "DessiLBI; the report's settings, then ours.",
        [
            row
            for name in ("prune_lbi_mnist_report", "prune_lbi_mnist")
            for row in _layers(name, _LENET, _MNIST_LAYERS, "official", _AUTHORS)
        ],
        (),
    ),
    (
        "Figure 19: conv3 of LeNet before and after pruning",
        "80 % of the filters.",
        (),
        (
            (
                "conv3 of LeNet",
                "prune_lbi_mnist_report/figures/layer_before_and_after.png",
            ),
        ),
    ),
    (
        "Table 12: VGG-A, conv3 pruned",
        "Theirs is 20 epochs, ours 8.",
        [
            (
                "nothing removed: test accuracy (%)",
                "80.30",
                "prune_lbi_cifar10_short",
                "dense",
                "%.2f",
            ),
            *_removed("prune_lbi_cifar10_short", _VGG_CONV3, "official", _AUTHORS),
        ],
        (),
    ),
    (
        "Table 13: VGG-A, 80 % of one layer pruned",
        "Theirs is 20 epochs, ours 8. The "
        "report calls fc1, fc2 and fc3 classifier.0, classifier.3 and classifier.6.",
        [
            *_layers(
                "prune_lbi_cifar10_short",
                _CONVS[:5],
                _VGG_CONVS[:5],
                "official",
                _AUTHORS,
            ),
            *_layers(
                "prune_lbi_cifar10_short",
                ("fc1", "fc2", "fc3"),
                _VGG_DENSE,
                "official",
                _AUTHORS,
            ),
        ],
        (),
    ),
    (
        "Figure 20: conv3 of VGG-A before and after pruning",
        "80 % of the filters.",
        (),
        (
            (
                "conv3 of VGG-A",
                "prune_lbi_cifar10_short/figures/layer_before_and_after.png",
            ),
        ),
    ),
    (
        "Figures 21 to 24: images of 32x32 to 128x128",
        "The report's settings.",
        (),
        tuple(
            (f"{n}x{n}", f"fit_image_report/figures/reconstructions_{n}x{n}.png")
            for n in (32, 64, 96, 128)
        ),
    ),
    (
        "Figure 25: nine images in one",
        "A mosaic of 96x96 pixels.",
        (),
        (("Mosaic", "fit_image_report/figures/field_96x96_mosaic.png"),),
    ),
    (
        "Figures 26 and 27: structure of the classifiers",
        "`classify_functa`, variants `report_mlp1` and `report_mlp2`.",
        (),
        (),
    ),
]

# page: (title, introduction, sections of (heading, caption, rows, figures)).
PAGES = {
    "results": (
        "Results",
        "Every number is read from the folder that its row names; `±` is the deviation "
        "over seeds (ddof 1). Published numbers are those of the student report. Runs "
        "on the same machine sometimes shared its cores, so times are upper bounds.",
        _RESULTS,
    ),
    "report": (
        "The student report, table by table",
        "Each table and figure of the student report in its order, theirs and ours.",
        _REPORT,
    ),
}

_PATHS = (
    ("ms", "milliseconds", ".4g"),
    ("per second", "per_second", ".4g"),
    ("unit", "unit", ""),
    ("dtype", "dtype", ""),
    ("GFLOP/s", "gflops_per_second", ".3g"),
    ("share of the products (%)", "share_of_product", "%.0f"),
    ("memory (MiB)", "mebibytes", ".3g"),
    ("compilation (s)", "compile_seconds", ".1f"),
    ("time over reference", "time_over_reference", ".3f"),
    ("arithmetic over reference", "arithmetic_over_reference", ".3f"),
    ("reference", "reference", ""),
    ("times torch, float32", "over_peer", ".2f"),
)
_SPEED = (
    ("multiply-adds saved (%)", "saved", "%.1f"),
    ("predicted speed-up", "predicted_speedup", ".2f"),
    ("speed-up, batch 1", "speedup_1", ".2f"),
    ("speed-up, batch 32", "speedup_32", ".2f"),
    ("measured over predicted, batch 32 (%)", "efficiency_32", "%.0f"),
    ("speed-up, gradient", "gradient_speedup", ".2f"),
)
# title, introduction, sections of (heading, caption, folder, prefix, columns, figures);
# a tuple of columns makes one row a record, a list one row a quantity.
BENCHMARKS = (
    "Benchmarks",
    "Rates, arithmetic shares, memory and start-up, read from the runs named.",
    [
        (
            "Hot paths",
            "Medians over the rounds of one run, in which the paths take "
            "turns. A share is that of the best 1024x1024 product of the same dtype; a "
            "convolution counts as defined, so it may pass 100 %.",
            "benchmark_all",
            "",
            _PATHS,
            (),
        ),
        (
            "What a meta-step grows with",
            "One size at a time from a SIREN of width 64 "
            "and depth 4 on 16 images of 16x16 pixels.",
            "benchmark_scaling",
            "",
            _PATHS,
            (
                (
                    "Time and memory of a meta-step",
                    "benchmark_scaling/figures/scaling.png",
                ),
            ),
        ),
        (
            "Start-up, devices, size of a data set",
            "Whole processes. Virtual devices "
            "share the same cores: they show what dividing costs.",
            "scaling_cpu",
            "",
            [
                ("`import functa` (s)", "import_functa_seconds", ".2f"),
                ("`import vit` (s)", "import_vit_seconds", ".2f"),
                ("`import landscape` (s)", "import_landscape_seconds", ".2f"),
                ("`import lbi` (s)", "import_lbi_seconds", ".2f"),
                (
                    "first step, nothing compiled (s)",
                    "first_step_nothing_compiled_seconds",
                    ".1f",
                ),
                ("first step, compiled before (s)", "first_step_seconds", ".1f"),
                *[
                    (
                        f"{n} virtual devices, meta-learning (images/s)",
                        f"images_per_second.{i}",
                        ".1f",
                    )
                    for i, n in enumerate((1, 2, 4, 8))
                ],
                *[
                    (f"encoding {n} images (images/s)", f"encoded_per_second.{i}", "d")
                    for i, n in enumerate(("1,000", "10,000", "100,000", "1,000,000"))
                ],
                *[
                    (
                        f"encoding {n} images, peak memory (MiB)",
                        f"peak_mebibytes.{i}",
                        ".0f",
                    )
                    for i, n in enumerate(("1,000", "10,000", "100,000", "1,000,000"))
                ],
            ],
            (),
        ),
        (
            "Pruned small ViT",
            "Times against the whole network of the same run, whose "
            "own row shows the noise.",
            "prune_vit_speed_cifar10_cpu",
            "rows",
            _SPEED,
            (
                (
                    "Speed of the pruned networks",
                    "prune_vit_speed_cifar10_cpu/figures/speed.png",
                ),
            ),
        ),
        (
            "Pruned ViT-B/16",
            "Random weights, 224 pixels.",
            "prune_vit_speed_b16",
            "rows",
            _SPEED,
            (
                (
                    "Speed of the pruned networks",
                    "prune_vit_speed_b16/figures/speed.png",
                ),
            ),
        ),
    ],
)

README_ROWS = [
    (
        "functa on CIFAR-10: PSNR after 200 latent steps (dB)",
        "about 27",
        "meta_learn_cifar10_cpu",
        "further_psnr",
        ".2f",
    ),
    (
        "functa on CIFAR-10: test accuracy from the latents (%)",
        "43.54",
        "classify_functa_best",
        "test_accuracy",
        "%.2f",
    ),
    (
        "functa on the digits: test accuracy from the latents (%)",
        "",
        "classify_functa_digits*",
        "test_accuracy",
        "%.1f",
    ),
    (
        "SIREN on a 32x32 image: PSNR after 2,000 steps (dB)",
        "55.47",
        "fit_image_report",
        "32x32_psnr.4",
        ".1f",
    ),
    (
        "small ViT on CIFAR-10, 40 % of the patches pruned: points lost",
        "1.9",
        "prune_vit_cifar10_cpu",
        "max_0.4_drop",
        "%.2f",
    ),
    (
        "LeNet on MNIST, DessiLBI: test accuracy (%)",
        "99.02",
        "train_lbi_mnist",
        "dessilbi_test_accuracy",
        "%.2f",
    ),
    (
        "LeNet on MNIST, 80 % of conv3's filters pruned: test accuracy (%)",
        "93.42",
        "prune_lbi_mnist",
        "one_layer.official.4",
        "%.2f",
    ),
    (
        "band of losses without over with batch normalization",
        "",
        "probe_landscape_cifar10_subset",
        "envelope_width_ratio",
        ".2f",
    ),
]
