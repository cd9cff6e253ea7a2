"""Training and evaluation of image classifiers, shared by several commands.

The images are on the device as uint8. The jitted step normalizes them and, if the
config says so, augments them. Axes: N images, B images of a batch, S steps.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import struct
from ml_collections import ConfigDict

from experiments.common import augmentation, data, devices, runs, settings
from experiments.networks import registry
from experiments.training import features, loop

BN_MODES = ("batch", "frozen", "recalibrated")
_EVALUATED_AT_ONCE = 500


class Images(NamedTuple):
    """A data set as the input of a network.

    Attributes:
      train: uint8 (N, H, W, C) and labels (N,); float32 for grids of latents.
      test: the same for the test split.
      mean: mean of each channel of the training images in [0, 1], (1, 1, 1, C).
      std: standard deviation, (1, 1, 1, C); inputs are (image - mean) / std.
      num_classes: K.
    """

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    mean: np.ndarray
    std: np.ndarray
    num_classes: int


@struct.dataclass
class TrainState:
    """Training state, with the loss and accuracy of each step.

    Attributes:
      params: weights.
      batch_stats: running statistics of batch normalization; {} without it.
      opt_state: state of the optimizer.
      loss: loss of the batch of each step, (S,); zero for future steps.
      accuracy: accuracy of the batch before each step, (S,); zero for future steps.
    """

    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    loss: jax.Array
    accuracy: jax.Array

    @property
    def variables(self) -> dict[str, Any]:
        return {"params": self.params, "batch_stats": self.batch_stats}


def load_images(config: ConfigDict) -> Images:
    """Loads config.dataset, enlarged and padded to config.image_size.

    An image_size of 0 keeps the size of the images. The data set `functaset` gives
    grids of latents as images, see `features.load_grids`.
    """
    if config.dataset.name == "functaset":
        return _load_grids(config)
    loaded = data.load_dataset(**config.dataset)
    devices.say(loaded.found)
    splits = {}
    for split, arrays in loaded.splits.items():
        if arrays["label"].min() < 0:
            raise ValueError(
                f"the {split} split of data set {config.dataset.name!r} has no labels."
            )
        if config.dataset.name in ("folder", "npz"):
            # Images of a user are sorted by class; shuffle, so that the first ones are
            # representative.
            order = np.random.default_rng(0).permutation(len(arrays["label"]))
            arrays = {name: values[order] for name, values in arrays.items()}
        limit = config.num_train if split == "train" else config.num_test
        kept = slice(limit or None)
        images = _enlarge(arrays["image"][kept], config.image_size)
        splits[split] = images, arrays["label"][kept]
    num_classes = 1 + int(max(labels.max() for _, labels in splits.values()))
    _check_classes(config.dataset.name, num_classes)
    return Images(**splits, **moments(splits["train"][0]), num_classes=num_classes)


def moments(images: np.ndarray) -> dict[str, np.ndarray]:
    """Mean and standard deviation of each channel of images, as in `Images`."""
    pixels, axes = data.to_float(images), (0, 1, 2)
    mean = pixels.mean(axes, keepdims=True, dtype=np.float64)
    std = pixels.std(axes, keepdims=True, dtype=np.float64)
    return {"mean": mean.astype(np.float32), "std": std.astype(np.float32)}


def _check_classes(source, num_classes):
    if num_classes < 2:
        raise ValueError(f"data set {source!r} has one class; a classifier needs two.")


def _load_grids(config):
    """The grids of latents of a functaset as float32 images."""
    if config.image_size:
        raise ValueError(
            f"image_size must be 0 for the data set functaset, got {config.image_size}."
        )
    splits, mean, std, num_classes = features.load_grids(**config.dataset)
    _check_classes(config.dataset.data_dir, num_classes)
    devices.say(f"functaset {config.dataset.data_dir}: {_describe(splits)}")
    limits = {"train": config.num_train or None, "test": config.num_test or None}
    splits = {
        name: (values[: limits[name]], labels[: limits[name]])
        for name, (values, labels) in splits.items()
    }
    return Images(**splits, mean=mean, std=std, num_classes=num_classes)


def _describe(splits):
    return ", ".join(
        f"{len(labels)} {name} grids of {'x'.join(map(str, values.shape[1:]))}"
        for name, (values, labels) in splits.items()
    )


def _enlarge(images, side):
    """Repeats pixels by an integer factor, then pads with zeros to (side, side)."""
    height, width = images.shape[1:3]
    if not side:
        return images
    factor = side // max(height, width)
    if factor < 1:
        raise ValueError(
            f"the network takes {side}x{side} pixels, the images have {height}x{width}."
        )
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    pads = [((side - n) // 2, side - n - (side - n) // 2) for n in images.shape[1:3]]
    return np.pad(images, ((0, 0), *pads, (0, 0)))


def split_validation(
    images: Images, num_validation: int
) -> tuple[Images, tuple[np.ndarray, np.ndarray]]:
    """The data set without its last training images, and these with their labels.

    Raises:
      ValueError: if no training image is left.
    """
    pixels, labels = images.train
    num_train = len(pixels) - num_validation
    if num_train < 1:
        raise ValueError(
            f"num_validation must be below the {len(pixels)} training images, got "
            f"{num_validation}."
        )
    training = pixels[:num_train], labels[:num_train]
    return images._replace(train=training), (pixels[num_train:], labels[num_train:])


def digests(images: Images) -> dict[str, str]:
    """Digests of the images and labels of each split, for `runs.open_run`."""
    splits = {"train": images.train, "test": images.test}
    return data.digests(
        {
            split: {"image": pixels, "label": labels}
            for split, (pixels, labels) in splits.items()
        }
    )


def count_steps(images: Images, batch_size: int) -> int:
    """Steps per epoch; a remainder that does not fill a batch is dropped."""
    return data.count_batches(len(images.train[0]), batch_size)


def check_augmentation(images: Images, used: Mapping[str, Any]) -> None:
    """Refuses augmentations of pixels for images that are grids of latents.

    They move whole cells, or change numbers that are no colors. What results is not the
    latent of an image that is mirrored, resized or recolored.

    Args:
      images: the data set.
      used: {"field=value that switches an augmentation off": whether it is on}.

    Raises:
      ValueError: if the images are latents and an augmentation is on.
    """
    on = [setting for setting, is_used in used.items() if is_used]
    if on and images.train[0].dtype != np.uint8:
        raise ValueError(
            f"grids of latents need {', '.join(on)}: a grid that is mirrored, resized "
            "or recolored is not the latent of such an image."
        )


def check(
    config: ConfigDict, images: Images, model: Any = None, **fields: Any
) -> dict[str, Any]:
    """Checks model and batch of a config against the images, without compiling.

    Args:
      config: with model and batch_size.
      images: the data set.
      model: the network; None makes that of config.model.
      **fields: fields of the network that replace those of config.model.

    Returns:
      The shapes of the network's variables.

    Raises:
      ValueError: if the batch does not fit the images or the devices, or if the network
        cannot be applied to the images.
    """
    count_steps(images, config.batch_size)
    devices.check_divisible(config.batch_size)
    if model is None:
        model = registry.make_model(config.model.to_dict() | fields, images.num_classes)
    shape = (1, *images.train[0].shape[1:])
    with settings.blamed_on("model"):
        return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))


class Problem(NamedTuple):
    """A classification problem before training.

    Attributes:
      model: the network, a Linen module or a `custom.Network`.
      variables: its initial parameters and batch statistics ({} without).
      images: the data set.
      predict: (variables, uint8 (N, H, W, C)) -> logits (N, K), with the running
        statistics.
      steps_per_epoch: a remainder that does not fill a batch is dropped.
      num_steps: steps of the training.
    """

    model: Any
    variables: dict[str, Any]
    images: Images
    predict: Callable[[dict[str, Any], np.ndarray], np.ndarray]
    steps_per_epoch: int
    num_steps: int

    def test_accuracy(self, variables: dict[str, Any]) -> float:
        """Accuracy on the test images."""
        pixels, labels = self.images.test
        return accuracy(self.predict(variables, pixels), labels)


def make_problem(
    config: ConfigDict, images: Images, model: Any = None, **fields: Any
) -> Problem:
    """Makes the problem of config.model on images.

    Args:
      config: with model, batch_size, num_epochs and seeds; the first seed is used.
      images: the data set.
      model: the network; None makes that of config.model.
      **fields: fields of the network that replace those of config.model.
    """
    if model is None:
        model = registry.make_model(config.model.to_dict() | fields, images.num_classes)
    steps_per_epoch = count_steps(images, config.batch_size)
    return Problem(
        model=model,
        variables=init_variables(model, images, config.seeds[0]),
        images=images,
        predict=make_predict(model, images),
        steps_per_epoch=steps_per_epoch,
        num_steps=config.num_epochs * steps_per_epoch,
    )


def init_variables(model: nn.Module, images: Images, seed: int) -> dict[str, Any]:
    """Parameters and batch statistics ({} without) before the first step."""
    shape = (1, *images.train[0].shape[1:])
    variables = jax.jit(model.init)(jax.random.key(seed), jnp.zeros(shape))
    return {
        "params": variables["params"],
        "batch_stats": variables.get("batch_stats", {}),
    }


def train(
    run: runs.Run,
    problem: Problem,
    state: TrainState,
    update: Callable[[TrainState, int, int], TrainState],
    *,
    measure: Callable[[TrainState, int], dict[str, Any]] = lambda state, step: {},
    stops: Iterable[int] = (),
    may_diverge: bool = False,
) -> TrainState:
    """Trains a classifier; after every epoch its training accuracy is logged.

    Args:
      run: the open run folder, with checkpoint_every in its config.
      problem: the problem.
      state: the state before the first step.
      update: see `make_update`.
      measure: (state, step) -> additional metrics to log at a stop.
      stops: steps at which to log, in addition to the ends of epochs and the
        checkpoints.
      may_diverge: see `loop.train`.
    """
    steps_per_epoch = problem.steps_per_epoch

    def advance(state, start, stop):
        metrics = {}
        if stop > start:
            state = update(state, start, stop)
        if stop and stop % steps_per_epoch == 0:
            epoch = state.accuracy[stop - steps_per_epoch : stop]
            metrics["train_accuracy"] = float(epoch.mean())
        return state, state.loss[start:stop], metrics | measure(state, stop)

    return loop.train(
        run,
        state,
        advance,
        stops=loop.every(problem.num_steps, steps_per_epoch).union(stops),
        saves=loop.every(problem.num_steps, run.config.checkpoint_every),
        may_diverge=may_diverge,
    )


def init_state(
    variables: dict[str, Any],
    optimizer: optax.GradientTransformation,
    num_steps: int,
) -> TrainState:
    """The state before the first of `num_steps` steps."""
    return TrainState(
        **variables,
        opt_state=jax.jit(optimizer.init)(variables["params"]),
        loss=jnp.zeros(num_steps),
        accuracy=jnp.zeros(num_steps),
    )


def make_update(
    model: nn.Module,
    images: Images,
    optimizer: optax.GradientTransformation,
    *,
    batch_size: int,
    augmented: bool,
    seed: int,
    loss: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> Callable[[TrainState, int, int], TrainState]:
    """The training: (state, first, last) -> state after steps first, ..., last - 1.

    See `make_steps`. The loss is a function of logits (B, K) and labels (B,); None is
    the cross-entropy.
    """
    loss = loss or cross_entropy

    def step_fn(state, step, batch, labels):
        if augmented:
            key = jax.random.fold_in(jax.random.key(seed), step)
            batch = augmentation.crop_flip(key, batch)
        batch = normalize(images, batch)

        def loss_fn(params):
            logits, updated = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                batch,
                train=True,
                mutable=["batch_stats"],
            )
            accuracy = jnp.mean(logits.argmax(-1) == labels)
            return loss(logits, labels), (updated.get("batch_stats", {}), accuracy)

        (value, (batch_stats, accuracy)), grads = jax.value_and_grad(
            loss_fn, has_aux=True
        )(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return TrainState(
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
            loss=state.loss.at[step].set(value),
            accuracy=state.accuracy.at[step].set(accuracy),
        )

    return make_steps(step_fn, images, batch_size=batch_size, seed=seed)


def make_steps(
    step_fn: Callable[..., Any],
    images: Images,
    *,
    batch_size: int,
    seed: int,
    constants: Sequence[Any] = (),
) -> Callable[[Any, int, int], Any]:
    """Makes (state, first, last) -> state after steps first, ..., last - 1 of an epoch.

    The steps are one dispatch and must be in one epoch. Their number is traced, so that
    the function compiles once. The buffers of the state are donated.

    Args:
      step_fn: (state, step, uint8 images (B, H, W, C), labels (B,), *constants) ->
        state.
      images: the data set; it is copied to each device.
      batch_size: B.
      seed: seed of the order of the images in each epoch.
      constants: arguments of every step that are too large to be compiled into it.
    """
    num_examples = len(images.train[0])
    steps_per_epoch = count_steps(images, batch_size)
    devices.check_divisible(batch_size)
    fixed = devices.replicate((images.train, tuple(constants)))

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=devices.replicated())
    def update(state, fixed, order, first, last, offset):
        (train_images, train_labels), constants = fixed

        def body(step, state):
            indices = jax.lax.dynamic_slice_in_dim(
                order, (step - offset) * batch_size, batch_size
            )
            batch = train_images[indices], train_labels[indices]
            return step_fn(state, step, *devices.divide_traced(batch), *constants)

        return jax.lax.fori_loop(first, last, body, state)

    def run(state, first, last):
        epoch = first // steps_per_epoch
        offset = epoch * steps_per_epoch
        if last > offset + steps_per_epoch:
            raise ValueError(f"steps {first} to {last} must be in one epoch.")
        order = data.batch_indices(
            seed, epoch, num_examples=num_examples, batch_size=num_examples
        )
        state = devices.replicate(state)
        return update(state, fixed, order, first, last, offset)

    return run


def normalize(images: Images, batch: jax.Array) -> jax.Array:
    """Normalizes uint8 (B, H, W, C), or latents, to the inputs of the network."""
    scale = 255 if batch.dtype == jnp.uint8 else 1
    return (batch.astype(jnp.float32) / scale - images.mean) / divisor(images)


def divisor(images: Images) -> np.ndarray:
    """`images.std`, but not zero for a channel that is constant over the data set."""
    return np.maximum(images.std, np.float32(1e-6))


def make_predict(
    model: nn.Module, images: Images
) -> Callable[[dict[str, Any], np.ndarray], np.ndarray]:
    """Evaluation with running statistics: (variables, uint8 (N, ...)) -> logits."""
    return in_batches(
        lambda variables, batch: model.apply(variables, normalize(images, batch)),
        _EVALUATED_AT_ONCE,
    )


def in_batches(
    forward: Callable[[Any, jax.Array], jax.Array], batch_size: int
) -> Callable[[Any, np.ndarray], np.ndarray]:
    """Makes (variables, uint8 (N, H, W, C)) -> outputs, computed in equal batches."""

    @functools.partial(jax.jit, out_shardings=devices.replicated())
    def predict(variables, batches):
        return jax.lax.map(lambda batch: forward(variables, batch), batches)

    def run(variables, pixels):
        num_images = len(pixels)
        size = min(batch_size, num_images)
        size += -size % jax.device_count()
        # Images again, not zeros: a cascade may choose heads by the whole batch.
        padded = pixels[np.arange(num_images + -num_images % size) % num_images]
        batches = padded.reshape(-1, size, *pixels.shape[1:])
        batches = devices.divide(batches, axis=1)
        logits = np.asarray(predict(devices.replicate(variables), batches))
        return logits.reshape(-1, logits.shape[-1])[:num_images]

    return run


def recalibrate(
    model: nn.Module,
    images: Images,
    variables: dict[str, Any],
    *,
    num_batches: int,
    batch_size: int = _EVALUATED_AT_ONCE,
) -> dict[str, Any]:
    """Sets the running statistics to means over batches of the training images.

    After pruning the running statistics are those of the network before pruning. A
    network without batch normalization is returned unchanged.
    """
    if not jax.tree.leaves(variables["batch_stats"]):
        return variables
    fresh = model.clone(bn_momentum=0.0)
    pixels = images.train[0]
    batch_size = min(batch_size, len(pixels))
    num_batches = min(num_batches, len(pixels) // batch_size)
    total = None
    for i in range(num_batches):
        batch = pixels[i * batch_size : (i + 1) * batch_size]
        stats = _statistics(fresh, variables, normalize(images, batch))
        total = stats if total is None else jax.tree.map(jnp.add, total, stats)
    mean = jax.tree.map(lambda x: x / num_batches, total)
    return variables | {"batch_stats": mean}


@functools.partial(jax.jit, static_argnums=0)
def _statistics(model, variables, inputs):
    """The running statistics after one batch; compiled once for each network."""
    _, updated = model.apply(variables, inputs, train=True, mutable=["batch_stats"])
    return updated["batch_stats"]


def cross_entropy(
    logits: jax.Array, labels: jax.Array, *, label_smoothing: float = 0.0
) -> jax.Array:
    """Mean cross-entropy of logits (B, K) and labels (B,), ().

    With label smoothing a (Szegedy et al. 2016, arXiv 1512.00567) the target is 1 - a
    at the label plus a / K at every class.
    """
    if not label_smoothing:
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()
    targets = jax.nn.one_hot(labels, logits.shape[-1])
    targets = optax.losses.smooth_labels(targets, label_smoothing)
    return optax.losses.softmax_cross_entropy(logits, targets).mean()


def make_loss(
    model: Any,
    bn_mode: str,
    loss: Callable[[jax.Array, jax.Array], jax.Array] = cross_entropy,
) -> Callable[[Any, Any], jax.Array]:
    """The loss of a network as a function of the parameters alone.

    Args:
      model: the network.
      bn_mode: the statistics of batch normalization: "batch", those of the batch, as in
        training; "frozen", the running ones; "recalibrated", those of other images at
        the same parameters. The running statistics are never changed.
      loss: a function of logits (B, K) and labels (B,).

    Returns:
      loss_fn(params, batch) -> (), with {"inputs": (B, H, W, C), "labels": (B,),
      "batch_stats": ...} and for "recalibrated" also "calibration", (M, H, W, C).
    """
    if bn_mode not in BN_MODES:
        raise ValueError(
            f"bn_mode must be one of {', '.join(BN_MODES)}; got {bn_mode!r}."
        )

    def loss_fn(params, batch):
        def apply(model, inputs, batch_stats, train):
            variables = {"params": params, "batch_stats": batch_stats}
            return model.apply(variables, inputs, train=train, mutable=["batch_stats"])

        batch_stats = batch["batch_stats"]
        if bn_mode == "recalibrated":
            fresh = model.clone(bn_momentum=0.0)
            _, updated = apply(fresh, batch["calibration"], batch_stats, True)
            batch_stats = updated.get("batch_stats", {})
        logits, _ = apply(model, batch["inputs"], batch_stats, bn_mode == "batch")
        return loss(logits, batch["labels"])

    return loss_fn


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of the labels (N,) whose logit is the largest of the logits (N, K)."""
    return float(np.mean(logits.argmax(-1) == labels))


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p-value of McNemar's test of two classifiers on the same images.

    If both were equally accurate, each of the n = lost + gained images that only one of
    them classifies correctly would favor either with probability 1/2:

        p = min(1, 2 sum_{k <= min(lost, gained)} binomial(n, k) / 2^n)

    Args:
      lost: number of images that only the first classifies correctly.
      gained: number of images that only the second classifies correctly.
    """
    from scipy.stats import binomtest

    return binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
