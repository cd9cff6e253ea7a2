"""Trains an MLP that classifies images by their latents.

    python -m experiments.classify_functa \
        --config=experiments/configs/classify_functa.py:digits

The whole functaset is on the device, and an epoch is one call. All candidate settings
are trained at once. A validation part of the training split selects a candidate and an
epoch, and only this one is evaluated on the test split.
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

from experiments.common import devices, figures, files, launch, runs, settings
from experiments.common.sweep import sweep
from experiments.configs import classify_functa as configs
from experiments.training import loop
from functa import classifier, functaset

Splits = dict[str, tuple[np.ndarray, np.ndarray]]


@struct.dataclass
class TrainState:
    """The state of training; every leaf has a leading axis of candidates.

    Attributes:
      params: weights.
      opt_state: state of the optimizer.
      average: exponential moving average of `params`.
      best: {"params", "accuracy", "epoch"}: the average after the epoch with the best
        validation accuracy; without a validation part, after the last epoch.
    """

    params: Any
    opt_state: optax.OptState
    average: Any
    best: dict[str, Any]


def train_and_evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs or resumes one experiment; returns its summary."""
    settings.check(config, configs.RULES)
    candidates = make_candidates(config)
    by_seed = {seed: load_splits(config, seed) for seed in config.seeds}

    def experiment(run):
        [seed] = run.config.seeds
        _, splits = by_seed[seed]
        num_classes = 1 + max(int(labels.max()) for _, labels in splits.values())
        model = classifier.MLP(**config.model, num_classes=num_classes)
        state = train(run, model, candidates, splits)
        return _evaluate(run, model, candidates, state, splits)

    def inputs(config):
        [seed] = config.seeds
        return {"functaset": by_seed[seed][0]}

    return sweep(config, workdir, experiment, inputs=inputs)


def make_candidates(config: ConfigDict) -> dict[str, np.ndarray]:
    """All combinations of config.candidates: {name: (num_candidates,)}.

    Raises:
      ValueError: if there are several candidates but no validation part, or if the
        activation is unknown.
    """
    values = config.candidates.to_dict()
    combinations = np.array(list(itertools.product(*values.values())))
    if not config.validation_fraction and len(combinations) > 1:
        raise ValueError(
            f"selecting one of {len(combinations)} candidates needs a validation part: "
            "set validation_fraction."
        )
    if not callable(getattr(nn, config.model.activation, None)):
        raise ValueError(f"flax.linen has no activation {config.model.activation!r}.")
    return dict(zip(values, combinations.T, strict=True))


def load_splits(config: ConfigDict, seed: int = 0) -> tuple[str, Splits]:
    """Reads a functaset: the digest of the weights that made it, and its parts.

    The parts are latents and labels of `train`, `validation` (if any) and `test`.

    The validation part is a fixed random choice of images of the training split. Their
    augmented copies are not used for training.

    Raises:
      FileNotFoundError: if the functaset does not exist.
      ValueError: if it is damaged, or if it has no test split, labels or classes.
    """
    path = config.functaset.replace("{seed}", str(seed))
    if not Path(path).exists():
        raise FileNotFoundError(
            f"there is no functaset {path}; experiments.meta_learn and "
            "experiments.make_functaset write one (--config.functaset=PATH)."
        )
    whole = functaset.load_functaset(path)
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
    # Independent of the seed: runs of several seeds are compared on the same images.
    order = np.random.default_rng(0).permutation(num_images)
    num_validation = round(config.validation_fraction * num_images)
    held_out, kept = order[:num_validation], np.sort(order[num_validation:])
    # The rows are ordered by copy, and within a copy by image.
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
    splits["test"] = latents(test), test.label
    return whole.params_sha256, splits


def init_state(
    config: ConfigDict,
    model: classifier.MLP,
    candidates: dict[str, np.ndarray],
    latents: np.ndarray,
) -> TrainState:
    """The state before the first epoch; all candidates start from the same weights."""
    num_candidates = len(candidates["learning_rate"])
    params = jax.jit(model.init)(jax.random.key(config.seeds[0]), latents[:1])["params"]

    def stack(tree):
        return jax.tree.map(
            lambda x: jnp.broadcast_to(x, (num_candidates, *x.shape)).copy(), tree
        )

    first = {name: values[0] for name, values in candidates.items()}
    best = {"params": params, "accuracy": jnp.array(-1.0), "epoch": jnp.array(0)}
    opt_state = _make_optimizer(config, first, num_steps=1).init(params)
    # Separate copies: the buffers of the state are donated.
    return TrainState(stack(params), stack(opt_state), stack(params), stack(best))


def _make_optimizer(config, settings, *, num_steps):
    """Adam with the learning rate and weight decay of a candidate (may be traced)."""
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
    candidates: dict[str, np.ndarray],
    *,
    num_examples: int,
):
    """The jitted epoch: (state, latents (N, L), labels (N,), key) -> state, losses.

    An epoch is shuffled, and a remainder that does not fill a batch is dropped. The
    losses are means over the epoch, (num_candidates,).
    """
    num_steps = num_examples // config.batch_size
    num_candidates = len(candidates["learning_rate"])
    used = {name for name, values in candidates.items() if values.any()}

    def loss_fn(params, settings, latents, labels, key):
        key_noise, key_mixup, key_dropout = jax.random.split(key, 3)
        targets = classifier.smooth_labels(
            labels, model.num_classes, settings["label_smoothing"]
        )
        # Only the regularization that some candidate uses is computed.
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
            # All candidates use the same batch.
            return jax.vmap(update, in_axes=(0, 0, None, None, 0))(
                state, candidates, *batch, keys
            )

        keys = jax.random.split(key_steps, (num_steps, num_candidates))
        state, losses = jax.lax.scan(step, state, (order, keys))
        return state, losses.mean(0)

    return epoch


@functools.partial(jax.jit, static_argnums=0)
def measure_accuracy(
    model: classifier.MLP, params: Any, latents: jax.Array, labels: jax.Array
) -> jax.Array:
    """Accuracy of each candidate, (num_candidates,)."""

    def accuracy(params):
        predicted = classifier.predict(
            lambda x: model.apply({"params": params}, x), latents
        )
        return jnp.mean(predicted == labels)

    return jax.lax.map(accuracy, params)


@jax.jit
def keep_best(state: TrainState, accuracy: jax.Array, epoch: int) -> TrainState:
    """Stores the average in `best` for each candidate whose accuracy has improved."""
    better = accuracy > state.best["accuracy"]
    now = {
        "params": state.average,
        "accuracy": accuracy,
        "epoch": jnp.full_like(state.best["epoch"], epoch),
    }

    def choose(new, old):
        return jnp.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return state.replace(best=jax.tree.map(choose, now, state.best))


def train(
    run: runs.Run,
    model: classifier.MLP,
    candidates: dict[str, np.ndarray],
    splits: Splits,
) -> TrainState:
    """Trains all candidates at once according to run.config; a step is an epoch."""
    config = run.config
    on_device = devices.replicate(splits)
    latents, labels = on_device["train"]
    run_epoch = make_epoch(config, model, candidates, num_examples=len(latents))
    shown = [name for name in splits if name != "test" or config.log_test]
    key = jax.random.key(config.seeds[0] + 1)
    run.say(f"compiling the epoch of {len(latents)} latents ...")

    def advance(state, start, stop):
        losses = []
        for epoch in range(start, stop):
            epoch_key = jax.random.fold_in(key, epoch)
            state, loss = run_epoch(state, latents, labels, epoch_key)
            losses.append(loss)
        accuracy = {
            name: measure_accuracy(model, state.average, *on_device[name])
            for name in shown
        }
        # Without a validation part each epoch replaces the previous one.
        score = accuracy.get("validation", jnp.full(len(loss), float(stop)))
        state = keep_best(state, score, stop)
        leader = int(np.argmax(score))
        mean_loss = np.mean(jax.device_get(losses), axis=0)
        metrics = {"loss": float(mean_loss[leader]), "loss_per_candidate": mean_loss}
        for name, values in accuracy.items():
            metrics[f"{name}_accuracy"] = float(values[leader])
            metrics[f"{name}_accuracy_per_candidate"] = values
        return state, losses, metrics

    return loop.train(
        run,
        init_state(config, model, candidates, latents),
        advance,
        stops=loop.every(config.num_epochs, config.log_every),
        saves=loop.every(config.num_epochs, config.checkpoint_every),
    )


def _evaluate(run, model, candidates, state, splits):
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
    metrics = run.metrics()
    arrays = {"confusion": confusion, "chosen": np.array(chosen)}
    files.write_npz(run.workdir / "arrays.npz", arrays)
    figures.draw(run.workdir)
    summary = {"test_accuracy": np.mean(predicted == labels)}
    if "validation" in splits:
        summary["validation_accuracy"] = state.best["accuracy"][chosen]
    summary |= {
        "linear_probe_test_accuracy": probe_accuracy,
        "epoch": state.best["epoch"][chosen],
        **{name: values[chosen] for name, values in candidates.items()},
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
    # Raw latents are too small for the probe to converge.
    mean, std = train[0].mean(0, keepdims=True), train[0].std(0, keepdims=True)
    std = jnp.where(std > 0, std, 1)
    probe = classifier.linear_probe((train[0] - mean) / std, train[1], num_classes)
    return jnp.mean(classifier.predict(probe, (test[0] - mean) / std) == test[1])


if __name__ == "__main__":
    launch.launch("classify_functa", train_and_evaluate)
