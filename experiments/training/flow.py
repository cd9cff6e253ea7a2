"""Trains a flow on latents, and samples from it.

Axes: N latents, *Z shape of a latent, K classes.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from ml_collections import ConfigDict

from experiments.common import devices, runs
from experiments.networks.dit import DiT
from experiments.training import loop, optimizers
from functa import flow


class Part(NamedTuple):
    """Normalized latents (N, *Z), float32, and the labels of their classes, (N,)."""

    latents: np.ndarray
    labels: np.ndarray


@struct.dataclass
class TrainState:
    """The state of training.

    Attributes:
      params: weights of the network.
      opt_state: state of the optimizer.
      average: moving average of the weights.
      gaussians: what the network is added to, or None; not trained.
    """

    params: Any
    opt_state: optax.OptState
    average: Any
    gaussians: flow.Gaussians | None

    @property
    def sampled(self) -> tuple[Any, flow.Gaussians | None]:
        """The weights that are sampled from, and what the network is added to."""
        return self.average, self.gaussians


def make_model(config: ConfigDict, num_classes: int) -> DiT:
    """The network of config.model; without classes all labels are 0.

    Raises:
      ValueError: if the heads do not divide the width.
    """
    model = DiT(num_classes, **config.model)
    if model.hidden_size % model.num_heads:
        raise ValueError(
            f"model.hidden_size {model.hidden_size} must be a multiple of "
            f"model.num_heads {model.num_heads}."
        )
    return model


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """The optimizer of the config, after clipping of the gradient."""
    return optimizers.make_clipped(config.optimizer, config.num_steps)


def init_state(config: ConfigDict, model: DiT, part: Part) -> TrainState:
    """The state before the first step."""
    latents, label = part.latents[:1], jnp.zeros(1, jnp.int32)
    variables = jax.jit(model.init)(
        jax.random.key(config.seeds[0]), latents, jnp.zeros(1), label
    )
    params = variables["params"]
    opt_state = jax.jit(make_optimizer(config).init)(params)
    gaussians = None
    if config.gaussian:
        gaussians = flow.fit_gaussians(*part, model.num_classes)
    # A copy: the buffers of the state are donated, and each only once.
    average = jax.tree.map(jnp.copy, params)
    return TrainState(params, opt_state, average, gaussians)


def make_steps(config: ConfigDict, model: DiT) -> Callable[..., Any]:
    """The jitted training: (state, latents, labels, key, steps (S,)) -> state, losses.

    A step draws its batch from all latents, with replacement. Its random numbers depend
    on its number alone.
    """
    optimizer = make_optimizer(config)

    def loss_fn(params, gaussians, latents, labels, key):
        key_labels, key_flow = jax.random.split(key)
        labels = flow.drop_labels(
            key_labels, labels, model.num_classes, config.label_dropout
        )
        velocity = _velocity(model, (params, gaussians), labels)
        return flow.flow_loss(key_flow, velocity, latents).mean()

    # For CPUs XLA fuses the gradients of shifts, scales and gates into slow loops, the
    # more so the deeper the network: with 6 blocks a step takes 2.8 times as long.
    is_cpu = jax.default_backend() == "cpu"

    @functools.partial(
        jax.jit,
        donate_argnums=0,
        out_shardings=devices.replicated(),
        compiler_options={"xla_disable_hlo_passes": "fusion"} if is_cpu else {},
    )
    def run_steps(state, latents, labels, key, steps):
        def step(state, number):
            key_batch, key_loss = jax.random.split(jax.random.fold_in(key, number))
            rows = jax.random.randint(key_batch, (config.batch_size,), 0, len(latents))
            batch = devices.divide_traced((latents[rows], labels[rows]))
            loss, grads = jax.value_and_grad(loss_fn)(
                state.params, state.gaussians, *batch, key_loss
            )
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            average = optax.incremental_update(
                params, state.average, 1 - config.optimizer.ema_decay
            )
            return TrainState(params, opt_state, average, state.gaussians), loss

        return jax.lax.scan(step, state, steps)

    return run_steps


def train(
    run: runs.Run, model: DiT, part: Part, held_out: Part | None = None
) -> TrainState:
    """Trains according to run.config.

    Args:
      run: the open run.
      model: the network.
      part: latents to train on.
      held_out: latents whose loss is logged, with the same noise each time.
    """
    config = run.config
    latents, labels = devices.replicate(tuple(part))
    key = jax.random.key(config.seeds[0] + 1)
    run_steps = make_steps(config, model)

    @jax.jit
    def measure(sampled, latents, labels):
        velocity = _velocity(model, sampled, labels)
        return flow.flow_loss(jax.random.key(0), velocity, latents).mean()

    def advance(state, start, stop):
        steps = jnp.arange(start, stop)
        state, losses = run_steps(state, latents, labels, key, steps)
        metrics = {}
        if held_out is not None:
            metrics["held_out_loss"] = float(measure(state.sampled, *held_out))
        return state, losses, metrics

    run.say(f"training a flow on {len(latents)} latents ...")
    return loop.train(
        run,
        devices.replicate(init_state(config, model, part)),
        advance,
        stops=loop.every(config.num_steps, config.log_every),
        saves=loop.every(config.num_steps, config.checkpoint_every),
    )


def draw(
    config: ConfigDict,
    model: DiT,
    sampled: tuple[Any, flow.Gaussians | None],
    labels: np.ndarray,
    shape: tuple,
) -> np.ndarray:
    """Samples one normalized latent for each label (N,), in batches.

    Args:
      config: with the entry `sampling` and the seed.
      model: the network.
      sampled: its weights and what it is added to, `TrainState.sampled`.
      labels: classes, or the label K for no class, (N,).
      shape: *Z.

    Returns:
      float32 (N, *Z). A sample does not depend on the number of the others.
    """
    sampled = devices.replicate(sampled, local=True)  # not again for each batch
    return devices.in_batches(
        functools.partial(make_sampler(config, model, shape), sampled),
        np.arange(len(labels)),
        labels,
        batch_size=config.sampling.batch_size,
    )


def make_sampler(
    config: ConfigDict, model: DiT, shape: tuple
) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
    """Makes (sampled, numbers of the samples (B,), labels (B,)) -> latents (B, *Z).

    See `draw` for the arguments. The number of a sample is the seed of its noise.
    """
    key = jax.random.key(config.seeds[0] + 2)

    @jax.jit
    def sample(sampled, numbers, labels):
        def draw_noise(number):
            return jax.random.normal(jax.random.fold_in(key, number), shape)

        noise = jax.vmap(draw_noise)(numbers)
        velocity = flow.guide(
            lambda x, time, labels: _velocity(model, sampled, labels)(x, time),
            labels,
            model.num_classes,
            config.sampling.guidance,
        )
        return flow.sample(velocity, noise, num_steps=config.sampling.num_steps)

    return sample


def _velocity(model, sampled, labels):
    params, gaussians = sampled

    def velocity(x, time):
        learned = model.apply({"params": params}, x, time, labels)
        if gaussians is None:
            return learned
        return learned + flow.gaussian_velocity(gaussians, labels)(x, time)

    return velocity
