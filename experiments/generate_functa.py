"""Trains a flow on the latents of a functaset and generates images with it.

    python -m experiments.generate_functa \\
        --config=experiments/configs/generate_functa.py:digits

Sampled latents are rendered by the field, rounded to 8 bits and fitted again, so that
they enter every measure like the images of a data set. The same measures are taken of
training images, of their reconstructions, and of samples from the Gaussian of each
class of latents, the control. Features are those of a classifier of the latents and of
a random network on the pixels.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

import functa
from experiments.common import data, devices, files, launch, runs, settings
from experiments.common.sweep import sweep
from experiments.configs import generate_functa as configs
from experiments.drawing import figures
from experiments.networks import heads
from experiments.networks.convnext import ConvNeXt
from experiments.training import encoding, features, flow, latent_classifier
from experiments.training.latent_classifier import LatentClassifier
from functa import functaset, generation

# Parts of the kernel distance, and neighbors of density and coverage.
_NUM_BLOCKS, _NUM_NEIGHBORS = 10, 5
_SCALE = 4  # of the large images
# Samples of a class, classes, and images of each source in the figures.
_PER_CLASS, _SHOWN_CLASSES, _SHOWN = 10, 10, 12


class Images(NamedTuple):
    """Images uint8 (N, H, W, C), their fitted latents (N, *Z) and their labels (N,)."""

    image: np.ndarray
    latent: np.ndarray
    label: np.ndarray


class Signals(NamedTuple):
    """Training and reference signals of a flow.

    Attributes:
      whole: the functaset.
      learner: the weights that made it.
      rows: training rows of the functaset, with copies.
      train: the training images, without copies.
      reference: the images that samples are compared with, in random order.
      classes: the labels that were trained, sorted; () if the flow has no classes.
      classifier: of the latents, or None.
    """

    whole: functa.Functaset
    learner: encoding.Learner
    rows: np.ndarray
    train: Images
    reference: Images
    classes: tuple[int, ...]
    classifier: LatentClassifier | None

    @property
    def num_classes(self) -> int:
        """K; the label K stands for no class."""
        return 1 + max(self.classes, default=-1)


def train_and_evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs or resumes one experiment; returns its summary."""
    settings.check(config, configs.RULES)
    devices.check_divisible(config.batch_size)
    flow.make_optimizer(config)
    flow.make_model(config, 0)
    loaded = {seed: load_signals(config, seed) for seed in config.seeds}

    def experiment(run):
        return generate(run, loaded[run.config.seeds[0]])

    def inputs(config):
        signals = loaded[config.seeds[0]]
        whole = signals.whole
        return {
            "functaset": functaset.hash_params(whole.latent),
            "labels or normalization of the functaset": functaset.hash_params(
                [whole.label, whole.mean, whole.std]
            ),
            "classifier": signals.classifier and signals.classifier.sha256,
        }

    return sweep(config, workdir, experiment, inputs=inputs)


def load_signals(config: ConfigDict, seed: int) -> Signals:
    """Reads the functaset, its images and the classifier for one seed.

    Raises:
      FileNotFoundError: if a file, a run or the data set does not exist.
      ValueError: if they do not belong together, or do not suffice for the config.
    """
    run, path, classifier = (
        value and value.replace("{seed}", str(seed))
        for value in (config.run, config.functaset, config.classifier)
    )
    learner = encoding.load_learner(run)
    whole = features.load_renderable(path, run, learner)
    # Samples are fitted again as the latents of the functaset were fitted.
    num_steps = whole.config.get("inner", {}).get("num_steps")
    if num_steps is not None:
        learner = learner.with_steps(num_steps)
    images, rows = features.load_images(whole, "train", config.data_dir)
    features.check_grid(path, whole, learner, images)
    learner = learner.for_shape(images.shape[1:3])
    train = _select(whole, images, rows)
    if config.num_validation:
        if config.num_validation >= len(images):
            raise ValueError(
                f"num_validation must be below the {len(images)} training images, got "
                f"{config.num_validation}."
            )
        held_out, kept = data.hold_out(len(images), config.num_validation)
        reference = Images(*(x[held_out] for x in train))
        train = Images(*(x[kept] for x in train))
        rows = rows.reshape(-1, len(images))[:, kept].ravel()
    else:
        found = features.load_images(whole, "test", config.data_dir)
        reference = _select(whole, *found)
    sizes = len(train.label), len(reference.label), config.num_images or np.inf
    if min(sizes) < 2 * _NUM_BLOCKS:
        raise ValueError(
            f"{path}: the comparison needs {2 * _NUM_BLOCKS} training images, as many "
            f"{_reference(config)} images, and num_images of at least that number or "
            f"0; got {sizes[0]}, {sizes[1]} and {config.num_images}."
        )
    order = np.random.default_rng(1).permutation(len(reference.label))
    reference = Images(*(x[order] for x in reference))
    classes = _check_classes(config, path, train.label)
    if classifier is not None:
        classifier = latent_classifier.load(
            classifier,
            num_classes=1 + int(whole.label.max()),
            latent_shape=whole.latent.shape[1:],
            dataset=whole.config["dataset"],
            params_sha256=whole.params_sha256,
        )
    devices.say(
        f"{path}: {len(train.label)} training images of {whole.config['dataset']}, and "
        f"{len(reference.label)} {_reference(config)} images to compare with"
    )
    return Signals(whole, learner, rows, train, reference, classes, classifier)


def _select(whole, images, rows):
    rows = rows[: len(images)]
    return Images(images, whole.latent[rows], whole.label[rows])


def _check_classes(config, path, labels):
    """The classes of a conditional flow; refuses those that cannot be trained."""
    asked = tuple(config.sampling.classes)
    if not config.conditional:
        if asked or config.sampling.guidance != 1:
            raise ValueError(
                "sampling.classes and sampling.guidance need conditional=True."
            )
        return ()
    if config.sampling.guidance != 1 and not config.label_dropout:
        raise ValueError(
            "sampling.guidance needs label_dropout above 0: guidance uses the flow "
            "without a class, which is trained only on dropped labels."
        )
    if labels.min() < 0:
        raise ValueError(
            f"{path} has signals without a label (-1); set conditional=False to train "
            "a flow without classes."
        )
    classes, counts = np.unique(labels, return_counts=True)
    for number in asked:
        if number not in classes:
            raise ValueError(
                f"sampling.classes: class {number} is not trained; {path} has the "
                f"classes {', '.join(map(str, classes))}."
            )
    if counts.min() < 2:
        raise ValueError(
            f"{path}: class {classes[counts.argmin()]} has one training image; each "
            "class needs two."
        )
    return tuple(classes.tolist())


def _reference(config):
    return "validation" if config.num_validation else "test"


def generate(run: runs.Run, signals: Signals) -> dict[str, Any]:
    """Trains the flow, samples from it and measures the samples."""
    config, whole = run.config, signals.whole
    model = flow.make_model(config, signals.num_classes)
    std = np.where(whole.std > 0, whole.std, 1)

    def part(latents, labels):
        return flow.Part(
            np.float32((latents - whole.mean) / std),
            labels if signals.classes else np.zeros_like(labels),
        )

    trained = part(whole.latent[signals.rows], whole.label[signals.rows])
    held_out = None
    if config.num_validation:
        held_out = part(signals.reference.latent, signals.reference.label)
    state = flow.train(run, model, trained, held_out)

    rng = np.random.default_rng(config.seeds[0])
    num_train = len(signals.train.label)
    chosen = rng.permutation(num_train)[: config.num_images or num_train]
    train = Images(*(x[chosen] for x in signals.train))
    shown = config.sampling.classes or signals.classes[:_SHOWN_CLASSES]
    shown = np.array(shown or range(_SHOWN_CLASSES), np.int32)
    rows = np.repeat(shown, _PER_CLASS)

    def draw(labels):
        drawn = flow.draw(
            config,
            model,
            jax.device_get(state.sampled),
            labels if signals.classes else np.zeros_like(labels),
            whole.latent.shape[1:],
        )
        return np.float32(drawn * std + whole.mean)

    stored = run.workdir / "generated.npz"
    if not stored.exists():  # It takes minutes.
        files.write_npz(stored, _generate_images(run, signals, draw, train, rows))
    made = files.read_npz(stored)
    sources = {"train": train} | {
        name: Images(made[f"image_{name}"], made[f"latent_{name}"], train.label)
        for name in ("reconstructions", "samples", "gaussian")
    }
    summary = measure(run, signals, sources)
    summary |= {
        "num_params": optax.tree.size(state.params),
        "loss": run.metrics()[-1]["loss"],
    }
    # One sample of each class.
    few = slice(None, None, _PER_CLASS + 1)
    _, nearest = generation.nearest_distances(
        data.to_float(sources["samples"].image[:_SHOWN]),
        data.to_float(signals.train.image),
    )
    arrays = {
        "rows": made["image_rows"],
        "row_labels": rows[::_PER_CLASS],
        "small": made["image_rows"][few],
        "large": render(
            config,
            signals.learner,
            made["drawn_rows"][few],
            [_SCALE * side for side in train.image.shape[1:3]],
        ),
        "nearest": signals.train.image[nearest],
        "reference": signals.reference.image[:_SHOWN],
        **{name: source.image[:_SHOWN] for name, source in sources.items()},
    }
    names = whole.config.get("class_names")
    if names is not None and signals.classes:
        arrays["class_names"] = np.array(names)
    files.write_npz(run.workdir / "arrays.npz", arrays)
    figures.draw(run.workdir, summary)
    return summary


def _generate_images(run, signals, draw, train, rows):
    """Images of all sources and the latents fitted to them, as arrays of one file."""
    run.say(f"sampling {len(train.label) + len(rows)} latents ...")
    drawn = draw(np.concatenate([train.label, rows]))
    drawn, drawn_rows = np.split(drawn, [len(train.label)])
    _save_samples(run, signals, drawn, train.label)
    run.say("rendering the images and fitting them ...")
    images, latents = make_images(
        run.config,
        signals.learner,
        {
            "reconstructions": train.latent,
            "samples": drawn,
            "gaussian": _draw_gaussian(run.config, signals, train.label),
            "rows": drawn_rows,
        },
        train.image.shape[1:3],
    )
    arrays = {f"image_{name}": value for name, value in images.items()}
    arrays |= {f"latent_{name}": value for name, value in latents.items()}
    return arrays | {"drawn_rows": drawn_rows}


def _save_samples(run, signals, latents, labels):
    """Writes the samples as a functaset of the same field."""
    whole = signals.whole
    samples = whole._replace(
        latent=latents,
        label=labels if signals.classes else np.full_like(labels, -1),
        # A sample is its own signal, so it is exact.
        psnr=np.full(len(latents), np.inf, np.float32),
        split=np.full(len(latents), "train"),
        config={"model": whole.config.get("model")},
    )
    files.write_atomic(
        run.workdir / "samples.npz",
        lambda file: functaset.save_functaset(file, samples),
        mode="wb",
    )


def _draw_gaussian(config, signals, labels):
    """Samples with these labels from the Gaussian of each class, or of all latents."""
    key = jax.random.key(config.seeds[0] + 3)
    train = signals.train
    if not signals.classes:
        return generation.sample_gaussian(key, train.latent, len(labels))
    drawn = np.empty((len(labels), *train.latent.shape[1:]), np.float32)
    for number in np.unique(labels):
        rows = labels == number
        drawn[rows] = generation.sample_gaussian(
            jax.random.fold_in(key, number),
            train.latent[train.label == number],
            rows.sum(),
        )
    return drawn


def render(
    config: ConfigDict,
    learner: encoding.Learner,
    latents: np.ndarray,
    shape: Sequence[int],
) -> np.ndarray:
    """The images (H, W) of latents (N, *Z), uint8 (N, H, W, C)."""
    values = functa.render(
        learner.model,
        learner.params,
        latents,
        shape,
        batch_size=config.render_batch_size,
    )
    return np.uint8(np.clip(np.round(255 * values), 0, 255))


def make_images(
    config: ConfigDict,
    learner: encoding.Learner,
    latents: dict[str, np.ndarray],
    shape: Sequence[int],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The images (H, W) of several sets of latents, and the latents fitted to them."""
    ends = np.cumsum([len(values) for values in latents.values()])[:-1]
    # All at once, because each number of images would be compiled separately.
    images = render(config, learner, np.concatenate([*latents.values()]), shape)
    encoded = encoding.encode(learner, images, batch_size=config.render_batch_size)
    fitted = np.concatenate([batch for batch, _ in encoded])
    return tuple(
        dict(zip(latents, np.split(values, ends), strict=True))
        for values in (images, fitted)
    )


def measure(
    run: runs.Run, signals: Signals, sources: dict[str, Images]
) -> dict[str, Any]:
    """Compares each source with the reference; all with the same number of images.

    A source takes minutes, so its measures are stored when they are known.
    """
    config, reference = run.config, signals.reference
    num = min(len(reference.label), len(sources["train"].label))
    classifier = signals.classifier
    summary = {
        "dataset": signals.whole.config["dataset"],
        "compared_with": _reference(config),
        "num_compared": num,
        "num_train": len(signals.train.label),
        "num_samples": len(sources["samples"].label),
        "expected_coverage": generation.expected_coverage(
            num, num, num_neighbors=_NUM_NEIGHBORS
        ),
    }

    random_network = make_random_network(reference.image.shape[1:])

    def extract(images):
        found = {"random": random_network(images.image[:num])}
        if classifier is not None:
            found["classifier"] = classifier.features(images.latent[:num])
        return found

    if classifier is not None:
        right = classifier.predict(reference.latent) == reference.label
        summary["classifier_sha256"] = classifier.sha256
        summary["classifier_accuracy"] = np.mean(right)
    real = extract(reference)
    train = data.to_float(signals.train.image)
    to_train, _ = generation.nearest_distances(
        data.to_float(reference.image[:num]), train
    )
    stored = run.workdir / "measures.json"
    measured = files.read_json(stored) if stored.exists() else {}
    for name, images in sources.items():
        if name in measured:
            continue
        run.say(f"measuring {name} ...")
        measures = {}
        for extractor, fake in extract(images).items():
            distance, error = generation.kernel_distance(
                fake, real[extractor], num_blocks=_NUM_BLOCKS
            )
            density, coverage = generation.density_and_coverage(
                real[extractor], fake, num_neighbors=_NUM_NEIGHBORS
            )
            measures[extractor] = {
                "frechet_distance": generation.frechet_distance(fake, real[extractor]),
                "kernel_distance": distance,
                "kernel_distance_error": error,
                "density": density,
                "coverage": coverage,
            }
        if classifier is not None and signals.classes:
            measures["accuracy_score"] = score_accuracy(
                config, classifier, images, reference
            )
        if name in ("samples", "gaussian"):
            distances, _ = generation.nearest_distances(
                data.to_float(images.image[:num]), train
            )
            measures["memorization_ratio"] = np.median(distances) / np.median(to_train)
        measured[name] = measures
        files.write_json(stored, measured)
    return summary | measured


def make_random_network(
    shape: Sequence[int],
) -> Callable[[np.ndarray], np.ndarray]:
    """A network of random weights: uint8 images (N, H, W, C) -> features (N, 128).

    Args:
      shape: (H, W, C). The network halves the grid twice, unless a side is odd.
    """
    num_stages = 1
    while num_stages < 3 and not any(side % 2**num_stages for side in shape[:2]):
        num_stages += 1
    model = ConvNeXt(
        1, widths=(32, 64, 128)[-num_stages:], depths=(2,) * num_stages, layer_scale=1.0
    )
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *shape)))

    @jax.jit
    def extract(images):
        values = 2 * (jnp.float32(images) / 255) - 1
        return heads.with_features(lambda x: model.apply(params, x), values)[1]

    return functools.partial(devices.in_batches, extract)


def score_accuracy(
    config: ConfigDict, classifier: LatentClassifier, images: Images, reference: Images
) -> float:
    """Trains a classifier on `images` and returns its accuracy on `reference`."""
    params = latent_classifier.fit(
        jax.random.key(config.seeds[0] + 4),
        classifier.head,
        classifier.normalize(images.latent),
        images.label,
        **config.accuracy_score,
    )
    predicted = classifier._replace(params=params).predict(reference.latent)
    return float(np.mean(predicted == reference.label))


if __name__ == "__main__":
    launch.launch("generate_functa", train_and_evaluate)
