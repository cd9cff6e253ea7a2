"""The outer loop of meta-learning: state, batches and compiled step."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import struct
from ml_collections import ConfigDict

import functa
from experiments.common import data, devices, runs
from experiments.training import encoding, loop, optimizers


@struct.dataclass
class TrainState:
    """The state of the outer loop.

    Attributes:
      weights: the trained leaves {"params": ..., "learning_rate": (), (L,) or (S, L)}.
      opt_state: state of the outer optimizer.
      average: exponential moving average of `weights`, or None.
      latent: start of every inner loop, (*Z); not trained.
      guard: what a recovery from a collapse needs, or None.
    """

    weights: dict[str, Any]
    opt_state: optax.OptState
    average: dict[str, Any] | None
    latent: jax.Array
    guard: "Guard | None" = None

    def trained(self) -> tuple[Any, ...]:
        """The parts that an update changes."""
        return self.weights, self.opt_state, self.average

    def with_trained(self, parts: tuple[Any, ...]) -> "TrainState":
        """The state with other parts that an update changes."""
        weights, opt_state, average = parts
        return self.replace(weights=weights, opt_state=opt_state, average=average)


@struct.dataclass
class Guard:
    """States to return to when the training collapses.

    A collapse is noticed at the end of an interval of steps, after it has begun. The
    state to return to is therefore one interval older than the last sound one.

    Attributes:
      good: trained parts after the last sound interval but one.
      latest: trained parts after the last sound interval.
      best_psnr: the best PSNR of the intervals that are compared, ().
      scale: factor of the updates, (); each recovery lowers it.
      num_recoveries: ().
    """

    good: Any
    latest: Any
    best_psnr: jax.Array
    scale: jax.Array
    num_recoveries: jax.Array


# Variance of rounding to 8 bits: a batch of constant signals has at least this power.
MIN_POWER = 1 / (12 * 255**2)
# Factor of the updates after a recovery, and the number of recoveries that is allowed.
_SLOWER, _MAX_RECOVERIES = 0.5, 8


def keep_or_recover(
    state: TrainState, psnr: float, *, max_drop: float, other_latents: bool = False
) -> tuple[TrainState, bool]:
    """Stores a sound state, or returns to the last good one after a collapse.

    Args:
      state: the state after an interval of steps.
      psnr: PSNR, or another ratio of a power to the mean squared error, of the interval
        in dB; NaN counts as a collapse.
      max_drop: largest fall below the best interval so far, in dB.
      other_latents: whether the latents of earlier intervals were those of a warm
        start. Half of the decibels that they reached is then enough.

    Returns:
      The state to continue with, and whether it is an earlier one.

    Raises:
      ValueError: if the training has collapsed too often.
    """
    guard = state.guard
    if other_latents:
        guard = guard.replace(
            best_psnr=jnp.minimum(guard.best_psnr, guard.best_psnr / 2)
        )
    if psnr >= guard.best_psnr - max_drop:
        guard = guard.replace(
            good=guard.latest,
            latest=jax.tree.map(jnp.copy, state.trained()),
            best_psnr=jnp.maximum(guard.best_psnr, psnr),
        )
        return state.replace(guard=guard), False
    num_recoveries = guard.num_recoveries + 1
    if num_recoveries > _MAX_RECOVERIES:
        raise ValueError(
            f"the training has collapsed {num_recoveries} times; lower "
            "optimizer.learning_rate."
        )
    guard = guard.replace(
        latest=jax.tree.map(jnp.copy, guard.good),
        scale=_SLOWER * guard.scale,
        num_recoveries=num_recoveries,
    )
    state = state.with_trained(jax.tree.map(jnp.copy, guard.good))
    return state.replace(guard=guard), True


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Global-norm clipping, then the optimizer with one learning rate per part.

    Raises:
      ValueError: as `optimizer.make_optimizer`.
    """
    settings = config.optimizer
    rates = settings.copy_and_resolve_references()
    rates.learning_rate *= settings.rate_multiplier
    parts = {"weights": settings, "rates": rates}
    by_part = {
        name: optimizers.make_optimizer(part, config.num_steps)
        for name, part in parts.items()
    }
    if not config.inner.meta_sgd:
        by_part["rates"] = optax.set_to_zero()
    clip = optax.identity()
    if settings.clip_norm:
        clip = optax.clip_by_global_norm(settings.clip_norm)
    labels = {"params": "weights", "learning_rate": "rates"}
    return optax.chain(clip, optax.partition(by_part, labels))


def init_state(
    config: ConfigDict,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    learner: encoding.Learner | None = None,
    *,
    num_coords: int = 2,
) -> TrainState:
    """The state before the first step, from the seed or from a learner.

    The positions of the points have `num_coords` coordinates.
    """
    if learner is None:
        key_params, key_rates = jax.random.split(jax.random.key(config.seeds[0]))
        latent = model.initial_latent()
        # The cells of a grid share their rates.
        shape = latent.shape[-1:] if config.inner.meta_sgd else ()
        if config.inner.rates_per_step:
            shape = (config.inner.num_steps, *(shape or (1,)))
        low, high = config.inner.rate_range
        rates = jax.random.uniform(key_rates, shape, minval=low, maxval=high)
        coords = jnp.zeros((1, num_coords))
        params = jax.jit(model.init)(key_params, coords, latent)["params"]
    else:
        params, latent, rates = learner.params, learner.latent, learner.learning_rate
        if learner.cell is not None:  # It may have been trained by cells, or not.
            latent = model.initial_latent()
    weights = {"params": params, "learning_rate": rates}
    # A copy: the buffers of the state are donated, and each only once.
    average = jax.tree.map(jnp.copy, weights) if config.optimizer.ema_decay else None
    state = TrainState(weights, jax.jit(optimizer.init)(weights), average, latent)
    if config.max_drop:
        state = state.replace(guard=make_guard(state.trained()))
    return devices.replicate(state)


def make_guard(trained: Any) -> Guard:
    """The guard before the first step, of the parts that an update changes."""
    return Guard(
        *[jax.tree.map(jnp.copy, trained) for _ in range(2)],
        best_psnr=jnp.array(-jnp.inf),
        scale=jnp.array(1.0),
        num_recoveries=jnp.array(0),
    )


def calibrated_rate(
    model: nn.Module,
    params: Any,
    shape: Sequence[int],
    fraction: float,
    *,
    coords: np.ndarray | None = None,
    weight: np.ndarray | None = None,
) -> jax.Array:
    """Learning rate of the inner loop at fraction / (largest eigenvalue at its start).

    An inner step contracts if its rate is below 2 / eigenvalue
    (`functa.largest_eigenvalue`). A grid has the rates of one of its cells.

    Args:
      model: the field.
      params: its weights.
      shape: points of a signal along each axis.
      fraction: below 2.
      coords: positions (*shape, d) of the points; by default those of a regular grid.
      weight: weights (*shape) of the points, or None.
    """
    coords = functa.coordinate_grid(shape) if coords is None else coords

    @jax.jit
    def find_eigenvalue(params):
        return functa.largest_eigenvalue(
            lambda z: model.apply({"params": params}, coords, z),
            model.initial_latent(),
            weight=weight,
        )

    return fraction / (find_eigenvalue(params) * _num_cells(model))


def set_first_rates(
    config: ConfigDict,
    model: nn.Module,
    state: TrainState,
    shape: Sequence[int],
    warm: "WarmStart | None",
    **points: Any,
) -> TrainState:
    """The state with the rates of a warm start, or else with calibrated ones.

    Args:
      config: configuration of the run.
      model: the field.
      state: the state before the first step, from the seed.
      shape: points of a signal along each axis.
      warm: the warm start, if any.
      **points: other keywords of `calibrated_rate`.
    """
    if warm is not None:
        return _fill_rates(state, warm.rate)
    fraction = config.inner.calibration
    if not fraction:
        return state
    params = state.weights["params"]
    rate = calibrated_rate(model, params, shape, fraction, **points)
    return _fill_rates(state, rate)


def _fill_rates(state, rate):
    """The state with one value for all learning rates of the inner loop."""

    def fill(weights):
        rates = weights["learning_rate"]
        return weights | {"learning_rate": jnp.full_like(rates, rate)}

    average = None if state.average is None else fill(state.average)
    state = state.replace(weights=fill(state.weights), average=average)
    return devices.replicate(state)


def _num_cells(model):
    return getattr(model, "num_cells", 1)


def apply_gradients(
    config: ConfigDict,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    grads: dict[str, Any],
) -> TrainState:
    """The state after one update by the gradients of its weights."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.weights)
    if state.guard is not None:
        updates = jax.tree.map(lambda x: state.guard.scale * x, updates)
    weights = optax.apply_updates(state.weights, updates)
    if config.inner.rate_clip:
        rates = jnp.clip(weights["learning_rate"], *config.inner.rate_clip)
        weights = weights | {"learning_rate": rates}
    average = state.average
    if average is not None:
        decay = config.optimizer.ema_decay
        average = optax.incremental_update(weights, average, 1 - decay)
    return state.replace(weights=weights, opt_state=opt_state, average=average)


def make_update(
    config: ConfigDict,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    apply_fn: Callable[..., jax.Array] | None = None,
):
    """The jitted outer step: (state, coords, targets, key, weight) -> ...

    Coordinates are (N, d) and targets (B, N, C), or what `apply_fn` takes and returns.
    The weights of the points are (N,), or None.

    Args:
      config: configuration of the run.
      model: the field.
      optimizer: as from `make_optimizer`.
      apply_fn: by default `model.apply`.

    Returns:
      A function that returns the new state and, from before the update, the outer loss
      () and the mean PSNR after every inner step, (S + 1,).
    """
    inner = config.inner
    apply_fn = apply_fn or model.apply

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=devices.replicated())
    def update(state, coords, targets, key, weight=None):
        batch_size, num_points = len(targets), math.prod(targets.shape[1:-1])
        noise = None
        if inner.noise_std:
            shape = (batch_size, *state.latent.shape)
            noise = inner.noise_std * jax.random.normal(key, shape)

        def spread(rates):
            # The loss is a mean over the cells; the rates are those of one cell.
            rates = _num_cells(model) * rates
            return functa.spatial.spread_rates(rates, state.latent.shape)

        rates, pull_back = jax.vjp(spread, state.weights["learning_rate"])
        (grads, rate_grads), info = functa.meta_gradient(
            apply_fn,
            state.weights["params"],
            state.latent,
            coords,
            targets,
            learning_rate=rates,
            noise=noise,
            num_groups=count_groups(batch_size, num_points, config.points_per_group),
            first_order=inner.first_order,
            weight=weight,
            **encoding.fit_options(config, _num_cells(model)),
        )
        [rate_grads] = pull_back(rate_grads)
        grads = {"params": grads, "learning_rate": rate_grads}
        state = apply_gradients(config, optimizer, state, grads)
        psnr = functa.psnr(info.mse).mean(0)
        return state, info.loss[:, -1].mean(), psnr

    return update


def _warm_scale(size):
    """Number by which components of signals of `size` values are divided.

    The latents of CIFAR-10, with 48 values in a cell, then have deviations below 0.2,
    and the rates are near 0.3. The components of larger signals are larger.
    """
    return 9.0 * max(size / 48, 1) ** 0.5


class WarmStart(NamedTuple):
    """Principal components that the field learns to decode before meta-learning.

    With the Jacobian V s of a code (y - mean) V / s, the matrix of the inner loop is
    2 s^2 / n times the identity, for n values of a signal. One step at the inverse rate
    then reconstructs a signal like the principal components.

    Attributes:
      mean: (n,).
      components: (K, n).
      rate: learning rate of the inner loop.
    """

    mean: np.ndarray
    components: np.ndarray
    rate: float

    def codes(self, targets: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Latents (B, *shape) of targets; zero beyond K entries.

        The targets are (B, N, C), with n values each, or grids of cells of n values.
        """
        flat = targets.reshape(-1, len(self.mean)) - self.mean
        codes = flat @ self.components.T / _warm_scale(len(self.mean))
        size = math.prod(shape) * len(targets) // len(codes)
        codes = np.pad(codes, ((0, 0), (0, size - codes.shape[1])))
        return np.float32(codes.reshape(-1, *shape))


def make_warm_start(signals: np.ndarray, latent_size: int) -> WarmStart:
    """Principal components of the signals (N, *shape, C), at most 10^6 of them."""
    size = math.prod(signals.shape[1:])
    signals = signals[:: max(1, len(signals) // 10**6)]
    # Few signals have fewer components than values.
    num = min(latent_size, size, max(len(signals) - 1, 1))
    pca = functa.linear.fit_pca(signals, num)
    rate = size / (2 * _warm_scale(size) ** 2)
    return WarmStart(np.float32(pca.mean), np.float32(pca.components), rate)


def coded_signals(
    model: nn.Module, images: np.ndarray, *, by_cells: bool
) -> tuple[np.ndarray, int]:
    """What has a code in a warm start, and how many components the code has.

    These are the images or, `by_cells`, their cells (N, *cell, C).
    """
    if not by_cells:
        return images, math.prod(model.latent_shape)
    cells = functa.spatial.split_cells(images, model.grid)
    return cells.reshape(-1, *cells.shape[len(model.grid) + 1 :]), model.channels


def make_warm_update(
    config: ConfigDict,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    apply_fn: Callable[..., jax.Array] | None = None,
):
    """The jitted regression of targets (B, ..., C) on their codes (B, *Z).

    The arguments are those of `make_update`; the function that is returned also takes
    the weights of the points, (...), or None.
    """
    apply_fn = apply_fn or model.apply

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=devices.replicated())
    def update(state, coords, targets, codes, weight=None):
        def loss_fn(params):
            fields = jax.vmap(lambda z: apply_fn({"params": params}, coords, z))
            error = jnp.square(fields(codes) - targets)
            if weight is not None:
                error = error * (weight / weight.mean()).reshape(1, *weight.shape, 1)
            return error.mean(range(1, error.ndim))

        def mean_loss(params):
            loss = loss_fn(params)
            return loss.mean(), loss

        grads, loss = jax.grad(mean_loss, has_aux=True)(state.weights["params"])
        rates = state.weights["learning_rate"]
        grads = {"params": grads, "learning_rate": jnp.zeros_like(rates)}
        state = apply_gradients(config, optimizer, state, grads)
        psnr = jnp.full(config.inner.num_steps + 1, functa.psnr(loss).mean())
        return state, loss.mean(), psnr

    return update


def select_points(config: ConfigDict, num_points: int, step: int) -> Any:
    """Index of the points of update `step`: config.num_pixels of them, or all."""
    if not 0 < config.num_pixels < num_points:
        return slice(None)
    rng = np.random.default_rng((config.seeds[0], step, 1))
    return rng.choice(num_points, config.num_pixels, replace=False)


def _batch_indices(config, images, step):
    return data.batch_indices(
        config.seeds[0], step, num_examples=len(images), batch_size=config.batch_size
    )


def select_signals(
    config: ConfigDict, signals: np.ndarray, step: int, mean: Any = 0.0
) -> np.ndarray:
    """The signals of update number `step`, or mixtures of two, float32 (B, ...).

    A mixture of x and y is m + cos(a) (x - m) + sin(a) (y - m) with the mean m of all
    signals and a random angle a. Its covariance is that of the signals, because x and y
    are drawn independently; principal components are therefore the same.

    Args:
      config: the configuration; with mix_signals they are mixtures.
      signals: (N, ...), or their codes.
      step: number of the update.
      mean: m; the mean of codes is 0.
    """
    chosen = data.to_float(signals[_batch_indices(config, signals, step)])
    if not config.mix_signals:
        return chosen
    rng = np.random.default_rng((config.seeds[0], step, 2))
    others = data.to_float(signals[rng.integers(len(signals), size=len(chosen))])
    angle = rng.uniform(0, 2 * np.pi, (len(chosen), *[1] * (chosen.ndim - 1)))
    mixed = np.cos(angle) * (chosen - mean) + np.sin(angle) * (others - mean)
    return np.float32(mean + mixed)


def make_batch(
    config: ConfigDict,
    images: np.ndarray,
    step: int,
    coords: np.ndarray | None = None,
    mean: np.ndarray | float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """The coordinates (N, d) and targets (B, N, C) of update number `step`.

    The points of a signal are at `coords` (*shape, d), by default a regular grid.
    Mixtures need the `mean` of all signals, (*shape, C).
    """
    targets = select_signals(config, images, step, mean)
    if step < config.coarse_steps:
        batch, height, width, channels = targets.shape
        factor = config.coarse_factor
        cells = (height // factor, factor, width // factor, factor)
        targets = targets.reshape(batch, *cells, channels).mean((2, 4))
    if coords is None:
        coords = functa.coordinate_grid(targets.shape[1:-1])
    coords = coords.reshape(-1, coords.shape[-1])
    targets = targets.reshape(len(targets), -1, targets.shape[-1])  # (B, N, C)
    kept = select_points(config, len(coords), step)
    return coords[kept], targets[:, kept]


def train(
    run: runs.Run,
    model: nn.Module,
    images: np.ndarray,
    learner: encoding.Learner | None = None,
    *,
    coords: np.ndarray | None = None,
    weight: np.ndarray | None = None,
) -> TrainState:
    """Meta-learns on images according to run.config; resumes from a checkpoint.

    Args:
      run: the open run folder.
      model: the field.
      images: uint8 (N, H, W, C), or the values of fields, float32 (N, *shape, C).
      learner: start of the training; None starts from random weights.
      coords: positions (*shape, d) of the points; by default those of a regular grid.
      weight: weights (*shape) of the points in the loss, or None.
    """
    config = run.config
    num_steps = config.num_steps
    devices.check_divisible(config.batch_size)
    view = None
    if config.by_cells:
        # A cell is a signal of its own; a batch has cells of different images.
        images = functa.spatial.layout(model, images.shape[1:-1]).split(images)
        model = model.cell()
    elif config.cell:
        view = functa.spatial.layout(model, images.shape[1:-1], separate=False)
    apply_fn = view.apply_fn if view else model.apply
    mean = 0.0
    if config.mix_signals:
        scale = 255 if images.dtype == np.uint8 else 1
        mean = np.float32(images.mean(0, dtype=np.float64) / scale)
    optimizer = make_optimizer(config)
    update = make_update(config, model, optimizer, apply_fn)
    warm, all_codes, num_warm_steps = None, None, 0
    if config.warm_start_steps and learner is None:
        num_warm_steps = config.warm_start_steps
        signals, size = coded_signals(model, images, by_cells=view is not None)
        if weight is not None:  # The components have the weights of the loss.
            signals = signals * np.sqrt(weight)[..., None]
        warm = make_warm_start(signals, size)
        if config.num_pixels or weight is not None:
            # A batch does not have all values that the codes are made of.
            all_codes = warm.codes(data.to_float(signals), model.latent_shape)
        warm_update = make_warm_update(config, model, optimizer, apply_fn)
    key = jax.random.key(config.seeds[0] + 1)
    compiled = set()

    def advance(state, start, stop):
        losses, psnrs, powers = [], [], []
        for step in range(start, stop):
            points, targets = make_batch(config, images, step, coords, mean)
            powers.append(targets.var() + MIN_POWER)
            weights = None
            if weight is not None:
                weights = weight.ravel()
                weights = weights[select_points(config, len(weights), step)]
            if view:
                targets = view.split(targets.reshape(-1, *images.shape[1:]))
                points = view.coords
            if targets.shape not in compiled:
                compiled.add(targets.shape)
                run.say(f"compiling the outer step for batches of {targets.shape} ...")
            if step < num_warm_steps:
                if all_codes is None:
                    codes = warm.codes(targets, model.latent_shape)
                else:
                    codes = select_signals(config, all_codes, step)
                state, loss, psnr = warm_update(
                    state, points, *devices.divide((targets, codes)), weights
                )
            else:
                step_key = jax.random.fold_in(key, step)
                state, loss, psnr = update(
                    state, points, devices.divide(targets), step_key, weights
                )
            losses.append(loss)
            psnrs.append(psnr)
        psnr = np.mean(jax.device_get(psnrs), axis=0)
        metrics = {"psnr": float(psnr[-1]), "psnr_per_step": psnr}
        if config.max_drop and stop > start:
            # The error of the median batch, relative to its power. A mean of the PSNRs
            # of signals would be that of the quiet ones, which a constant describes.
            relative = np.array(jax.device_get(losses)) / np.array(powers)
            snr = float(functa.psnr(np.median(relative)))
            state, recovered = keep_or_recover(
                state,
                snr,
                max_drop=config.max_drop,
                other_latents=start == num_warm_steps,
            )
            if recovered:
                run.say(
                    f"the signal-to-noise ratio fell to {snr:.1f} dB by step {stop}; "
                    f"going back to the last good state with {_SLOWER} of the learning "
                    "rates."
                )
            metrics["num_recoveries"] = int(state.guard.num_recoveries)
        return state, losses, metrics

    num_coords = images.ndim - 2 if coords is None else coords.shape[-1]
    state = init_state(config, model, optimizer, learner, num_coords=num_coords)
    if learner is None:
        points = {"coords": coords, "weight": weight}
        shape = images.shape[1:-1]
        state = set_first_rates(config, model, state, shape, warm, **points)
    return loop.train(
        run,
        state,
        advance,
        stops=loop.every(num_steps, config.log_every)
        | {min(num_warm_steps, num_steps)} - {0},
        saves=loop.every(num_steps, config.checkpoint_every),
        may_diverge=bool(config.max_drop),
    )


def count_groups(batch_size: int, num_points: int, points_per_group: int) -> int:
    """Smallest number of groups with at most points_per_group points on a device."""
    if not points_per_group:
        return 1
    num_devices = jax.device_count()
    if batch_size % num_devices == 0:
        batch_size //= num_devices  # each device has a part of each group
    largest = max(1, min(batch_size, points_per_group // num_points))
    return min(
        n
        for n in range(1, batch_size + 1)
        if batch_size % n == 0 and batch_size // n <= largest
    )
