"""Cascades for a budget of multiply-adds in place of a ratio.

A pruning ratio is not a cost: the same ratio saves different shares with different
schedules, networks and image sizes. `for_budget` turns a share of the multiply-adds of
the whole network into the cascade that needs at most this share.

Axes: P patches, L layers.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from vit import cost, schedules
from vit import model as models
from vit.cascade import Cascade
from vit.model import ViT


def for_budget(
    model: ViT,
    image_size: int | tuple[int, int],
    multiply_adds: float,
    *,
    method: str = "cp_vit",
    channels: int = 3,
    **options: Any,
) -> Cascade:
    """The cascade of a method that comes closest to a budget without exceeding it.

    Args:
      model: the network; its own cascade is ignored.
      image_size: side, or (height, width), in pixels.
      multiply_adds: budget as a share of the multiply-adds of the whole network, in
        (0, 1].
      method: a key of `METHODS`, the constructors of `schedules`.
      channels: channels of the images.
      **options: other arguments of the method, such as fields of `Cascade`.

    Returns:
      A `Cascade` for `model.clone(cascade=...)`.

    Raises:
      ValueError: if the method is unknown, the budget is out of range, or the method
        cannot reach it.

    Example:
      >>> import vit
      >>> model = vit.make("S", num_classes=1000, patch_size=16)
      >>> cascade = vit.for_budget(model, 224, multiply_adds=0.7)
      >>> pruned = vit.cost.count(model.clone(cascade=cascade), 224).total
      >>> f"{pruned / vit.cost.count(model, 224).total:.3f}"
      '0.700'
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}.")
    if not 0 < multiply_adds <= 1:
        raise ValueError(f"multiply_adds must lie in (0, 1], got {multiply_adds}.")
    shape = (image_size, image_size) if isinstance(image_size, int) else image_size
    sizes = {
        "num_layers": model.num_layers,
        "num_patches": models.count_patches(shape, model.patch_size),
    }
    parameters, make = METHODS[method]

    def cost_of(cascade):
        pruned = model.clone(cascade=cascade)
        return cost.count(pruned, shape, channels=channels).total

    budget = multiply_adds * cost_of(None)
    # The cost falls along the parameters: the first that fits is the closest.
    values = parameters(sizes["num_patches"])
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        if cost_of(make(values[middle], **sizes, **options)) <= budget:
            high = middle
        else:
            low = middle + 1
    if low == len(values):
        least = cost_of(make(values[-1], **sizes, **options)) / cost_of(None)
        raise ValueError(
            f"{method} needs at least {least:.3f} of the multiply-adds, got a budget "
            f"of {multiply_adds}."
        )
    return make(values[low], **sizes, **options)


def _constant(ratio, *, num_layers, num_patches, **options):
    ratios = schedules.constant_ratios(ratio, num_layers)
    return schedules.from_ratios(ratios, num_patches, **options)


def _ratios(num_patches):
    return np.arange(1000) / 1000


def _keep_rates(num_patches):
    return 1 - np.arange(1000) / 1000


def _merged_tokens(num_patches):
    return range(num_patches // 2 + 1)


# method -> (its parameter from the dearest to the cheapest, constructor).
METHODS: dict[str, tuple[Callable, Callable[..., Cascade]]] = {
    "cp_vit": (_ratios, schedules.cp_vit),
    "constant": (_ratios, _constant),
    "evit": (_keep_rates, schedules.evit),
    "token_merging": (_merged_tokens, schedules.token_merging),
}
