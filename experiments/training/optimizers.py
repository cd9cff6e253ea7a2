"""Optimizers and schedules from a config."""

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
