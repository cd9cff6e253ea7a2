"""What the trainings of probe_landscape have measured, and the table of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments.common import files
from landscape import probes

# Networks of config.model; the other names are functions of config.network.
NETWORKS = ("bn", "plain")
# Widths of the envelope: over all steps, over the last epoch, and of runs that learn.
_WIDTHS = ("", "_at_the_end", "_without_dead")
# Losses at which the networks are compared at equal progress.
_NUM_LEVELS = 7


def recorded_layers(config: ConfigDict) -> dict[str, str | None]:
    """The layers whose changes are recorded, and the patterns of their paths."""
    last = {} if config.last_layer is None else {"last_layer": config.last_layer}
    return {**last, "all_layers": None}


def is_dead(config: ConfigDict, losses: jax.Array, labels: np.ndarray) -> jax.Array:
    """Which runs are dead; with a loss of the user, those that diverged.

    Args:
      config: of a run of probe_landscape.
      losses: training losses, (..., S).
      labels: those of the training images, (N,).
    """
    if config.loss is not None:
        return ~jnp.all(jnp.isfinite(losses), axis=-1)
    counts = np.bincount(labels)
    return probes.is_dead(losses, len(counts), class_counts=counts)


def read_arrays(workdir: Path, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The measurements of all trainings of a run of probe_landscape.

    Returns:
      {NETWORK/NAME: (rates, seeds, ...)} of the arrays and the log of each training.
      `logged_loss` are means over the intervals of the log, and `loss_step` their
      middles; `progress_loss` and `progress_step` begin with the loss before the first
      step. NETWORK/surface is that of the only training that has one.

    Raises:
      FileNotFoundError: if a training has no log.
    """
    arrays = {}
    for network in config["networks"]:
        names = [
            [f"{network}_rate{rate:g}_seed{seed}" for seed in config["seeds"]]
            for rate in config["learning_rates"]
        ]
        trainings = [[_training(workdir / name) for name in row] for row in names]
        for single in (single for row in trainings for single in row):
            if "surface" in single:
                arrays[f"{network}/surface"] = single.pop("surface")
        for name in trainings[0][0]:
            values = [[single[name] for single in row] for row in trainings]
            arrays[f"{network}/{name}"] = np.array(values)
    last_step = next(v for k, v in arrays.items() if k.endswith("/last_step")).flat[0]
    num_epochs = config["num_epochs"] or 1
    return arrays | {"steps_per_epoch": max(last_step // num_epochs, 1)}


def _training(folder):
    metrics = files.read_metrics(folder / "metrics.jsonl")
    if not metrics:
        raise FileNotFoundError(f"{folder} has no metrics.jsonl to draw from.")
    ends, losses = files.logged(metrics[1:], "loss")
    starts = [metrics[0]["step"], *ends[:-1]][: len(ends)]
    arrays = {
        "last_step": np.array(metrics[-1]["step"]),
        "logged_loss": losses,
        "loss_step": (ends + starts) / 2,
        "test_accuracy": files.logged(metrics, "test_accuracy")[1],
    }
    arrays["probe_step"], probed = files.logged(metrics, "probe")
    for key in probed[0]:
        arrays[f"probe_{key}"] = np.array([probe[key] for probe in probed])
    if "probe_loss" in arrays:
        for name, later in (("step", arrays["loss_step"]), ("loss", losses)):
            first = arrays[f"probe_{name}"][:1]
            arrays[f"progress_{name}"] = np.concatenate([first, later])
    for prefix in ("", "preconditioned_"):
        steps, values = files.logged(metrics, f"{prefix}eigenvalues")
        if steps.size:
            arrays[f"{prefix}eigenvalue_step"] = steps
            arrays[f"{prefix}eigenvalues"] = values
    path = folder / "arrays.npz"
    return arrays | (files.read_npz(path) if path.exists() else {})


def loss_at_probes(arrays: Mapping[str, np.ndarray], network: str) -> np.ndarray:
    """The smallest training loss so far at each probe, (rates, seeds, P).

    Args:
      arrays: those of `read_arrays`.
      network: one of the networks of the run.
    """
    names = ("probe_step", "progress_step", "progress_loss")
    probed, steps, losses = (arrays[f"{network}/{name}"] for name in names)
    lowest = np.fmin.accumulate(losses, axis=-1)
    found = np.empty(probed.shape)
    for i in np.ndindex(probed.shape[:2]):
        found[i] = np.interp(probed[i], steps[i], lowest[i])
    return found


def make_table(
    config: ConfigDict, arrays: dict[str, np.ndarray], labels: np.ndarray
) -> dict[str, Any]:
    """Results with and without batch normalization: mean and deviation over seeds.

    Probes are averaged from the end of the first epoch on. The width of the envelope
    over the learning rates is averaged over all steps, with and without dead runs, and
    over the steps of the last epoch. A loss that is not finite counts as chance level,
    and with a loss of the user as the first one of its run.

    Args:
      config: of a run of probe_landscape.
      arrays: those of `read_arrays`.
      labels: those of the training images, (N,).
    """
    table = {}
    steps_per_epoch = int(arrays["steps_per_epoch"])
    for network in config.networks:
        curves = {
            key.removeprefix(f"{network}/"): values
            for key, values in arrays.items()
            if key.startswith(f"{network}/")
        }
        if config.num_epochs:
            table |= _envelope_rows(
                config, network, curves["loss"], steps_per_epoch, labels
            )
        measures = _measures_to_average(config, curves, steps_per_epoch)
        for i, rate in enumerate(config.learning_rates):
            for key, values in measures.items():
                name = f"{network}.rate{rate:g}.{key}"
                table |= _mean_and_std(name, values[i].mean(-1))
    if set(config.networks) == set(NETWORKS) and config.num_epochs:
        for suffix in _WIDTHS:
            plain, bn = (table[f"{n}.envelope_width{suffix}"] for n in ("plain", "bn"))
            # The envelope of a single run has no width.
            is_known = plain is not None and bn
            table[f"envelope_width_ratio{suffix}"] = plain / bn if is_known else None
    if config.num_epochs:
        table |= equal_loss_table(config, arrays)
    return table


def equal_loss_table(config: ConfigDict, arrays: dict[str, np.ndarray]) -> dict:
    """Results at equal training loss, from the logs of the trainings alone.

    `NETWORK.envelope_width_at_equal_loss` is the width of the band over the learning
    rates, averaged over losses that the mean over the rates reaches with every network.
    `at_equal_loss` compares single trainings, at losses that each of them reaches: the
    epochs until it is reached, and the measures along the gradient. `low` and `high`
    are the smallest and the largest over the rates, means over the seeds. Values
    between two probes are interpolated.

    Returns:
      The entries of the table; without those that need a loss that all have reached.
    """
    losses = {n: arrays[f"{n}/progress_loss"] for n in config.networks}
    table, widths = {}, {}
    levels = _shared_levels({n: x.mean(0) for n, x in losses.items()})
    for network, values in losses.items() if levels is not None else ():
        name = f"{network}.envelope_width_at_equal_loss"
        band = probes.at_equal_loss(values.mean(0), np.ptp(values, 0), levels)
        table |= _mean_and_std(name, np.asarray(band).mean(-1))
        widths[network] = table[name]
    if set(widths) == set(NETWORKS) and widths["bn"]:
        ratio = widths["plain"] / widths["bn"]
        table["envelope_width_ratio_at_equal_loss"] = ratio
    levels = _shared_levels(losses)
    if levels is None:
        return table
    compared = {"loss": levels.tolist()}
    for network in config.networks:
        curves = {
            key: arrays[f"{network}/{key}"].max(-1)
            for key in ("probe_grad_distances", "probe_betas")
        }
        epochs = arrays[f"{network}/progress_step"] / arrays["steps_per_epoch"]
        probed = loss_at_probes(arrays, network)
        compared[network] = {}
        for name, progress, values in (
            ("epochs", losses[network], epochs),
            ("gradient_predictiveness", probed, curves["probe_grad_distances"]),
            ("effective_beta", probed, curves["probe_betas"]),
        ):
            found = np.asarray(probes.at_equal_loss(progress, values, levels))
            compared[network][name] = {
                "low": found.min(0).mean(0).tolist(),
                "high": found.max(0).mean(0).tolist(),
            }
    return table | {"at_equal_loss": compared}


def _shared_levels(losses):
    """Losses (K,) that all curves of {name: (..., T)} pass; None if there is none."""
    highest = min(values[..., 0].min() for values in losses.values())
    lowest = max(np.fmin.reduce(values, -1).max() for values in losses.values())
    if not highest > lowest:
        return None
    # Not the ends: rounding must not decide whether a loss is reached.
    return np.linspace(highest, lowest, _NUM_LEVELS + 2)[1:-1]


def _measures_to_average(config, curves, steps_per_epoch):
    """{measure: (rates, seeds, measurements)} of one network."""
    later = curves["probe_step"][0, 0] >= steps_per_epoch * (config.num_epochs > 0)
    distances, relative, betas = (
        curves[f"probe_{key}"].max(-1)
        for key in ("grad_distances", "relative_grad_distances", "betas")
    )
    measures = {
        "test_accuracy": curves["test_accuracy"][..., -1:],
        "gradient_predictiveness": distances[..., later],
        "relative_gradient_predictiveness": relative[..., later],
        "effective_beta": betas[..., later],
        "grad_norm": curves["probe_grad_norm"][..., later],
    }
    for layers in recorded_layers(config) if config.num_epochs else ():
        for key in ("grad_distance", "beta"):
            changes = curves[f"{layers}_{key}"]
            if not changes.shape[-1]:  # a single step
                continue
            # With a single epoch, the last change.
            first = min(steps_per_epoch, changes.shape[-1] - 1)
            measures[f"consecutive_{key}_{layers}"] = changes[..., first:]
    for key, name in (
        ("eigenvalues", "largest_eigenvalue_at_the_end"),
        ("preconditioned_eigenvalues", "preconditioned_sharpness_at_the_end"),
    ):
        if key in curves:
            measures[name] = curves[key][..., -1:, 0]
    return measures


def _envelope_rows(config, network, losses, steps_per_epoch, labels):
    """Widths of the band of the losses (rates, seeds, S), and dead runs."""
    dead = np.asarray(is_dead(config, losses, labels))
    without = np.log(1 + labels.max())
    if config.loss is not None and np.isfinite(losses[..., 0]).all():
        without = losses[..., :1]
    finite = np.where(np.isfinite(losses), losses, without)
    widths = {suffix: [] for suffix in _WIDTHS}
    for number in range(len(config.seeds)):
        low, high = probes.envelope(finite[:, number])
        widths[""].append(np.mean(high - low))
        widths["_at_the_end"].append(np.mean((high - low)[-steps_per_epoch:]))
        if not dead[:, number].all():
            low, high = probes.envelope(finite[:, number], dead[:, number])
            widths["_without_dead"].append(np.mean(high - low))
    table = {f"{network}.dead_runs": int(dead.sum())}
    for suffix, values in widths.items():
        table |= _mean_and_std(f"{network}.envelope_width{suffix}", values)
    return table


def _mean_and_std(name, values):
    # One seed has no deviation; no seeds have no mean.
    found = {name: float(np.mean(values)) if len(values) else None}
    if len(values) > 1:
        found[f"{name}_std"] = float(np.std(values, ddof=1))
    return found
