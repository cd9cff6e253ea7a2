"""Training and evaluation of Vision Transformers, for train_vit and prune_vit.

Axes: B images, H W C of an image, K classes, S steps.
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

from experiments.common import augmentation, runs
from experiments.training import classifier, loop, optimizers
from experiments.training.classifier import Images
from vit import Cascade, ViT


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


def load_images(config: ConfigDict) -> Images:
    """Loads config.dataset; mean and std are 0.5 if config.normalisation is "google".

    Raises:
      ValueError: if config.normalisation is not google or dataset.
    """
    settings = ConfigDict(config)
    # Images are resized on the device if necessary.
    settings.image_size = 0
    images = classifier.load_images(settings)
    if config.normalisation == "google":
        half = np.full_like(images.mean, 0.5)
        return images._replace(mean=half, std=half)
    if config.normalisation != "dataset":
        raise ValueError(
            f"normalisation {config.normalisation!r} is neither google nor dataset."
        )
    return images


def parse_dtype(name: str) -> Any:
    """The compute dtype with this name.

    Raises:
      ValueError: if it is not float32 or bfloat16.
    """
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"dtype {name!r} is neither float32 nor bfloat16.")
    return jnp.dtype(name)


def check_channels(model: ViT, params: Any, images: Images | None) -> None:
    """Raises ValueError if the weights are for another number of channels."""
    first = params["stem_0" if model.stem else "embedding"]["kernel"]
    if images is not None and first.shape[2] != images.train[0].shape[-1]:
        raise ValueError(
            f"the checkpoint takes images of {first.shape[2]} channels, the data set "
            f"has {images.train[0].shape[-1]}."
        )


def make_optimizer(
    settings: ConfigDict, num_steps: int
) -> optax.GradientTransformation:
    """Makes config.optimizer, any of optax, after clipping of the global norm.

    Muon (Jordan et al. 2024) updates the matrices of the blocks, with heads and their
    width as one axis. AdamW updates all other parameters, such as head and embeddings.

    Raises:
      ValueError: if the optimizer or one of its options is unknown.
    """
    settings = ConfigDict(settings)
    if settings.name == "muon":
        # A field of a ConfigDict cannot be a function.
        options = settings.options.to_dict()
        schedule = optimizers.make_schedule(settings, num_steps)
        try:
            optimizer = optax.contrib.muon(
                schedule, muon_weight_dimension_numbers=_matrices, **options
            )
        except TypeError as error:
            raise ValueError(f"optimizer.options: {error}") from None
    else:
        optimizer = optimizers.make_optimizer(settings, num_steps)
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), optimizer)


def _matrices(params):
    """Marks the parameters that are matrices, and their input and output axes."""

    def axes(path, x):
        names = [entry.key for entry in path]
        if names[-1] != "kernel" or "Transformer" not in names:
            return None
        num_inputs = 2 if names[-2] == "out" else 1
        return optax.contrib.MuonDimensionNumbers(
            tuple(range(num_inputs)), tuple(range(num_inputs, x.ndim))
        )

    return jax.tree_util.tree_map_with_path(axes, params)


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


def check_stages(config: ConfigDict) -> None:
    """Raises ValueError if patch_dropout or stages are not valid for `train`."""
    starts = [start for start, _ in config.stages]
    fields = {field for _, changes in config.stages for field in changes}
    if starts != sorted(starts) or not all(0 <= start < 1 for start in starts):
        raise ValueError(
            f"stages must begin at rising shares of the epochs in [0, 1), got {starts}."
        )
    if fields - _CHANGEABLE:
        raise ValueError(
            f"stages can change {', '.join(sorted(_CHANGEABLE))}, not "
            f"{', '.join(sorted(fields - _CHANGEABLE))}."
        )
    for stage in range(len(starts) + 1):
        keep = in_stage(config, stage).patch_dropout
        if not 0 < keep <= 1:
            raise ValueError(f"patch_dropout keeps a share in (0, 1], got {keep}.")


def in_stage(config: ConfigDict, stage: int) -> ConfigDict:
    """`config` after the changes of the first `stage` entries of config.stages."""
    config = config.copy_and_resolve_references()
    for _, changes in config.stages[:stage]:
        config.update_from_flattened_dict(changes)
    return config


# Fields that only the construction of a step reads.
_CHANGEABLE = {"patch_dropout", "label_smoothing"} | {
    f"augment.{name}"
    for name in (
        *("crop_padding", "flip", "num_ops", "magnitude", "min_area"),
        *("erase", "mixup", "cutmix"),
    )
}


class Teacher(NamedTuple):
    """A network whose predictions are additional targets of a training.

    Distillation of Hinton et al. 2015, arXiv 1503.02531, at temperature 1. The inputs
    of the teacher are the same augmented images, before they are resized for the
    student.

    Attributes:
      model: the network, without dropout of any kind.
      params: its weights, which are not trained.
      weight: weight of its probabilities in the targets, in [0, 1]; the labels have
        the remaining weight.
    """

    model: ViT
    params: Any
    weight: float


def make_update(
    model: ViT,
    images: Images,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
    *,
    image_size: int | None = None,
    teacher: Teacher | None = None,
) -> Callable[[TrainState, int, int], TrainState]:
    """The training: (state, first, last) -> state after steps first, ..., last - 1.

    See `classifier.make_steps`, and `train` for the arguments.
    """
    image_size = image_size or config.image_size

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
                jax.nn.softmax(logits), learned, teacher.weight
            )
        if image_size != config.image_size:
            pixels = augmentation.resize(pixels, image_size)

        def loss_fn(params):
            logits = model.apply({"params": params}, pixels, train=True, rngs=rngs)
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
    return classifier.normalise(images, pixels)


def make_predict(
    model: ViT, images: Images, image_size: int, *, batch_size: int = 250
) -> Callable[[Any, np.ndarray], np.ndarray]:
    """Evaluation: (params, uint8 (N, H, W, C)) -> logits (N, K)."""

    return classifier.in_batches(
        lambda params, batch: model.apply(
            {"params": params}, prepare(images, batch, image_size)
        ),
        batch_size,
    )


def train(
    run: runs.Run,
    model: ViT,
    images: Images,
    params: Any,
    *,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    image_size: int | None = None,
    teacher: Teacher | None = None,
) -> TrainState:
    """Trains `model` from `params` by run.config; resumes from a checkpoint.

    config.stages changes fields during the training: ((from, {field: value}), ...),
    where `from` is a share of the epochs. A stage keeps the changes of earlier stages.

    Args:
      run: the open run folder.
      model: the network, pruned or not.
      images: the data set.
      params: the initial parameters.
      evaluate: measures the metrics that are logged every config.evaluate_every epochs.
      optimizer: replaces config.optimizer.
      image_size: image size of `model` if it is not config.image_size; the augmented
        images are resized to it.
      teacher: a network whose predictions are additional targets.
    """
    config = run.config
    image_size = image_size or config.image_size
    steps_per_epoch = classifier.count_steps(images, config.batch_size)
    num_steps = config.num_epochs * steps_per_epoch
    if optimizer is None:
        optimizer = make_optimizer(config.optimizer, num_steps)
    num_patches = (image_size // model.patch_size) ** 2
    starts = [start * config.num_epochs for start, _ in config.stages]

    @functools.cache
    def update_of(stage):
        settings = in_stage(config, stage)
        keep = settings.patch_dropout
        run.say(f"compiling; {100 * keep:.0f} % of the patches ...")
        return make_update(
            patch_dropout(model, num_patches, keep),
            images,
            optimizer,
            settings,
            image_size=image_size,
            teacher=teacher,
        )

    def advance(state, start, stop):
        stage = sum(first <= start // steps_per_epoch for first in starts)
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
        init_state(params, optimizer, num_steps),
        advance,
        stops=loop.every(num_steps, config.log_every, steps_per_epoch),
        saves=loop.every(num_steps, config.checkpoint_every),
    )
