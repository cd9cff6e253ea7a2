"""Prunes networks trained with DessiLBI (report, 3.3.2), and makes them smaller.

    python -m experiments.prune_lbi --config=experiments/configs/prune_lbi.py:digits

One layer at several shares, every layer at one, by order of entry, by magnitude and
at random, at equal counts; batch normalisation left as in the authors' code, removed
with its filter, and measured anew; then a compressed network, trained on, and built
smaller for real. All accuracies are those of the test split.
"""

import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from ml_collections import ConfigDict

import lbi
from experiments.common import figures, files, launch, runs
from experiments.networks import registry
from experiments.training import classifier, loop, optimizers
from experiments.training.classifier import Images
from lbi import pruning

ORDERS = ("entry", "magnitude", "random")


class Trained(NamedTuple):
    """What a run of train_lbi ended with.

    Attributes:
      config: of that run.
      model: the network.
      variables: parameters and batch statistics.
      opt_state: with the dual and the order of entry.
      steps_per_epoch: of the training.
      evaluate: variables -> accuracy on the test split.
      images: the data set.
    """

    config: ConfigDict
    model: nn.Module
    variables: dict[str, Any]
    opt_state: Any
    steps_per_epoch: int
    evaluate: Any
    images: Images


def train_and_evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs one experiment; returns its summary."""
    _check_config(config)
    folders = find_runs(config)
    images = classifier.load_images(runs.load_config(folders[0]))
    with runs.open_run(workdir, config) as run:
        if run.summary is not None:
            return run.show_summary()
        rows, arrays = [], {}
        for number, folder in enumerate(folders):
            run.say(f"--- {folder}")
            trained = load_trained(folder, images)
            _check_layers(config, trained.model)
            path = run.workdir / f"{folder.name}.json"
            if not path.exists():
                files.write_json(path, prune_one(run, trained))
            rows.append(files.read_json(path))
            # The pictures show the first run, the curves the mean over all.
            if number == 0:
                arrays = make_pictures(config, trained)
        for key, values in _curves(rows).items():
            arrays[key] = values
        files.write_npz(run.workdir / "arrays.npz", arrays)
        figures.draw(run.workdir)
        return run.finish({"num_runs": len(rows), **summarize(rows)})


def find_runs(config: ConfigDict) -> list[Path]:
    """The run folders that config.run and config.method mean.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if what is there was not trained with DessiLBI.
    """
    top = Path(config.run)
    stored = runs.load_config(top)
    if stored.experiment != "train_lbi":
        raise ValueError(f"{top} is a run of {stored.experiment}, not of train_lbi.")
    if len(stored.methods) * len(stored.seeds) == 1:
        folders = [top]
        method = stored.methods[0]
    else:
        method = config.method
        folders = sorted(top.glob(f"{method}_seed*"))
    if not folders:
        raise FileNotFoundError(
            f"{top} has no {method}_seed* folders; its methods are "
            f"{', '.join(stored.methods)}."
        )
    if stored.optimizer[method].name == "adam":
        raise ValueError(f"{method} has no structure parameter to prune by.")
    return folders


def load_trained(folder: Path, images: Images) -> Trained:
    """Restores the last checkpoint of a single run of train_lbi."""
    config = runs.load_config(folder)
    model = registry.make_model(config.model.to_dict(), images.num_classes)
    steps_per_epoch = classifier.count_steps(images, config.batch_size)
    num_steps = config.num_epochs * steps_per_epoch
    variables = classifier.init_variables(model, images, config.seeds[0])
    optimizer = classifier.make_optimizer(
        config, config.methods[0], variables["params"], num_steps
    )
    state = classifier.init_state(variables, optimizer, num_steps)
    _, state = runs.load_checkpoint(folder, state)
    predict = classifier.make_predict(model, images)
    pixels, labels = images.test

    def evaluate(variables):
        return classifier.accuracy(predict(variables, pixels), labels)

    return Trained(
        config,
        model,
        state.variables,
        state.opt_state,
        steps_per_epoch,
        evaluate,
        images,
    )


def prune_one(run: runs.Run, trained: Trained) -> dict[str, Any]:
    """All measurements of one network: nested numbers."""
    config = run.config
    started = time.monotonic()
    importances = make_importances(config, trained)
    dense = trained.evaluate(trained.variables)
    run.say(f"dense: {100 * dense:.2f} %")
    # Without batch normalisation there is nothing to measure anew.
    has_bn = bool(jax.tree.leaves(trained.variables["batch_stats"]))
    modes = ("official", "connected") + ("recalibrated",) * has_bn
    row = {"dense": dense, "one_layer": {}, "each_layer": {}}

    for mode in modes:
        row["one_layer"][mode] = [
            _accuracy(config, trained, importances, "entry", config.layer, s, mode)
            if s
            else dense
            for s in config.sparsities
        ]
        run.say(f"{config.layer}, {mode}: {_percent(row['one_layer'][mode])}")
    last = config.sparsities[-1]
    for layer in _layers(trained):
        row["each_layer"][layer] = {
            mode: _accuracy(config, trained, importances, "entry", layer, last, mode)
            for mode in modes
            # A dense layer loses weights, no channels.
            if mode == "official" or _kernel(trained, layer).ndim == 4
        } | {
            order: _accuracy(
                config, trained, importances, order, layer, last, "connected"
            )
            for order in ("entry", "magnitude")
            if _kernel(trained, layer).ndim == 2
        }
        run.say(f"{layer} at {last:.0%}: {row['each_layer'][layer]}")

    row["curves"] = _measure_curves(run, trained, importances, modes[-1])
    if config.finetune.epochs:
        row["finetuned"] = _finetune_layer(run, trained, importances)
    row["compressed"] = _compress(run, trained, importances["entry"])
    row["seconds"] = time.monotonic() - started
    return row


def make_importances(config: ConfigDict, trained: Trained) -> dict[str, Any]:
    """{order: importance}; `random` is a list of draws."""
    params, opt_state = trained.variables["params"], trained.opt_state
    penalty = {f"^{p}$": q for p, q in lbi.path.penalties_of(opt_state).items()}
    keys = jax.random.split(jax.random.key(config.seed), config.num_random)
    return {
        "entry": pruning.entry_importance(params, opt_state),
        "magnitude": pruning.magnitude_importance(params, penalty),
        "random": [pruning.random_importance(key, params, penalty) for key in keys],
        "official": pruning.official_importance(
            params, opt_state, trained.steps_per_epoch
        ),
    }


def prune_layer(
    trained: Trained, importance: Any, layer: str, share: float
) -> dict[str, Any]:
    """Zeroes channels of a convolution, or weights of a dense layer: exact counts."""
    path = f"{layer}/kernel"
    keep = pruning.keep_masks({path: importance[path]}, share)[path]
    if _kernel(trained, layer).ndim == 2:
        return _zero_weights(trained, {path: keep})
    return _zero_channels(trained, {layer: keep})


def prune_layer_officially(
    trained: Trained, importance: Any, layer: str, share: float
) -> dict[str, Any]:
    """As the authors' code: percentile rule, filter and bias, BN left as it is."""
    path = f"{layer}/kernel"
    rank = _kernel(trained, layer).ndim
    keep = pruning.percentile_masks(
        {path: importance[path]}, 100 * share, {path: rank}
    )[path]
    variables = _zero_weights(trained, {path: keep})
    if rank == 4:
        bias = variables["params"][layer]["bias"]
        pruned = variables["params"][layer] | {"bias": jnp.where(keep, bias, 0)}
        variables["params"] = variables["params"] | {layer: pruned}
    return variables


def _accuracy(config, trained, importances, order, layer, share, mode):
    if mode == "official":
        scores = importances["official"]
        return trained.evaluate(prune_layer_officially(trained, scores, layer, share))
    variables = prune_layer(trained, importances[order], layer, share)
    return _evaluate(config, trained, variables, mode)


def _evaluate(config, trained, variables, mode):
    if mode == "recalibrated":
        variables = classifier.recalibrate(
            trained.model,
            trained.images,
            variables,
            num_batches=config.num_recalibration_batches,
        )
    return trained.evaluate(variables)


def _measure_curves(run, trained, importances, mode):
    """Accuracy against share removed, of each order: {scope_order: [...]}."""
    config = run.config
    if not config.curve_sparsities:
        return {}
    shares = curve_sparsities(config)
    convs = [n for n in _layers(trained) if _kernel(trained, n).ndim == 4]
    curves = {}
    for order in ORDERS:
        drawn = importances[order]
        draws = drawn if isinstance(drawn, list) else [drawn]
        for scope in ("one_layer", "layer", "global"):
            values = []
            for share in shares:
                accuracies = []
                for importance in draws:
                    if scope == "one_layer":
                        chosen = {config.layer: importance[f"{config.layer}/kernel"]}
                    else:
                        chosen = {n: importance[f"{n}/kernel"] for n in convs}
                    keep = pruning.keep_masks(
                        chosen,
                        share,
                        scope="global" if scope == "global" else "layer",
                    )
                    variables = _zero_channels(trained, keep)
                    accuracies.append(_evaluate(config, trained, variables, mode))
                values.append(np.mean(accuracies))
            curves[f"{scope}_{order}"] = values
            run.say(f"curve {scope}, {order}: {_percent(values)}")
    return curves


def curve_sparsities(config: ConfigDict) -> list[float]:
    """Shares of the curves: those of the tables and the further ones, rising."""
    return sorted({*config.sparsities, *config.curve_sparsities})


def _finetune_layer(run, trained, importances):
    """Accuracy of config.layer at the last share after masked training."""
    config = run.config
    results = {}
    for order in ("entry", "magnitude"):
        path = f"{config.layer}/kernel"
        importance = {config.layer: importances[order][path]}
        keep = pruning.keep_masks(importance, config.sparsities[-1])
        variables = _train_masked(run, trained, keep, config.finetune.epochs)
        results[order] = trained.evaluate(variables)
    run.say(f"{config.layer} after {config.finetune.epochs} masked epoch(s): {results}")
    return results


def _train_masked(run, trained, keep, num_epochs):
    """Trains on with the channels outside `keep` at zero; returns the variables."""
    config = run.config
    masks = pruning.channel_masks(
        keep, registry.channel_map(trained.model), trained.variables
    )
    if num_epochs == 0:
        return pruning.apply_masks(trained.variables, masks)
    num_steps = num_epochs * trained.steps_per_epoch
    settings = config.finetune
    optimizer = optax.chain(
        optimizers.make_optimizer(settings, num_steps),
        pruning.keep_zero(masks["params"]),
    )
    variables = pruning.apply_masks(trained.variables, masks)
    state = classifier.init_state(variables, optimizer, num_steps)
    update = classifier.make_update(
        trained.model,
        trained.images,
        optimizer,
        batch_size=trained.config.batch_size,
        augmented=trained.config.augment,
        seed=config.seed + 1,
    )
    for first in range(0, num_steps, trained.steps_per_epoch):
        last = first + trained.steps_per_epoch
        state = update(state, first, last)
        losses = np.asarray(state.loss[first:last])
        loop.check_finite(losses, first_step=first + 1)
        run.say(f"masked training, step {last}/{num_steps}, loss {losses.mean():.4g}")
    return pruning.apply_masks(state.variables, masks)


def _compress(run, trained, importance):
    """Keeps shares of the channels of every layer, trains on, and builds it smaller."""
    config = run.config
    channels = registry.channel_map(trained.model)
    keep = {}
    for layer, share in config.compress.items():
        scores = importance[f"{layer}/kernel"]
        # The channels of a dense layer are units: by the mean place of their weights.
        scores = scores.mean(0) if scores.ndim == 2 else scores
        keep[layer] = pruning.keep_masks({layer: scores}, 1 - share)[layer]
    before = _evaluate(config, trained, _zero_channels(trained, keep), "recalibrated")
    masked = _train_masked(run, trained, keep, config.finetune.compressed_epochs)
    if config.finetune.compressed_epochs == 0:
        masked = classifier.recalibrate(
            trained.model,
            trained.images,
            masked,
            num_batches=config.num_recalibration_batches,
        )
    small_model = registry.thin_model(trained.model, keep)
    small = pruning.thin(masked, keep, channels)
    predict = classifier.make_predict(trained.model, trained.images)
    predict_small = classifier.make_predict(small_model, trained.images)
    pixels, labels = trained.images.test
    logits, small_logits = predict(masked, pixels), predict_small(small, pixels)
    results = {
        "kept_channels": {layer: int(mask.sum()) for layer, mask in keep.items()},
        "accuracy_before_training": before,
        "accuracy": classifier.accuracy(small_logits, labels),
        "largest_difference_of_logits": np.abs(logits - small_logits).max(),
        "largest_logit": np.abs(logits).max(),
    }
    for name, model, variables in (
        ("dense", trained.model, trained.variables),
        ("compressed", small_model, small),
    ):
        results |= {
            f"{name}_params": sum(x.size for x in jax.tree.leaves(variables["params"])),
            f"{name}_multiply_adds": registry.count_multiply_adds(
                model, variables, pixels.shape[1:]
            ),
            f"{name}_milliseconds": _milliseconds(config, model, variables, trained),
        }
    results["removed_params"] = (
        1 - results["compressed_params"] / results["dense_params"]
    )
    run.say(f"compressed: {results}")
    return results


def _milliseconds(config, model, variables, trained):
    """Median time of a forward pass of a batch."""
    pixels = trained.images.test[0][: config.timing_batch_size]
    batch = classifier.normalise(trained.images, jnp.asarray(pixels))
    forward = jax.jit(model.apply)
    jax.block_until_ready(forward(variables, batch))
    times = []
    for _ in range(20):
        start = time.perf_counter()
        jax.block_until_ready(forward(variables, batch))
        times.append(time.perf_counter() - start)
    return 1000 * float(np.median(times))


def _zero_weights(trained, keep):
    penalty = {
        f"^{path}$": chosen
        for path, chosen in lbi.path.penalties_of(trained.opt_state).items()
    }
    params = trained.variables["params"]
    masks = pruning.spread_masks(keep, params, penalty)
    return trained.variables | {"params": pruning.apply_masks(params, masks)}


def _zero_channels(trained, keep):
    channels = registry.channel_map(trained.model)
    masks = pruning.channel_masks(keep, channels, trained.variables)
    return pruning.apply_masks(trained.variables, masks)


def _layers(trained):
    """Names of the layers with a penalty, first to last."""
    paths = lbi.path.penalties_of(trained.opt_state)
    return sorted(
        (path.removesuffix("/kernel") for path in paths),
        key=lambda name: (name[:2] != "co", name),
    )


def _kernel(trained, layer):
    return trained.variables["params"][layer]["kernel"]


def make_pictures(config: ConfigDict, trained: Trained) -> dict[str, np.ndarray]:
    """Arrays for the figures of one network."""
    importance = pruning.entry_importance(
        trained.variables["params"], trained.opt_state
    )
    path = f"{config.layer}/kernel"
    kernel = np.asarray(_kernel(trained, config.layer))
    keep = pruning.keep_masks({path: importance[path]}, config.sparsities[-1])[path]
    return {
        "kernel": kernel,
        "kept": keep,
        "sparsities": np.array(config.sparsities),
        "curve_sparsities": np.array(curve_sparsities(config)),
        "layer": np.array(config.layer),
    }


def _curves(rows):
    """{curve_NAME: (runs, shares)} of the curves against sparsity."""
    return {
        f"curve_{name}": np.array([row["curves"][name] for row in rows])
        for name in rows[0]["curves"]
    }


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean over the runs of every number, beside it the deviation if there are several.

    Args:
      rows: nested dicts of numbers or lists of numbers, all of one structure.

    Returns:
      Flat: {"one_layer.connected": mean, "one_layer.connected_std": ...}.
    """
    summary = {}
    first = rows[0]
    for name, value in first.items():
        if isinstance(value, dict):
            inner = summarize([row[name] for row in rows])
            summary |= {f"{name}.{key}": number for key, number in inner.items()}
            continue
        values = np.array([row[name] for row in rows], np.float64)
        summary[name] = values.mean(0)
        if len(rows) > 1:
            summary[f"{name}_std"] = values.std(0, ddof=1)
    return summary


def _percent(values):
    return "  ".join(f"{100 * value:.2f}" for value in values) + " %"


def _check_config(config):
    for name in ("sparsities", "curve_sparsities"):
        if not all(0 <= s < 1 for s in config[name]):
            raise ValueError(f"{name} must be from 0 to below 1, got {config[name]}.")
    if not config.sparsities or config.num_random < 1:
        raise ValueError("sparsities and num_random must name at least one.")
    for name, share in config.compress.items():
        if not 0 < share <= 1:
            raise ValueError(f"compress.{name} must be in (0, 1], got {share}.")
    for name in ("epochs", "compressed_epochs"):
        if config.finetune[name] < 0:
            raise ValueError(f"finetune.{name} must not be negative.")


def _check_layers(config, model):
    known = registry.channel_map(model)
    unknown = {config.layer, *config.compress} - set(known)
    if unknown:
        raise ValueError(
            f"there is no layer {', '.join(sorted(unknown))}; the layers whose "
            f"channels can go are {', '.join(known)}."
        )


if __name__ == "__main__":
    launch.launch("prune_lbi", train_and_evaluate)
