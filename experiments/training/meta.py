"""The outer loop of meta-learning: state, batches and compiled step."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
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
      latent: start of every inner loop, (L,); not trained.
    """

    weights: dict[str, Any]
    opt_state: optax.OptState
    average: dict[str, Any] | None
    latent: jax.Array


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
    model: functa.LatentModulatedSiren | functa.ModulatedSiren,
    optimizer: optax.GradientTransformation,
    learner: encoding.Learner | None = None,
) -> TrainState:
    """The state before the first step, from the seed or from a learner."""
    if learner is None:
        key_params, key_rates = jax.random.split(jax.random.key(config.seeds[0]))
        latent = model.initial_latent()
        shape = latent.shape if config.inner.meta_sgd else ()
        if config.inner.rates_per_step:
            shape = (config.inner.num_steps, *(shape or (1,)))
        low, high = config.inner.rate_range
        rates = jax.random.uniform(key_rates, shape, minval=low, maxval=high)
        params = model.init(key_params, jnp.zeros((1, 2)), latent)["params"]
    else:
        params, latent, rates = learner.params, learner.latent, learner.learning_rate
    weights = {"params": params, "learning_rate": rates}
    # A copy: the buffers of the state are donated, and each only once.
    average = jax.tree.map(jnp.copy, weights) if config.optimizer.ema_decay else None
    state = TrainState(weights, optimizer.init(weights), average, latent)
    return devices.replicate(state)


def make_update(
    config: ConfigDict,
    model: functa.LatentModulatedSiren | functa.ModulatedSiren,
    optimizer: optax.GradientTransformation,
):
    """The jitted outer step: (state, coords (N, d), targets (B, N, C), key) -> ...

    Returns:
      A function that returns the new state and, from before the update, the outer loss
      () and the mean PSNR after every inner step, (S + 1,).
    """
    inner = config.inner

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=devices.replicated())
    def update(state, coords, targets, key):
        batch_size, num_points = targets.shape[:2]
        noise = None
        if inner.noise_std:
            shape = (batch_size, *state.latent.shape)
            noise = inner.noise_std * jax.random.normal(key, shape)
        (grads, rate_grads), info = functa.meta_gradient(
            model.apply,
            state.weights["params"],
            state.latent,
            coords,
            targets,
            learning_rate=state.weights["learning_rate"],
            noise=noise,
            num_groups=_num_groups(batch_size, num_points, config.points_per_group),
            first_order=inner.first_order,
            **encoding.fit_options(config),
        )
        grads = {"params": grads, "learning_rate": rate_grads}
        updates, opt_state = optimizer.update(grads, state.opt_state, state.weights)
        weights = optax.apply_updates(state.weights, updates)
        if inner.rate_clip:
            rates = jnp.clip(weights["learning_rate"], *inner.rate_clip)
            weights = weights | {"learning_rate": rates}
        average = state.average
        if average is not None:
            decay = config.optimizer.ema_decay
            average = optax.incremental_update(weights, average, 1 - decay)
        psnr = functa.psnr(info.mse).mean(0)
        state = TrainState(weights, opt_state, average, state.latent)
        return state, info.loss[:, -1].mean(), psnr

    return update


def make_batch(
    config: ConfigDict, images: np.ndarray, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """The coordinates (N, d) and targets (B, N, C) of update number `step`."""
    indices = data.batch_indices(
        config.seeds[0], step, num_examples=len(images), batch_size=config.batch_size
    )
    targets = data.to_float(images[indices])
    if step < config.coarse_steps:
        batch, height, width, channels = targets.shape
        factor = config.coarse_factor
        cells = (height // factor, factor, width // factor, factor)
        targets = targets.reshape(batch, *cells, channels).mean((2, 4))
    coords = functa.coordinate_grid(targets.shape[1:3]).reshape(-1, 2)
    targets = targets.reshape(len(targets), -1, targets.shape[-1])  # (B, N, C)
    if config.num_pixels and config.num_pixels < len(coords):
        rng = np.random.default_rng((config.seeds[0], step, 1))
        kept = rng.choice(len(coords), config.num_pixels, replace=False)
        coords, targets = coords[kept], targets[:, kept]
    return coords, targets


def train(
    run: runs.Run,
    model: functa.LatentModulatedSiren | functa.ModulatedSiren,
    images: np.ndarray,
    learner: encoding.Learner | None = None,
) -> TrainState:
    """Meta-learns on images according to run.config; resumes from a checkpoint.

    Args:
      run: the open run folder.
      model: the field.
      images: uint8 (N, H, W, C).
      learner: start of the training; None starts from random weights.
    """
    config = run.config
    num_steps = config.num_steps
    devices.check_divisible(config.batch_size)
    optimizer = make_optimizer(config)
    update = make_update(config, model, optimizer)
    key = jax.random.key(config.seeds[0] + 1)
    compiled = set()

    def advance(state, start, stop):
        losses, psnrs = [], []
        for step in range(start, stop):
            coords, targets = make_batch(config, images, step)
            if targets.shape not in compiled:
                compiled.add(targets.shape)
                run.say(f"compiling the outer step for batches of {targets.shape} ...")
            state, loss, psnr = update(
                state, coords, devices.divide(targets), jax.random.fold_in(key, step)
            )
            losses.append(loss)
            psnrs.append(psnr)
        psnr = np.mean(jax.device_get(psnrs), axis=0)
        return state, losses, {"psnr": float(psnr[-1]), "psnr_per_step": psnr}

    return loop.train(
        run,
        init_state(config, model, optimizer, learner),
        advance,
        stops=loop.every(num_steps, config.log_every),
        saves=loop.every(num_steps, config.checkpoint_every),
    )


def _num_groups(batch_size, num_points, points_per_group):
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
