"""Training of plain SIRENs on images: task, state and compiled steps."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from ml_collections import ConfigDict

import functa
from experiments.common import data, devices, settings
from experiments.training import optimizers

# Number of images per task whose reconstructions are stored for the figures.
NUM_SHOWN = 8


class Task(NamedTuple):
    """Images of one size, fitted together.

    Attributes:
      name: size and kind, for files and tables.
      images: uint8 (B, H, W, C).
      labels: int32 (B,), -1 without a label.
      num_steps: S.
      snapshots: the K steps after which reconstructions are stored; the last is S.
      class_names: the names of the labels, or None.
    """

    name: str
    images: np.ndarray
    labels: np.ndarray
    num_steps: int
    snapshots: tuple[int, ...]
    class_names: list[str] | None = None


@struct.dataclass
class TaskState:
    """Training state of a task, with its measurements; b <= 8 of B images are shown.

    Attributes:
      params: stacked parameters of the B networks.
      opt_state: stacked states of the optimizers.
      loss: loss before each step, (S, B); zero for future steps.
      mse: MSE over all pixels at each snapshot, (K, B).
      shown: reconstructions at the snapshots, (K, b, H, W, C).
    """

    params: Any
    opt_state: optax.OptState
    loss: jax.Array
    mse: jax.Array
    shown: jax.Array


def init_state(config: ConfigDict, model: functa.Siren, task: Task) -> TaskState:
    """The state before the first step, from config.seeds and the task."""
    num_images, height, width, channels = task.images.shape
    keys = jax.random.split(jax.random.key(config.seeds[0]), num_images)
    optimizer = optimizers.make_optimizer(config.optimizer, task.num_steps)

    @jax.jit
    @jax.vmap
    def init(key):
        params = model.init(key, jnp.zeros((1, 2)))["params"]
        return params, optimizer.init(params)

    params, opt_state = init(keys)
    num_snapshots = len(task.snapshots)
    num_shown = min(num_images, NUM_SHOWN)
    return TaskState(
        params,
        opt_state,
        loss=jnp.zeros((task.num_steps, num_images)),
        mse=jnp.zeros((num_snapshots, num_images)),
        shown=jnp.zeros((num_snapshots, num_shown, height, width, channels)),
    )


def check(config: ConfigDict, task: Task) -> None:
    """Raises ValueError if model or optimizer cannot be made, or points not divided."""
    with settings.blamed_on("model"):
        model = functa.make_model(config.model.to_dict())
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2)))
    optimizers.make_optimizer(config.optimizer, task.num_steps)
    num_points = task.images[0, ..., 0].size
    devices.check_divisible(min(config.num_pixels or num_points, num_points))


def make_update(config: ConfigDict, model: functa.Siren, task: Task):
    """The jitted training of one task: (state, first, last) -> state.

    The steps first, ..., last - 1 are one dispatch. Their number is traced, so that the
    function compiles once.
    """
    optimizer = optimizers.make_optimizer(config.optimizer, task.num_steps)
    low, high = config.coord_range
    grid = functa.coordinate_grid(task.images.shape[1:3]).reshape(-1, 2)
    targets = data.to_float(task.images)
    targets = targets.reshape(len(targets), -1, targets.shape[-1])  # (B, N, C)
    batch = np.float32(low + (high - low) * grid), targets
    coords, targets = devices.replicate(batch)
    sampled = 0 < config.num_pixels < len(coords)
    devices.check_divisible(config.num_pixels if sampled else len(coords))
    key = jax.random.key(config.seeds[0] + 1)

    def loss_fn(params, coords, target):
        values = model.apply({"params": params}, coords)
        return jnp.mean(jnp.square(values - target))

    def update_one(params, opt_state, coords, target):
        loss, grads = jax.value_and_grad(loss_fn)(params, coords, target)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    update_all = jax.vmap(update_one, in_axes=(0, 0, None, 0))

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=devices.replicated())
    def update(state, coords, targets, first, last):
        def body(step, state):
            points, values = coords, targets
            if sampled:
                kept = jax.random.randint(
                    jax.random.fold_in(key, step), (config.num_pixels,), 0, len(coords)
                )
                points, values = coords[kept], targets[:, kept]
            points = devices.divide_traced(points)
            values = devices.divide_traced(values, axis=1)
            params, opt_state, loss = update_all(
                state.params, state.opt_state, points, values
            )
            losses = state.loss.at[step].set(loss)
            return state.replace(params=params, opt_state=opt_state, loss=losses)

        return jax.lax.fori_loop(first, last, body, state)

    return lambda state, first, last: update(state, coords, targets, first, last)
