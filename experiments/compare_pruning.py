"""Compares DessiLBI with other pruning methods at equal sparsity and equal training.

    python -m experiments.compare_pruning \\
        --config=experiments/configs/compare_pruning.py:digits

Each method ranks the groups of a trained network: weights, rows, kernels or filters.
The same fraction of them is removed, and the remaining network is fine-tuned. The
accuracies are those of the test images before and after the fine-tuning; before it,
batch normalization is recalibrated. Where a method may choose between layers, the
accuracy on a validation part of the training images decides.
"""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

import lbi
from experiments.common import devices, files, launch, runs, settings
from experiments.common.sweep import mean_and_std, sweep
from experiments.configs import compare_pruning as configs
from experiments.drawing import figures
from experiments.training import classifier, optimizers, pruning
from experiments.training import lbi as lbi_training
from experiments.training.classifier import Problem, TrainState


class FineTuning(NamedTuple):
    """What all pruned networks of one seed share.

    Attributes:
      problem: the network and the data; num_steps are those of the fine-tuning.
      validation: images (N, H, W, C) and labels (N,) for choices.
      optimizer: a `pruning.masked` optimizer.
      update: its training, see `classifier.make_update`.
    """

    problem: Problem
    validation: tuple[np.ndarray, np.ndarray]
    optimizer: optax.GradientTransformation
    update: Callable[[TrainState, int, int], TrainState]


def train_and_evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs or resumes one experiment; returns its summary."""
    settings.check(config, configs.RULES)
    if not any(config.sparsities.values()):
        raise ValueError("sparsities must have a value for at least one grain.")
    loaded = classifier.load_images(config)
    digests = classifier.digests(loaded)
    images, validation = classifier.split_validation(loaded, config.num_validation)
    classifier.check_augmentation(images, {"augment=False": config.augment})
    shapes = classifier.check(config, images)["params"]
    params = jax.tree.map(lambda x: jnp.ones(x.shape), shapes)
    num_steps = config.num_epochs * classifier.count_steps(images, config.batch_size)
    for training in config.optimizer:
        make_optimizer(config, training, params, num_steps, "auto")
    optimizers.make_optimizer(config.finetune, 1, entry="finetune")

    def finish(run, summaries):
        table = mean_and_std(list(summaries.values()))
        figures.draw(run.workdir, {**table, "runs": summaries})
        return table

    return sweep(
        config,
        workdir,
        lambda run: _compare(run, images, validation),
        nested=True,
        inputs=digests,
        finish=finish,
    )


def _compare(run, images, validation):
    """All methods for one seed: {"dense": ..., grain: {method: {measure: [...]}}}."""
    config = run.config
    problem = classifier.make_problem(config, images)
    finetuning = _make_finetuning(config, problem, validation)
    summary = {"dense": {}}
    for grain, sparsities in config.sparsities.items():
        structure = pruning.make_structure(
            grain, problem.model, images.test[0][0].shape
        )
        for method in config.methods if sparsities else ():
            name = _training(method, grain)
            paths = [
                run.workdir / "pruned" / f"{grain}_{method}_{sparsity}.json"
                for sparsity in sparsities
            ]
            if not all(path.exists() for path in paths):
                _prune_all(run, problem, finetuning, structure, method, grain, paths)
            rows = [files.read_json(path) for path in paths]
            summary["dense"][name] = rows[0]["dense"]
            summary.setdefault(grain, {})[method] = {
                measure: [row[measure] for row in rows]
                for measure in rows[0]
                if measure != "dense"
            }
    return summary


def _training(method, grain):
    """The name of the training of a method; SGD is the same for all grains."""
    training = configs.METHODS[method][0]
    return training if training == "sgd" else f"{training}_{grain}"


def _make_finetuning(config, problem, validation):
    num_steps = config.finetune.epochs * problem.steps_per_epoch
    optimizer = pruning.masked(
        optimizers.make_optimizer(config.finetune, num_steps, entry="finetune")
    )
    update = classifier.make_update(
        problem.model,
        problem.images,
        optimizer,
        batch_size=config.batch_size,
        augmented=config.augment,
        seed=config.seeds[0] + 1,
    )
    problem = problem._replace(num_steps=num_steps)
    return FineTuning(problem, validation, optimizer, update)


def _prune_all(run, problem, finetuning, structure, method, grain, paths):
    """Writes the results of a method at every sparsity that has none yet."""
    config = run.config
    training, order = configs.METHODS[method]
    name = _training(method, grain)
    state = _train(run, problem, training, name, structure)
    importance = make_importance(config, problem, structure, state, order)
    dense = problem.test_accuracy(state.variables)
    for sparsity, path in zip(config.sparsities[grain], paths, strict=True):
        if path.exists():
            continue
        run.say(f"--- {grain}, {method}, {100 * sparsity:g} % removed")
        row = _prune(
            run,
            finetuning,
            structure,
            state.variables,
            importance,
            sparsity=sparsity,
            scopes=config.scopes[grain],
            gradual=method == "gradual",
            folder=path.with_suffix(""),
        )
        run.say(f"{row}")
        files.write_json(path, {"dense": dense, **row})


def _train(run, problem, training, name, structure):
    """The dense network; a finished training is read from its checkpoint."""
    config = run.config
    optimizer = make_optimizer(
        config,
        training,
        problem.variables["params"],
        problem.num_steps,
        structure.penalty,
    )
    update = classifier.make_update(
        problem.model,
        problem.images,
        optimizer,
        batch_size=config.batch_size,
        augmented=config.augment,
        seed=config.seeds[0],
    )
    # The steps reuse the memory of the first state.
    variables = jax.tree.map(jnp.copy, problem.variables)
    state = classifier.init_state(variables, optimizer, problem.num_steps)
    with _open(run, run.workdir / "trained" / name, config.checkpoint_every) as inner:
        return classifier.train(inner, problem, state, update)


def _open(run, folder, checkpoint_every):
    fields = {name: run.config[name] for name in ("experiment", "variant", "seeds")}
    config = ConfigDict(fields | {"checkpoint_every": checkpoint_every})
    return runs.open_run(folder, config)


def make_optimizer(
    config: ConfigDict,
    training: str,
    params: Any,
    num_steps: int,
    groups: lbi.penalty.PenaltySpec,
) -> optax.GradientTransformation:
    """Makes the optimizer config.optimizer[training] with a penalty on `groups`.

    Raises:
      ValueError: if one of its options or the schedule is unknown.
    """
    chosen, entry = config.optimizer[training], f"optimizer.{training}"
    schedule = optimizers.make_schedule(chosen, num_steps)
    if training in ("sgd", "group_lasso"):
        make = functools.partial(pruning.proximal_sgd, schedule)
        optimizers.check(make, chosen.options, entry)
        penalty = None
        if training == "group_lasso":
            strength = config.lasso_strength
            penalty = pruning.lasso_penalty(
                params, schedule, num_steps, groups, strength
            )
        return make(penalty=penalty, **chosen.options)

    def make_penalty():
        clocked = schedule, chosen.options.nu, num_steps
        return lbi.suggest_lambda(params, *clocked, groups, enter_at=config.enter_at)

    return lbi_training.make_coupled(chosen, num_steps, make_penalty, entry=entry)


def make_importance(
    config: ConfigDict,
    problem: Problem,
    structure: pruning.Structure,
    state: TrainState,
    order: str,
) -> lbi.pruning.Importance:
    """Importance of the groups of a trained network, by one order of METHODS."""
    if order == "entry":
        return lbi.pruning.entry_importance(state.params, state.opt_state)
    if order == "magnitude":
        return lbi.pruning.magnitude_importance(state.params, structure.penalty)
    if order == "random":
        key = jax.random.key(config.seeds[0])
        return lbi.pruning.random_importance(key, state.params, structure.penalty)
    grads = _gradients(config, problem, state)
    return lbi.pruning.taylor_importance(state.params, grads, structure.penalty)


def _gradients(config, problem, state):
    """Gradients of the loss of batches of training images, stacked."""
    pixels, labels = problem.images.train
    size = config.batch_size
    num_batches = min(config.num_gradient_batches, len(pixels) // size)
    used = num_batches * size
    batches = pixels[:used].reshape(num_batches, size, *pixels.shape[1:])
    loss_fn = classifier.make_loss(problem.model, "frozen")

    @jax.jit
    def gradients(variables, batches):
        def gradient(batch):
            inputs = classifier.normalize(problem.images, batch[0])
            data = {"inputs": inputs, "labels": batch[1]}
            data["batch_stats"] = variables["batch_stats"]
            return jax.grad(loss_fn)(variables["params"], data)

        return jax.lax.map(gradient, batches)

    labels = labels[:used].reshape(num_batches, size)
    return gradients(state.variables, (batches, labels))


def _prune(
    run,
    finetuning,
    structure,
    variables,
    importance,
    *,
    sparsity,
    scopes,
    gradual,
    folder,
):
    """Prunes and fine-tunes one network; returns its measurements."""
    config, problem = run.config, finetuning.problem
    scope, masks, pruned = _choose_scope(
        config, finetuning, structure, variables, importance, sparsity, scopes
    )
    kept = [np.asarray(mask) for mask in jax.tree.leaves(masks["params"])]
    row = {
        "scope": scope,
        "kept_params": sum(m.sum() for m in kept) / sum(m.size for m in kept),
    }
    update, sparsities = finetuning.update, {}
    if gradual:

        def choose(variables, sparsity):
            by_norm = lbi.pruning.magnitude_importance(
                variables["params"], structure.penalty
            )
            return pruning.make_masks(structure, by_norm, sparsity, scope, variables)

        last = int(config.gradual.until * problem.num_steps)
        sparsities = pruning.cubic(sparsity, last, config.gradual.num_prunings)
        update = pruning.gradually(update, choose, sparsities)
        masks = choose(variables, 0.0)
    else:
        row["before"] = problem.test_accuracy(pruned)
    state = classifier.init_state(variables, finetuning.optimizer, problem.num_steps)
    with _open(run, folder, problem.num_steps) as inner:
        state = classifier.train(
            inner, problem, pruning.prune(state, masks), update, stops=sparsities
        )
    row["after"] = problem.test_accuracy(state.variables)
    # The results are in the file that the caller writes.
    if devices.is_main():
        shutil.rmtree(folder)
    return row


def _choose_scope(
    config, finetuning, structure, variables, importance, sparsity, scopes
):
    """The scope with the best validation accuracy, its masks and its pruned network."""
    problem = finetuning.problem
    pixels, labels = finetuning.validation
    candidates = {}
    for scope in scopes:
        masks = pruning.make_masks(structure, importance, sparsity, scope, variables)
        pruned = classifier.recalibrate(
            problem.model,
            problem.images,
            lbi.pruning.apply_masks(variables, masks),
            num_batches=config.num_recalibration_batches,
        )
        accuracy = classifier.accuracy(problem.predict(pruned, pixels), labels)
        candidates[scope] = accuracy, masks, pruned
    best = max(scopes, key=lambda scope: candidates[scope][0])
    return best, *candidates[best][1:]


if __name__ == "__main__":
    launch.launch("compare_pruning", train_and_evaluate)
