"""The training loop: restore, advance from stop to stop, check, log, save.

config.stages changes fields during a training: ((from, {field: value}), ...), where
`from` is a share of the epochs. A stage keeps the changes of earlier stages.
"""

from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments.common import runs

Advance = Callable[[Any, int, int], tuple[Any, np.ndarray, dict[str, Any]]]


def train(
    run: runs.Run,
    state: Any,
    advance: Advance,
    *,
    stops: Iterable[int],
    saves: Iterable[int],
    may_diverge: bool = False,
) -> Any:
    """Trains `state` to the last stop; resumes exactly from the newest checkpoint.

    Args:
      run: the open run folder, which stores metrics and checkpoints.
      state: the state before the first step; it is stored in checkpoints.
      advance: (state, start, stop) -> the state after the steps start, ..., stop - 1,
        their losses (stop - start, ...), and the metrics to log at `stop`. It must
        depend only on its arguments, so that a resumed run equals an uninterrupted one.
      stops: steps at which to log. The last one ends the training; a stop at 0 measures
        before the first step.
      saves: steps after which a checkpoint is written; each of them is also a stop.
      may_diverge: whether a loss that is not finite is allowed.

    Returns:
      The trained state.

    Raises:
      ValueError: if a loss is not finite; names the first such step.
    """
    saves = set(saves)
    stops = sorted(saves.union(stops))
    step, state = run.restore(state)
    # A run that was killed before its first checkpoint already has this line.
    if 0 in stops and not run.metrics():
        _, _, metrics = advance(state, 0, 0)
        run.log(0, metrics, num_steps=stops[-1])
    for stop in stops:
        if stop <= step:
            continue
        state, losses, metrics = advance(state, step, stop)
        losses = np.asarray(losses)
        if not may_diverge:
            per_step = losses.reshape(len(losses), -1).sum(1)
            check_finite(per_step, first_step=step + 1)
        metrics = {"loss": float(losses.mean()), **metrics}
        run.log(stop, metrics, num_steps=stops[-1])
        if stop in saves:
            run.save(stop, state)
        step = stop
    return state


def every(num_steps: int, *intervals: int) -> set[int]:
    """The multiples of each interval up to `num_steps`, and `num_steps` itself."""
    if num_steps == 0:
        return set()
    steps = {num_steps}
    for interval in intervals:
        steps.update(range(interval, num_steps, interval))
    return steps


def check_stages(config: ConfigDict, changeable: Set[str]) -> None:
    """Raises ValueError if config.stages are not in order or change other fields."""
    for stage in config.stages:
        is_pair = isinstance(stage, tuple | list) and len(stage) == 2
        if not is_pair or not isinstance(stage[1], Mapping | ConfigDict):
            raise ValueError(
                "stages must be a tuple of (start, {field: value}), got "
                f"{config.stages!r}."
            )
    starts = [start for start, _ in config.stages]
    fields = {field for _, changes in config.stages for field in changes}
    if starts != sorted(starts) or not all(0 <= start < 1 for start in starts):
        raise ValueError(
            f"stages must begin at rising shares of the epochs in [0, 1), got {starts}."
        )
    if fields - changeable:
        raise ValueError(
            f"stages can change {', '.join(sorted(changeable))}, not "
            f"{', '.join(sorted(fields - changeable))}."
        )


def stage_of(config: ConfigDict, epoch: int) -> int:
    """The number of stages that have begun at an epoch, counted from 0."""
    return sum(start * config.num_epochs <= epoch for start, _ in config.stages)


def in_stage(config: ConfigDict, stage: int) -> ConfigDict:
    """`config` after the changes of the first `stage` entries of config.stages."""
    config = config.copy_and_resolve_references()
    for _, changes in config.stages[:stage]:
        config.update_from_flattened_dict(changes)
    return config


def check_finite(losses: np.ndarray, *, first_step: int) -> None:
    """Raises ValueError that names the first step whose loss is not finite.

    Args:
      losses: losses of consecutive steps, (S,).
      first_step: the number of the step of losses[0].
    """
    bad = np.flatnonzero(~np.isfinite(losses))
    if bad.size:
        raise ValueError(
            f"the loss is {losses[bad[0]]} at step {first_step + bad[0]}; the last "
            "checkpoint precedes it. Lower the learning rate or clip the gradient."
        )
