"""Figures of train_vit and prune_vit, each a function of a run's files."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

# Color, marker and name of each method.
_TOKENS = {
    "max": ("tab:blue", "o", "cascade, cumulative maxima"),
    "sum": ("tab:cyan", "v", "cascade, sums"),
    "cls": ("tab:green", "s", "cascade, CLS attention"),
    "evit": ("tab:olive", "D", "EViT, fused token"),
    "merge": ("tab:purple", "P", "token merging"),
    "random": ("tab:gray", "^", "random patches"),
    "resolution": ("tab:red", "X", "lower resolution"),
    "norm": ("tab:pink", "<", "largest norms"),
}
_CASCADES = {
    "max": _TOKENS["max"],
    "constant": ("tab:orange", "h", "constant ratios"),
    "range": ("tab:brown", "d", "ratios by attention range"),
    "skip": ("teal", "*", "skipped for a layer"),
    "zero": ("magenta", "p", "zeroed rows"),
    "released_code": ("black", "x", "released code (masked only)"),
}
_WEIGHTS = {
    "heads": ("navy", ">", "heads, by maxima"),
    "heads_lbi": ("tab:cyan", "D", "heads, by DessiLBI"),
    "heads_random": ("tab:gray", "^", "heads, random"),
    "neurons_lbi": ("tab:orange", "D", "neurons, by DessiLBI"),
    "neurons_random": ("tab:brown", "^", "neurons, random"),
}


def draw_train_vit(folder, arrays, metrics):
    """Loss of the steps, accuracy of the epochs."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.plot([m["step"] for m in metrics], [m["loss"] for m in metrics])
    left.set_xlabel("step")
    left.set_ylabel("training loss, with augmentation and smoothing")
    steps_per_epoch = int(arrays["steps_per_epoch"])
    for key, label in (
        ("train_accuracy", "training, augmented, on the patches it sees"),
        ("test_accuracy", "test, averaged weights"),
    ):
        points = [(m["step"] / steps_per_epoch, m[key]) for m in metrics if key in m]
        epochs, values = np.array(points).T
        right.plot(epochs, 100 * values, label=label)
    right.set_xlabel("epoch")
    right.set_ylabel("accuracy (%)")
    right.legend(fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    _save(figure, folder / "training.png")


def draw_prune_vit(folder, arrays, metrics):
    """Accuracy against cost and speed, and what the network looks at."""
    del metrics
    if "row_accuracy" in arrays:
        _draw_accuracy(folder, arrays)
        _draw_kept(folder, arrays)
        _draw_attention(folder, arrays)
        _draw_informativeness(folder, arrays)
        _draw_heads(folder, arrays)
    _draw_speed(folder, arrays)


def _draw_accuracy(folder, arrays):
    groups = {
        "patches": _TOKENS,
        "forms of the cascade": _CASCADES,
        "heads and neurons": _WEIGHTS,
    }
    measured = set(arrays["row_method"])
    groups = {title: group for title, group in groups.items() if measured & set(group)}
    if not groups:
        return
    figure, axes = plt.subplots(
        1,
        len(groups),
        figsize=(4.5 * len(groups), 5),
        layout="constrained",
        squeeze=False,
    )
    for axis, (title, methods) in zip(axes[0], groups.items(), strict=True):
        for method, (color, marker, label) in methods.items():
            cost, accuracy = _curve(arrays, method, "row_accuracy")
            if len(cost) > 1:
                axis.plot(cost, accuracy, color=color, marker=marker, ms=4, label=label)
            cost, accuracy = _curve(arrays, method, "row_tuned_accuracy")
            if len(cost) > 1:
                axis.plot(
                    cost,
                    accuracy,
                    color=color,
                    marker=marker,
                    ms=4,
                    mfc="white",
                    linestyle="--",
                    label=f"{label}, trained on",
                )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("multiply-adds (% of the whole network's)")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            # Below: within, it would hide points.
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13)}
            axis.legend(fontsize=7, ncols=2, **below)
    axes[0, 0].set_ylabel("test accuracy (%)")
    _save(figure, folder / "accuracy_and_cost.png")


def _curve(arrays, method, column):
    """Percent of the whole network's cost, and of `column`, cheapest first."""
    if column not in arrays:
        return np.array([]), np.array([])
    methods = arrays["row_method"]
    chosen = (methods == method) | (methods == "dense")
    chosen &= np.isfinite(arrays[column])
    whole = arrays["row_multiply_adds"][methods == "dense"][0]
    cost = 100 * arrays["row_multiply_adds"][chosen] / whole
    order = np.argsort(cost)
    return cost[order], 100 * arrays[column][chosen][order]


def _draw_speed(folder, arrays):
    batches = sorted(
        int(name.removeprefix("row_speedup_"))
        for name in arrays
        if name.startswith("row_speedup_")
        # Beside the whole network, which is always timed.
        and np.isfinite(arrays[name]).sum() > 1
    )
    has_accuracy = "row_accuracy" in arrays
    count = len(batches) + has_accuracy
    if not batches:
        return
    figure, axes = plt.subplots(
        1, count, figsize=(4.5 * count, 4), layout="constrained", squeeze=False
    )
    named = _TOKENS | _CASCADES | _WEIGHTS
    for axis, batch in zip(axes[0], batches, strict=False):
        for method, (color, marker, label) in named.items():
            rows = arrays["row_method"] == method
            rows &= np.isfinite(arrays[f"row_speedup_{batch}"])
            if not rows.any():
                continue
            axis.plot(
                arrays["row_predicted_speedup"][rows],
                arrays[f"row_speedup_{batch}"][rows],
                color=color,
                marker=marker,
                ms=5,
                linestyle="none",
                label=label,
            )
        low, high = 1, 1.05 * arrays["row_predicted_speedup"].max()
        axis.plot([low, high], [low, high], color="0.5", linewidth=1)
        axis.plot([low, high], [0.9 * low, 0.9 * high], color="0.5", linestyle=":")
        axis.set_xlabel("predicted by multiply-adds (times)")
        axis.set_ylabel("measured (times)")
        axis.set_title(f"speed-up at batch {batch} (dotted: 0.9 of it)", fontsize=10)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=6)
    if has_accuracy:
        axis, batch = axes[0, -1], batches[-1]
        for method, (color, marker, label) in _TOKENS.items():
            rows = np.isin(arrays["row_method"], (method, "dense"))
            rows &= np.isfinite(arrays[f"row_speedup_{batch}"])
            if rows.sum() < 2:
                continue
            speed = arrays[f"row_speedup_{batch}"][rows]
            order = np.argsort(speed)
            axis.plot(
                speed[order],
                100 * arrays["row_accuracy"][rows][order],
                color=color,
                marker=marker,
                ms=4,
                label=label,
            )
        axis.set_xlabel(f"measured speed-up at batch {batch} (times)")
        axis.set_ylabel("test accuracy (%), not trained on")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    _save(figure, folder / "speed.png")


def _draw_kept(folder, arrays):
    """Images over the layers, what is pruned left grey."""
    images, kept = arrays["pictured"], arrays["kept"]
    num_layers, num_images, num_patches = kept.shape
    grid = round(num_patches**0.5)
    figure, axes = plt.subplots(
        num_images,
        num_layers + 1,
        figsize=(1.1 * (num_layers + 1), 1.15 * num_images + 0.3),
        squeeze=False,
        layout="constrained",
    )
    for row, image in enumerate(images):
        image = image / 255
        _show(axes[row, 0], image)
        for layer in range(num_layers):
            # The patch that each pixel lies in; images may be smaller than what the
            # network sees.
            rows, columns = (np.arange(side) * grid // side for side in image.shape[:2])
            mask = kept[layer, row].reshape(grid, grid)[rows][:, columns, None]
            faded = 0.25 * image + 0.6
            _show(axes[row, layer + 1], np.where(mask, image, faded))
            if row == 0:
                share = 100 * kept[layer].mean()
                axes[0, layer + 1].set_title(f"layer {layer}\n{share:.0f} %", size=8)
    axes[0, 0].set_title("image", size=8)
    _save(figure, folder / "kept_patches.png")


def _draw_attention(folder, arrays):
    """As the report's figure 14: short, mixed and long range."""
    attention = arrays["attention"]
    layers = sorted({0, len(attention) // 2, len(attention) - 1})
    figure, axes = plt.subplots(
        1,
        len(layers),
        figsize=(4 * len(layers), 3.6),
        layout="constrained",
        squeeze=False,
    )
    for axis, layer in zip(axes[0], layers, strict=True):
        patches = attention[layer][1:, 1:]
        high = np.quantile(patches, 0.995)
        picture = axis.imshow(patches, vmin=0, vmax=high, cmap="viridis")
        axis.set_title(
            f"layer {layer}, range {arrays['attention_ranges'][layer]:.2f}", fontsize=10
        )
        axis.set_xlabel("key patch")
        axis.set_ylabel("query patch")
        figure.colorbar(picture, ax=axis, label="probability, mean over heads")
    _save(figure, folder / "attention.png")


def _draw_informativeness(folder, arrays):
    """As the report's figure 13: how unequal the patches of one layer are."""
    scores = arrays["patch_scores"]
    layer = min(3, len(scores) - 1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.hist(scores[layer].ravel(), bins=30, color="tab:blue")
    left.set_xlabel(f"informativeness in layer {layer} (sum of column maxima)")
    left.set_ylabel("patches")
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.95, len(scores)))
    for number, (values, color) in enumerate(zip(scores, colors, strict=True)):
        ranked = -np.sort(-values, axis=1)
        shares = 100 * np.arange(1, ranked.shape[1] + 1) / ranked.shape[1]
        mean = (ranked / ranked.mean(1, keepdims=True)).mean(0)
        right.plot(shares, mean, color=color, label=f"layer {number}")
    right.set_xlabel("share of the patches, best first (%)")
    right.set_ylabel("informativeness over its mean")
    right.legend(fontsize=6)
    right.grid(alpha=0.3)
    _save(figure, folder / "informativeness.png")


def _draw_heads(folder, arrays):
    heads, ranges = arrays["head_scores"], arrays["attention_ranges"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    picture = left.imshow(heads, aspect="auto", cmap="viridis")
    figure.colorbar(picture, ax=left, label="sum of column maxima")
    left.set_xlabel("head")
    left.set_ylabel("layer")
    left.set_title("informativeness of the heads", fontsize=10)
    left.set_xticks(range(heads.shape[1]))
    right.plot(100 * ranges, marker="o")
    right.set_xlabel("layer")
    right.set_ylabel("queries whose strongest key is\n3 or more patches away (%)")
    right.set_ylim(bottom=0)
    right.set_title("attention range", fontsize=10)
    right.grid(alpha=0.3)
    _save(figure, folder / "heads.png")


def _show(axis, image):
    image = np.clip(image, 0, 1)
    grey = image.shape[-1] == 1
    axis.imshow(image[..., 0] if grey else image, cmap="gray", vmin=0, vmax=1)
    axis.set_xticks([])
    axis.set_yticks([])


def _save(figure, path):
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
