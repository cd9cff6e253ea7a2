"""Prunes a Vision Transformer and measures cost, accuracy and speed.

    python -m experiments.prune_vit --config=experiments/configs/prune_vit.py:smoke

For every method and ratio the command measures the test accuracy with and without
fine-tuning, the multiply-adds, and the time in turns with the dense network. Methods
with another parameter (keep rate, merged tokens, image size) are set to the cost of the
report's cascade at the same ratio.
"""

import functools
import hashlib
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import lbi
import vit
from experiments.common import figures, files, launch, runs, settings
from experiments.common.sweep import sweep
from experiments.configs import prune_vit as configs
from experiments.training import classifier, optimizers
from experiments.training import vit as vit_training
from experiments.training.classifier import Images
from vit import cascade, checkpoint, cost, importance, schedules, slicing


class Network(NamedTuple):
    """A model, its parameters, and the size and channels of its input images."""

    model: vit.ViT
    params: Any
    image_size: int
    channels: int

    @property
    def cost(self) -> cost.Cost:
        return cost.count(self.model, self.image_size, channels=self.channels)

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.model.patch_size) ** 2

    @property
    def sizes(self) -> dict[str, int]:
        """The keywords of a cascade's constructor."""
        return {"num_layers": self.model.num_layers, "num_patches": self.num_patches}

    def with_cascade(self, chosen: vit.Cascade | None) -> "Network":
        return self._replace(model=self.model.clone(cascade=chosen))


class Calibration(NamedTuple):
    """Statistics of the dense network on some training images.

    Attributes:
      head_scores: mean of `importance.head_scores`, (L, H).
      ranges: `importance.attention_range` of each layer, (L,).
    """

    head_scores: np.ndarray
    ranges: np.ndarray


def train_and_evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs or resumes one experiment; returns its summary."""
    settings.check(config, configs.RULES)
    _check_methods(config)
    images = vit_training.load_images(config) if config.dataset.name else None
    dense = load_network(config, images)
    # A resumed run must not combine the rows of two networks.
    digest = None
    if config.checkpoint:
        digest = hashlib.sha256(Path(config.checkpoint).read_bytes()).hexdigest()
    return sweep(
        config,
        workdir,
        lambda run: _measure_all(run, dense, images),
        inputs=lambda config: {"checkpoint": digest},
    )


def _measure_all(run, dense, images):
    config = run.config
    calibration = structure = None
    if images is not None:
        calibration = calibrate(config, dense, images)
        if any(method.endswith("_lbi") for method in config.methods):
            structure = _learn_structure(run, dense, images)
    rows, seen = [], set()
    for method, ratios in {"dense": (0.0,), **config.methods}.items():
        for ratio in ratios:
            network = prune(
                method, ratio, dense, calibration, structure, seed=config.seeds[0]
            )
            if (method, network.model, network.image_size) in seen:
                continue  # the parameter has no value in between
            seen.add((method, network.model, network.image_size))
            name = f"{method}_{ratio:g}"
            path = run.workdir / "rows" / f"{name}.json"
            if not path.exists():
                started = time.monotonic()
                row = {"method": method, "ratio": ratio}
                timed = method == "dense" or method in config.timing.methods
                row |= measure(run, network, dense, images, timed=timed)
                tuned = config.tuning.methods.get(method, ())
                if config.tuning.num_epochs and ratio in tuned:
                    row |= _fine_tune(run, name, network, dense, images)
                row["seconds"] = time.monotonic() - started
                files.write_json(path, row)
                _say_row(run, row)
            rows.append(files.read_json(path))
    arrays = _table(rows)
    summary = {"rows": {f"{r['method']}_{r['ratio']:g}": r for r in rows}}
    if images is not None:
        arrays |= make_pictures(config, dense, images, calibration)
        summary |= {"parity": _parity(run, dense, images)}
        summary |= compare(rows)
    files.write_npz(run.workdir / "arrays.npz", arrays)
    _write_table(run.workdir / "table.md", rows, config.timing.batch_sizes)
    figures.draw(run.workdir)
    # Includes rows of earlier sessions.
    return summary | {"rows_seconds": sum(row["seconds"] for row in rows)}


def load_network(config: ConfigDict, images: Images | None) -> Network:
    """The network of config.checkpoint, or one with random weights for timing."""
    num_classes = None if images is None else images.num_classes
    channels = 3 if images is None else images.train[0].shape[-1]
    options = {
        "dtype": vit_training.parse_dtype(config.dtype),
        "attention_implementation": config.attention_implementation,
    }
    if config.checkpoint:
        model, params = vit.load_checkpoint(
            config.checkpoint, image_size=config.image_size, num_classes=num_classes
        )
        if images is not None and not np.any(params["head"]["kernel"]):
            raise ValueError(
                f"{config.checkpoint} has no head for {num_classes} classes; train it "
                "with train_vit first."
            )
        vit_training.check_channels(model, params, images)
        return Network(model.clone(**options), params, config.image_size, channels)
    if images is not None:
        raise ValueError(
            "config.checkpoint must name a file that train_vit wrote (model.npz in its "
            "run folder) or one that vit.load_checkpoint reads."
        )
    model = vit.make(num_classes=1000, **config.model.to_dict(), **options)
    shape = (1, config.image_size, config.image_size, channels)
    variables = jax.jit(model.init)(jax.random.key(config.seeds[0]), jnp.zeros(shape))
    return Network(model, variables["params"], config.image_size, channels)


def calibrate(config: ConfigDict, dense: Network, images: Images) -> Calibration:
    """Head scores and attention ranges over the first config.num_calibration images."""
    grid = (dense.image_size // dense.model.patch_size,) * 2

    @jax.jit
    def observe(params, pixels):
        batch = vit_training.prepare(images, pixels, dense.image_size)
        _, captured = dense.model.apply(
            {"params": params}, batch, mutable=["intermediates"]
        )
        blocks = captured["intermediates"]["Transformer"]
        probs = [
            blocks[f"encoderblock_{i}"]["attention"][0]
            for i in range(dense.model.num_layers)
        ]
        heads = [importance.head_scores(p).mean(0) for p in probs]
        ranges = [importance.attention_range(p, grid) for p in probs]
        return jnp.stack(heads), jnp.stack(ranges)

    pixels = images.train[0][: config.num_calibration]
    parts = np.array_split(pixels, -(-len(pixels) // 64))
    means = [observe(dense.params, part) for part in parts]
    sizes = [len(part) for part in parts]
    heads, ranges = (
        np.average(np.stack(values), axis=0, weights=sizes)
        for values in zip(*means, strict=True)
    )
    return Calibration(heads, ranges)


def prune(
    method: str,
    ratio: float,
    dense: Network,
    calibration: Calibration | None = None,
    structure: dict[str, list[np.ndarray]] | None = None,
    *,
    seed: int = 0,
) -> Network:
    """`dense` pruned by one of METHODS.

    Args:
      method: its name.
      ratio: plateau of the ramp over the layers; for "constant" and "range" the mean
        over all layers except the first; for heads and neurons the share per layer. The
        cost of "evit", "merge" and "resolution" is as close as possible to that of
        "max".
      dense: the dense network.
      calibration: for "range" and "heads".
      structure: scores of each layer, for "heads_lbi" and "neurons_lbi".
      seed: for "random", "heads_random" and "neurons_random".
    """
    if method == "dense" or ratio == 0:
        return dense
    return _METHODS[method](
        dense, ratio, calibration=calibration, structure=structure, seed=seed
    )


def _by_score(score, cumulative, **options):
    def prune_by_score(dense, ratio, *, seed, **_):
        return dense.with_cascade(
            schedules.cp_vit(
                ratio,
                **dense.sizes,
                score=score,
                cumulative=cumulative,
                seed=seed,
                **options,
            )
        )

    return prune_by_score


def _constant(dense, ratio, **_):
    ratios = schedules.constant_ratios(ratio, dense.model.num_layers)
    return dense.with_cascade(schedules.from_ratios(ratios, dense.num_patches))


def _by_range(dense, ratio, *, calibration, **_):
    ratios = schedules.range_ratios(ratio, calibration.ranges)
    return dense.with_cascade(schedules.from_ratios(ratios, dense.num_patches))


def _released_code(dense, ratio, **_):
    return dense.with_cascade(schedules.released_code(**dense.sizes, plateau=ratio))


def _evit(dense, ratio, **_):
    rates = np.linspace(0.2, 1, 161)
    candidates = [dense.with_cascade(schedules.evit(r, **dense.sizes)) for r in rates]
    return _at_equal_cost(dense, ratio, candidates)


def _merge(dense, ratio, **_):
    candidates = [
        dense.with_cascade(schedules.token_merging(num_merged, **dense.sizes))
        for num_merged in range(dense.num_patches // 2)
    ]
    return _at_equal_cost(dense, ratio, candidates)


def _resolution(dense, ratio, **_):
    patch = dense.model.patch_size
    candidates = [
        dense._replace(
            image_size=side * patch, params=_resize_positions(dense.params, side)
        )
        for side in range(1, dense.image_size // patch)
    ]
    return _at_equal_cost(dense, ratio, candidates)


def _at_equal_cost(dense, ratio, candidates):
    """The candidate whose cost is closest to that of "max" at the ratio."""
    target = dense.with_cascade(schedules.cp_vit(ratio, **dense.sizes)).cost.total
    return min(candidates, key=lambda network: abs(network.cost.total - target))


def _slices(what, by):
    """Cuts a share of the heads or neurons out of the weights of every layer."""

    def prune_weights(dense, ratio, *, calibration, structure, seed):
        model = dense.model
        total = model.num_heads if what == "heads" else model.mlp_dim
        if by == "random":
            rng = np.random.default_rng(seed)
            scores = [rng.random(total) for _ in range(model.num_layers)]
        elif by == "lbi":
            scores = structure[what]
        else:
            scores = list(calibration.head_scores)
        count = schedules.keep_counts([ratio], total)[0]
        kept = slicing.largest(scores, [max(count, 1)] * model.num_layers)
        cut = slicing.keep_heads if what == "heads" else slicing.keep_neurons
        smaller, params = cut(model, dense.params, kept)
        return dense._replace(model=smaller, params=params)

    return prune_weights


# name -> (dense, ratio, *, calibration, structure, seed) -> the pruned network.
_METHODS = {
    "max": _by_score("max", cumulative=True),
    "sum": _by_score("sum", cumulative=True),
    "cls": _by_score("cls", cumulative=False),
    "norm": _by_score("norm", cumulative=False),
    "random": _by_score("random", cumulative=True),
    "constant": _constant,
    "range": _by_range,
    "skip": _by_score("max", cumulative=True, semantics="skip"),
    "zero": _by_score("max", cumulative=True, semantics="zero"),
    "released_code": _released_code,
    "evit": _evit,
    "merge": _merge,
    "resolution": _resolution,
    "heads": _slices("heads", "scores"),
    "heads_random": _slices("heads", "random"),
    "heads_lbi": _slices("heads", "lbi"),
    "neurons_random": _slices("neurons", "random"),
    "neurons_lbi": _slices("neurons", "lbi"),
}
METHODS = ("dense", *_METHODS)


def _resize_positions(params, grid_size):
    encoder = params["Transformer"]
    positions = encoder["posembed_input"]["pos_embedding"]
    resized = checkpoint.resize_positions(np.asarray(positions), grid_size)
    embedding = {"posembed_input": {"pos_embedding": resized}}
    return params | {"Transformer": encoder | embedding}


def measure(
    run: runs.Run,
    network: Network,
    dense: Network,
    images: Images | None,
    *,
    timed: bool,
) -> dict[str, Any]:
    """Cost, accuracy and, if `timed`, speed of a network relative to the dense one."""
    config = run.config
    counted, whole = network.cost, dense.cost
    row = {
        "multiply_adds": counted.total,
        "saved": 1 - counted.total / whole.total,
        "predicted_speedup": whole.total / counted.total,
        "attention_tokens": list(counted.attention_tokens),
        "mlp_tokens": list(counted.mlp_tokens),
        "num_params": sum(x.size for x in jax.tree.leaves(network.params)),
        "image_size": network.image_size,
    }
    if images is not None:
        row["accuracy"] = _accuracy(network, network.params, images)
    for batch_size in config.timing.batch_sizes if timed else ():
        own, others = time_in_turns(
            _forward, network, dense, batch_size, config.timing.num_rounds
        )
        row[f"milliseconds_{batch_size}"] = own
        row[f"speedup_{batch_size}"] = others / own
        row[f"efficiency_{batch_size}"] = others / own / row["predicted_speedup"]
    if timed and config.timing.gradient_batch_size:
        own, others = time_in_turns(
            _gradient,
            network,
            dense,
            config.timing.gradient_batch_size,
            config.timing.num_rounds,
        )
        row["gradient_milliseconds"] = own
        row["gradient_speedup"] = others / own
    return row


def time_in_turns(
    function: Any, network: Network, dense: Network, batch_size: int, num_rounds: int
) -> tuple[float, float]:
    """Median milliseconds of a batch through a network and through the dense one.

    They take turns, so that other load on the machine affects both.
    """
    times, arguments = ([], []), []
    for one in (network, dense):
        shape = (batch_size, one.image_size, one.image_size, one.channels)
        images = jax.random.normal(jax.random.key(0), shape)
        arguments.append((one.model, one.params, images))
        jax.block_until_ready(function(*arguments[-1]))
    for _ in range(num_rounds):
        for argument, own in zip(arguments, times, strict=True):
            started = time.perf_counter()
            jax.block_until_ready(function(*argument))
            own.append(1000 * (time.perf_counter() - started))
    return float(np.median(times[0])), float(np.median(times[1]))


@functools.partial(jax.jit, static_argnums=0)
def _forward(model, params, inputs):
    return model.apply({"params": params}, inputs)


@functools.partial(jax.jit, static_argnums=0)
def _gradient(model, params, inputs):
    """A training step without the optimizer, for timing."""

    def loss_fn(params):
        logits = model.apply({"params": params}, inputs, train=True)
        return -jnp.mean(jax.nn.log_softmax(logits)[:, 0])

    return jax.grad(loss_fn)(params)


def _accuracy(network, params, images):
    predict = vit_training.make_predict(network.model, images, network.image_size)
    pixels, labels = images.test
    return classifier.accuracy(predict(params, pixels), labels)


def _fine_tune(run, name, network, dense, images):
    """Accuracy of the pruned network after fine-tuning by config.tuning."""
    config = _tuning_config(run.config, dense.image_size)
    weight = run.config.tuning.teacher_weight
    teacher = vit_training.Teacher(dense.model, dense.params, weight)
    with runs.open_run(run.workdir / f"tuned_{name}", config) as inner:
        state = vit_training.train(
            inner,
            network.model,
            images,
            network.params,
            image_size=network.image_size,
            teacher=teacher if weight else None,
        )
    return {"tuned_accuracy": _accuracy(network, state.average, images)}


def _tuning_config(config, image_size):
    return ConfigDict(
        config.tuning.training.to_dict()
        | {
            "num_epochs": config.tuning.num_epochs,
            "image_size": image_size,
            "seeds": config.seeds,
        }
    )


def _learn_structure(run, dense, images):
    """Scores of heads and hidden neurons by DessiLBI: higher for earlier entry.

    The dense network is fine-tuned with a group penalty on each head's rows of the
    output projection and on each neuron's column. Groups that never enter come last,
    ordered by their norm. Only the order is used; the weights of the dense network are
    unchanged.
    """
    settings = run.config.structure
    config = _tuning_config(run.config, dense.image_size)
    config.num_epochs = settings.num_epochs
    steps_per_epoch = classifier.count_steps(images, config.batch_size)
    num_steps = settings.num_epochs * steps_per_epoch
    schedule = optimizers.make_schedule(settings, num_steps)
    penalty = lbi.suggest_lambda(
        dense.params,
        schedule,
        settings.nu,
        num_steps,
        {
            "/out/kernel$": lbi.GroupL2(group_axes=0),
            "/Dense_0/kernel$": lbi.GroupL2(group_axes=-1),
        },
        enter_at=settings.enter_at,
    )
    optimizer = lbi.dessilbi_adam(
        schedule, settings.nu, penalty=penalty, record_entry=True
    )
    with runs.open_run(run.workdir / "structure", config) as inner:
        state = vit_training.train(
            inner, dense.model, images, dense.params, optimizer=optimizer
        )
    places = lbi.pruning.entry_importance(state.params, state.opt_state)
    block = "Transformer/encoderblock_{}/{}/kernel"
    return {
        what: [
            places[block.format(layer, name)] for layer in range(dense.model.num_layers)
        ]
        for what, name in (
            ("heads", "MultiHeadDotProductAttention_0/out"),
            ("neurons", "MlpBlock_0/Dense_0"),
        )
    }


def compare(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Compares the report's cascade with other methods at equal cost.

    The accuracy of other methods is interpolated linearly between two measured costs.
    This slightly underestimates it, because the accuracy is a concave function of cost.
    """
    dense = next(row for row in rows if row["method"] == "dense")
    summary = {"dense_accuracy": dense["accuracy"]}
    tuned = dense.get("tuned_accuracy")
    if tuned is not None:
        summary["dense_tuned_accuracy"] = tuned
    for row in rows:
        if row["method"] != "max":
            continue
        name = f"max_{row['ratio']:g}"
        summary[f"{name}_drop"] = dense["accuracy"] - row["accuracy"]
        if "tuned_accuracy" in row:
            summary[f"{name}_tuned_drop"] = dense["accuracy"] - row["tuned_accuracy"]
            if tuned is not None:
                drop = tuned - row["tuned_accuracy"]
                summary[f"{name}_tuned_drop_from_tuned"] = drop
        for other in ("random", "cls", "evit", "merge", "resolution"):
            for key in ("accuracy", "tuned_accuracy"):
                points = sorted(
                    (r["multiply_adds"], r[key])
                    for r in rows
                    if r["method"] in (other, "dense") and key in r
                )
                inside = points and points[0][0] <= row["multiply_adds"]
                if key in row and inside and len(points) > 1:
                    value = np.interp(row["multiply_adds"], *zip(*points, strict=True))
                    summary[f"{name}_{key}_over_{other}"] = row[key] - value
    return summary


def _parity(run, dense, images):
    """Compares masked and compact mode on all test images, for each semantics."""
    pixels = images.test[0]
    results = {}
    dense = dense._replace(model=dense.model.clone(dtype=jnp.float32))
    for semantics in cascade.SEMANTICS:
        logits = []
        for mode in cascade.MODES:
            network = dense.with_cascade(
                schedules.cp_vit(
                    run.config.parity_ratio,
                    num_layers=dense.model.num_layers,
                    num_patches=dense.num_patches,
                    semantics=semantics,
                    mode=mode,
                )
            )
            predict = vit_training.make_predict(
                network.model, images, network.image_size
            )
            with jax.default_matmul_precision("highest"):
                logits.append(predict(network.params, pixels))
        first, second = logits
        largest = float(np.abs(first - second).max())
        same = int(np.sum(first.argmax(-1) == second.argmax(-1)))
        results[semantics] = {
            "largest_difference_of_logits": largest,
            "same_predictions": same,
            "num_images": len(pixels),
        }
        run.say(
            f"masked against compact, {semantics}: {same} of {len(pixels)} predictions "
            f"are the same, logits differ by {largest:.0e} at most"
        )
    return results


def make_pictures(
    config: ConfigDict, dense: Network, images: Images, calibration: Calibration
) -> dict[str, np.ndarray]:
    """Arrays for the pictures: kept patches, attention maps, informativeness."""
    count = min(config.num_pictured, len(images.test[0]))
    pixels = images.test[0][:count]
    batch = vit_training.prepare(images, jnp.asarray(pixels), dense.image_size)

    def observe(network):
        _, captured = network.model.apply(
            {"params": network.params}, batch, mutable=["intermediates"]
        )
        blocks = captured["intermediates"]["Transformer"]
        return [blocks[f"encoderblock_{i}"] for i in range(network.model.num_layers)]

    attention = [block["attention"][0] for block in observe(dense)]
    pruned = prune("max", config.pictured_ratio, dense)
    kept = np.zeros((dense.model.num_layers, count, dense.num_patches), bool)
    for layer, block in enumerate(observe(pruned)):
        for image, tokens in enumerate(np.asarray(block["tokens"][0])):
            kept[layer, image, tokens[tokens > 0] - 1] = True
    return {
        "pictured": pixels,
        "kept": kept,
        "pictured_ratio": np.array(config.pictured_ratio),
        # First image, mean over the heads: (L, N, N).
        "attention": np.stack([np.asarray(a[0].mean(0)) for a in attention]),
        "patch_scores": np.stack(
            [np.asarray(importance.patch_scores(a)[:, 1:]) for a in attention]
        ),
        "head_scores": np.asarray(calibration.head_scores),
        "attention_ranges": np.asarray(calibration.ranges),
    }


def _table(rows):
    """The rows as arrays for the figures, one array per number."""
    columns = {"row_method": np.array([row["method"] for row in rows])}
    names = sorted({k for row in rows for k, v in row.items() if np.isscalar(v)})
    for name in names:
        if name != "method":
            values = [row.get(name, np.nan) for row in rows]
            columns[f"row_{name}"] = np.array(values, np.float64)
    return columns


def _write_table(path, rows, batch_sizes):
    """The rows as a Markdown table."""
    columns = {
        "multiply-adds saved (%)": lambda row: f"{100 * row['saved']:.1f}",
        "tokens in attention": lambda row: _mean(row["attention_tokens"]),
        "in MLP": lambda row: _mean(row["mlp_tokens"]),
        "parameters": lambda row: f"{row['num_params']:,}",
        "accuracy (%)": lambda row: f"{100 * row['accuracy']:.2f}",
        "fine-tuned (%)": lambda row: f"{100 * row['tuned_accuracy']:.2f}",
        "predicted": lambda row: f"{row['predicted_speedup']:.2f}",
    }
    for batch in batch_sizes:
        columns[f"batch {batch} faster by"] = lambda row, batch=batch: (
            f"{row[f'speedup_{batch}']:.2f}"
        )
    columns["gradient faster by"] = lambda row: f"{row['gradient_speedup']:.2f}"
    lines = [
        "| method | ratio | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for row in rows:
        cells = [row["method"], f"{row['ratio']:g}"]
        for show in columns.values():
            try:
                cells.append(show(row))
            except KeyError:
                cells.append("")  # not measured
        lines.append("| " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    files.write_atomic(path, lambda file: file.write(text))


def _mean(counts):
    return f"{np.mean(counts):.1f}"


def _say_row(run, row):
    parts = [f"{row['method']} {row['ratio']:g}: {100 * row['saved']:.1f} % saved"]
    for name, text in (("accuracy", "accuracy"), ("tuned_accuracy", "fine-tuned")):
        if name in row:
            parts.append(f"{text} {100 * row[name]:.2f} %")
    parts += [
        f"batch {batch} {row[f'speedup_{batch}']:.2f}x"
        f" ({row[f'efficiency_{batch}']:.2f} of predicted)"
        for batch in run.config.timing.batch_sizes
        if f"speedup_{batch}" in row
    ]
    run.say(", ".join(parts))


def _check_methods(config):
    for entry, allowed in (
        (config.methods, METHODS[1:]),  # the whole network is always measured
        (config.timing.methods, METHODS),
        (config.tuning.methods, METHODS),
    ):
        unknown = set(entry) - set(allowed)
        if unknown:
            raise ValueError(
                f"methods must be among {', '.join(allowed)}; got "
                f"{', '.join(sorted(unknown))}."
            )
    vit_training.check_stages(config.tuning.training)
    needy = [m for m in config.methods if m in ("range", "heads") or m[-4:] == "_lbi"]
    if needy and not config.dataset.name:
        raise ValueError(f"methods {', '.join(needy)} need a data set.")


if __name__ == "__main__":
    launch.launch("prune_vit", train_and_evaluate)
