"""Figures of probe_landscape, each a function of a run's files.

Arrays are {NETWORK/NAME: (rates, seeds, ...)}; see `experiments.probe_landscape`.
"""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

NETWORKS = {
    "plain": ("tab:red", "without BN"),
    "bn": ("tab:blue", "with BN"),
}
# Points of a curve over all steps: the noise of single batches hides the rest.
_NUM_WINDOWS = 60


def draw_probe_landscape(folder, arrays, metrics):
    """Everything that the run's arrays hold."""
    del metrics
    _draw_envelope(folder, arrays)
    _draw_consecutive(folder, arrays)
    _draw_probes(folder, arrays)
    _draw_profile(folder, arrays)
    networks = _networks(arrays)
    if all(f"{name}/eigenvalues" in arrays for name in networks):
        _draw_eigenvalues(folder, arrays)
    with_surface = [name for name in networks if f"{name}/surface" in arrays]
    if with_surface:
        _draw_surfaces(folder, arrays, with_surface)


def _networks(arrays):
    return [name for name in NETWORKS if f"{name}/loss" in arrays]


def _epochs(arrays, steps):
    return np.asarray(steps) / arrays["steps_per_epoch"]


def _windows(values):
    """Means over windows of steps: (..., S) -> their centres (W,), (..., W)."""
    size = max(values.shape[-1] // _NUM_WINDOWS, 1)
    count = values.shape[-1] // size
    kept = values[..., : count * size].reshape(*values.shape[:-1], count, size)
    return size * (np.arange(count) + 0.5), kept.mean(-1)


def _draw_envelope(folder, arrays):
    """Training loss at all learning rates: the band, and each run."""
    networks = _networks(arrays)
    figure, axes = plt.subplots(
        1, 1 + len(networks), figsize=(4 + 3.4 * len(networks), 3.4), sharey=True
    )
    for name in networks:
        color, label = NETWORKS[name]
        steps, losses = _windows(arrays[f"{name}/loss"])  # (rates, seeds, W)
        # The band of each seed; their mean is drawn.
        low, high = losses.min(0).mean(0), losses.max(0).mean(0)
        axes[0].fill_between(
            _epochs(arrays, steps), low, high, color=color, alpha=0.4, label=label
        )
    rates = arrays["learning_rates"]
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(rates)))
    for axis, name in zip(axes[1:], networks, strict=True):
        steps, losses = _windows(arrays[f"{name}/loss"])
        for rate, color, runs in zip(rates, colors, losses, strict=True):
            for number, run in enumerate(runs):
                label = f"{rate:g}" if number == 0 else None
                axis.plot(
                    _epochs(arrays, steps), run, color=color, linewidth=0.9, label=label
                )
        axis.set_title(NETWORKS[name][1], fontsize=9)
        axis.legend(fontsize=7, title="learning rate", title_fontsize=7)
    axes[0].set_title("band over the learning rates", fontsize=9)
    axes[0].legend(fontsize=8)
    axes[0].set_ylabel("training loss (nats)")
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
    _save(figure, folder / "loss_envelope.png")


def _draw_consecutive(folder, arrays):
    """The report's curves: between consecutive steps, bands over learning rates."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True)
    layers = {"last_layer": "last layer", "all_layers": "all parameters"}
    measures = {
        "grad_distance": "gradient distance",
        "beta": "gradient distance / step length",
    }
    for row, (measure, title) in zip(axes, measures.items(), strict=True):
        for axis, (which, layer) in zip(row, layers.items(), strict=True):
            for name in _networks(arrays):
                color, label = NETWORKS[name]
                steps, values = _windows(arrays[f"{name}/{which}_{measure}"])
                values = values.mean(1)  # (rates, W)
                axis.fill_between(
                    _epochs(arrays, steps + 1),
                    values.min(0),
                    values.max(0),
                    color=color,
                    alpha=0.4,
                    label=label,
                )
            axis.set_yscale("log")
            axis.set_title(f"{title}, {layer}", fontsize=9)
            axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("epoch")
    for axis in axes[:, 0]:
        axis.set_ylabel("between consecutive steps")
    axes[0, 0].legend(fontsize=8)
    _save(figure, folder / "consecutive_steps.png")


def _draw_probes(folder, arrays):
    """Santurkar et al., figure 4, at every learning rate: bands over the step sizes."""
    rates = arrays["learning_rates"]
    figure, axes = plt.subplots(
        4,
        len(rates),
        figsize=(2.7 * len(rates) + 0.8, 9),
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    rows = {
        "losses": "loss variation (nats)",
        "grad_distances": "gradient predictiveness",
        "relative_grad_distances": "the same / gradient norm",
        "betas": "effective beta",
    }
    for row, (key, title) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(title, fontsize=9)
        for i, axis in enumerate(row):
            for name in _networks(arrays):
                color, label = NETWORKS[name]
                values = arrays[f"{name}/probe_{key}"][i]  # (seeds, P, step sizes)
                steps = _epochs(arrays, arrays[f"{name}/probe_step"][i, 0])
                low, high = values.min(-1).mean(0), values.max(-1).mean(0)
                if key == "betas":
                    # The paper's beta is the largest.
                    axis.plot(steps, high, color=color, label=label, linewidth=1)
                else:
                    axis.fill_between(
                        steps, low, high, color=color, alpha=0.4, label=label
                    )
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
    for axis, rate in zip(axes[0], rates, strict=True):
        axis.set_title(f"learning rate {rate:g}", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("epoch")
    axes[0, 0].legend(fontsize=8)
    _save(figure, folder / "along_the_gradient.png")


def _draw_profile(folder, arrays):
    """Over the step sizes, averaged from the end of the first epoch on."""
    rates, step_sizes = arrays["learning_rates"], arrays["step_sizes"]
    figure, axes = plt.subplots(
        1, len(rates), figsize=(2.7 * len(rates) + 0.8, 3), sharey=True, squeeze=False
    )
    for i, axis in enumerate(axes[0]):
        for name in _networks(arrays):
            color, label = NETWORKS[name]
            later = arrays[f"{name}/probe_step"][i, 0] >= arrays["steps_per_epoch"]
            values = arrays[f"{name}/probe_betas"][i][:, later]  # (seeds, P, S)
            values = values.reshape(-1, len(step_sizes))
            axis.plot(step_sizes, np.median(values, 0), color=color, label=label)
            low, high = np.quantile(values, [0.1, 0.9], axis=0)
            axis.fill_between(step_sizes, low, high, color=color, alpha=0.2)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_title(f"learning rate {rates[i]:g}", fontsize=9)
        axis.set_xlabel("step along the gradient")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("gradient distance /\n(step x gradient norm)", fontsize=9)
    axes[0, 0].legend(fontsize=8, title="median, 10 to 90 %", title_fontsize=7)
    _save(figure, folder / "beta_profile.png")


def _draw_eigenvalues(folder, arrays):
    """The largest eigenvalues of the Hessian, and the learning rate times the first."""
    rates = arrays["learning_rates"]
    figure, axes = plt.subplots(
        2,
        len(rates),
        figsize=(2.7 * len(rates) + 0.8, 5),
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    for i, (top, bottom) in enumerate(axes.T):
        for name in _networks(arrays):
            color, label = NETWORKS[name]
            steps = _epochs(arrays, arrays[f"{name}/eigenvalue_step"][i, 0])
            values = arrays[f"{name}/eigenvalues"][i].mean(0)  # (E, k)
            # The last one is the smallest.
            for number in range(values.shape[1] - 1):
                top.plot(
                    steps,
                    values[:, number],
                    color=color,
                    linestyle="-" if number == 0 else "--",
                    linewidth=1.4 if number == 0 else 0.9,
                    label=label if number == 0 else f"{label}, next",
                )
            bottom.plot(steps, rates[i] * values[:, 0], color=color)
        bottom.axhline(2, color="black", linewidth=0.8, linestyle=":")
        top.set_title(f"learning rate {rates[i]:g}", fontsize=9)
        bottom.set_xlabel("epoch")
        for axis in (top, bottom):
            axis.set_yscale("symlog", linthresh=1e-3)
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("largest eigenvalues\nof the Hessian", fontsize=9)
    axes[1, 0].set_ylabel(
        "learning rate x largest\n(dotted: plain gradient descent's bound)", fontsize=8
    )
    axes[0, 0].legend(fontsize=7)
    _save(figure, folder / "eigenvalues.png")


def _draw_surfaces(folder, arrays, networks):
    """Contours above, the same surface in three dimensions below."""
    size = arrays[f"{networks[0]}/surface"].shape[0]
    axis_values = np.linspace(-arrays["span"], arrays["span"], size)
    first, second = np.meshgrid(axis_values, axis_values, indexing="ij")
    figure = plt.figure(figsize=(4.6 * len(networks), 7.6), layout="constrained")
    finite = np.concatenate(
        [np.ravel(arrays[f"{name}/surface"]) for name in networks]
    ).clip(1e-6)
    finite = finite[np.isfinite(finite)]
    # What is far above chance is cut off: it would flatten all the rest.
    low, high = finite.min(), min(np.quantile(finite, 0.98), 30 * np.median(finite))
    levels = np.geomspace(low, high, 25)
    for number, name in enumerate(networks):
        losses = np.clip(arrays[f"{name}/surface"], low, high)
        axis = figure.add_subplot(2, len(networks), number + 1)
        filled = axis.contourf(
            first,
            second,
            losses,
            levels=levels,
            cmap="viridis",
            norm=matplotlib.colors.LogNorm(low, high),
        )
        axis.plot(0, 0, "w+", markersize=9)
        axis.set_aspect("equal")
        axis.set_title(NETWORKS[name][1], fontsize=10)
        axis.set_xlabel("first direction (filter norms)")
        axis.set_ylabel("second direction (filter norms)")
        figure.colorbar(
            filled,
            ax=axis,
            label="loss (nats)",
            ticks=matplotlib.ticker.LogLocator(subs=(1, 2, 5)),
            format=matplotlib.ticker.StrMethodFormatter("{x:g}"),
            shrink=0.8,
        )
        axis = figure.add_subplot(
            2, len(networks), len(networks) + number + 1, projection="3d"
        )
        axis.plot_surface(
            first,
            second,
            np.log10(losses),
            cmap="viridis",
            vmin=np.log10(low),
            vmax=np.log10(high),
            rstride=1,
            cstride=1,
            linewidth=0,
        )
        axis.set_zlim(np.log10(low), np.log10(high))
        axis.set_zlabel("log10 of the loss", fontsize=8)
        axis.tick_params(labelsize=7)
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_major_locator(matplotlib.ticker.MaxNLocator(4))
    _save(figure, folder / "surfaces.png")


def _save(figure, path):
    if figure.get_layout_engine() is None:
        figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
