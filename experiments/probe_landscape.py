"""Measures the loss landscape of networks in training (report, 3.1 and 3.2).

    python -m experiments.probe_landscape \
        --config=experiments/configs/probe_landscape.py:digits

A network with and without batch normalization is trained at several learning rates.
During the training the command measures loss and gradient along the gradient (Santurkar
et al. 2018), differences of gradients between consecutive steps (the report's curves),
and the largest eigenvalues of the Hessian. After the training it measures a surface
around the network. Each training has its own run folder `NETWORK_rateR_seedN` inside
that of the run. The outer folder has the table and the figures.
"""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from experiments.common import data, figures, files, launch, settings
from experiments.common.sweep import sweep
from experiments.configs import probe_landscape as configs
from experiments.training import classifier, loop, optimizers
from experiments.training.classifier import Images, TrainState
from landscape import curvature, probes, surface

_NETWORKS = ("bn", "plain")
# Widths of the envelope: over all steps, over the last epoch, and of runs that learn.
_WIDTHS = ("", "_at_the_end", "_without_dead")
# Points of a surface between two writes of the file.
_PIECE = 25


class ChangesState(NamedTuple):
    """State of `record_changes`.

    Attributes:
      count: number of updates, (), int32.
      params: parameters at the last update.
      grads: gradient at the last update.
      changes: {name: `probes.ConsecutiveChange` of (S,)}; the first entry is undefined,
        because no step precedes it.
    """

    count: jax.Array
    params: Any
    grads: Any
    changes: dict[str, probes.ConsecutiveChange]


def record_changes(
    num_steps: int, patterns: dict[str, str | None]
) -> optax.GradientTransformation:
    """First transformation of a chain: records how gradients change between steps.

    Args:
      num_steps: S.
      patterns: {name: pattern of `probes.consecutive_change`}.

    Returns:
      A transformation that does not change the updates; it needs the parameters.
    """

    def init_fn(params):
        empty = probes.ConsecutiveChange(*[jnp.zeros(num_steps)] * 3)
        return ChangesState(
            count=jnp.zeros([], jnp.int32),
            # Copies: the buffers of the state are donated, and each only once.
            params=jax.tree.map(jnp.copy, params),
            grads=jax.tree.map(jnp.zeros_like, params),
            changes={name: jax.tree.map(jnp.copy, empty) for name in patterns},
        )

    def update_fn(updates, state, params=None):
        changes = {}
        for name, pattern in patterns.items():
            change = probes.consecutive_change(
                state.params, state.grads, params, updates, pattern=pattern
            )
            changes[name] = jax.tree.map(
                lambda record, value: record.at[state.count].set(value),
                state.changes[name],
                change,
            )
        count = optax.safe_increment(state.count)
        return updates, ChangesState(count, params, updates, changes)

    return optax.GradientTransformation(init_fn, update_fn)


class Tools(NamedTuple):
    """Functions shared by the trainings of one network and seed, compiled once.

    Attributes:
      problem: the network, its initial variables, and the images.
      init: rate -> the state before the first step.
      update: see `classifier.make_update`.
      probe: (state, indices of training images) -> `probes.GradientProbe`.
      eigenvalues: (key, state) -> `curvature.Eigenpairs`.
      surface_losses: (state, directions, points) -> losses.
    """

    problem: classifier.Problem
    init: Callable[..., TrainState]
    update: Callable[..., TrainState]
    probe: Callable[..., probes.GradientProbe]
    eigenvalues: Callable[..., curvature.Eigenpairs]
    surface_losses: Callable[..., jax.Array]


def train_and_evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs or resumes one experiment; returns its summary."""
    settings.check(config, configs.RULES)
    images = classifier.load_images(config)
    _check(config, images)

    @functools.cache  # compiled once for all learning rates
    def tools_of(network, seed):
        return make_tools(config, images, network, seed)

    def experiment(run):
        [network], [seed] = run.config.networks, run.config.seeds
        [rate] = run.config.learning_rates
        with_surface = (
            config.surface.size > 0
            and rate == config.surface.learning_rate
            and seed == config.seeds[0]
        )
        return _train_one(run, tools_of(network, seed), with_surface=with_surface)

    def finish(run, summaries):
        figures.draw(run.workdir)
        arrays = figures.landscape_arrays(run.workdir, config)
        return make_table(config, arrays, images.num_classes)

    return sweep(
        config,
        workdir,
        experiment,
        axes={"networks": "{}", "learning_rates": "rate{:g}", "seeds": "seed{}"},
        nested=True,
        finish=finish,
    )


def make_tools(config: ConfigDict, images: Images, network: str, seed: int) -> Tools:
    """Makes the functions of a network and seed; the learning rate is in the state."""
    single = ConfigDict(config)
    single.seeds = (seed,)
    problem = classifier.make_problem(single, images, batch_norm=network == "bn")
    model, num_steps = problem.model, problem.num_steps
    optimizer = optax.chain(
        record_changes(
            num_steps, {"last_layer": config.last_layer, "all_layers": None}
        ),
        _make_optimizer(config.optimizer),
    )

    def init(rate):
        # Copies: the buffers of the state are donated.
        fresh = jax.tree.map(jnp.copy, problem.variables)
        state = classifier.init_state(fresh, optimizer, num_steps)
        opt_state = optax.tree.set(state.opt_state, learning_rate=jnp.float32(rate))
        return state.replace(opt_state=opt_state)

    update = classifier.make_update(
        model,
        images,
        optimizer,
        batch_size=config.batch_size,
        augmented=False,
        seed=seed,
    )
    return Tools(
        problem=problem,
        init=init,
        update=update,
        probe=_make_probe(config, model, images),
        eigenvalues=_make_eigenvalues(config, model, images),
        surface_losses=_make_surface(config, model, images),
    )


def _make_optimizer(config):
    make = optimizers.find(config.name, "optimizer.name")
    with settings.blamed_on("optimizer.name"):
        make = functools.partial(optax.inject_hyperparams(make), learning_rate=1.0)
    return optimizers.check(make, config.options)


def _as_batch(images, pixels, labels, batch_stats, calibration):
    return {
        "inputs": classifier.normalise(images, pixels),
        "labels": labels,
        "batch_stats": batch_stats,
        "calibration": classifier.normalise(images, calibration),
    }


def _make_probe(config, model, images):
    loss_fn = classifier.make_loss(model, config.bn_mode)
    pixels, labels = images.train
    calibration = pixels[: config.sharpness.num_images]

    @jax.jit
    def probe(params, batch_stats, pixels, labels, calibration):
        batch = _as_batch(images, pixels, labels, batch_stats, calibration)
        step_sizes = jnp.array(config.step_sizes)
        return probes.probe_gradient(loss_fn, params, batch, step_sizes)

    return lambda state, indices: probe(
        state.params, state.batch_stats, pixels[indices], labels[indices], calibration
    )


def _make_eigenvalues(config, model, images):
    loss_fn = classifier.make_loss(model, config.bn_mode)
    sizes = config.sharpness
    pixels, labels = (x[: sizes.num_images] for x in images.train)

    @jax.jit
    def eigenvalues(key, params, batch_stats, pixels, labels):
        batch = _as_batch(images, pixels, labels, batch_stats, pixels)
        matvec = functools.partial(
            curvature.hessian_vector_product, loss_fn, params, batch
        )
        return curvature.leading_eigenvalues(
            key,
            matvec,
            params,
            num=sizes.num_eigenvalues,
            num_smallest=1,
            num_steps=sizes.num_steps,
        )

    return lambda key, state: eigenvalues(
        key, state.params, state.batch_stats, pixels, labels
    )


def _make_surface(config, model, images):
    # The running statistics are valid only at the trained weights.
    loss_fn = classifier.make_loss(model, "batch")
    settings = config.surface
    chunk_size = min(settings.chunk_size, len(images.train[0]))
    num_chunks = min(settings.num_images, len(images.train[0])) // chunk_size

    @jax.jit
    def losses(params, batch_stats, directions, points, pixels, labels):
        def loss_of_chunks(params, chunks):
            return curvature.mean_over_batches(
                lambda chunk: loss_fn(
                    params, _as_batch(images, *chunk, batch_stats, chunk[0])
                ),
                chunks,
            )

        return surface.loss_surface(
            loss_of_chunks, params, (pixels, labels), directions, points
        )

    chunks = [
        x[: num_chunks * chunk_size].reshape(num_chunks, chunk_size, *x.shape[1:])
        for x in images.train
    ]
    return lambda state, directions, points: losses(
        state.params, state.batch_stats, directions, points, *chunks
    )


def _train_one(run, tools, *, with_surface):
    config, problem = run.config, tools.problem
    num_steps = problem.num_steps
    intervals = [config.probe_every]
    if config.sharpness.every:
        intervals.append(config.sharpness.every)
    # Divergence is a result here: the run continues and is marked.
    state = classifier.train(
        run,
        problem,
        tools.init(config.learning_rates[0]),
        tools.update,
        measure=lambda state, step: _measure(config, tools, state, step),
        stops={0} | loop.every(num_steps, *intervals),
        may_diverge=True,
    )
    arrays = {"loss": np.asarray(state.loss)}
    for name, change in optax.tree.get(state.opt_state, "changes").items():
        for key, values in change._asdict().items():
            # No step precedes the first one.
            arrays[f"{name}_{key}"] = np.asarray(values[1:])
    summary = {
        "test_accuracy": run.metrics()[-1]["test_accuracy"],
        "is_dead": bool(probes.is_dead(state.loss, problem.images.num_classes)),
        "num_params": sum(x.size for x in jax.tree.leaves(state.params)),
    }
    if with_surface:
        started = time.monotonic()
        key = jax.random.fold_in(jax.random.key(config.seeds[0]), num_steps + 1)
        arrays["surface"] = _measure_surface(run, tools, state, key)
        # Includes compilation; counted from the last start of the run.
        summary["surface_seconds"] = round(time.monotonic() - started, 1)
    files.write_npz(run.workdir / "arrays.npz", arrays)
    return summary


def _measure(config, tools, state, step):
    """The measurements of this step: lists are logged, numbers are also shown."""
    problem = tools.problem
    is_last = step == problem.num_steps
    metrics = {}
    if step % problem.steps_per_epoch == 0:
        metrics["test_accuracy"] = problem.test_accuracy(state.variables)
    if step % config.probe_every == 0 or is_last:
        indices = data.batch_indices(
            config.seeds[0],
            step,
            num_examples=len(problem.images.train[0]),
            batch_size=config.batch_size,
        )
        metrics["probe"] = tools.probe(state, indices)._asdict()
    every = config.sharpness.every
    if every and (step % every == 0 or is_last):
        key = jax.random.fold_in(jax.random.key(config.seeds[0]), step)
        found = tools.eigenvalues(key, state)
        metrics["eigenvalues"] = found.values
        metrics["residuals"] = found.residuals
        metrics["sharpness"] = float(found.values[0])
    return metrics


def _measure_surface(run, tools, state, key):
    """Losses (size, size), written in pieces: a kill loses at most one piece."""
    settings = run.config.surface
    draw = jax.jit(surface.filter_normalized_direction)
    keys = jax.random.split(key)
    first = draw(keys[0], state.params)
    second = draw(keys[1], state.params, orthogonal_to=first)
    axis = np.linspace(-settings.span, settings.span, settings.size)
    points = surface.grid(axis, axis)
    path = run.workdir / "surface.npz"
    known = np.full(len(points), np.nan, np.float32)
    if path.exists():
        known = _stored_losses(run, path, known)
    run.say(f"surface: {int(np.isnan(known).sum())} points left")
    losses = known
    for losses in surface.fill_missing(
        lambda piece: tools.surface_losses(state, [first, second], piece),
        points,
        known,
        piece=_PIECE,
    ):
        files.write_npz(path, {"losses": losses})
    return losses.reshape(settings.size, settings.size)


def _stored_losses(run, path, unknown):
    """The losses of an interrupted run; `unknown` if the file is damaged."""
    try:
        losses = files.read_npz(path)["losses"]
        if (losses.shape, losses.dtype) == (unknown.shape, unknown.dtype):
            return losses
    except (ValueError, KeyError):
        pass
    run.say(f"{path} is damaged; the surface is computed again.")
    return unknown


def make_table(
    config: ConfigDict, arrays: dict[str, np.ndarray], num_classes: int
) -> dict[str, Any]:
    """Results with and without batch normalization: mean and deviation over seeds.

    Probes are averaged from the end of the first epoch on. The width of the envelope
    over the learning rates is averaged over all steps, with and without dead runs, and
    over the steps of the last epoch.
    """
    table = {}
    steps_per_epoch = int(arrays["steps_per_epoch"])
    for network in config.networks:
        curves = {
            key.removeprefix(f"{network}/"): values
            for key, values in arrays.items()
            if key.startswith(f"{network}/")
        }
        losses = curves["loss"]  # (rates, seeds, S)
        dead = np.asarray(probes.is_dead(losses, num_classes))
        finite = np.where(np.isfinite(losses), losses, np.log(num_classes))
        widths = {suffix: [] for suffix in _WIDTHS}
        for number in range(len(config.seeds)):
            low, high = probes.envelope(finite[:, number])
            widths[""].append(np.mean(high - low))
            widths["_at_the_end"].append(np.mean((high - low)[-steps_per_epoch:]))
            if not dead[:, number].all():
                low, high = probes.envelope(finite[:, number], dead[:, number])
                widths["_without_dead"].append(np.mean(high - low))
        for suffix, values in widths.items():
            table |= _mean_and_std(f"{network}.envelope_width{suffix}", values)
        table[f"{network}.dead_runs"] = int(dead.sum())
        later = curves["probe_step"][0, 0] >= steps_per_epoch
        distances, relative, betas = (
            curves[f"probe_{key}"].max(-1)
            for key in ("grad_distances", "relative_grad_distances", "betas")
        )
        measures = {  # each (rates, seeds, measurements), to be averaged
            "test_accuracy": curves["test_accuracy"][..., -1:],
            "gradient_predictiveness": distances[..., later],
            "relative_gradient_predictiveness": relative[..., later],
            "effective_beta": betas[..., later],
            "grad_norm": curves["probe_grad_norm"][..., later],
        }
        for layers in ("last_layer", "all_layers"):
            for key in ("grad_distance", "beta"):
                changes = curves[f"{layers}_{key}"]
                # With a single epoch, the last change.
                first = min(steps_per_epoch, changes.shape[-1] - 1)
                measures[f"consecutive_{key}_{layers}"] = changes[..., first:]
        if "eigenvalues" in curves:
            largest = curves["eigenvalues"][..., -1:, 0]
            measures["largest_eigenvalue_at_the_end"] = largest
        for i, rate in enumerate(config.learning_rates):
            for key, values in measures.items():
                name = f"{network}.rate{rate:g}.{key}"
                table |= _mean_and_std(name, values[i].mean(-1))
    if set(config.networks) == set(_NETWORKS):
        for suffix in _WIDTHS:
            plain, bn = (table[f"{n}.envelope_width{suffix}"] for n in ("plain", "bn"))
            # The envelope of a single run has no width.
            is_known = plain is not None and bn
            table[f"envelope_width_ratio{suffix}"] = plain / bn if is_known else None
    return table


def _mean_and_std(name, values):
    # One seed has no deviation; no seeds have no mean.
    found = {name: float(np.mean(values)) if len(values) else None}
    if len(values) > 1:
        found[f"{name}_std"] = float(np.std(values, ddof=1))
    return found


def _check(config, images):
    """Checks what depends on the images or on several fields, before any training."""
    _make_optimizer(config.optimizer)
    for network in config.networks:
        shapes = classifier.check(config, images, batch_norm=network == "bn")["params"]
        with settings.blamed_on("last_layer"):
            jax.eval_shape(
                lambda p: probes.consecutive_change(
                    p, p, p, p, pattern=config.last_layer
                ),
                shapes,
            )
    measured = config.sharpness
    if measured.num_eigenvalues > measured.num_steps:
        raise ValueError(
            f"sharpness.num_eigenvalues must be at most sharpness.num_steps "
            f"({measured.num_steps}), got {measured.num_eigenvalues}."
        )
    sizes = config.surface
    if sizes.size and sizes.learning_rate not in config.learning_rates:
        raise ValueError(
            f"surface.learning_rate must be one of learning_rates "
            f"{config.learning_rates}, got {sizes.learning_rate:g}; surface.size=0 "
            "omits the surface."
        )
    if sizes.size and sizes.chunk_size > sizes.num_images:
        raise ValueError(
            f"surface.chunk_size must be at most surface.num_images "
            f"({sizes.num_images}), got {sizes.chunk_size}."
        )


if __name__ == "__main__":
    launch.launch("probe_landscape", train_and_evaluate)
