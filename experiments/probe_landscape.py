"""Measures the loss landscape of networks during training.

    python -m experiments.probe_landscape \\
        --config=experiments/configs/probe_landscape.py:digits

A network with and without batch normalization, or networks of your own
(--config.network=PATH.py:make_network), are trained at several learning rates. During
the training the command measures loss and gradient along the gradient (Santurkar
et al. 2018), differences of gradients between consecutive steps (the curves of the
student report), and the largest eigenvalues of the Hessian, which for Adam can be
preconditioned. After the training it measures a surface around the network and the
spectral density. With num_epochs=0 the networks are measured without training. Each
training has its own run folder `NETWORK_rateR_seedN` inside that of the run. The outer
folder has the table and the figures.
"""

import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

import lbi
from experiments.common import data, files, launch, settings
from experiments.common.sweep import sweep
from experiments.configs import probe_landscape as configs
from experiments.drawing import figures
from experiments.networks import custom, registry
from experiments.training import classifier, landscape, loop, optimizers
from experiments.training.classifier import Images, TrainState
from landscape import curvature, probes, surface

# Points of a surface between two writes of the file.
_PIECE = 25
# The optimizers of optax whose steps have the preconditioner of Adam; others, such as
# adamax and lamb, have the same state but other steps.
_ADAMS = ("adam", "adamw", "nadam", "nadamw")


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
      preconditioned: the same for the preconditioned Hessian of Adam; None if it is not
        measured.
      spectrum: (key, state) -> `curvature.Quadrature`.
      filters: {path: axes of the filters} of the network.
      surface_losses: (state, directions, points) -> losses.
    """

    problem: classifier.Problem
    init: Callable[..., TrainState]
    update: Callable[..., TrainState]
    probe: Callable[..., probes.GradientProbe]
    eigenvalues: Callable[..., curvature.Eigenpairs]
    preconditioned: Callable[..., curvature.Eigenpairs] | None
    spectrum: Callable[..., curvature.Quadrature]
    filters: dict[str, tuple[int, ...]]
    surface_losses: Callable[..., jax.Array]


def train_and_evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs or resumes one experiment; returns its summary."""
    settings.check(config, configs.RULES)
    if config.network:
        config.networks = custom.split_names(config.network)
        if config.last_layer == configs.BASE["last_layer"].value:
            config.last_layer = None
    images = classifier.load_images(config)
    _check(config, images)
    digests = classifier.digests(images) | {
        field: custom.digest(chosen)
        for field, chosen in (("network", config.network), ("loss", config.loss))
        if chosen
    }

    @functools.cache  # compiled once for all learning rates
    def tools_of(network, seed):
        return make_tools(config, images, network, seed)

    if (config.network or config.loss) and not (workdir / "summary.json").exists():
        for network in config.networks:
            _check_first_loss(config, tools_of(network, config.seeds[0]), network)

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
        arrays = landscape.read_arrays(run.workdir, config)
        return landscape.make_table(config, arrays, images.train[1])

    return sweep(
        config,
        workdir,
        experiment,
        axes={"networks": "{}", "learning_rates": "rate{:g}", "seeds": "seed{}"},
        nested=True,
        inputs=digests,
        finish=finish,
    )


def make_tools(config: ConfigDict, images: Images, network: str, seed: int) -> Tools:
    """Makes the functions of a network and seed; the learning rate is in the state."""
    single = ConfigDict(config)
    single.seeds = (seed,)
    problem = classifier.make_problem(
        single,
        images,
        _load_network(config, images, network, seed),
        **_batch_norm(network),
    )
    model, num_steps = problem.model, problem.num_steps
    loss = _load_loss(config, images)
    filters = _find_filters(problem)
    optimizer = optax.chain(
        record_changes(num_steps, landscape.recorded_layers(config)),
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
        loss=loss,
    )
    loss_fn = classifier.make_loss(model, config.bn_mode, loss)
    # The running statistics are valid only at the trained weights.
    batch_loss_fn = classifier.make_loss(model, "batch", loss)
    eigenvalues, preconditioned, spectrum = _make_eigenvalues(config, loss_fn, images)
    return Tools(
        problem=problem,
        init=init,
        update=update,
        probe=_make_probe(config, loss_fn, images, filters),
        eigenvalues=eigenvalues,
        preconditioned=preconditioned if config.sharpness.preconditioned else None,
        spectrum=spectrum,
        filters=filters,
        surface_losses=_make_surface(config, batch_loss_fn, images),
    )


def _batch_norm(network):
    """The fields of config.model that one of landscape.NETWORKS replaces."""
    is_known = network in landscape.NETWORKS
    return {"batch_norm": network == "bn"} if is_known else {}


def _load_network(config, images, network, seed):
    """A network of config.network; None if it is that of config.model."""
    if not config.network:
        return None
    shape = (config.batch_size, *images.train[0].shape[1:])
    return custom.load_network(
        config.network,
        network,
        jax.ShapeDtypeStruct(shape, jnp.float32),
        num_classes=images.num_classes,
        options=config.network_options.to_dict(),
        seed=seed,
    )


def _load_loss(config, images):
    if config.loss is None:
        return classifier.cross_entropy
    return custom.load_loss(config.loss, images.num_classes)


def _find_filters(problem):
    """The filters of the network, read from its trace."""
    images = jax.ShapeDtypeStruct((1, *problem.images.train[0].shape[1:]), jnp.float32)

    def apply(params, images):
        return problem.model.apply(problem.variables | {"params": params}, images)

    params = problem.variables["params"]
    with settings.blamed_on("network"):
        return lbi.groups(apply, params, images).filters()


def _make_optimizer(config):
    make = optimizers.find(config.name, "optimizer.name")
    with settings.blamed_on("optimizer.name"):
        make = functools.partial(optax.inject_hyperparams(make), learning_rate=1.0)
    return optimizers.check(make, config.options)


def _as_batch(images, pixels, labels, batch_stats, calibration):
    return {
        "inputs": classifier.normalize(images, pixels),
        "labels": labels,
        "batch_stats": batch_stats,
        "calibration": classifier.normalize(images, calibration),
    }


# The images are arguments of the jitted functions: XLA would treat captured ones as
# constants.


def _make_probe(config, loss_fn, images, filters):
    @jax.jit
    def probe(calibration, batch, state):
        batch = _as_batch(images, *batch, state.batch_stats, calibration)
        step_sizes = jnp.array(config.step_sizes)
        return probes.probe_gradient(
            loss_fn, state.params, batch, step_sizes, filters=filters
        )

    pixels, labels = images.train
    calibration = pixels[: config.sharpness.num_images]
    return lambda state, indices: probe(
        calibration, (pixels[indices], labels[indices]), state
    )


def _make_eigenvalues(config, loss_fn, images):
    """Eigenvalues, those of the preconditioned Hessian, and the spectrum."""
    sizes = config.sharpness

    def matvec_of(measured, state):
        pixels, labels = measured
        batch = _as_batch(images, pixels, labels, state.batch_stats, pixels)
        return functools.partial(
            curvature.hessian_vector_product, loss_fn, state.params, batch
        )

    def leading(key, matvec, params):
        return curvature.leading_eigenvalues(
            key,
            matvec,
            params,
            num=sizes.num_eigenvalues,
            num_smallest=1,
            num_steps=sizes.num_steps,
        )

    def eigenvalues(measured, key, state):
        return leading(key, matvec_of(measured, state), state.params)

    def preconditioned(measured, key, state):
        preconditioner = curvature.adam_preconditioner(**_adam_state(state.opt_state))
        matvec = curvature.preconditioned(matvec_of(measured, state), preconditioner)
        return leading(key, matvec, state.params)

    def spectrum(measured, key, state):
        return curvature.lanczos_quadrature(
            key, matvec_of(measured, state), state.params, **config.spectrum
        )

    measured = tuple(x[: sizes.num_images] for x in images.train)
    return [
        functools.partial(jax.jit(function), measured)
        for function in (eigenvalues, preconditioned, spectrum)
    ]


def _adam_state(opt_state):
    """The arguments of `curvature.adam_preconditioner`."""
    leaves = jax.tree.leaves(
        opt_state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState)
    )
    [adam] = [leaf for leaf in leaves if isinstance(leaf, optax.ScaleByAdamState)]
    names = ("b1", "b2", "eps", "eps_root")
    hyperparams = {name: optax.tree.get(opt_state, name) for name in names}
    return {"nu": adam.nu, "count": adam.count, **hyperparams}


def _make_surface(config, loss_fn, images):
    num_images = len(images.train[0])
    chunk_size = min(config.surface.chunk_size, num_images)
    num_chunks = min(config.surface.num_images, num_images) // chunk_size

    @jax.jit
    def losses(chunks, state, directions, points):
        def loss_of_chunks(params, chunks):
            return curvature.mean_over_batches(
                lambda chunk: loss_fn(
                    params, _as_batch(images, *chunk, state.batch_stats, chunk[0])
                ),
                chunks,
            )

        return surface.loss_surface(
            loss_of_chunks, state.params, chunks, directions, points
        )

    chunks = tuple(
        x[: num_chunks * chunk_size].reshape(num_chunks, chunk_size, *x.shape[1:])
        for x in images.train
    )
    return functools.partial(losses, chunks)


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
        "num_params": optax.tree.size(state.params),
    }
    if num_steps:
        dead = landscape.is_dead(config, state.loss, problem.images.train[1])
        summary["is_dead"] = bool(dead)
    if config.spectrum.num_samples:
        key = jax.random.fold_in(jax.random.key(config.seeds[0]), num_steps + 2)
        spectrum = tools.spectrum(key, state)
        for name, values in spectrum._asdict().items():
            arrays[f"spectrum_{name}"] = np.asarray(values)
        # The mean of the eigenvalues times their number.
        mean = float(jnp.sum(spectrum.nodes * spectrum.weights))
        summary["hessian_trace"] = mean * summary["num_params"]
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
        if tools.preconditioned and step:  # before the first step P is zero
            key = jax.random.fold_in(jax.random.key(config.seeds[0]), step)
            found = tools.preconditioned(jax.random.fold_in(key, 1), state)
            metrics["preconditioned_eigenvalues"] = found.values
            metrics["preconditioned_sharpness"] = float(found.values[0])
    return metrics


def _measure_surface(run, tools, state, key):
    """Losses (size, size), written in pieces: a kill loses at most one piece."""
    span, size = run.config.surface.span, run.config.surface.size
    draw = jax.jit(
        functools.partial(surface.filter_normalized_direction, filters=tools.filters)
    )
    keys = jax.random.split(key)
    first = draw(keys[0], state.params)
    second = draw(keys[1], state.params, orthogonal_to=first)
    axis = np.linspace(-span, span, size)
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
    return losses.reshape(size, size)


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


def _check(config, images):
    """Checks what depends on the images or on several fields, before any training."""
    _make_optimizer(config.optimizer)
    if config.sharpness.preconditioned and config.optimizer.name not in _ADAMS:
        raise ValueError(
            "sharpness.preconditioned needs one of the optimizers "
            f"{', '.join(_ADAMS)}; got {config.optimizer.name!r}."
        )
    if config.network is None and len(config.network_options):
        raise ValueError("network_options are those of a network; set network.")
    if config.network and config.bn_mode == "recalibrated":
        raise ValueError(
            "bn_mode=recalibrated is not available for config.network; use batch or "
            "frozen."
        )
    loss = _load_loss(config, images)
    _check_sizes(config)
    for network in config.networks:
        model = _load_network(config, images, network, config.seeds[0])
        if model is None:
            model = registry.make_model(
                config.model.to_dict() | _batch_norm(network), images.num_classes
            )
        variables = classifier.check(config, images, model)
        shapes = variables["params"]
        if config.network or config.loss:
            with settings.blamed_on(f"network {network} or its loss"):
                _check_derivatives(config, images, model, variables, loss)
        size = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
        for name, is_used in (
            ("sharpness", config.sharpness.every),
            ("spectrum", config.spectrum.num_samples),
        ):
            if is_used and config[name].num_steps > size:
                raise ValueError(
                    f"{name}.num_steps must be at most {size}, the number of "
                    f"parameters of {network}, got {config[name].num_steps}."
                )
        if config.last_layer is None:
            continue
        with settings.blamed_on("last_layer"):
            jax.eval_shape(
                lambda p: probes.consecutive_change(
                    p, p, p, p, pattern=config.last_layer
                ),
                shapes,
            )


def _check_derivatives(config, images, model, variables, loss):
    """Traces the derivatives that the run needs, without compiling them."""
    pixels, labels = (
        jax.ShapeDtypeStruct((config.batch_size, *x.shape[1:]), x.dtype)
        for x in images.train
    )
    loss_fn = classifier.make_loss(model, config.bn_mode, loss)

    def derive(params, batch_stats, pixels, labels):
        batch = _as_batch(images, pixels, labels, batch_stats, pixels)
        if config.sharpness.every or config.spectrum.num_samples:
            return curvature.hessian_vector_product(loss_fn, params, batch, params)
        return jax.grad(loss_fn)(params, batch)

    stats = variables.get("batch_stats", {})
    jax.eval_shape(derive, variables["params"], stats, pixels, labels)


def _check_first_loss(config, tools, network):
    """Refuses a network whose first loss is not a number."""
    indices = np.arange(config.batch_size)
    gradient = tools.probe(tools.init(config.learning_rates[0]), indices)
    if not np.isfinite(gradient.loss):
        raise ValueError(
            f"the loss of the initial network {network} is {float(gradient.loss)}."
        )


def _check_sizes(config):
    measured = config.sharpness
    # The smallest eigenvalue is measured too.
    if measured.every and measured.num_eigenvalues >= measured.num_steps:
        raise ValueError(
            f"sharpness.num_eigenvalues must be below sharpness.num_steps "
            f"({measured.num_steps}), got {measured.num_eigenvalues}; "
            "sharpness.every=0 omits them."
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
