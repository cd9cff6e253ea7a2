"""Prunes and compresses networks trained with DessiLBI.

    python -m experiments.prune_lbi --config=experiments/configs/prune_lbi.py:digits

One layer is pruned at several fractions, and each layer alone at one fraction. Channels
are ranked by order of entry, by magnitude and at random, and the same number is
removed. Batch normalization is unchanged as in the authors' code, removed with its
filter, or recalibrated. Then a network is compressed, fine-tuned, and rebuilt with
fewer channels. All accuracies are those of the test split.
"""

import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

import lbi
from experiments.common import files, launch, runs, settings
from experiments.common.sweep import mean_and_std
from experiments.configs import prune_lbi as configs
from experiments.drawing import figures
from experiments.networks import registry
from experiments.training import classifier, optimizers
from experiments.training import lbi as lbi_training
from experiments.training.classifier import Images
from functa.functaset import hash_params
from lbi import pruning

ORDERS = ("entry", "magnitude", "random")


class Trained(NamedTuple):
    """A trained network and its training data.

    Attributes:
      config: configuration of the run of train_lbi.
      problem: the network before training, and the data set.
      variables: parameters and batch statistics after training.
      opt_state: state of the optimizer, with the dual and the order of entry.
      graph: the channels that can be removed.
    """

    config: ConfigDict
    problem: classifier.Problem
    variables: dict[str, Any]
    opt_state: Any
    graph: lbi.channels.Graph


def train_and_evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs or resumes one experiment; returns its summary."""
    settings.check(config, configs.RULES)
    optimizers.make_optimizer(config.finetune, 1, entry="finetune")
    with settings.blamed_on(f"{config.run}/config.json"):
        folders = find_runs(config)
        images = classifier.load_images(runs.load_config(folders[0]))
    all_trained = [load_trained(folder, images) for folder in folders]
    for trained in all_trained:
        _check_layers(config, trained.graph)

    digests = classifier.digests(images)
    for folder, trained in zip(folders, all_trained, strict=True):
        digests[f"weights of {folder}"] = hash_params(trained.variables)

    def experiment(run):
        rows = []
        for folder, trained in zip(folders, all_trained, strict=True):
            run.say(f"--- {folder}")
            path = run.workdir / f"{folder.name}.json"
            if not path.exists():
                files.write_json(path, prune_one(run, folder.name, trained))
            rows.append(files.read_json(path))
        files.write_npz(
            run.workdir / "arrays.npz", make_pictures(config, all_trained[0])
        )
        figures.draw(run.workdir)
        return {"num_runs": len(rows), **mean_and_std(rows)}

    return runs.run_once(workdir, config, experiment, inputs=digests)


def find_runs(config: ConfigDict) -> list[Path]:
    """The run folders selected by config.run and config.method.

    Raises:
      FileNotFoundError: if there is no such folder.
      ValueError: if the network was not trained with DessiLBI.
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
    config, problem, state = lbi_training.load(folder, images)
    graph = registry.channel_graph(problem.model, images.test[0].shape[1:])
    return Trained(config, problem, state.variables, state.opt_state, graph)


def prune_one(run: runs.Run, name: str, trained: Trained) -> dict[str, Any]:
    """All measurements of one network, called `name` in the run, as nested dicts."""
    config = run.config
    started = time.monotonic()
    importances = make_importances(config, trained)
    dense = trained.problem.test_accuracy(trained.variables)
    run.say(f"dense: {100 * dense:.2f} %")
    # A network without batch normalization has no statistics to recalibrate.
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
            # A dense layer loses weights, not channels.
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
        row["finetuned"] = _finetune_layer(run, name, trained, importances)
    row["compressed"] = _compress(run, name, trained, importances["entry"])
    row["seconds"] = time.monotonic() - started
    return row


def make_importances(config: ConfigDict, trained: Trained) -> dict[str, Any]:
    """Importance by each order, {order: importance}; `random` is a list of draws."""
    params, opt_state = trained.variables["params"], trained.opt_state
    penalty = {f"^{p}$": q for p, q in lbi.path.penalties_of(opt_state).items()}
    keys = jax.random.split(jax.random.key(config.seed), config.num_random)
    return {
        "entry": pruning.entry_importance(params, opt_state),
        "magnitude": pruning.magnitude_importance(params, penalty),
        "random": [pruning.random_importance(key, params, penalty) for key in keys],
        "official": pruning.released_code_importance(
            params, opt_state, trained.problem.steps_per_epoch
        ),
    }


def prune_layer(
    trained: Trained, importance: Any, layer: str, share: float
) -> dict[str, Any]:
    """Zeroes a number of channels of a convolution, or of weights of a dense layer."""
    path = f"{layer}/kernel"
    keep = pruning.keep_masks({path: importance[path]}, share)[path]
    if _kernel(trained, layer).ndim == 2:
        return _zero_weights(trained, {path: keep})
    return _zero_channels(trained, {layer: keep})


def prune_layer_by_released_code(
    trained: Trained, importance: Any, layer: str, share: float
) -> dict[str, Any]:
    """Prunes as the authors' code: percentile rule, filter and bias; BN unchanged."""
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
        return trained.problem.test_accuracy(
            prune_layer_by_released_code(trained, scores, layer, share)
        )
    variables = prune_layer(trained, importances[order], layer, share)
    return _evaluate(config, trained, variables, mode)


def _evaluate(config, trained, variables, mode):
    if mode == "recalibrated":
        variables = _recalibrate(config, trained, variables)
    return trained.problem.test_accuracy(variables)


def _recalibrate(config, trained, variables):
    return classifier.recalibrate(
        trained.problem.model,
        trained.problem.images,
        variables,
        num_batches=config.num_recalibration_batches,
    )


def _measure_curves(run, trained, importances, mode):
    """Accuracy at each removed share, for each order: {scope_order: [...]}."""
    config = run.config
    if not config.curve_sparsities:
        return {}
    shares = sorted({*config.sparsities, *config.curve_sparsities})
    convs = [n for n in _layers(trained) if _kernel(trained, n).ndim == 4]
    scopes = {
        "one_layer": ([config.layer], "layer"),
        "layer": (convs, "layer"),
        "global": (convs, "global"),
    }

    def accuracy(importance, layers, share, scope):
        chosen = {layer: importance[f"{layer}/kernel"] for layer in layers}
        keep = pruning.keep_masks(chosen, share, scope=scope)
        return _evaluate(config, trained, _zero_channels(trained, keep), mode)

    curves = {}
    for order in ORDERS:
        draws = importances[order] if order == "random" else [importances[order]]
        for name, (layers, scope) in scopes.items():
            values = curves[f"{name}_{order}"] = [
                np.mean([accuracy(draw, layers, share, scope) for draw in draws])
                for share in shares
            ]
            run.say(f"curve {name}, {order}: {_percent(values)}")
    return curves


def _finetune_layer(run, name, trained, importances):
    """Accuracy of config.layer at the last share after masked training."""
    config = run.config
    results = {}
    for order in ("entry", "magnitude"):
        path = f"{config.layer}/kernel"
        importance = {config.layer: importances[order][path]}
        keep = pruning.keep_masks(importance, config.sparsities[-1])
        variables = _train_masked(
            run,
            f"{name}_masked_{order}",
            trained,
            keep,
            config.finetune.epochs,
        )
        results[order] = trained.problem.test_accuracy(variables)
    run.say(f"{config.layer} after {config.finetune.epochs} masked epoch(s): {results}")
    return results


def _train_masked(run, name, trained, keep, num_epochs):
    """Fine-tunes with the channels outside `keep` at zero; returns the variables.

    The fine-tuning is a separate run, `name`, inside the folder of `run`.
    """
    problem = trained.problem
    masks = lbi.channels.channel_masks(keep, trained.graph, trained.variables)
    variables = pruning.apply_masks(trained.variables, masks)
    if num_epochs == 0:
        return variables
    finetune = run.config.finetune
    problem = problem._replace(num_steps=num_epochs * problem.steps_per_epoch)
    optimizer = optax.chain(
        optimizers.make_optimizer(finetune, problem.num_steps, entry="finetune"),
        pruning.keep_zero(masks["params"]),
    )
    update = classifier.make_update(
        problem.model,
        problem.images,
        optimizer,
        batch_size=trained.config.batch_size,
        augmented=trained.config.augment,
        seed=run.config.seed + 1,
    )
    config = ConfigDict(
        finetune.to_dict()
        | {
            "experiment": "prune_lbi",
            "variant": run.config.variant,
            "num_epochs": num_epochs,
            "checkpoint_every": problem.steps_per_epoch,
        }
    )
    with runs.open_run(run.workdir / name, config) as inner:
        state = classifier.init_state(variables, optimizer, problem.num_steps)
        state = classifier.train(inner, problem, state, update)
    return pruning.apply_masks(state.variables, masks)


def _compress(run, name, trained, importance):
    """Removes channels of every layer, fine-tunes, and builds the smaller network."""
    config = run.config
    keep = {}
    for layer, share in config.compress.items():
        scores = importance[f"{layer}/kernel"]
        # Channels of a dense layer are units, ranked by the mean rank of their weights.
        scores = scores.mean(0) if scores.ndim == 2 else scores
        keep[layer] = pruning.keep_masks({layer: scores}, 1 - share)[layer]
    before = _evaluate(config, trained, _zero_channels(trained, keep), "recalibrated")
    masked = _train_masked(
        run,
        f"{name}_compressed",
        trained,
        keep,
        config.finetune.compressed_epochs,
    )
    if config.finetune.compressed_epochs == 0:
        masked = _recalibrate(config, trained, masked)
    small_model = registry.thin_model(trained.problem.model, keep)
    small = lbi.channels.thin(masked, keep, trained.graph)
    predict_small = classifier.make_predict(small_model, trained.problem.images)
    pixels, labels = trained.problem.images.test
    logits = trained.problem.predict(masked, pixels)
    small_logits = predict_small(small, pixels)
    results = {
        "kept_channels": {layer: int(mask.sum()) for layer, mask in keep.items()},
        "accuracy_before_training": before,
        "accuracy": classifier.accuracy(small_logits, labels),
        "largest_difference_of_logits": np.abs(logits - small_logits).max(),
        "largest_logit": np.abs(logits).max(),
    }
    for name, model, variables in (
        ("dense", trained.problem.model, trained.variables),
        ("compressed", small_model, small),
    ):
        results |= {
            f"{name}_params": optax.tree.size(variables["params"]),
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
    """Median time of the forward pass of a batch."""
    pixels = trained.problem.images.test[0][: config.timing_batch_size]
    batch = classifier.normalize(trained.problem.images, jnp.asarray(pixels))
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
    masks = lbi.channels.channel_masks(keep, trained.graph, trained.variables)
    return pruning.apply_masks(trained.variables, masks)


def _layers(trained):
    """Names of the layers with a penalty, from first to last."""
    paths = lbi.path.penalties_of(trained.opt_state)
    return sorted(
        (path.removesuffix("/kernel") for path in paths),
        key=lambda name: (name[:2] != "co", name),
    )


def _kernel(trained, layer):
    return trained.variables["params"][layer]["kernel"]


def make_pictures(config: ConfigDict, trained: Trained) -> dict[str, np.ndarray]:
    """Arrays for the figure of config.layer before and after pruning."""
    params, path = trained.variables["params"], f"{config.layer}/kernel"
    importance = pruning.entry_importance(params, trained.opt_state)
    keep = pruning.keep_masks({path: importance[path]}, config.sparsities[-1])[path]
    return {"kernel": np.asarray(_kernel(trained, config.layer)), "kept": keep}


def _percent(values):
    return "  ".join(f"{100 * value:.2f}" for value in values) + " %"


def _check_layers(config, graph):
    known = [path.split("/")[1] for path in graph.removable()]
    unknown = {config.layer, *config.compress} - set(known)
    if unknown:
        raise ValueError(
            f"there is no layer {', '.join(sorted(unknown))}; the layers whose "
            f"channels can be pruned are {', '.join(known)}."
        )


if __name__ == "__main__":
    launch.launch("prune_lbi", train_and_evaluate)
