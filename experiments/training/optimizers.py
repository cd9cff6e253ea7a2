"""Optimizers and schedules from a config."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from experiments.common import settings as rules

# Ranges of keywords that optimizers of optax and lbi share; outside of them most
# optimizers compute numbers that mean nothing, or ascend.
_OPTIONS = {
    **dict.fromkeys(("b1", "b2", "b3", "decay", "momentum"), rules.within("[0, 1)")),
    **dict.fromkeys(("eps", "eps_root", "weight_decay"), rules.at_least(0)),
    **dict.fromkeys(("nu", "kappa"), rules.above(0)),
}


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
    settings: ConfigDict, num_steps: int, *, entry: str = "optimizer"
) -> optax.GradientTransformation:
    """Any optimizer of optax with the schedule of `make_schedule`.

    Args:
      settings: with name, options and the fields of a schedule.
      num_steps: steps of the training.
      entry: name of `settings` in the config, for errors.

    Raises:
      ValueError: if the optimizer, one of its options or the schedule is unknown.
    """
    make = find(settings.name, f"{entry}.name")
    schedule = make_schedule(settings, num_steps)
    return check(lambda **options: make(schedule, **options), settings.options, entry)


def make_clipped(
    settings: ConfigDict, num_steps: int, *, entry: str = "optimizer"
) -> optax.GradientTransformation:
    """`make_optimizer` after clipping by settings.clip_norm; 0 does not clip."""
    optimizer = make_optimizer(settings, num_steps, entry=entry)
    if not settings.clip_norm:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), optimizer)


def find(name: str, field: str) -> Callable[..., Any]:
    """The function of optax or optax.contrib with this name.

    Raises:
      ValueError: if there is none; names `field`.
    """
    make = getattr(optax, name, getattr(optax.contrib, name, None))
    if name.startswith("_") or not callable(make):
        raise ValueError(f"{field}: optax has no optimizer {name!r}.")
    return make


def check_options(options: ConfigDict, entry: str = "optimizer") -> None:
    """Raises ValueError if a common option is out of its range."""
    for name in options:
        if name in _OPTIONS:
            rules.check_value(f"{entry}.options.{name}", options[name], _OPTIONS[name])


def check(
    make: Callable[..., optax.GradientTransformation],
    options: ConfigDict,
    entry: str = "optimizer",
    **extra_args: Any,
) -> optax.GradientTransformation:
    """Returns make(**options), after tracing one update of it.

    Args:
      make: makes an optimizer.
      options: its keywords.
      entry: name of the optimizer in the config, for errors.
      **extra_args: keywords of its `update` that the training passes.

    Raises:
      ValueError: if an option is unknown or out of range, if `make` does not make an
        optimizer, or if the optimizer needs more than gradients and parameters.
    """
    check_options(options, entry)
    params = {"layer": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
    with rules.blamed_on(f"{entry}.options" if options else f"{entry}.name"):
        optimizer = make(**dict(options))
    with rules.blamed_on(f"{entry}.name"):
        if not isinstance(optimizer, optax.GradientTransformation):
            raise TypeError(f"{type(optimizer).__name__} is not an optimizer.")
        jax.eval_shape(
            lambda p: optimizer.update(p, optimizer.init(p), p, **extra_args), params
        )
    return optimizer


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
