"""The figures of loss landscapes: probe_landscape."""

import matplotlib.pyplot as plt
import numpy as np

from experiments.drawing.panels import panels, share_labels
from experiments.drawing.run import MissingError, bind
from experiments.training.landscape import loss_at_probes, read_arrays
from landscape import curvature, plots, probes

_NETWORKS = {"plain": "without BN", "bn": "with BN"}
# Number of points of a curve over all steps; averages reduce the noise of batches.
_NUM_WINDOWS = 60


def _probe_landscape(run):
    run = run._replace(arrays=read_arrays(run.workdir, run.config))
    figures = {"beta_profile": _beta_profile}
    if run.config["num_epochs"]:
        figures |= {
            "loss_envelope": _loss_envelope,
            "along_the_gradient": _along_the_gradient,
            "at_equal_loss": _at_equal_loss,
            "gradient_at_equal_loss": _gradient_at_equal_loss,
            "consecutive_steps": _consecutive_steps,
        }
        if run.config["sharpness"]["every"]:
            figures["eigenvalues"] = _eigenvalues
    if run.config.get("spectrum", {}).get("num_samples"):
        figures["spectral_density"] = _spectral_density
    if run.config["surface"]["size"]:
        figures["surfaces"] = _surfaces
    chosen = run.config["networks"]
    # Those of a file are functions, such as make_network.
    labels = _NETWORKS | {
        name: name.removeprefix("make_").replace("_", " ")
        for name in chosen
        if name not in _NETWORKS
    }
    return bind(figures, run, {n: label for n, label in labels.items() if n in chosen})


def _loss_label(run, name):
    """With its unit, which only the cross-entropy has."""
    return name if run.config.get("loss") else f"{name} (nats)"


def _in_epochs(run, name):
    return run.need(name) / run.need("steps_per_epoch")


def _windows(values):
    """Means over windows of steps: (..., S) -> their centers (W,), (..., W)."""
    size = max(values.shape[-1] // _NUM_WINDOWS, 1)
    count = values.shape[-1] // size
    kept = values[..., : count * size].reshape(*values.shape[:-1], count, size)
    return size * (np.arange(count) + 0.5), kept.mean(-1)


def _loss_envelope(run, networks):
    titles = ["band over the learning rates", *networks.values()]
    figure, axes = panels(1 + len(networks), width=4.6, sharey=True, titles=titles)
    bands = {}
    for ax, (network, label) in zip(axes[0, 1:], networks.items(), strict=True):
        epochs = _in_epochs(run, f"{network}/loss_step")[0, 0]
        losses = run.need(f"{network}/logged_loss")  # (rates, seeds, K)
        # The mean over seeds of the bands.
        bands[label] = epochs, np.stack([losses.min(0).mean(0), losses.max(0).mean(0)])
        plots.curves(
            {
                f"{rate:g}": (epochs, runs)
                for rate, runs in zip(run.config["learning_rates"], losses, strict=True)
            },
            y_label=_loss_label(run, "training loss"),
            legend_title="learning rate",
            ax=ax,
        )
    plots.envelope(bands, y_label=_loss_label(run, "training loss"), ax=axes[0, 0])
    for ax in axes[0, 1:-1]:
        ax.get_legend().remove()
    return figure


def _at_equal_loss(run, networks):
    """The band over the learning rates against the training loss, not the epoch."""
    figure, axes = panels(2, width=5)
    lows, highs = [], []
    for network in networks:
        losses = run.need(f"{network}/progress_loss")
        highs.append(np.nanmin(losses[..., 0]))
        lows.append(np.nanmin(losses))
    levels = np.linspace(min(highs), max(lows), 100)
    widths, bands = {}, {}
    for network, label in networks.items():
        losses = run.need(f"{network}/progress_loss")  # (rates, seeds, K)
        epochs = _in_epochs(run, f"{network}/progress_step")
        width = probes.at_equal_loss(losses.mean(0), np.ptp(losses, 0), levels)
        widths[label] = levels, width
        reached = np.asarray(probes.at_equal_loss(losses, epochs, levels)).mean(1)
        bands[label] = levels, reached
    plots.curves(
        widths,
        x_label=_loss_label(run, "mean training loss over the rates"),
        y_label=_loss_label(run, "width of the band of losses"),
        ax=axes[0, 0],
    )
    # A band ends where the first of the rates no longer gets there.
    plots.envelope(
        bands,
        x_label=_loss_label(run, "training loss"),
        y_label="epochs until the loss is reached\n(fastest to slowest rate)",
        log=True,
        ax=axes[0, 1],
    )
    # The losses before the first interval of the log are interpolated.
    steps = [run.need(f"{network}/progress_step")[..., 1] for network in networks]
    axes[0, 1].set_ylim(bottom=np.min(steps) / run.need("steps_per_epoch"))
    for ax in axes[0]:
        ax.invert_xaxis()
    axes[0, 0].get_legend().remove()
    return figure


def _gradient_at_equal_loss(run, networks):
    """Measures along the gradient against the training loss at the probes."""
    figure, axes = _rate_panels(run, rows=2, width=3, height=2.5, sharex=True)
    measures = {
        "grad_distances": "gradient distance (largest)",
        "betas": "effective beta",
    }
    for row, (key, y_label) in zip(axes, measures.items(), strict=True):
        x_label = _loss_label(run, "training loss") if key == "betas" else ""
        for i, ax in enumerate(row):
            curves = {}
            for network, label in networks.items():
                run.need(f"{network}/progress_loss")
                losses = loss_at_probes(run.arrays, network)[i].mean(0)
                values = run.need(f"{network}/probe_{key}")[i].max(-1)
                curves[label] = losses, values
            plots.curves(curves, x_label=x_label, y_label=y_label, log=True, ax=ax)
    axes[0, 0].invert_xaxis()  # shared
    share_labels(axes)
    return figure


def _consecutive_steps(run, networks):
    layers = {"last_layer": "last layer", "all_layers": "all parameters"}
    measures = {
        "grad_distance": "gradient distance",
        "beta": "gradient distance / step length",
    }
    if run.config.get("last_layer", "") is None:
        del layers["last_layer"]
    titles = 2 * [f"between consecutive steps, {layer}" for layer in layers.values()]
    figure, axes = panels(len(layers), rows=2, height=3, sharex=True, titles=titles)
    for row, (measure, y_label) in zip(axes, measures.items(), strict=True):
        x_label = "epoch" if measure == "beta" else ""  # the lower row
        for ax, layer in zip(row, layers, strict=True):
            bands = {}
            for network, label in networks.items():
                steps, values = _windows(run.need(f"{network}/{layer}_{measure}"))
                epochs = (steps + 1) / run.need("steps_per_epoch")
                bands[label] = epochs, values.mean(1)
            plots.envelope(bands, x_label=x_label, y_label=y_label, log=True, ax=ax)
    share_labels(axes)
    return figure


def _rate_panels(run, **options):
    """A column of Axes for each learning rate."""
    rates = run.config["learning_rates"]
    titles = [f"learning rate {rate:g}" for rate in rates]
    return panels(len(rates), sharey="row", titles=titles, **options)


def _along_the_gradient(run, networks):
    """Santurkar et al., figure 4, at every learning rate: bands over the step sizes."""
    figure, axes = _rate_panels(run, rows=4, width=3, height=2.3, sharex=True)
    measures = {
        "losses": _loss_label(run, "loss"),
        "grad_distances": "gradient distance",
        "relative_grad_distances": "gradient distance /\ngradient norm",
        "betas": "effective beta\n(largest over the step sizes)",
    }
    for row, (key, y_label) in zip(axes, measures.items(), strict=True):
        # A loss of the user may be negative.
        every = [run.need(f"{network}/probe_{key}") for network in networks]
        is_log = not any((values < 0).any() for values in every)
        for i, ax in enumerate(row):
            bands = {}
            for network, label in networks.items():
                values = run.need(f"{network}/probe_{key}")[i]  # (seeds, P, steps)
                low, high = values.min(-1), values.max(-1)
                if key != "betas":  # The beta of the paper is the largest one.
                    high = np.stack([low.mean(0), high.mean(0)])
                bands[label] = _in_epochs(run, f"{network}/probe_step")[i, 0], high
            # The lowest row has single curves.
            make, x_label = plots.envelope, ""
            if key == "betas":
                make, x_label = plots.curves, "epoch"
            make(bands, x_label=x_label, y_label=y_label, log=is_log, ax=ax)
    legend = axes[0, -1].get_legend()
    legend.set_title("smallest to largest\nover the step sizes", {"size": 7})
    share_labels(axes)
    return figure


def _beta_profile(run, networks):
    """Over the step sizes, from the end of the first epoch on, if there is one."""
    first = min(run.config["num_epochs"], 1)
    figure, axes = _rate_panels(run, width=3.2, height=3)
    for i, ax in enumerate(axes[0]):
        betas = {}
        for network, label in networks.items():
            later = _in_epochs(run, f"{network}/probe_step")[i, 0] >= first
            values = run.need(f"{network}/probe_betas")[i][:, later]
            betas[label] = values.reshape(-1, values.shape[-1])
        plots.step_profile(np.array(run.config["step_sizes"]), betas, ax=ax)
    axes[0, -1].get_legend().set_title("median, 10 to 90 %", {"size": 7})
    share_labels(axes)
    return figure


def _eigenvalues(run, networks):
    with_adam = run.config["sharpness"].get("preconditioned", False)
    rows = 2 + with_adam
    figure, axes = _rate_panels(run, rows=rows, width=3, height=2.6, sharex=True)
    for i, rate in enumerate(run.config["learning_rates"]):
        largest, products, preconditioned = {}, {}, {}
        for network, label in networks.items():
            epochs = _in_epochs(run, f"{network}/eigenvalue_step")[i, 0]
            values = run.need(f"{network}/eigenvalues")[i]  # (seeds, E, k)
            # The last eigenvalue is the smallest.
            largest[label] = epochs, values.mean(0)[:, :-1]
            products[label] = epochs, rate * values[..., 0]
            if with_adam:
                name = f"{network}/preconditioned_eigenvalue"
                preconditioned[label] = (
                    _in_epochs(run, f"{name}_step")[i, 0],
                    rate * run.need(f"{name}s")[i][..., 0],
                )
        plots.eigenvalues(largest, x_label="", ax=axes[0, i])
        plots.stability(
            products,
            x_label="" if with_adam else "epoch",
            bound=_descent_bound(run.config["optimizer"]),
            ax=axes[1, i],
        )
        if with_adam:
            plots.stability(
                preconditioned,
                y_label="learning rate x\npreconditioned sharpness",
                bound=_adam_bound(run.config["optimizer"]),
                optimizer="Adam",
                ax=axes[2, i],
            )
    share_labels(axes)
    return figure


def _descent_bound(optimizer):
    """None for another optimizer than gradient descent."""
    if optimizer["name"] != "sgd":
        return None
    momentum = optimizer["options"].get("momentum") or 0.0
    nesterov = bool(optimizer["options"].get("nesterov"))
    return curvature.gradient_descent_bound(momentum, nesterov=nesterov)


def _adam_bound(optimizer):
    nesterov = optimizer["name"].startswith("nadam")
    nesterov = optimizer["options"].get("nesterov", nesterov)
    b1 = optimizer["options"].get("b1", 0.9)
    return curvature.adam_bound(b1, nesterov=bool(nesterov))


def _spectral_density(run, networks):
    """At the end of the training, of the first seed."""
    figure, axes = _rate_panels(run, width=3.6, height=3)
    for i, ax in enumerate(axes[0]):
        densities = {}
        for network, label in networks.items():
            spectrum = curvature.Quadrature(
                run.need(f"{network}/spectrum_nodes")[i, 0],
                run.need(f"{network}/spectrum_weights")[i, 0],
            )
            if not np.isfinite(spectrum.nodes).all():  # a run that diverged
                continue
            low, high = spectrum.nodes.min(), spectrum.nodes.max()
            width = 0.01 * float(high - low) or 1e-3
            grid = np.linspace(low - 5 * width, high + 5 * width, 1000)
            density = curvature.spectral_density(spectrum, grid, sigma=width)
            densities[label] = grid, np.asarray(density)
        plots.spectral_density(densities, ax=ax)
    share_labels(axes)
    return figure


def _surfaces(run, networks):
    surfaces = {
        label: run.arrays[f"{network}/surface"]
        for network, label in networks.items()
        if f"{network}/surface" in run.arrays
    }
    if not surfaces:
        raise MissingError("surface")
    limits, name = plots.robust_limits(*surfaces.values()), _loss_label(run, "loss")
    num, span = len(surfaces), run.config["surface"]["span"]
    figure = plt.figure(figsize=(5.4 * num, 8.6), layout="constrained")
    for number, (label, losses) in enumerate(surfaces.items(), start=1):
        points = np.linspace(-span, span, len(losses))
        flat = figure.add_subplot(2, num, number)
        plots.surface_contours(losses, points, limits=limits, loss_label=name, ax=flat)
        flat.set_title(label, fontsize=9)
        deep = figure.add_subplot(2, num, num + number, projection="3d")
        plots.surface_3d(losses, points, limits=limits, loss_label=name, ax=deep)
    return figure


FIGURES = {"probe_landscape": _probe_landscape}
