"""Optimizers and schedules from a config."""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict


def make_schedule(settings: ConfigDict, num_steps: int) -> optax.Schedule:
    """A linear warm-up, then a constant or a cosine schedule.

    Raises:
      ValueError: if the schedule is unknown.
    """
    rate, warmup_steps = settings.learning_rate, settings.warmup_steps
    if settings.schedule == "cosine":
        decay = optax.cosine_decay_schedule(rate, max(num_steps - warmup_steps, 1))
    elif settings.schedule == "constant":
        decay = optax.constant_schedule(rate)
    else:
        raise ValueError(
            f"optimizer.schedule must be one of constant, cosine; got "
            f"{settings.schedule!r}."
        )
    warmup = optax.linear_schedule(rate / (warmup_steps + 1), rate, warmup_steps)
    return optax.join_schedules([warmup, decay], [warmup_steps])


def make_optimizer(
    settings: ConfigDict, num_steps: int
) -> optax.GradientTransformation:
    """Any optimizer of optax with the schedule of `make_schedule`.

    Raises:
      ValueError: if the optimizer, one of its options or the schedule is unknown.
    """
    schedule = make_schedule(settings, num_steps)
    make = getattr(optax, settings.name, getattr(optax.contrib, settings.name, None))
    if not callable(make):
        raise ValueError(f"optax has no optimizer {settings.name!r}.")
    try:
        return make(schedule, **settings.options.to_dict())
    except TypeError as error:
        raise ValueError(f"optimizer.options: {error}") from None


def matrix_axes(params: Any) -> Any:
    """The parameters that Muon updates, with their input and output axes.

    These are the kernels of the blocks, with heads and their width as one axis. For all
    other parameters, such as embeddings and the last layer, the entry is None.
    """

    def axes(path, x):
        names = [entry.key for entry in path]
        if names[-1] != "kernel" or names[0].startswith(_ENDS):
            return None
        num_inputs = 2 if names[-2] == "out" else 1
        return optax.contrib.MuonDimensionNumbers(
            tuple(range(num_inputs)), tuple(range(num_inputs, x.ndim))
        )

    return jax.tree_util.tree_map_with_path(axes, params)


_ENDS = ("embedding", "stem", "pre_logits", "head")
