"""Trains a field and a classifier of its latents, jointly or one after the other.

A method is a sequence of phases (`phases`). In each of them the field, the classifier
(head) or both are trained, on the same images and with the same augmentation:

    joint       field and head, with the gradient of the labels in both
    two_stage   the field without labels, then the head on the latents of this field

A head sees latents that are normalized by running moments of their channels, because
the latents change while the field is trained.

Axes: B batch, *Z shape of a latent, whose last axis has C channels or entries; K
classes; S inner steps.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import struct
from ml_collections import ConfigDict

import functa
from experiments.common import augmentation, data, devices, runs
from experiments.networks.heads import Head
from experiments.training import encoding, loop, meta, optimizers
from experiments.training.latent_classifier import LatentClassifier
from functa import classifier, joint

# Share by which a batch moves the moments of the latents; the first ones move more.
_MOMENT_RATE = 0.01
# What each phase trains.
_TRAINED = {"joint": ("field", "head"), "field": ("field",), "head": ("head",)}


class Part(NamedTuple):
    """Images uint8 (N, H, W, C) and their labels (N,)."""

    image: np.ndarray
    label: np.ndarray


@struct.dataclass
class HeadState:
    """The state of the head: weights, optimizer, average, and moments of latents.

    Attributes:
      params, opt_state: weights, and the state of their optimizer.
      average: exponential moving average of `params`, or None.
      mean, square: running means of each channel and of its square, (C,).
      num_batches: batches that the moments have seen, ().
    """

    params: Any
    opt_state: optax.OptState
    average: Any
    mean: jax.Array
    square: jax.Array
    num_batches: jax.Array

    def normalize(self, latents: jax.Array) -> jax.Array:
        """(latent - mean) / deviation, (B, *Z)."""
        mean, std = (jnp.expand_dims(x, range(latents.ndim - 1)) for x in self.scale())
        return (latents - mean) / std

    def scale(self) -> tuple[jax.Array, jax.Array]:
        """Mean and deviation of each channel; a constant channel has deviation 1."""
        variance = self.square - jnp.square(self.mean)
        return self.mean, jnp.where(variance > 1e-12, jnp.sqrt(variance), 1)

    def observe(self, latents: jax.Array) -> "HeadState":
        """The state with the moments of one more batch (B, *Z)."""
        rate = jnp.maximum(1 / (self.num_batches + 1), _MOMENT_RATE)
        axes = tuple(range(latents.ndim - 1))
        mean, square = latents.mean(axes), jnp.square(latents).mean(axes)
        return self.replace(
            mean=self.mean + rate * (mean - self.mean),
            square=self.square + rate * (square - self.square),
            num_batches=self.num_batches + 1,
        )


@struct.dataclass
class TrainState:
    """The state of training.

    Attributes:
      field: the state of the field.
      head: the state of the head.
      best: {"weights", "head", "mean", "std", "accuracy", "step"}: field and head at
        the best validation accuracy, where a head was trained.
      guard: see `meta.Guard`; of field and head.
    """

    field: meta.TrainState
    head: HeadState
    best: dict[str, Any]
    guard: meta.Guard | None = None

    def trained(self) -> tuple[Any, ...]:
        """The parts that an update changes."""
        return self.field.trained(), self.head

    def with_trained(self, parts: tuple[Any, ...]) -> "TrainState":
        """The state with other parts that an update changes."""
        field, head = parts
        return self.replace(field=self.field.with_trained(field), head=head)


class Problem(NamedTuple):
    """A data set, a field and a head that fit each other.

    Attributes:
      train, validation, test: the parts of the data set.
      model: the field.
      view: how its inner loop sees whole images.
      head: the classifier of the latents.
    """

    train: Part
    validation: Part
    test: Part
    model: nn.Module
    view: functa.spatial.Layout
    head: Head


def make_optimizers(
    config: ConfigDict,
) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """The optimizers of the field and of the head, each after its own clipping."""
    settings, entry = config.head_optimizer, "head_optimizer"
    num_steps = config.num_steps - config.warm_start_steps
    optimizer = optimizers.make_clipped(settings, num_steps, entry=entry)
    return meta.make_optimizer(config), optimizer


def phases(config: ConfigDict) -> list[tuple[str, int]]:
    """The phases of config.methods[0]: (name, its last step + 1).

    A head is trained for the same number of steps by each method, and so is a field.
    """
    num_warm, num_steps = config.warm_start_steps, config.num_steps
    after = {
        "joint": [("joint", num_steps)],
        "two_stage": [("field", num_steps), ("head", 2 * num_steps - num_warm)],
    }[config.methods[0]]
    return [("warm", num_warm), *after]


def init_state(config: ConfigDict, problem: Problem, warm: Any) -> TrainState:
    """The state before the first step, from the seed."""
    field_optimizer, head_optimizer = make_optimizers(config)
    # One guard covers both the field and the head.
    without = config.copy_and_resolve_references()
    without.max_drop = 0.0
    model, shape = problem.model, problem.train.image.shape[1:3]
    field = meta.init_state(without, model, field_optimizer)
    field = meta.set_first_rates(config, model, field, shape, warm)
    params = jax.jit(problem.head.init)(jax.random.key(config.seeds[0] + 2))
    channels = problem.view.latent.shape[-1]
    head = HeadState(
        params=params,
        opt_state=jax.jit(head_optimizer.init)(params),
        average=_copy(params) if config.optimizer.ema_decay else None,
        mean=jnp.zeros(channels),
        square=jnp.ones(channels),
        num_batches=jnp.array(0),
    )
    # Copies, because the buffers of the state are donated, and each only once.
    best = _copy(_evaluated(field, head))
    best |= {"accuracy": jnp.array(-1.0), "step": jnp.array(0)}
    state = TrainState(field, head, best)
    if is_guarded(config):
        state = state.replace(guard=meta.make_guard(state.trained()))
    return devices.replicate(state)


def is_guarded(config: ConfigDict) -> bool:
    """Whether a fall of the PSNR is a collapse; not without a reconstruction loss."""
    return bool(config.max_drop and config.reconstruction_weight)


def _copy(tree):
    return jax.tree.map(jnp.copy, tree)


def _evaluated(field, head):
    """What is evaluated of a state: averages where there are any."""
    mean, std = head.scale()
    return {
        "weights": field.weights if field.average is None else field.average,
        "head": head.params if head.average is None else head.average,
        "mean": mean,
        "std": std,
    }


def make_update(
    config: ConfigDict, problem: Problem, phase: str
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted step of a phase: (state, images, labels, key) -> state, metrics.

    Images are uint8 (B, H, W, C) and labels (B,). The metrics are those before the
    update: the loss (), the mean PSNR after every inner step (S + 1,) and, if the head
    is trained, its cross-entropy () and accuracy ().
    """
    view, head = problem.view, problem.head
    field_optimizer, head_optimizer = make_optimizers(config)
    trained = _TRAINED[phase]

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=devices.replicated())
    def update(state, images, labels, key):
        batch_size, num_points = len(images), math.prod(images.shape[1:3])
        key_images, key_head = jax.random.split(key)
        if config.augmentation.padding or config.augmentation.flip:
            images = augmentation.crop_flip(key_images, images, **config.augmentation)
        smooth = classifier.smooth_labels(
            labels, head.num_classes, config.label_smoothing
        )
        weights = {"field": state.field.weights, "head": state.head.params}
        if phase == "head":
            weights["field"] = _evaluated(state.field, state.head)["weights"]

        def loss_fn(changed):
            both = weights | changed
            field = both["field"]
            # The loss is a mean over the cells; the rates are those of one cell.
            rates = view.num_cells * field["learning_rate"]

            def label_loss(latents, group):
                targets, numbers = group
                key_group = jax.random.fold_in(key_head, numbers[0])
                key_latents, key_model = jax.random.split(key_group)
                inputs = drop(
                    key_latents, state.head.normalize(latents), config.latent_dropout
                )
                logits = head.apply(both["head"], inputs, key=key_model)
                return classifier.cross_entropy(logits, targets), logits

            return joint.joint_loss(
                view.apply_fn,
                field["params"],
                view.latent,
                view.coords,
                view.split(jnp.float32(images) / 255),
                label_loss,
                (smooth, jnp.arange(batch_size)),
                learning_rate=functa.spatial.spread_rates(rates, view.latent.shape),
                reconstruction_weight=config.reconstruction_weight,
                label_weight=config.label_weight if phase == "joint" else 0.0,
                normalize=config.normalize_losses,
                num_groups=meta.count_groups(
                    batch_size, num_points, config.points_per_group
                ),
                first_order=config.inner.first_order,
                **encoding.fit_options(config, view.num_cells),
            )

        grads, info = jax.grad(loss_fn, has_aux=True)({k: weights[k] for k in trained})
        metrics = {
            "loss": info.fit.loss[:, -1].mean(),
            "psnr_per_step": functa.psnr(info.fit.mse).mean(0),
        }
        field, new_head = state.field, state.head
        if "field" in trained:
            field = meta.apply_gradients(
                config,
                field_optimizer,
                field.replace(guard=state.guard),
                grads["field"],
            ).replace(guard=None)
        if "head" in trained:
            new_head = _apply_to_head(config, head_optimizer, state, grads["head"])
            new_head = new_head.observe(info.latents)
            metrics["cross_entropy"] = info.task_loss.mean()
            metrics["train_accuracy"] = jnp.mean(info.aux.argmax(-1) == labels)
            metrics["loss"] += metrics["cross_entropy"]
        return state.replace(field=field, head=new_head), metrics

    return update


def drop(key: jax.Array, latents: jax.Array, rate: float) -> jax.Array:
    """Dropout: zeroes a share `rate` of the entries, divides the rest by 1 - rate."""
    if not rate:
        return latents
    keep = jax.random.bernoulli(key, 1 - rate, latents.shape)
    return jnp.where(keep, latents / (1 - rate), 0)


def _apply_to_head(config, optimizer, state, grads):
    head = state.head
    updates, opt_state = optimizer.update(grads, head.opt_state, head.params)
    params, average = optax.apply_updates(head.params, updates), head.average
    if average is not None:
        decay = config.optimizer.ema_decay
        average = optax.incremental_update(params, average, 1 - decay)
    return head.replace(params=params, opt_state=opt_state, average=average)


def measure(
    config: ConfigDict, problem: Problem, chosen: dict[str, Any], part: Part
) -> tuple[np.ndarray, np.ndarray]:
    """The PSNR (N,) and the predicted classes (N,) of images.

    Args:
      config: configuration of the run.
      problem: field and head.
      chosen: their weights and the scale of the latents, as in `TrainState.best`.
      part: the images.
    """
    latent = problem.model.initial_latent()
    learner = encoding.make_learner(
        config, {"weights": chosen["weights"], "latent": latent}
    )
    encoded = encoding.encode(learner, part.image, batch_size=config.encode_batch_size)
    latents, mse = map(np.concatenate, zip(*encoded, strict=True))
    reader = LatentClassifier(
        problem.head, chosen["head"], *map(np.asarray, (chosen["mean"], chosen["std"]))
    )
    return np.asarray(functa.psnr(mse[:, -1])), reader.predict(latents)


@jax.jit
def keep_best(state: TrainState, accuracy: float, step: int) -> TrainState:
    """Stores what is evaluated in `best` if the accuracy is at least that of `best`."""
    now = _evaluated(state.field, state.head)
    now |= {"accuracy": jnp.float32(accuracy), "step": jnp.int32(step)}
    is_better = now["accuracy"] >= state.best["accuracy"]
    best = jax.tree.map(lambda a, b: jnp.where(is_better, a, b), now, state.best)
    return state.replace(best=best)


def train(run: runs.Run, problem: Problem) -> TrainState:
    """Trains by the method config.methods[0]; resumes from a checkpoint."""
    config, train = run.config, problem.train
    plan = phases(config)
    warm = None
    if config.warm_start_steps:
        by_cells = getattr(problem.model, "interpolation", "") == "nearest"
        warm = meta.make_warm_start(
            *meta.coded_signals(problem.model, train.image, by_cells=by_cells)
        )
    key = jax.random.key(config.seeds[0] + 1)

    @functools.cache
    def update_of(phase):
        run.say(f"compiling the step of the phase {phase} ...")
        if phase != "warm":
            return make_update(config, problem, phase)
        view, (optimizer, _) = problem.view, make_optimizers(config)
        update = meta.make_warm_update(config, problem.model, optimizer, view.apply_fn)

        def warm_update(state, images, labels, key):
            del labels, key
            targets = view.split(np.float32(images) / 255)
            batch = targets, warm.codes(targets, problem.model.latent_shape)
            field, loss, psnr = update(state.field, view.coords, *devices.divide(batch))
            metrics = {"loss": loss, "psnr_per_step": psnr}
            return state.replace(field=field), metrics

        return warm_update

    def advance(state, start, stop):
        # The ends of phases are stops.
        phase = next(name for name, last in plan if start < last)
        rows, powers = [], []
        for step in range(start, stop):
            indices = data.batch_indices(
                config.seeds[0],
                step,
                num_examples=len(train.label),
                batch_size=config.batch_size,
            )
            batch = train.image[indices], train.label[indices]
            powers.append(np.var(batch[0] / 255))
            if phase != "warm":
                batch = devices.divide(batch)
            step_key = jax.random.fold_in(key, step)
            state, metrics = update_of(phase)(state, *batch, step_key)
            rows.append(metrics)
        rows = jax.device_get(rows)
        metrics = jax.tree.map(lambda *values: np.stack(values), *rows)
        losses = metrics.pop("loss")
        metrics = jax.tree.map(lambda values: values.mean(0), metrics)
        metrics["psnr"] = metrics["psnr_per_step"][-1]
        # The field is not trained in the phase of the head.
        if is_guarded(config) and phase != "head":
            state, recovered = meta.keep_or_recover(
                state,
                # The signal-to-noise ratio, as in `meta.train`.
                metrics["psnr"] - functa.psnr(np.mean(powers) + meta.MIN_POWER),
                max_drop=config.max_drop,
                other_latents=start == config.warm_start_steps,
            )
            if recovered:
                run.say(f"the PSNR fell by step {stop}; back to the last good state.")
            metrics["num_recoveries"] = int(state.guard.num_recoveries)
        chosen = _evaluated(state.field, state.head)
        psnr, predicted = measure(config, problem, chosen, problem.validation)
        metrics["validation_psnr"] = float(psnr.mean())
        if phase in ("head", "joint"):
            accuracy = float(np.mean(predicted == problem.validation.label))
            metrics["validation_accuracy"] = accuracy
            state = keep_best(state, accuracy, stop)
        return state, losses, metrics

    ends = [last for _, last in plan if last]
    return loop.train(
        run,
        init_state(config, problem, warm),
        advance,
        stops=loop.every(ends[-1], config.log_every).union(ends),
        saves=loop.every(ends[-1], config.checkpoint_every),
        may_diverge=is_guarded(config),
    )
