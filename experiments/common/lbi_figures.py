"""Figures of train_lbi and prune_lbi, each a function of a run's files."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

METHODS = {
    "adam": ("tab:gray", "Adam"),
    "dessilbi": ("tab:blue", "DessiLBI"),
    "dessilbi_adam": ("tab:orange", "DessiLBI+Adam"),
}
_ORDERS = {
    "entry": ("tab:blue", "o", "order of entry"),
    "magnitude": ("tab:orange", "s", "magnitude"),
    "random": ("tab:gray", "^", "random"),
}
_SCOPES = {
    "one_layer": "filters of one layer",
    "layer": "all convolutions, each by the same share",
    "global": "all convolutions, ranked together",
}


def draw_train_lbi(folder, arrays, metrics):
    """Accuracy of several methods, or the path of one."""
    if "steps_per_epoch" in arrays:
        _draw_path(folder, arrays, metrics)
        return
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, split in zip(axes, ("train", "test"), strict=True):
        for method, (color, label) in METHODS.items():
            runs = [
                100 * values
                for name, values in sorted(arrays.items())
                if name.startswith(f"{method}_seed")
                and name.endswith(f"_{split}_accuracy")
            ]
            if not runs:
                continue
            epochs = np.arange(1, len(runs[0]) + 1)
            axis.plot(epochs, np.mean(runs, 0), color=color, label=label)
            if len(runs) > 1:
                low, high = np.min(runs, 0), np.max(runs, 0)
                axis.fill_between(epochs, low, high, color=color, alpha=0.2)
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("training accuracy, mean over the epoch (%)")
    axes[1].set_ylabel("test accuracy (%)")
    axes[1].legend(fontsize=8)
    _save(figure, folder / "accuracy.png")


def _draw_path(folder, arrays, metrics):
    """What entered when, and what accuracy the sparse network had by then."""
    steps_per_epoch = int(arrays["steps_per_epoch"])
    layers = [name.removeprefix("entry_") for name in arrays if name[:6] == "entry_"]
    num_epochs = int(arrays["num_steps"]) / steps_per_epoch
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.95, len(layers)))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
    for layer, color in zip(layers, colors, strict=True):
        steps = arrays[f"entry_{layer}"]
        entered = np.sort(steps[steps >= 0]) / steps_per_epoch
        shares = 100 * np.arange(len(entered) + 1) / len(steps)
        left.step(
            np.concatenate([[0], entered, [num_epochs]]),
            np.concatenate([shares, shares[-1:]]),
            where="post",
            color=color,
            label=layer,
        )
    left.set_ylabel("groups that have entered (%)")
    left.legend(fontsize=7)
    measured = [m for m in metrics if "sparse_test_accuracy" in m]
    epochs = [m["step"] / steps_per_epoch for m in measured]
    for name, label in (
        ("test_accuracy", "dense"),
        ("sparse_test_accuracy", "projected on the support"),
    ):
        right.plot(epochs, [100 * m[name] for m in measured], label=label)
    right.plot(
        epochs,
        [100 * m["density"] for m in measured],
        color="tab:gray",
        linestyle=":",
        label="share of all groups in the support",
    )
    right.set_ylabel("test accuracy; density (%)")
    right.legend(fontsize=7)
    for axis in (left, right):
        axis.set_xlabel("epoch")
        axis.set_xlim(0, num_epochs)
        axis.grid(alpha=0.3)
    _save(figure, folder / "path.png")

    # Filters of the convolutions: those that enter early are the ones that end large.
    convs = [name for name in layers if name.startswith("conv")]
    num_columns = min(4, len(convs))
    num_rows = -(-len(convs) // num_columns)
    figure, axes = plt.subplots(
        num_rows,
        num_columns,
        figsize=(2.8 * num_columns + 0.8, 2.6 * num_rows),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(convs) :]:
        axis.axis("off")
    # Under batch normalisation all enter early: the scale ends with the last of them.
    last = max(arrays[f"entry_{layer}"].max() for layer in convs) / steps_per_epoch
    scale = plt.cm.ScalarMappable(plt.Normalize(0, max(last, 1e-3)), "viridis")
    for axis, layer in zip(axes.flat, convs, strict=False):
        norms, steps = arrays[f"norm_{layer}"], arrays[f"entry_{layer}"]
        order = np.argsort(-norms)
        never = steps[order] < 0
        colors = scale.to_rgba(steps[order] / steps_per_epoch)
        colors[never] = matplotlib.colors.to_rgba("lightgray")
        axis.bar(np.arange(len(order)), norms[order], width=1.0, color=colors)
        axis.set_ylim(bottom=0)
        axis.set_title(f"{layer}: {np.mean(~never):.0%} entered", fontsize=8)
        axis.tick_params(labelsize=7)
    for axis in axes[:, 0]:
        axis.set_ylabel("norm at the end", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("filter, by norm (grey: never entered)", fontsize=7)
    figure.colorbar(scale, ax=axes, label="epoch of entry", shrink=0.8)
    _save(figure, folder / "filters.png")


def draw_prune_lbi(folder, arrays, metrics):
    """The layer before and after, and accuracy against the share removed."""
    del metrics
    kernel, kept = arrays["kernel"], arrays["kept"]
    flat = np.abs(kernel.reshape(-1, kernel.shape[-1]))  # (inputs and taps, filters)
    # The filters that stay side by side, so that what is left can be seen.
    order = np.argsort(~kept, kind="stable")
    before, after = flat[:, order], (flat * kept)[:, order]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    top = np.quantile(flat, 0.995)
    removed = f"{np.mean(~kept):.0%} of the filters removed"
    for axis, values, title in zip(
        axes, (before, after), ("before", removed), strict=True
    ):
        shown = axis.imshow(
            values, aspect="auto", cmap="magma", vmin=0, vmax=top, interpolation="none"
        )
        axis.set_title(f"{arrays['layer']}: {title}", fontsize=9)
        axis.set_xlabel("filter, those that stay first")
        axis.set_ylabel("weight within the filter")
    figure.colorbar(shown, ax=axes, label="absolute weight")
    _save(figure, folder / "layer_before_and_after.png")

    if "curve_one_layer_entry" not in arrays:
        return
    shares = 100 * arrays["curve_sparsities"]
    figure, axes = plt.subplots(
        1, 3, figsize=(12, 3.6), layout="constrained", sharey=True
    )
    for axis, (scope, title) in zip(axes, _SCOPES.items(), strict=True):
        for name, (color, marker, label) in _ORDERS.items():
            values = 100 * arrays[f"curve_{scope}_{name}"]
            axis.errorbar(
                shares,
                values.mean(0),
                yerr=values.std(0, ddof=1) if len(values) > 1 else None,
                color=color,
                marker=marker,
                markersize=4,
                capsize=2,
                label=label,
            )
        if scope == "one_layer":
            title = f"filters of {arrays['layer']}"
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("removed (%)")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy (%), no fine-tuning")
    axes[0].legend(fontsize=8)
    _save(figure, folder / "accuracy_against_sparsity.png")


def _save(figure, path):
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
