"""Trains an MLP that tells the class of an image from its latent.

    python -m experiments.classify_functa \
        --config=experiments/configs/classify_functa.py:digits

The functaset lies on the device as a whole, and an epoch is one call. Candidate
settings are trained side by side; a validation part of the training split chooses one
of them and its epoch, and the test split is looked at once, with that one.
"""

import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import struct
from ml_collections import ConfigDict

from experiments.common import devices, figures, files, launch, runs
from experiments.training import loop
from functa import classifier, functaset

Splits = dict[str, tuple[np.ndarray, np.ndarray]]


@struct.dataclass
class TrainState:
    """The state of training; every leaf has a leading axis of candidates.

    Attributes:
      params: weights.
      opt_state: of the optimizer.
      average: exponential moving average of `params`.
      best: {"params", "accuracy", "epoch"}: the average of the epoch that was best on
        the validation part; of the last one if there is none.
    """

    params: Any
    opt_state: optax.OptState
    average: Any
    best: dict[str, Any]


def train_and_evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs or resumes one experiment; returns its summary."""
    settings = make_settings(config)
    splits = load_splits(config)
    with runs.open_run(workdir, config) as run:
        if run.summary is not None:
            return run.show_summary()
        num_classes = 1 + max(int(labels.max()) for _, labels in splits.values())
        model = classifier.MLP(**config.model, num_classes=num_classes)
        state = init_state(config, model, settings, splits["train"][0])
        first_epoch, state = run.restore(state)
        state = _train(run, model, settings, state, splits, first_epoch)
        return run.finish(_evaluate(run, model, settings, state, splits))


def make_settings(config: ConfigDict) -> dict[str, np.ndarray]:
    """All combinations of config.candidates: {name: (num_candidates,)}.

    Raises:
      ValueError: if a field of the config is out of its range.
    """
    _check_config(config)
    candidates = config.candidates.to_dict()
    combinations = np.array(list(itertools.product(*candidates.values())))
    return dict(zip(candidates, combinations.T, strict=True))


def _check_config(config):
    for name, values in config.candidates.items():
        high = 1 if name in ("dropout_rate", "label_smoothing", "ema_decay") else np.inf
        if not values or not all(0 <= value < high for value in values):
            raise ValueError(
                f"candidates.{name} must be values from 0 to below {high}, "
                f"got {values}."
            )
    for name, allowed in {
        "schedule": ("constant", "cosine"),
        "weight_decay_type": ("decoupled", "l2"),
    }.items():
        if config[name] not in allowed:
            raise ValueError(
                f"{name} {config[name]!r} is none of {', '.join(allowed)}."
            )
    if not callable(getattr(nn, config.model.activation, None)):
        raise ValueError(f"flax.linen has no activation {config.model.activation!r}.")
    if not 0 <= config.validation_fraction < 1:
        raise ValueError(
            "validation_fraction must be from 0 to below 1, got "
            f"{config.validation_fraction}."
        )
    num_candidates = np.prod([len(values) for values in config.candidates.values()])
    if not config.validation_fraction and num_candidates > 1:
        raise ValueError(
            f"choosing one of {num_candidates} candidates needs a validation part: "
            "set validation_fraction."
        )
    for name in ("num_epochs", "log_every", "checkpoint_every"):
        if config[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {config[name]}.")
    if config.checkpoint_every % config.log_every:
        raise ValueError(
            "checkpoint_every must be a multiple of log_every, got "
            f"{config.checkpoint_every} and {config.log_every}."
        )


def load_splits(config: ConfigDict) -> Splits:
    """Latents and labels of the parts `train`, `validation` (if any) and `test`.

    The validation part is a fixed random choice of images of the training split.
    Training sees none of their augmented copies either.

    Raises:
      FileNotFoundError: if there is no such functaset.
      ValueError: if it is damaged or gives nothing to classify.
    """
    path = config.functaset
    if not Path(path).exists():
        raise FileNotFoundError(
            f"there is no functaset {path}; experiments.meta_learn and "
            "experiments.make_functaset write one (--config.functaset=PATH)."
        )
    whole = functaset.load_functaset(path)
    config.params_sha256 = whole.params_sha256
    for split in ("train", "test"):
        if not (whole.split == split).any():
            raise ValueError(f"{path} has no {split} split.")
    if whole.label.min() < 0:
        raise ValueError(f"{path} has signals without a label (-1).")
    train = whole.select("train")
    if len(np.unique(train.label)) < 2:
        raise ValueError(f"{path} has signals of one class only.")
    copies = whole.config.get("copies", 1)
    num_images, remainder = divmod(len(train.label), copies)
    if remainder:
        raise ValueError(
            f"{path}: {len(train.label)} training signals are not {copies} copies."
        )
    # Not of config.seed: runs of several seeds are compared on the same images.
    order = np.random.default_rng(0).permutation(num_images)
    num_validation = round(config.validation_fraction * num_images)
    held_out, kept = order[:num_validation], np.sort(order[num_validation:])
    # Rows are ordered copy by copy, each copy in the order of the images.
    rows = {"train": (np.arange(copies)[:, None] * num_images + kept).ravel()}
    if num_validation:
        rows["validation"] = np.sort(held_out)
    if not 0 < config.batch_size <= len(rows["train"]):
        raise ValueError(
            f"batch_size must be between 1 and the {len(rows['train'])} training "
            f"signals, got {config.batch_size}."
        )

    def latents(signals):
        return signals.normalized() if config.normalize else signals.latent

    values = latents(train)
    splits = {name: (values[index], train.label[index]) for name, index in rows.items()}
    test = whole.select("test")
    return splits | {"test": (latents(test), test.label)}


def init_state(
    config: ConfigDict,
    model: classifier.MLP,
    settings: dict[str, np.ndarray],
    latents: np.ndarray,
) -> TrainState:
    """The state before the first epoch; all candidates start from the same weights."""
    num_candidates = len(settings["learning_rate"])
    params = jax.jit(model.init)(jax.random.key(config.seed), latents[:1])["params"]

    def stack(tree):
        return jax.tree.map(
            lambda x: jnp.broadcast_to(x, (num_candidates, *x.shape)).copy(), tree
        )

    first = {name: values[0] for name, values in settings.items()}
    best = {"params": params, "accuracy": jnp.array(-1.0), "epoch": jnp.array(0)}
    opt_state = _make_optimizer(config, first, num_steps=1).init(params)
    # Each its own copy: the buffers of the state are donated.
    return TrainState(stack(params), stack(opt_state), stack(params), stack(best))


def _make_optimizer(config, settings, *, num_steps):
    """Adam with the rate and weight decay of one candidate, which may be traced."""
    rate, decay = settings["learning_rate"], settings["weight_decay"]
    if config.schedule == "cosine":
        cosine = optax.cosine_decay_schedule(1.0, num_steps)
        schedule = lambda count: rate * cosine(count)  # noqa: E731
    else:
        schedule = lambda count: rate  # noqa: E731
    if config.weight_decay_type == "l2":
        return optax.chain(optax.add_decayed_weights(decay), optax.adam(schedule))
    return optax.adamw(
        schedule,
        weight_decay=decay,
        mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
    )


def make_epoch(
    config: ConfigDict,
    model: classifier.MLP,
    settings: dict[str, np.ndarray],
    *,
    num_examples: int,
):
    """The jitted epoch: (state, latents (N, L), labels (N,), key) -> state, losses.

    An epoch is shuffled and drops the remainder that does not fill a batch; losses are
    the means over it, (num_candidates,).
    """
    num_steps = num_examples // config.batch_size
    num_candidates = len(settings["learning_rate"])
    used = {name for name, values in settings.items() if values.any()}

    def loss_fn(params, settings, latents, labels, key):
        key_noise, key_mixup, key_dropout = jax.random.split(key, 3)
        targets = classifier.smooth_labels(
            labels, model.num_classes, settings["label_smoothing"]
        )
        # What no candidate uses is not computed.
        if "noise_std" in used:
            noise = jax.random.normal(key_noise, latents.shape)
            latents = latents + settings["noise_std"] * noise
        if "mixup" in used:
            latents, targets = classifier.mixup(
                key_mixup, latents, targets, settings["mixup"]
            )
        logits = model.apply(
            {"params": params},
            latents,
            dropout_rate=settings["dropout_rate"],
            key=key_dropout if "dropout_rate" in used else None,
        )
        return classifier.cross_entropy(
            logits, targets, double_softmax=config.double_softmax
        ).mean()

    def update(state, settings, latents, labels, key):
        loss, grads = jax.value_and_grad(loss_fn)(
            state.params, settings, latents, labels, key
        )
        optimizer = _make_optimizer(
            config, settings, num_steps=num_steps * config.num_epochs
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = optax.incremental_update(
            params, state.average, 1 - settings["ema_decay"]
        )
        state = state.replace(params=params, opt_state=opt_state, average=average)
        return state, loss

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=devices.replicated())
    def epoch(state, latents, labels, key):
        key_order, key_steps = jax.random.split(key)
        order = jax.random.permutation(key_order, num_examples)
        order = order[: num_steps * config.batch_size].reshape(num_steps, -1)

        def step(state, inputs):
            indices, keys = inputs
            batch = devices.divide_traced((latents[indices], labels[indices]))
            # All candidates see the same batch.
            return jax.vmap(update, in_axes=(0, 0, None, None, 0))(
                state, settings, *batch, keys
            )

        keys = jax.random.split(key_steps, (num_steps, num_candidates))
        state, losses = jax.lax.scan(step, state, (order, keys))
        return state, losses.mean(0)

    return epoch


@functools.partial(jax.jit, static_argnums=0)
def measure_accuracy(
    model: classifier.MLP, params: Any, latents: jax.Array, labels: jax.Array
) -> jax.Array:
    """Share of right classes of each candidate's weights, (num_candidates,)."""

    def accuracy(params):
        predicted = classifier.predict(
            lambda x: model.apply({"params": params}, x), latents
        )
        return jnp.mean(predicted == labels)

    return jax.lax.map(accuracy, params)


@jax.jit
def keep_best(state: TrainState, accuracy: jax.Array, epoch: int) -> TrainState:
    """Puts the average into `best` for the candidates that are better than before."""
    better = accuracy > state.best["accuracy"]
    now = {
        "params": state.average,
        "accuracy": accuracy,
        "epoch": jnp.full_like(state.best["epoch"], epoch),
    }

    def choose(new, old):
        return jnp.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return state.replace(best=jax.tree.map(choose, now, state.best))


def _train(run, model, settings, state, splits, first_epoch):
    config = run.config
    on_device = devices.replicate(splits)
    num_examples = len(splits["train"][0])
    run_epoch = make_epoch(config, model, settings, num_examples=num_examples)
    shown = [name for name in splits if name != "test" or config.log_test]
    losses = []
    if first_epoch < config.num_epochs:
        run.say(f"compiling the epoch of {num_examples} latents ...")
    for epoch in range(first_epoch, config.num_epochs):
        key = jax.random.fold_in(jax.random.key(config.seed + 1), epoch)
        state, loss = run_epoch(state, *on_device["train"], key)
        losses.append(loss)
        done = epoch + 1
        last = done == config.num_epochs
        if done % config.log_every and not last:
            continue
        losses = np.asarray(jax.device_get(losses))
        loop.check_finite(losses.sum(1), first_step=done - len(losses) + 1)
        accuracy = {
            name: measure_accuracy(model, state.average, *on_device[name])
            for name in shown
        }
        # Without a validation part every epoch beats the one before: the last is kept.
        score = accuracy.get("validation", jnp.full(losses.shape[1], float(done)))
        state = keep_best(state, score, done)
        leader = int(np.argmax(score))
        loss = losses.mean(0)
        metrics = {"loss": float(loss[leader]), "loss_per_candidate": loss}
        for name, values in accuracy.items():
            metrics[f"{name}_accuracy"] = float(values[leader])
            metrics[f"{name}_accuracy_per_candidate"] = values
        run.log(done, metrics, num_steps=config.num_epochs)
        losses = []
        if done % config.checkpoint_every == 0 or last:
            run.save(done, state)
    return state


def _evaluate(run, model, settings, state, splits):
    config = run.config
    chosen = int(np.argmax(state.best["accuracy"]))
    params = jax.tree.map(lambda x: x[chosen], state.best["params"])
    latents, labels = splits["test"]
    predict = jax.jit(classifier.predict, static_argnums=0)
    predicted = np.asarray(
        predict(lambda x: model.apply({"params": params}, x), latents)
    )
    confusion = np.zeros((model.num_classes, model.num_classes), np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    run.say("fitting a linear probe ...")
    probe = jax.jit(_probe_accuracy, static_argnums=0)
    probe_accuracy = probe(model.num_classes, splits["train"], splits["test"])
    metrics = files.read_metrics(run.workdir / "metrics.jsonl")
    arrays = {"confusion": confusion, "chosen": np.array(chosen)}
    files.write_npz(run.workdir / "arrays.npz", arrays)
    figures.draw(run.workdir)
    summary = {"test_accuracy": np.mean(predicted == labels)}
    if "validation" in splits:
        summary["validation_accuracy"] = state.best["accuracy"][chosen]
    summary |= {
        "linear_probe_test_accuracy": probe_accuracy,
        "epoch": state.best["epoch"][chosen],
        **{name: values[chosen] for name, values in settings.items()},
        "num_params": sum(x.size for x in jax.tree.leaves(params)),
        **{f"num_{name}": len(labels) for name, (_, labels) in splits.items()},
    }
    if config.log_test:
        summary["epochs"] = [m["step"] for m in metrics]
        for split in "test", "train":
            name = f"{split}_accuracy"
            summary[f"{name}_per_epoch"] = [m[name] for m in metrics]
    return summary


def _probe_accuracy(num_classes, train, test):
    # Raw latents are so small that the probe would not get anywhere from them.
    mean, std = train[0].mean(0, keepdims=True), train[0].std(0, keepdims=True)
    std = jnp.where(std > 0, std, 1)
    probe = classifier.linear_probe((train[0] - mean) / std, train[1], num_classes)
    return jnp.mean(classifier.predict(probe, (test[0] - mean) / std) == test[1])


if __name__ == "__main__":
    launch.launch("classify_functa", train_and_evaluate)
