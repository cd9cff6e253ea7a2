"""Prunes a Vision Transformer and measures cost, accuracy and speed.

    python -m experiments.prune_vit --config=experiments/configs/prune_vit.py:smoke

For every method and ratio the command measures the test accuracy with and without
fine-tuning, the multiply-adds, and the time in turns with the dense network. Methods
with another parameter (keep rate, merged tokens, image size) are set to the cost of the
cascade of the student report (vit.schedules.cp_vit) at the same ratio.

McNemar's exact test over the images compares each pruned network with the dense one,
and each fine-tuned network with the dense one that was fine-tuned in the same way:
`lost` and `gained` count the images that only the dense or only the pruned network
classifies correctly, and `mcnemar_p` is the p-value. With several seeds, read the tests
of each run; a mean of p-values is not a p-value.
"""

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from experiments.common import data, devices, files, launch, runs, settings
from experiments.common.sweep import sweep
from experiments.configs import prune_vit as configs
from experiments.configs.train_vit import TRAINING_RULES
from experiments.drawing import figures
from experiments.training import classifier, vit_pruning
from experiments.training import vit as vit_training
from experiments.training.classifier import Images
from experiments.training.vit import Problem
from experiments.training.vit_pruning import METHODS, prune
from vit import Cascade, cascade, importance, predict_latency, schedules
from vit.checkpoint import load_normalization, save_checkpoint

Row = dict[str, Any]


def train_and_evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs or resumes one experiment; returns its summary."""
    settings.check(config, configs.RULES)
    vit_training.check_options(config)
    _check_methods(config)
    images = load_images(config) if config.dataset.name else None
    if images is not None:
        _check_training(config, images)
    dense = load_problem(config, images)
    _check_network(config, dense.model)
    # A resumed run must not combine the rows of two networks.
    digests = {"checkpoint": None}
    if config.checkpoint:
        digests["checkpoint"] = vit_training.digest(config.checkpoint)
    if images is not None:
        digests |= classifier.digests(images)
    return sweep(
        config,
        workdir,
        lambda run: _measure_all(run, dense),
        inputs=digests,
    )


def _check_methods(config):
    # The dense network is always measured.
    for entry, names, allowed in (
        ("methods", config.methods, METHODS),
        ("timing.methods", config.timing.methods, ("dense", *METHODS)),
        ("tuning.methods", config.tuning.methods, ("dense", *METHODS)),
    ):
        if unknown := set(names) - set(allowed):
            raise ValueError(
                f"{entry} must be among {', '.join(allowed)}; got "
                f"{', '.join(map(str, unknown))}."
            )
    if config.tuning.num_epochs:
        _check_tuned(config)
    implementation = config.attention_implementation
    if implementation in ("cudnn", "pallas") and jax.default_backend() != "gpu":
        raise ValueError(f"attention_implementation={implementation} needs a GPU.")
    if config.latency is not None and config.budget is not None:
        raise ValueError("set budget or latency, not both.")
    if config.latency is not None and not config.timing.batch_sizes:
        raise ValueError("latency needs a batch size in timing.batch_sizes.")
    methods = _methods(config)
    whole = [name for name in methods if name.startswith(_EVERY_TOKEN)]
    if config.latency is not None and whole:
        raise ValueError(
            "latency is predicted from the numbers of tokens, which the methods "
            f"{', '.join(whole)} leave as they are; {_remove(whole)}."
        )
    idle = [name for name in methods if name in vit_pruning.SAVE_NOTHING]
    if idle and _is_limited(config):
        raise ValueError(
            f"methods {', '.join(idle)} save no work and reach no budget; "
            f"{_remove(idle)}."
        )
    needy = [name for name in methods if name in vit_pruning.NEED_IMAGES]
    if not config.dataset.name:
        data.refuse_unread("a run without dataset.name", **config.dataset)
        if config.num_validation:
            raise ValueError(
                f"num_validation must be 0 without a data set, got "
                f"{config.num_validation}."
            )
    if needy and not config.dataset.name:
        raise ValueError(f"methods {', '.join(needy)} need a data set.")
    if config.dataset.name and not config.checkpoint:
        raise ValueError(
            "config.checkpoint must name a file that train_vit wrote (model.npz in its "
            "run folder) or one that vit.load_checkpoint reads."
        )
    with settings.blamed_on("tuning.training"):
        vit_training.check_stages(config.tuning.training, TRAINING_RULES)


def _check_network(config, model):
    others = set(_methods(config)) - _BESIDE_A_CASCADE
    if model.cascade is not None and others:
        raise ValueError(
            f"{config.checkpoint} has a cascade, but the methods "
            f"{', '.join(sorted(others))} start from a dense network; save it without "
            "one: vit.save_checkpoint(path, model.clone(cascade=None), params)."
        )
    for name in ("num_heads", "mlp_dim"):
        if not isinstance(value := getattr(model, name), int):
            raise ValueError(
                f"all layers must have the same {name} before pruning, got {value} in "
                f"{config.checkpoint}."
            )
    needy = [name for name in _methods(config) if name in vit_pruning.NEED_CLS]
    if needy and not model.class_token:
        raise ValueError(
            f"methods {', '.join(needy)} need a CLS token, which the network lacks; "
            f"{_remove(needy)}."
        )

    _check_ratios(config, model)


def _check_ratios(config, model):
    """Schedules whose largest ratio depends on the network, and images too small."""
    methods, num_layers = _methods(config), model.num_layers
    schedule_of = {
        "range": lambda ratio: schedules.range_ratios(ratio, np.zeros(num_layers)),
        "released_code": lambda ratio: schedules.released_code(
            plateau=ratio, num_layers=num_layers
        ),
    }
    for name in methods.keys() & schedule_of.keys():
        with settings.blamed_on(f"methods.{name}"):
            for ratio in () if _is_limited(config) else methods[name]:
                schedule_of[name](ratio)
    if "resolution" in methods and config.image_size == model.patch_size:
        raise ValueError(
            "methods resolution needs images of more than one patch; "
            f"{_remove(['resolution'])}."
        )


# Methods that leave the cascade of the network as it is.
_BESIDE_A_CASCADE = {"dense", "structure_lbi"}
# Methods that begin so work on all tokens.
_EVERY_TOKEN = ("heads", "neurons", "segment")


def _methods(config):
    """The methods that have ratios."""
    return {name: ratios for name, ratios in config.methods.items() if ratios}


def _is_limited(config):
    """With a budget or a latency the ratios of the methods only name them."""
    return (config.budget, config.latency) != (None, None)


def _remove(names):
    options = " ".join(f"--config.methods.{name}='()'" for name in names)
    return f"remove them with {options}"


def _check_tuned(config):
    if not config.dataset.name:
        raise ValueError("tuning.num_epochs must be 0 without a data set.")
    measured = {"dense": (0.0,), **_methods(config)}
    for method, ratios in config.tuning.methods.items():
        allowed = measured.get(method, ())
        if allowed and _is_limited(config):
            continue
        if lacking := [ratio for ratio in ratios if ratio not in allowed]:
            raise ValueError(
                f"tuning.methods.{method} must be among methods.{method}, which is "
                f"{allowed}; got {', '.join(map(str, lacking))}."
            )


def load_images(config: ConfigDict) -> Images:
    """Loads config.dataset; validation images take the place of the test images."""
    images = vit_training.load_images(config)
    if config.num_validation:
        images, validation = classifier.split_validation(images, config.num_validation)
        devices.say(
            f"{len(images.train[0])} training images; the next {len(validation[0])} "
            "replace the test images"
        )
        images = images._replace(test=validation)
        if config.dataset.name != "functaset":
            # As in train_vit, which has not seen the validation images either.
            images = images._replace(**classifier.moments(images.train[0]))
        images = vit_training.normalize_as(config, images)
    return images


def load_problem(config: ConfigDict, images: Images | None) -> Problem:
    """The network of config.checkpoint, or one with random weights for timing."""
    fields = {
        "dtype": jnp.dtype(config.dtype),
        "attention_implementation": config.attention_implementation,
    }
    if not config.checkpoint:
        fields |= config.model.to_dict()
        return vit_training.init_problem(
            config.seeds[0], config.image_size, images, **fields
        )
    dense = vit_training.load_problem(
        config.checkpoint,
        config.image_size,
        images,
        config.checkpoint_options.to_dict(),
        **fields,
    )
    if images is not None and not np.any(dense.params["head"]["kernel"]):
        raise ValueError(
            f"{config.checkpoint} has no head for {images.num_classes} classes; train "
            "it with train_vit first."
        )
    return dense


def _measure_all(run, dense):
    config = run.config
    timing = config.timing.to_dict()
    timed = ("dense", *timing.pop("methods"))
    scores = _scores(run, dense)
    rows, seen = {}, set()
    methods = {"dense": (0.0,), **_methods(config)}
    limits = _limits(run, dense)
    for name, fits in limits.items():
        with settings.blamed_on(name):
            for method in _methods(config):
                ratio = vit_pruning.ratio_for_budget(
                    method, fits, dense, scores, config.seeds[0]
                )
                methods[method] = (ratio,)
    for method, ratios in methods.items():
        for ratio in ratios:
            network = prune(method, ratio, dense, scores, config.seeds[0])
            if (method, network.model, network.image_size) in seen:
                continue  # the parameter has no value in between
            seen.add((method, network.model, network.image_size))
            name = f"{method}_{ratio:g}"
            path = run.workdir / "rows" / f"{name}.json"
            if not path.exists():
                started = time.monotonic()
                row = {"method": method, "ratio": ratio}
                row |= measure(network, dense, **(timing if method in timed else {}))
                if config.latency is not None:
                    row["predicted_milliseconds"] = _predict(run, network)
                tuned = config.tuning.methods.get(method, ())
                if ratio in tuned or (tuned and limits):
                    found, params = _fine_tune(run, name, network, dense)
                    row |= found
                    network = network._replace(params=params)
                # A file cannot leave out a segment of the attention.
                if config.save_networks and network.model.segment is None:
                    folder = run.workdir / "networks"
                    folder.mkdir(exist_ok=True)
                    file = folder / f"{method if limits else name}.npz"
                    save_checkpoint(
                        file,
                        network.model,
                        network.params,
                        **_normalization(run, dense),
                    )
                row["seconds"] = time.monotonic() - started
                files.write_json(path, row)
                _say_row(run, row)
            rows[name] = files.read_json(path)
    add_tests(rows)
    table = list(rows.values())
    # The seconds include rows of earlier sessions.
    summary = {"rows": rows, "rows_seconds": sum(row["seconds"] for row in table)}
    if dense.images is not None:
        # Latents cannot be pictured.
        if dense.images.test[0].dtype == np.uint8:
            pictures = make_pictures(
                dense, scores, config.pictured_ratio, num_images=config.num_pictured
            )
            files.write_npz(run.workdir / "arrays.npz", pictures)
        summary |= {"parity": _parity(run, dense)} | compare(table)
    text = _format_table(table, config.timing.batch_sizes)
    files.write_atomic(run.workdir / "table.md", lambda file: file.write(text))
    figures.draw(run.workdir, summary)
    return summary


def _normalization(run, dense):
    """Keywords of `save_checkpoint`: how the images were normalized, if it is known."""
    if dense.images is not None:
        images = dense.images
        return {"mean": images.mean, "std": classifier.divisor(images)}
    checkpoint = run.config.checkpoint
    stated = load_normalization(checkpoint) if checkpoint else None
    return {} if stated is None else dict(zip(("mean", "std"), stated, strict=True))


def _limits(run, dense):
    """{name of the budget: whether a pruned network is within it}; one or none."""
    config = run.config
    if config.budget is not None:
        most = config.budget * dense.cost.total
        return {"budget": lambda network: network.cost.total <= most}
    if config.latency is not None:
        _measure_layers(run, dense)
        longest = config.latency * _predict(run, dense)
        return {"latency": lambda network: _predict(run, network) <= longest}
    return {}


# Numbers of tokens at which the time is measured; between them it is interpolated.
_NUM_TIMES = 6


def _measure_layers(run, dense):
    """Writes {tokens: milliseconds} of the network with so many tokens everywhere."""
    path = run.workdir / "latency.json"
    if path.exists():
        return
    timing = run.config.timing
    run.say(f"measuring the time of {_NUM_TIMES} numbers of tokens ...")
    patches = np.linspace(1, dense.num_patches, _NUM_TIMES).round().astype(int)
    networks = []
    for count in np.unique(patches).tolist():
        keep = (count,) * dense.model.num_layers
        model = dense.model.clone(cascade=Cascade(keep=keep, score="random"))
        networks.append(dense._replace(model=model))
    times = _take_turns(_forward, networks, timing.batch_sizes[-1], timing.num_rounds)
    tokens = [network.cost.mlp_tokens[0] for network in networks]
    medians = np.median(times, axis=1).tolist()
    files.write_json(path, dict(zip(tokens, medians, strict=True)))


def _predict(run, network):
    table = files.read_json(run.workdir / "latency.json")
    table = {int(tokens): milliseconds for tokens, milliseconds in table.items()}
    return predict_latency(network.model, network.image_size, table)


def _scores(run, dense):
    """The scores that methods need; see `prune`."""
    config = run.config
    if dense.images is None:
        return {}
    scores = vit_pruning.attention_scores(dense, config.num_calibration)
    if any(method.endswith("_lbi") for method in _methods(config)):
        steps_per_epoch = classifier.count_steps(
            dense.images, config.tuning.training.batch_size
        )
        num_epochs = config.structure.num_epochs
        optimizer = vit_pruning.entry_optimizer(
            dense, config.structure, num_epochs * steps_per_epoch
        )
        state = _train(run, "structure", dense, dense, num_epochs, optimizer=optimizer)
        scores |= vit_pruning.entry_scores(state, dense.model.num_layers)
    return scores


def _fine_tune(run, name, network, dense):
    """Accuracy and parameters after fine-tuning of a network by config.tuning."""
    tuning = run.config.tuning
    if not tuning.num_epochs:
        return {}, network.params
    state = _train(
        run,
        f"tuned_{name}",
        network,
        dense,
        tuning.num_epochs,
        teacher=dense if tuning.teacher_weight else None,
        teacher_weight=tuning.teacher_weight,
    )
    return _evaluate(network, state.average, "tuned_"), state.average


def _evaluate(network, params, prefix=""):
    """Accuracy on the test images, and the indices of the errors."""
    wrong = network.test_errors(params)
    total = len(network.images.test[0])
    accuracy = (total - len(wrong)) / total
    return {f"{prefix}accuracy": accuracy, f"{prefix}wrong": wrong.tolist()}


def _train(run, name, network, dense, num_epochs, **options):
    """Trains on images of the dense network's size, in a run folder of its own."""
    config = ConfigDict(
        run.config.tuning.training.to_dict()
        | {
            "num_epochs": num_epochs,
            "image_size": dense.image_size,
            "seeds": run.config.seeds,
        }
    )
    with runs.open_run(run.workdir / name, config) as inner:
        return vit_training.train(inner, network, **options)


def measure(
    network: Problem,
    dense: Problem,
    *,
    batch_sizes: Sequence[int] = (),
    gradient_batch_size: int = 0,
    num_rounds: int = 10,
) -> Row:
    """Cost, accuracy and speed of a network, cost and speed against the dense one.

    "wrong" has the indices of the test images that are classified wrongly.

    Args:
      network: the network.
      dense: the dense network.
      batch_sizes: batches of which the time is measured.
      gradient_batch_size: the batch of which the time of a gradient is measured; 0
        skips it.
      num_rounds: see `time_in_turns`.
    """
    cost, whole = network.cost, dense.cost
    row = {
        "multiply_adds": cost.total,
        "saved": 1 - cost.total / whole.total,
        "predicted_speedup": whole.total / cost.total,
        "attention_tokens": list(cost.attention_tokens),
        "mlp_tokens": list(cost.mlp_tokens),
        "num_params": optax.tree.size(network.params),
        "image_size": network.image_size,
    }
    if network.images is not None:
        row |= _evaluate(network, network.params)
    for size in batch_sizes:
        times, speedups = time_in_turns(_forward, network, dense, size, num_rounds)
        row[f"milliseconds_{size}"], row[f"milliseconds_{size}_quartiles"] = times
        row[f"speedup_{size}"], row[f"speedup_{size}_quartiles"] = speedups
        row[f"efficiency_{size}"] = speedups[0] / row["predicted_speedup"]
    if size := gradient_batch_size:
        times, speedups = time_in_turns(_gradient, network, dense, size, num_rounds)
        row["gradient_milliseconds"], row["gradient_milliseconds_quartiles"] = times
        row["gradient_speedup"], row["gradient_speedup_quartiles"] = speedups
    return row


def time_in_turns(
    function: Callable[..., Any],
    network: Problem,
    dense: Problem,
    batch_size: int,
    num_rounds: int,
) -> tuple[tuple[float, list[float]], tuple[float, list[float]]]:
    """Milliseconds of a batch through a network, and its speed-up over the dense one.

    The two take turns, so that other load on the machine affects both.

    Returns:
      Milliseconds: median and quartiles over the rounds. Speed-up: ratio of the two
      medians, and quartiles of the ratio in each round.
    """
    times = _take_turns(function, (network, dense), batch_size, num_rounds)
    own, whole = np.median(times, axis=1)
    quartiles = np.quantile([times[0], times[1] / times[0]], (0.25, 0.75), axis=1).T
    return (float(own), quartiles[0].tolist()), (
        float(whole / own),
        quartiles[1].tolist(),
    )


def _take_turns(function, networks, batch_size, num_rounds):
    """Milliseconds of a batch, (networks, rounds)."""
    arguments = []
    for one in networks:
        images = jax.random.normal(jax.random.key(0), (batch_size, *one.input_shape))
        arguments.append((one.model, one.params, images))
        jax.block_until_ready(function(*arguments[-1]))
    times = np.zeros((len(arguments), num_rounds))
    for turn in range(num_rounds):
        for one, argument in enumerate(arguments):
            started = time.perf_counter()
            jax.block_until_ready(function(*argument))
            times[one, turn] = 1000 * (time.perf_counter() - started)
    return times


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


def add_tests(rows: dict[str, Row]) -> None:
    """Replaces the errors of the rows by McNemar's test against the dense network.

    Args:
      rows: {name: row}; those of networks with images have "wrong", and "tuned_wrong"
        if fine-tuned. The pruned ones get "lost", "gained" and "mcnemar_p", with the
        prefix "tuned_" for the fine-tuned networks.
    """
    for prefix in ("", "tuned_"):
        key = f"{prefix}wrong"
        errors = {name: set(row.pop(key)) for name, row in rows.items() if key in row}
        dense = errors.pop("dense_0", None)
        if dense is None:  # not fine-tuned
            continue
        for name, wrong in errors.items():
            lost, gained = len(wrong - dense), len(dense - wrong)
            rows[name] |= {
                f"{prefix}lost": lost,
                f"{prefix}gained": gained,
                f"{prefix}mcnemar_p": classifier.mcnemar(lost, gained),
            }


def compare(rows: Sequence[Row]) -> dict[str, float]:
    """Compares the report's cascade with other methods at equal cost.

    The accuracy of other methods is interpolated linearly between two measured costs.
    This slightly underestimates it, because the accuracy is a concave function of cost.
    """
    [dense] = [row for row in rows if row["method"] == "dense"]
    drops = {
        "drop": ("accuracy", "accuracy"),
        "tuned_drop": ("accuracy", "tuned_accuracy"),
        "tuned_drop_from_tuned": ("tuned_accuracy", "tuned_accuracy"),
    }
    summary = {f"dense_{key}": dense[key] for key in _ACCURACIES if key in dense}
    for row in (row for row in rows if row["method"] == "max"):
        name = f"max_{row['ratio']:g}"
        for drop, (before, after) in drops.items():
            if before in dense and after in row:
                summary[f"{name}_{drop}"] = dense[before] - row[after]
        for other in (
            "random",
            "cls",
            "evit",
            "merge",
            "merge_decreasing",
            "resolution",
        ):
            for key in _ACCURACIES:
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


_ACCURACIES = ("accuracy", "tuned_accuracy")


def _parity(run, dense):
    """Compares masked and compact mode on all test images, for each semantics."""
    pixels, _ = dense.images.test
    dense = dense._replace(model=dense.model.clone(dtype=jnp.float32))
    results = {}
    for semantics in cascade.SEMANTICS:
        logits = []
        for mode in cascade.MODES:
            network = vit_pruning.with_cascade(
                dense,
                schedules.cp_vit,
                run.config.parity_ratio,
                semantics=semantics,
                mode=mode,
            )
            with jax.default_matmul_precision("highest"):
                predict = vit_training.make_predict(network)
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
    dense: Problem, scores: vit_pruning.Scores, ratio: float, *, num_images: int
) -> dict[str, np.ndarray]:
    """Arrays for the pictures: kept patches, attention maps, informativeness."""
    pixels = dense.images.test[0][:num_images]
    pruned = prune("max", ratio, dense)
    num_prefix = dense.model.num_prefix

    def observe(problem):
        return jax.jit(problem.observe)(problem.params, pixels)

    attention = observe(dense).attention
    return {
        "pictured": pixels,
        "kept": np.asarray(observe(pruned).kept),
        "pictured_ratio": np.array(ratio),
        # First image, mean over the heads: (L, N, N).
        "attention": np.stack([np.asarray(a[0].mean(0)) for a in attention]),
        "patch_scores": np.stack(
            [np.asarray(importance.patch_scores(a)[:, num_prefix:]) for a in attention]
        ),
        # First image and layer: (H, P).
        "segments": np.asarray(
            importance.segments(attention[0][:1], num_prefix=num_prefix)[0]
        ),
        "head_scores": scores["heads"],
        "attention_ranges": scores["range"],
    }


def _format_table(rows, batch_sizes):
    """The rows as a Markdown table; numbers that were not measured are left out."""
    columns = {
        "multiply-adds saved (%)": ("saved", 100, ".1f"),
        "tokens in attention": ("attention_tokens", 1, ".1f"),
        "in MLP": ("mlp_tokens", 1, ".1f"),
        "parameters": ("num_params", 1, ",.0f"),
        "accuracy (%)": ("accuracy", 100, ".2f"),
        "lost": ("lost", 1, ".0f"),
        "gained": ("gained", 1, ".0f"),
        "p": ("mcnemar_p", 1, ".2g"),
        "fine-tuned (%)": ("tuned_accuracy", 100, ".2f"),
        "lost, fine-tuned": ("tuned_lost", 1, ".0f"),
        "gained, fine-tuned": ("tuned_gained", 1, ".0f"),
        "p, fine-tuned": ("tuned_mcnemar_p", 1, ".2g"),
        "predicted": ("predicted_speedup", 1, ".2f"),
        **{f"batch {b} faster by": (f"speedup_{b}", 1, ".2f") for b in batch_sizes},
        "gradient faster by": ("gradient_speedup", 1, ".2f"),
    }
    lines = [["method", "ratio", *columns], ["---"] * (len(columns) + 2)]
    for row in rows:
        cells = [
            format(scale * np.mean(row[key]), form) if key in row else ""
            for key, scale, form in columns.values()
        ]
        lines.append([row["method"], f"{row['ratio']:g}", *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


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


def _check_training(config, images):
    """Checks fine-tuning and the training of structure, where they are used."""
    if config.tuning.num_epochs:
        training = config.tuning.training.to_dict()
        training["num_epochs"] = config.tuning.num_epochs
        vit_training.check(ConfigDict(training), images, parent="tuning.training.")
    elif any(method.endswith("_lbi") for method in _methods(config)):
        classifier.count_steps(images, config.tuning.training.batch_size)


if __name__ == "__main__":
    launch.launch("prune_vit", train_and_evaluate)
