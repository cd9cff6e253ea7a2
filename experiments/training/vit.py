"""Training and evaluation of Vision Transformers, for train_vit and prune_vit.

Axes: B images, H W C of an image, K classes, S steps.
"""

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from ml_collections import ConfigDict

from experiments.common import augmentation, devices, runs, settings
from experiments.training import classifier, loop, optimizers
from experiments.training.classifier import Images
from vit import Cascade, ViT, cost, load_checkpoint, load_normalization, make, observe
from vit.checkpoint import find_files
from vit.model import Observed

_EVALUATED_AT_ONCE = 250


@struct.dataclass
class TrainState:
    """Training state, with the loss and accuracy of each step.

    Attributes:
      params: weights, float32.
      average: exponential moving average of the weights, which is evaluated.
      opt_state: state of the optimizer.
      loss: loss of the batch of each step, (S,); zero for future steps.
      accuracy: accuracy of the batch before each step, (S,); in a mixed batch the label
        with the larger weight counts.
    """

    params: Any
    average: Any
    opt_state: optax.OptState
    loss: jax.Array
    accuracy: jax.Array


class Problem(NamedTuple):
    """A classification problem: a network, pruned or not, and its images.

    Attributes:
      model: the network.
      params: its parameters.
      image_size: side of the images that it takes; others are resized.
      images: the data set; None if only the time is measured.
    """

    model: ViT
    params: Any
    image_size: int
    images: Images | None = None

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of an image; the first kernel tells the channels."""
        first = self.params["stem_0" if self.model.stem else "embedding"]["kernel"]
        return (self.image_size, self.image_size, first.shape[2])

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.model.patch_size) ** 2

    @property
    def cost(self) -> cost.Cost:
        """Multiply-adds of one image."""
        *_, channels = self.input_shape
        return cost.count(self.model, self.image_size, channels=channels)

    def test_accuracy(self, params: Any) -> float:
        """Accuracy on the test images."""
        pixels, labels = self.images.test
        return classifier.accuracy(make_predict(self)(params, pixels), labels)

    def test_errors(self, params: Any) -> np.ndarray:
        """Indices of the test images that are classified wrongly, ascending."""
        pixels, labels = self.images.test
        logits = make_predict(self)(params, pixels)
        return np.flatnonzero(logits.argmax(-1) != labels)

    def observe(self, params: Any, pixels: jax.Array) -> Observed:
        """`vit.observe` of uint8 images (B, H, W, C)."""
        inputs = prepare(self.images, pixels, self.image_size)
        return observe(self.model, params, inputs)


def load_images(config: ConfigDict) -> Images:
    """Loads config.dataset; they are resized on the device if necessary."""
    images = classifier.load_images(ConfigDict({**config, "image_size": 0}))
    return normalize_as(config, images)


def normalize_as(config: ConfigDict, images: Images) -> Images:
    """Sets mean and std to those that config.checkpoint states, if it does.

    Otherwise they are 0.5 if config.normalization is "google", and stay those of the
    training images if it is "dataset".

    Raises:
      ValueError: if the checkpoint states others than "google".
    """
    stated = load_normalization(config.checkpoint) if config.checkpoint else None
    if config.normalization == "google":
        half = np.full_like(images.mean, 0.5)
        images = images._replace(mean=half, std=half)
    if stated is None:
        return images
    mean, std = (value.reshape(1, 1, 1, -1) for value in stated)
    if config.normalization == "google" and not np.all(np.append(mean, std) == 0.5):
        raise ValueError(
            f"normalization=google means [-1, 1], but {config.checkpoint} states the "
            f"mean {mean.ravel()} and the deviation {std.ravel()}; set "
            "--config.normalization=dataset, which keeps those of a checkpoint."
        )
    return images._replace(mean=mean, std=std)


def digest(checkpoint: str) -> str:
    """Digest of a checkpoint and of the files beside it that are read with it."""
    found = hashlib.sha256()
    weights = find_files(checkpoint)
    # Beside a .npz, config.json is the configuration of a run, which is not read.
    if weights[0].suffix == ".safetensors":
        names = "config.json", "preprocessor_config.json"
        others = [weights[0].with_name(name) for name in names]
        weights = (*weights, *(path for path in others if path.exists()))
    for path in weights:
        found.update(path.read_bytes())
    return found.hexdigest()


def check_options(config: ConfigDict) -> None:
    """Raises ValueError if there are options of a checkpoint, but no checkpoint."""
    if config.checkpoint_options and not config.checkpoint:
        raise ValueError(
            f"checkpoint_options ({', '.join(config.checkpoint_options)}) are not read "
            "without a checkpoint; set --config.checkpoint, or fields of config.model."
        )


def load_problem(
    path: str,
    image_size: int,
    images: Images | None,
    options: Mapping[str, Any],
    **fields: Any,
) -> Problem:
    """The network of a checkpoint file, with other values of some fields of the model.

    Args:
      path: a file that `vit.load_checkpoint` reads.
      image_size: side of the images in pixels.
      images: the data set; None keeps the classes of the file.
      options: other keywords of `vit.load_checkpoint`.
      **fields: fields of the model.

    Raises:
      FileNotFoundError, ValueError: as `vit.load_checkpoint`, and if the images have
        another number of channels or there is no such option.
    """
    num_classes = None if images is None else images.num_classes
    known = inspect.signature(load_checkpoint).parameters
    known = [name for name, one in known.items() if one.kind is one.KEYWORD_ONLY]
    if unknown := set(options) - set(known):
        raise ValueError(
            f"checkpoint_options must be among {', '.join(known)}; got "
            f"{', '.join(sorted(unknown))}."
        )
    model, params = load_checkpoint(
        path, image_size=image_size, num_classes=num_classes, **options
    )
    problem = Problem(model.clone(**fields), params, image_size, images)
    channels = problem.input_shape[-1]
    if images is not None and channels != images.train[0].shape[-1]:
        raise ValueError(
            f"the checkpoint takes images of {channels} channels, the data set has "
            f"{images.train[0].shape[-1]}."
        )
    return problem


def init_problem(
    seed: int, image_size: int, images: Images | None, **fields: Any
) -> Problem:
    """A network with random weights; without images, for 1000 classes of RGB images.

    Raises:
      ValueError: if the model has no such field, or a value is out of range.
    """
    num_classes = 1000 if images is None else images.num_classes
    channels = 3 if images is None else images.train[0].shape[-1]
    inputs = jnp.zeros((1, image_size, image_size, channels))
    with settings.blamed_on("model"):
        model = make(num_classes=num_classes, **fields)
        jax.eval_shape(model.init, jax.random.key(0), inputs)
    variables = jax.jit(model.init)(jax.random.key(seed), inputs)
    return Problem(model, variables["params"], image_size, images)


def make_optimizer(
    settings: ConfigDict, num_steps: int, *, entry: str = "optimizer"
) -> optax.GradientTransformation:
    """Makes config.optimizer, any of optax, after clipping of the global norm.

    Muon (Jordan et al. 2024) updates the matrices of the blocks, with heads and their
    width as one axis. AdamW updates all other parameters, such as head and embeddings.
    `entry` is the name of `settings` in the config, for errors.

    Raises:
      ValueError: if the optimizer or one of its options is unknown.
    """
    if settings.name == "muon":
        schedule = optimizers.make_schedule(settings, num_steps)
        make = functools.partial(
            optax.contrib.muon,
            schedule,
            muon_weight_dimension_numbers=optimizers.matrix_axes,
        )
        optimizer = optimizers.check(make, settings.options, entry)
    else:
        optimizer = optimizers.make_optimizer(settings, num_steps, entry=entry)
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), optimizer)


def init_state(
    params: Any, optimizer: optax.GradientTransformation, num_steps: int
) -> TrainState:
    """The state before the first of `num_steps` steps; `params` are copied."""
    return TrainState(
        # The buffers of the training state are donated.
        params=jax.tree.map(jnp.copy, params),
        average=jax.tree.map(jnp.copy, params),
        opt_state=jax.jit(optimizer.init)(params),
        loss=jnp.zeros(num_steps),
        accuracy=jnp.zeros(num_steps),
    )


def patch_dropout(model: ViT, num_patches: int, keep: float) -> ViT:
    """`model` on a random share of the patches of each image, drawn at every step.

    PatchDropout (Liu et al. 2023, arXiv 2208.07220): a cascade before the first layer.
    A model with its own cascade is returned unchanged.
    """
    if keep == 1 or model.cascade is not None:
        return model
    count = max(round(keep * num_patches), 1)
    return model.clone(
        cascade=Cascade(keep=(count,) * model.num_layers, score="random")
    )


def check(config: ConfigDict, images: Images, *, parent: str = "") -> None:
    """Raises ValueError if batch, optimizer or augmentation do not suit `train`.

    `parent` is what precedes the fields of `config` in the whole config, for errors.
    """
    steps_per_epoch = classifier.count_steps(images, config.batch_size)
    devices.check_divisible(config.batch_size)
    stages = [
        loop.in_stage(config, number).augment
        for number in range(len(config.stages) + 1)
    ]
    used = {
        "num_ops=0": any(augment.num_ops for augment in stages),
        "flip=False": any(augment.flip for augment in stages),
        "min_area=1": any(augment.min_area < 1 for augment in stages),
    }
    classifier.check_augmentation(
        images, {f"{parent}augment.{field}": is_on for field, is_on in used.items()}
    )
    num_steps = config.num_epochs * steps_per_epoch
    make_optimizer(config.optimizer, num_steps, entry=f"{parent}optimizer")


def check_stages(config: ConfigDict, rules: Mapping[str, settings.Rule]) -> None:
    """Raises ValueError if stages are not valid for `train`.

    Args:
      config: with stages and the fields that they change.
      rules: {field: rule}, which every stage must keep.
    """
    loop.check_stages(config, _CHANGEABLE)
    for stage in range(1, len(config.stages) + 1):
        with settings.blamed_on(f"stages[{stage - 1}]"):
            settings.check(loop.in_stage(config, stage), rules)


# Fields that only the construction of a step reads.
_CHANGEABLE = {"patch_keep_rate", "label_smoothing"} | {
    f"augment.{name}"
    for name in (
        *("crop_padding", "flip", "num_ops", "magnitude", "min_area"),
        *("erase", "mixup", "cutmix"),
    )
}


def make_update(
    problem: Problem,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
    *,
    teacher: Problem | None = None,
    teacher_weight: float = 0.0,
) -> Callable[[TrainState, int, int], TrainState]:
    """The training: (state, first, last) -> state after steps first, ..., last - 1.

    See `classifier.make_steps`, and `train` for the arguments.
    """
    images = problem.images

    def step_fn(state, step, pixels, labels, *teacher_params):
        key = jax.random.fold_in(jax.random.key(config.seeds[0]), step)
        keys = jax.random.split(key, 4)
        pixels, targets = augmentation.mix(
            keys[1],
            augment(keys[0], pixels, images, config),
            jax.nn.one_hot(labels, images.num_classes),
            mixup_alpha=config.augment.mixup,
            cutmix_alpha=config.augment.cutmix,
        )
        rngs = {"dropout": keys[2], "cascade": keys[3]}
        learned = optax.losses.smooth_labels(targets, config.label_smoothing)
        if teacher is not None:
            logits = teacher.model.apply({"params": teacher_params[0]}, pixels)
            learned = optax.incremental_update(
                jax.nn.softmax(logits), learned, teacher_weight
            )
        if problem.image_size != config.image_size:
            pixels = augmentation.resize(pixels, problem.image_size)

        def loss_fn(params):
            logits = problem.model.apply(
                {"params": params}, pixels, train=True, rngs=rngs
            )
            loss = optax.losses.softmax_cross_entropy(logits, learned).mean()
            return loss, jnp.mean(logits.argmax(-1) == targets.argmax(-1))

        (loss, accuracy), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # The decay starts small, so that the initial weights are soon forgotten.
        decay = jnp.minimum(config.average_decay, (1 + step) / (10 + step))
        return TrainState(
            params=params,
            average=optax.incremental_update(params, state.average, 1 - decay),
            opt_state=opt_state,
            loss=state.loss.at[step].set(loss),
            accuracy=state.accuracy.at[step].set(accuracy),
        )

    return classifier.make_steps(
        step_fn,
        images,
        batch_size=config.batch_size,
        seed=config.seeds[0],
        constants=() if teacher is None else (teacher.params,),
    )


def augment(
    key: jax.Array, pixels: jax.Array, images: Images, config: ConfigDict
) -> jax.Array:
    """Augments a batch by config.augment: uint8 (B, H, W, C) -> normalized float32.

    Images of another size are resized to config.image_size: random crops if
    augment.min_area is below one (Google's fine-tuning), otherwise whole images.
    """
    settings = config.augment
    keys = jax.random.split(key, 4)
    if settings.crop_padding or settings.flip:
        pixels = augmentation.crop_flip(
            keys[0], pixels, padding=settings.crop_padding, flip=settings.flip
        )
    if settings.num_ops:
        pixels = augmentation.rand_augment(
            keys[1], pixels, num_ops=settings.num_ops, magnitude=settings.magnitude
        )
    if settings.min_area < 1:
        pixels = augmentation.resized_crop(
            keys[2], pixels, size=config.image_size, min_area=settings.min_area
        )
    pixels = prepare(images, pixels, config.image_size)
    if settings.erase:
        pixels = augmentation.erase(keys[3], pixels, probability=settings.erase)
    return pixels


def prepare(images: Images, pixels: jax.Array, image_size: int) -> jax.Array:
    """Resizes (B, H, W, C) to the size of the model if necessary, and normalizes."""
    if pixels.shape[1:3] != (image_size, image_size):
        pixels = augmentation.resize(pixels, image_size)
    return classifier.normalize(images, pixels)


def make_predict(problem: Problem) -> Callable[[Any, np.ndarray], np.ndarray]:
    """Evaluation: (params, uint8 (N, H, W, C)) -> logits (N, K)."""

    def forward(params, pixels):
        inputs = prepare(problem.images, pixels, problem.image_size)
        return problem.model.apply({"params": params}, inputs)

    return classifier.in_batches(forward, _EVALUATED_AT_ONCE)


def train(
    run: runs.Run,
    problem: Problem,
    *,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    teacher: Problem | None = None,
    teacher_weight: float = 0.0,
) -> TrainState:
    """Trains a network, pruned or not, by run.config; resumes from a checkpoint.

    config.stages changes fields during the training: ((from, {field: value}), ...),
    where `from` is a share of the epochs. A stage keeps the changes of earlier stages.

    Args:
      run: the open run folder.
      problem: the network, with its initial parameters, and the images. The augmented
        images, of side config.image_size, are resized to the size that it takes.
      evaluate: measures the metrics that are logged every config.evaluate_every epochs.
      optimizer: replaces config.optimizer.
      teacher: a network, without dropout of any kind, whose probabilities are
        additional targets (distillation of Hinton et al. 2015, arXiv 1503.02531, at
        temperature 1). It gets the augmented images before they are resized.
      teacher_weight: weight of its probabilities in the targets, in [0, 1]; the labels
        have the remaining weight.
    """
    config, model = run.config, problem.model
    steps_per_epoch = classifier.count_steps(problem.images, config.batch_size)
    num_steps = config.num_epochs * steps_per_epoch
    if optimizer is None:
        optimizer = make_optimizer(config.optimizer, num_steps)

    @functools.cache
    def update_of(stage):
        settings = loop.in_stage(config, stage)
        keep = settings.patch_keep_rate
        chosen = f"{100 * keep:.0f} % of the patches"
        if model.cascade is not None:
            chosen = "the patches of the network's cascade"
        run.say(f"compiling; {chosen} ...")
        return make_update(
            problem._replace(model=patch_dropout(model, problem.num_patches, keep)),
            optimizer,
            settings,
            teacher=teacher,
            teacher_weight=teacher_weight,
        )

    def advance(state, start, stop):
        stage = loop.stage_of(config, start // steps_per_epoch)
        state = update_of(stage)(state, start, stop)
        metrics = {}
        epoch, rest = divmod(stop, steps_per_epoch)
        if not rest:
            accuracy = state.accuracy[stop - steps_per_epoch : stop].mean()
            metrics["train_accuracy"] = float(accuracy)
            due = epoch % config.evaluate_every == 0 or stop == num_steps
            if evaluate is not None and due:
                metrics |= evaluate(state)
        return state, state.loss[start:stop], metrics

    return loop.train(
        run,
        init_state(problem.params, optimizer, num_steps),
        advance,
        stops=loop.every(num_steps, config.log_every, steps_per_epoch),
        saves=loop.every(num_steps, config.checkpoint_every),
    )
