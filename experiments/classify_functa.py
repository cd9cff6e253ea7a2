"""Trains a network that classifies images by their latents.

    python -m experiments.classify_functa \\
        --config=experiments/configs/classify_functa.py:digits

The network is an MLP, or for grids of latents a Vision Transformer or a ConvNeXt. The
whole functaset is on the device, and an epoch is one call. All candidate settings are
trained at once. A validation part of the training split selects a candidate and an
epoch, and only this one is evaluated on the test split.
"""

import functools
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import struct
from ml_collections import ConfigDict

import vit
from experiments.common import (
    augmentation,
    data,
    devices,
    files,
    launch,
    runs,
    settings,
)
from experiments.common.sweep import sweep
from experiments.configs import classify_functa as configs
from experiments.drawing import figures
from experiments.networks import heads
from experiments.networks.heads import Head
from experiments.training import features, latent_classifier, loop, optimizers
from functa import classifier
from functa.functaset import hash_params


class Signals(NamedTuple):
    """A functaset as the data of a classifier.

    Attributes:
      splits: {part: (inputs (N, *Z), labels (N,))} of the parts `train`, `validation`
        (if any) and `test`. The rows of `train` are ordered by copy, and within a copy
        by image.
      num_images: number of training images; each has N / num_images copies.
      num_classes: K.
      class_names: names of the classes, or None.
      digests: of the weights that made the functaset, of its latents and labels, and
        of their normalization.
      mean: mean of the last axis, by which the inputs were normalized, (C,).
      std: standard deviation, (C,).
    """

    splits: dict[str, tuple[np.ndarray, np.ndarray]]
    num_images: int
    num_classes: int
    class_names: list[str] | None
    digests: dict[str, str]
    mean: np.ndarray
    std: np.ndarray


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
    loop.check_stages(config, _CHANGEABLE)
    candidates = make_candidates(config)
    paths = {seed: _path(config, seed) for seed in config.seeds}
    # Several seeds may classify the same functaset.
    loaded = {path: load_signals(config, path) for path in set(paths.values())}
    for signals in loaded.values():
        for stage in range(len(config.stages) + 1):
            make_head(loop.in_stage(config, stage), signals)

    def experiment(run):
        [seed] = run.config.seeds
        signals = loaded[paths[seed]]
        state = train(run, candidates, signals)
        return _evaluate(run, candidates, state, signals)

    def inputs(config):
        [seed] = config.seeds
        return loaded[paths[seed]].digests

    return sweep(config, workdir, experiment, inputs=inputs)


# Fields that only the construction of an epoch reads.
_CHANGEABLE = {
    "cutmix",
    "model.token_drop",
    "model.dropout_rate",
    "model.drop_path_rate",
}


def _path(config, seed):
    return config.functaset.replace("{seed}", str(seed))


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
    activation = config.model.get("activation", "relu")
    if not callable(getattr(nn, activation, None)):
        raise ValueError(f"flax.linen has no activation {activation!r}.")
    with settings.blamed_on("model.activation"):
        jax.eval_shape(getattr(nn, activation), jnp.zeros((2, 3)))
    if config.model.type != "mlp" and any(config.candidates.dropout_rate):
        raise ValueError(
            "candidates.dropout_rate is the rate of the head mlp; for the head "
            f"{config.model.type} set model.dropout_rate."
        )
    return dict(zip(values, combinations.T, strict=True))


def load_signals(config: ConfigDict, path: str) -> Signals:
    """Reads a functaset, or the control of config.features on the same images.

    The validation part is a fixed random choice of images of the training split. Their
    augmented copies are not used for training.

    Raises:
      FileNotFoundError: if the functaset does not exist.
      ValueError: if it is damaged, or if it has no test split, labels or classes, or
        if config.crop or config.cutmix do not fit its latents.
    """
    whole = features.load_splits(path)
    of_split = {
        split: np.flatnonzero(whole.split == split) for split in ("train", "test")
    }
    train_rows = of_split["train"]
    features.check_labels(path, *(whole.label[rows] for rows in of_split.values()))
    num_classes = 1 + int(whole.label.max())
    features.check_config(path, whole)
    copies = whole.config.get("copies", 1)
    num_images = len(train_rows) // copies
    _check_grid(config, path, whole.latent.shape[1:])
    num_validation = round(config.validation_fraction * num_images)
    held_out, kept = data.hold_out(num_images, num_validation)
    labels = whole.label[train_rows]
    untrained = np.setdiff1d(labels, labels[kept])
    if untrained.size:
        devices.say(
            f"{path}: all training images of the classes "
            f"{', '.join(map(str, untrained[:10]))} are in the validation part; they "
            "are not learned."
        )
    # The rows are ordered by copy, and within a copy by image.
    copied = (np.arange(copies)[:, None] * num_images + kept).ravel()
    rows = {"train": train_rows[copied]}
    if num_validation:
        rows["validation"] = train_rows[np.sort(held_out)]
    rows["test"] = of_split["test"]
    data.count_batches(len(kept), config.batch_size)  # refuses a larger batch
    if config.images_per_group and config.batch_size % config.images_per_group:
        raise ValueError(
            f"images_per_group must divide batch_size {config.batch_size}, got "
            f"{config.images_per_group}."
        )
    values, mean, std = features.load_features(
        config.features, whole, data_dir=config.data_dir
    )
    # An entry that is constant becomes 0 instead of infinite.
    std = np.where(std > 0, std, 1)
    if not config.normalize:
        mean, std = np.zeros_like(mean), np.ones_like(std)

    def inputs(index):
        # One copy, changed in place: grids with padding are large.
        chosen = values[index].astype(np.float32, copy=False)
        if config.normalize:
            chosen -= mean
            chosen /= std
        return chosen

    return Signals(
        splits={
            name: (inputs(index), whole.label[index]) for name, index in rows.items()
        },
        num_images=len(kept),
        num_classes=num_classes,
        class_names=whole.config.get("class_names"),
        digests={
            "functaset": whole.params_sha256,
            "content of the functaset": hash_params([whole.latent, whole.label]),
            latent_classifier.NORMALIZATION: hash_params([whole.mean, whole.std]),
        },
        mean=mean,
        std=std,
    )


def _check_grid(config, path, latent_shape):
    grid = latent_shape[:-1]
    if config.crop and (
        len(config.crop) != len(grid)
        or any(kept > side for kept, side in zip(config.crop, grid, strict=True))
    ):
        raise ValueError(
            f"crop {tuple(config.crop)} does not fit into the grid {grid} of the "
            f"latents of {path}."
        )
    if len(grid) != 2 and any(
        loop.in_stage(config, stage).cutmix for stage in range(len(config.stages) + 1)
    ):
        raise ValueError(
            f"cutmix needs grids of latents (N, h, w, C), but those of {path} have the "
            f"shape {latent_shape}; set cutmix=0."
        )


def make_head(config: ConfigDict, signals: Signals) -> Head:
    """The network of config.model, see `heads.make_head`."""
    latent_shape = signals.splits["train"][0].shape[1:]
    if config.crop:
        latent_shape = (*config.crop, latent_shape[-1])
    return heads.make_head(config.model.to_dict(), signals.num_classes, latent_shape)


def init_state(
    config: ConfigDict, head: Head, candidates: dict[str, np.ndarray]
) -> TrainState:
    """The state before the first epoch; all candidates start from the same weights."""
    num_candidates = len(candidates["learning_rate"])
    params = jax.jit(head.init)(jax.random.key(config.seeds[0]))

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
    """The optimizer of a candidate, whose settings may be traced."""
    rate, decay = settings["learning_rate"], settings["weight_decay"]
    relative = ConfigDict(
        {
            "learning_rate": 1.0,
            "schedule": config.schedule,
            "warmup_steps": round(num_steps * config.warmup_epochs / config.num_epochs),
        }
    )
    factor = optimizers.make_schedule(relative, num_steps)

    def schedule(count):
        return rate * factor(count)

    if config.optimizer == "muon":
        # The scale of the updates is that of Adam (Liu et al. 2025, arXiv 2502.16982).
        optimizer = optax.contrib.muon(
            schedule,
            weight_decay=decay,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=optimizers.matrix_axes,
        )
    elif config.weight_decay_type == "l2":
        optimizer = optax.chain(optax.add_decayed_weights(decay), optax.adam(schedule))
    else:
        optimizer = optax.adamw(
            schedule,
            weight_decay=decay,
            mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        )
    if config.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    return optimizer


def make_epoch(
    config: ConfigDict,
    head: Head,
    candidates: dict[str, np.ndarray],
    *,
    num_images: int,
):
    """The jitted epoch: (state, latents (N, *Z), labels (N,), key) -> state, losses.

    An epoch takes each image once, in random order, in a random one of its N /
    num_images copies, and in a random window if config.crop is set. A remainder that
    does not fill a batch is dropped. The losses are means over the epoch,
    (num_candidates,).
    """
    num_steps = num_images // config.batch_size
    num_candidates = len(candidates["learning_rate"])
    num_groups = config.batch_size // (config.images_per_group or config.batch_size)
    used = {name for name, values in candidates.items() if values.any()}

    def mix(key, latents, targets, largest):
        def by_mixup(key):
            if "mixup" not in used:
                return latents, targets
            return classifier.mixup(key, latents, targets, largest)

        def by_cutmix(key):
            return augmentation.mix(
                key, latents, targets, mixup_alpha=0.0, cutmix_alpha=1.0
            )

        if not config.cutmix:
            return by_mixup(key)
        keys = jax.random.split(key, 3)
        is_cutmix = jax.random.bernoulli(keys[0], config.cutmix)
        return jax.tree.map(
            functools.partial(jnp.where, is_cutmix),
            by_cutmix(keys[1]),
            by_mixup(keys[2]),
        )

    def loss_fn(params, settings, latents, labels, key):
        key_noise, key_mixup, key_dropout = jax.random.split(key, 3)
        targets = classifier.smooth_labels(
            labels, head.num_classes, settings["label_smoothing"]
        )
        # Only the regularization that some candidate uses is computed.
        if "noise_std" in used:
            noise = jax.random.normal(key_noise, latents.shape)
            latents = latents + settings["noise_std"] * noise
        latents, targets = mix(key_mixup, latents, targets, settings["mixup"])
        options = {}
        if "dropout_rate" in used:
            options["dropout_rate"] = settings["dropout_rate"]
        logits = head.apply(params, latents, key=key_dropout, **options)
        return classifier.cross_entropy(
            logits, targets, double_softmax=config.double_softmax
        ).mean()

    def update(state, settings, latents, labels, key):
        grad_fn = jax.value_and_grad(loss_fn)
        if num_groups == 1:
            loss, grads = grad_fn(state.params, settings, latents, labels, key)
        else:
            groups = jax.tree.map(
                lambda x: x.reshape(num_groups, -1, *x.shape[1:]), (latents, labels)
            )
            parts = jax.lax.map(
                lambda group: grad_fn(
                    state.params, settings, *group[1], jax.random.fold_in(key, group[0])
                ),
                (jnp.arange(num_groups), groups),
            )
            loss, grads = jax.tree.map(lambda x: x.mean(0), parts)
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
        num_copies = len(latents) // num_images
        if num_copies > 1:
            key_order, key_copies = jax.random.split(key_order)
            copies = jax.random.randint(key_copies, (num_images,), 0, num_copies)
        order = jax.random.permutation(key_order, num_images)
        if num_copies > 1:
            order += num_images * copies
        order = order[: num_steps * config.batch_size].reshape(num_steps, -1)

        def step(state, inputs):
            indices, keys, *key_window = inputs
            batch = latents[indices]
            if config.crop:
                batch = augmentation.random_window(*key_window, batch, config.crop)
            batch = devices.divide_traced((batch, labels[indices]))
            # All candidates use the same batch.
            return jax.vmap(update, in_axes=(0, 0, None, None, 0))(
                state, candidates, *batch, keys
            )

        windows = ()
        if config.crop:
            key_steps, key_windows = jax.random.split(key_steps)
            windows = (jax.random.split(key_windows, num_steps),)
        keys = jax.random.split(key_steps, (num_steps, num_candidates))
        state, losses = jax.lax.scan(step, state, (order, keys, *windows))
        return state, losses.mean(0)

    return epoch


@functools.partial(jax.jit, static_argnums=0)
def measure_accuracy(
    head: Head, params: Any, latents: jax.Array, labels: jax.Array
) -> jax.Array:
    """Accuracy of each candidate, (num_candidates,)."""

    def accuracy(params):
        return jnp.mean(predict(head, params, latents) == labels)

    return jax.lax.map(accuracy, params)


def predict(head: Head, params: Any, latents: jax.Array) -> jax.Array:
    """Most likely class of each latent: (N, *Z) -> int32 (N,)."""
    return classifier.predict(
        lambda latent: head.apply(params, latent[None])[0], latents, batch_size=500
    )


@jax.jit
def keep_best(state: TrainState, accuracy: jax.Array, epoch: int) -> TrainState:
    """Stores the average in `best` for each candidate that is as good as its best.

    Of equally good epochs the last is kept: its learning rate was the smallest.
    """
    better = accuracy >= state.best["accuracy"]
    now = {
        "params": state.average,
        "accuracy": accuracy,
        "epoch": jnp.full_like(state.best["epoch"], epoch),
    }

    def choose(new, old):
        return jnp.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return state.replace(best=jax.tree.map(choose, now, state.best))


def train(
    run: runs.Run, candidates: dict[str, np.ndarray], signals: Signals
) -> TrainState:
    """Trains all candidates at once according to run.config; a step is an epoch."""
    config = run.config
    head = make_head(config, signals)
    latents, labels = devices.replicate(signals.splits["train"])
    measured = {
        name: evaluated_part(config, signals, name)
        for name in signals.splits
        if name != "test" or config.log_test
    }
    if config.num_measured:
        measured["train"] = tuple(x[: config.num_measured] for x in measured["train"])
    measured = devices.replicate(measured)
    key = jax.random.key(config.seeds[0] + 1)

    @functools.cache
    def epoch_in(stage):
        run.say(f"compiling the epoch of {signals.num_images} images ...")
        changed = loop.in_stage(config, stage)
        return make_epoch(
            changed,
            make_head(changed, signals),
            candidates,
            num_images=signals.num_images,
        )

    def advance(state, start, stop):
        losses = []
        for epoch in range(start, stop):
            run_epoch = epoch_in(loop.stage_of(config, epoch))
            epoch_key = jax.random.fold_in(key, epoch)
            state, loss = run_epoch(state, latents, labels, epoch_key)
            losses.append(loss)
        accuracy = {
            name: measure_accuracy(head, state.average, *part)
            for name, part in measured.items()
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
        # As the epoch returns it; otherwise the second epoch would be compiled again.
        devices.replicate(init_state(config, head, candidates)),
        advance,
        stops=loop.every(config.num_epochs, config.log_every),
        saves=loop.every(config.num_epochs, config.checkpoint_every),
    )


def evaluated_part(
    config: ConfigDict, signals: Signals, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels for evaluation: the first copies, in their central windows."""
    latents, labels = signals.splits[name]
    if name == "train":
        latents, labels = latents[: signals.num_images], labels[: signals.num_images]
    if config.crop:
        latents = augmentation.center_window(latents, config.crop)
    return latents, labels


def _evaluate(run, candidates, state, signals):
    config = run.config
    head = make_head(config, signals)
    num_classes = signals.num_classes
    chosen = int(np.argmax(state.best["accuracy"]))
    params = jax.tree.map(lambda x: x[chosen], state.best["params"])
    latents, labels = evaluated_part(config, signals, "test")
    predicted = np.asarray(jax.jit(predict, static_argnums=0)(head, params, latents))
    confusion = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    run.say("fitting a linear probe ...")
    probe = jax.jit(_probe_accuracy, static_argnums=0)
    probe_accuracy = probe(
        num_classes, evaluated_part(config, signals, "train"), (latents, labels)
    )
    metrics = run.metrics()
    arrays = {"confusion": confusion, "chosen": np.array(chosen)}
    if signals.class_names is not None:
        arrays["class_names"] = np.array(signals.class_names)
    files.write_npz(run.workdir / "arrays.npz", arrays)
    if config.model.type == "vit":
        # Its images are the grids of latents, its patches their cells.
        vit.save_checkpoint(
            run.workdir / "model.npz",
            head.model,
            params,
            mean=signals.mean,
            std=signals.std,
        )
    summary = {"test_accuracy": np.mean(predicted == labels)}
    if "validation" in signals.splits:
        summary["validation_accuracy"] = state.best["accuracy"][chosen]
    summary |= {
        "linear_probe_test_accuracy": probe_accuracy,
        "epoch": state.best["epoch"][chosen],
        **{name: values[chosen] for name, values in candidates.items()},
        "num_params": optax.tree.size(params),
        **{f"num_{name}": len(part[1]) for name, part in signals.splits.items()},
    }
    if config.log_test:
        summary["epochs"] = [m["step"] for m in metrics]
        for split in "test", "train":
            name = f"{split}_accuracy"
            summary[f"{name}_per_epoch"] = [m[name] for m in metrics]
    figures.draw(run.workdir, summary)
    return summary


def _probe_accuracy(num_classes, train, test):
    vectors = train[0].reshape(len(train[0]), -1)
    # Raw latents are too small for the probe to converge.
    mean, std = vectors.mean(0, keepdims=True), vectors.std(0, keepdims=True)
    std = jnp.where(std > 0, std, 1)
    probe = classifier.linear_probe((vectors - mean) / std, train[1], num_classes)
    tested = (test[0].reshape(len(test[0]), -1) - mean) / std
    return jnp.mean(classifier.predict(probe, tested) == test[1])


if __name__ == "__main__":
    launch.launch("classify_functa", train_and_evaluate)
