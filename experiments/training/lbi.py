"""Training with DessiLBI and other optimizers: penalties, path, measurements."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

import lbi
from experiments.common import runs
from experiments.common import settings as rules
from experiments.training import classifier, loop, optimizers
from experiments.training.classifier import Images, Problem, TrainState

# Batches of 500 training images that recalibrate batch normalization.
_NUM_RECALIBRATION_BATCHES = 5


def train(run: runs.Run, problem: Problem) -> TrainState:
    """Trains with the single method of config.methods; resumes from a checkpoint."""
    config = run.config
    optimizer = make_optimizer(config, problem.variables["params"], problem.num_steps)
    total_clock = _forecast(run, problem)
    update = classifier.make_update(
        problem.model,
        problem.images,
        optimizer,
        batch_size=config.batch_size,
        augmented=config.augment,
        seed=config.seeds[0],
        loss=functools.partial(
            classifier.cross_entropy, label_smoothing=config.label_smoothing
        ),
    )
    steps_per_epoch = problem.steps_per_epoch

    def measure_epoch(state, step):
        if step % steps_per_epoch:
            return {}
        metrics = measure(problem, state)
        if total_clock is None:
            return metrics
        left = lbi.open_groups(state.params, state.opt_state, total_clock)
        metrics["open_groups"] = sum(map(int, left.values()))
        before = [m["open_groups"] for m in run.metrics() if "open_groups" in m]
        is_new = not before or before[-1]
        if not metrics["open_groups"] and is_new and step < problem.num_steps:
            run.say(f"step {step}: no further group enters if the weights stay.")
        return metrics

    run.say(f"compiling the step of {config.methods[0]} ...")
    return classifier.train(
        run,
        problem,
        classifier.init_state(problem.variables, optimizer, problem.num_steps),
        update,
        measure=measure_epoch,
        stops=loop.every(problem.num_steps, config.log_every),
    )


def load(folder: Path, images: Images) -> tuple[ConfigDict, Problem, TrainState]:
    """The configuration, the problem and the trained state of a run of train_lbi.

    Raises:
      FileNotFoundError, ValueError: as `runs.load_checkpoint`.
    """
    config = runs.load_config(folder)
    with rules.blamed_on(f"{folder}/config.json"):
        problem = classifier.make_problem(config, images)
        params, num_steps = problem.variables["params"], problem.num_steps
        optimizer = make_optimizer(config, params, num_steps)
        state = classifier.init_state(problem.variables, optimizer, num_steps)
    _, state = runs.load_checkpoint(folder, state)
    return config, problem, state


def make_optimizer(
    config: ConfigDict, params: Any, num_steps: int
) -> optax.GradientTransformation:
    """Makes the optimizer config.optimizer[config.methods[0]].

    Args:
      config: with methods, optimizer, penalty and enter_at.
      params: parameters before training.
      num_steps: steps of the training.

    Raises:
      ValueError: if the optimizer, one of its options or the schedule is unknown.
    """
    [method] = config.methods
    settings, entry = config.optimizer[method], f"optimizer.{method}"
    if settings.name == "adam":
        return optimizers.make_optimizer(settings, num_steps, entry=entry)
    penalty = functools.partial(make_penalty, config, params, num_steps)
    return make_coupled(settings, num_steps, penalty, entry=entry)


def make_coupled(
    settings: ConfigDict,
    num_steps: int,
    make_penalty: Callable[[], lbi.penalty.PenaltySpec],
    *,
    entry: str,
) -> optax.GradientTransformation:
    """Makes an optimizer with a structure parameter, which records the entries.

    Args:
      settings: with name, options and the fields of a schedule.
      num_steps: steps of the training.
      make_penalty: makes the penalty, after the options have been checked.
      entry: name of `settings` in the config, for errors.

    Raises:
      ValueError: if the optimizer, one of its options or the schedule is unknown.
    """
    makers = {
        "dessilbi": lbi.dessilbi,
        "dessilbi_adam": lbi.dessilbi_adam,
        "adam_then_dessilbi": adam_then_dessilbi,
    }
    if settings.name not in makers:
        raise ValueError(
            f"{entry}.name must be one of adam, {', '.join(makers)}; got "
            f"{settings.name!r}."
        )
    missing = {"nu", "kappa"} - set(settings.options)
    if missing:
        raise ValueError(f"{entry}.options lacks {', '.join(sorted(missing))}.")
    optimizers.check_options(settings.options, entry)
    schedule = optimizers.make_schedule(settings, num_steps)
    make = functools.partial(makers[settings.name], schedule, record_entry=True)
    optimizers.check(make, settings.options, entry)
    return make(penalty=make_penalty(), **settings.options)


def check(config: ConfigDict, images: Images) -> None:
    """Checks network, batch and the optimizer of every method before any training.

    Raises:
      ValueError: as `classifier.check` and `make_optimizer`.
    """
    classifier.check_augmentation(images, {"augment=False": config.augment})
    shapes = classifier.check(config, images)["params"]
    params = jax.tree.map(lambda x: jnp.ones(x.shape), shapes)
    num_steps = config.num_epochs * classifier.count_steps(images, config.batch_size)
    for method in config.methods:
        single = ConfigDict(config)
        single.methods = (method,)
        make_optimizer(single, params, num_steps)


def make_penalty(
    config: ConfigDict, params: Any, num_steps: int
) -> lbi.penalty.PenaltySpec:
    """The penalties of config.penalty: "auto", or "suggested" for these parameters."""
    if config.penalty != "suggested":
        return config.penalty
    settings = config.optimizer[config.methods[0]]
    return lbi.suggest_lambda(
        params,
        optimizers.make_schedule(settings, num_steps),
        settings.options.nu,
        num_steps,
        enter_at=config.enter_at,
    )


def adam_then_dessilbi(
    learning_rate: optax.Schedule, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """The student report's DessiLBI+Adam: a full step of Adam, then one of DessiLBI.

    Both steps use the same gradient. The coupling and the dual use the weights after
    the step of Adam. This is not a discretization of DessiLBI; it reproduces the
    numbers of the report.
    """
    adam = optax.adam(learning_rate)
    dessilbi = lbi.dessilbi(learning_rate, **options)

    def init_fn(params):
        return adam.init(params), dessilbi.init(params)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        first, adam_state = adam.update(updates, state[0], params)
        between = optax.apply_updates(params, first)
        second, dessilbi_state = dessilbi.update(updates, state[1], between)
        total = jax.tree.map(lambda a, b: a + b, first, second)
        return total, (adam_state, dessilbi_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _forecast(run, problem):
    """Prints a forecast of the path; returns the clock at its end, None without."""
    config = run.config
    settings = config.optimizer[config.methods[0]]
    if settings.name == "adam":
        return None
    params, num_steps = problem.variables["params"], problem.num_steps
    schedule = optimizers.make_schedule(settings, num_steps)
    clocked = schedule, settings.options.nu, num_steps
    penalty = make_penalty(config, params, num_steps)
    expected = lbi.forecast_entries(params, *clocked, penalty)
    decaying = lbi.forecast_entries(
        params, *clocked, penalty, decaying=True, kappa=settings.options.kappa
    )
    total_clock = lbi.final_clock(*clocked)
    run.say(
        f"clock at the end {total_clock:.3g}; groups that enter if "
        "their norms stay (if the coupling alone moves them): "
        + ", ".join(
            f"{name} {100 * share:.0f} % ({100 * decaying[name]:.0f} %)"
            for name, share in expected.items()
        )
    )
    if not any(expected.values()):
        run.say(
            "warning: no group can enter; the run would only decay its weights. Use "
            "--config.penalty=suggested, a smaller nu or a higher rate."
        )
    return total_clock


def measure(problem: Problem, state: TrainState) -> dict[str, Any]:
    """Test accuracy of the dense and the sparse network, and the clock of the path.

    The sparse network is W projected on the support, with recalibrated batch
    statistics.
    """
    metrics = {"test_accuracy": problem.test_accuracy(state.variables)}
    if not lbi.find_states(state.opt_state):
        return metrics
    sparse = {
        **state.variables,
        "params": lbi.sparse_params(state.params, state.opt_state),
    }
    sparse = classifier.recalibrate(
        problem.model,
        problem.images,
        sparse,
        num_batches=_NUM_RECALIBRATION_BATCHES,
    )
    inside = lbi.in_support(state.opt_state)
    total = sum(x.size for x in inside.values())
    return metrics | {
        "sparse_test_accuracy": problem.test_accuracy(sparse),
        "clock": float(lbi.clock(state.opt_state)),
        "density": sum(int(x.sum()) for x in inside.values()) / total,
        "density_per_layer": {k: float(v.mean()) for k, v in inside.items()},
    }


def path_arrays(problem: Problem, state: TrainState) -> dict[str, np.ndarray]:
    """Entry time of each group and final norm of each filter, for the figures."""
    arrays = {
        "steps_per_epoch": np.array(problem.steps_per_epoch),
        "num_steps": np.array(problem.num_steps),
    }
    entries = lbi.entry_steps(state.opt_state)
    assigned = lbi.path.penalties_of(state.opt_state)
    leaves = lbi.penalty.named_leaves(state.params)
    for path, steps in entries.items():
        layer = path.removesuffix("/kernel")
        arrays[f"entry_{layer}"] = steps.ravel()
        if leaves[path].ndim == 4:  # A large dense layer has many groups.
            arrays[f"norm_{layer}"] = np.ravel(assigned[path].norms(leaves[path]))
    return arrays
