"""Cascades for a budget of multiply-adds or of time in place of a ratio.

A pruning ratio is not a cost: the same ratio saves different shares with different
schedules, networks and image sizes. `for_budget` turns a share of the multiply-adds of
the whole network into the cascade that needs at most this share. `for_latency` does the
same for a share of the time, from times that were measured on the machine; the layers
add up their times, as in NetAdapt (Yang et al. 2018, arXiv 1804.03230).

Axes: P patches, L layers.
"""

from collections.abc import Callable, Mapping
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
    _check_share("multiply_adds", multiply_adds)

    def cost_of(model):
        return cost.count(model, image_size, channels=channels).total

    return _search(method, model, image_size, multiply_adds, cost_of, options)


def for_latency(
    model: ViT,
    image_size: int | tuple[int, int],
    latency: float,
    table: Mapping[int, float],
    *,
    method: str = "cp_vit",
    **options: Any,
) -> Cascade:
    """The cascade whose predicted time comes closest to a budget without exceeding it.

    Args:
      model: the network; its own cascade is ignored.
      image_size: side, or (height, width), in pixels.
      latency: budget as a share of the time of the whole network, in (0, 1].
      table: see `predict_latency`. `python -m experiments.prune_vit
        --config.latency=SHARE` measures one and writes it to `latency.json`.
      method: a key of `METHODS`, the constructors of `schedules`.
      **options: other arguments of the method, such as fields of `Cascade`.

    Returns:
      A `Cascade` for `model.clone(cascade=...)`.

    Raises:
      ValueError: as `for_budget` and `predict_latency`.

    Example:
      >>> import vit
      >>> model = vit.make("S", num_classes=1000, patch_size=16)
      >>> table = {50: 5.0, 99: 8.0, 148: 12.0, 197: 17.0}  # tokens: milliseconds
      >>> cascade = vit.for_latency(model, 224, 0.7, table)
      >>> pruned = model.clone(cascade=cascade)
      >>> f"{vit.predict_latency(pruned, 224, table):.1f} of 17 milliseconds"
      '11.8 of 17 milliseconds'
    """
    _check_share("latency", latency)

    def cost_of(model):
        return predict_latency(model, image_size, table)

    return _search(method, model, image_size, latency, cost_of, options)


def predict_latency(
    model: ViT, image_size: int | tuple[int, int], table: Mapping[int, float]
) -> float:
    """Time of a network as the sum of its layers, in the unit of the table.

    Args:
      model: the network, with its cascade.
      image_size: side, or (height, width), in pixels.
      table: {tokens: time of the network with so many tokens in every layer}, CLS
        included. Between its entries the time is interpolated linearly; below the first
        one it is that of the first.

    Raises:
      ValueError: if a layer has more tokens than the table.
    """
    counted = cost.count(model, image_size)
    tokens = sorted(table)
    times = [table[number] for number in tokens]
    # Half of a layer is attention and half is MLP.
    used = np.array([*counted.attention_tokens, *counted.mlp_tokens])
    if not tokens or used.max() > tokens[-1]:
        raise ValueError(
            f"the table must have times up to {used.max()} tokens, got "
            f"{', '.join(map(str, tokens)) or 'none'}."
        )
    return float(np.mean(np.interp(used, tokens, times)))


def _check_share(name, share):
    if not 0 < share <= 1:
        raise ValueError(f"{name} must lie in (0, 1], got {share}.")


def _search(method, model, image_size, share, cost_of, options):
    """The first cascade, from the dearest on, that costs at most a share."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}.")
    shape = (image_size, image_size) if isinstance(image_size, int) else image_size
    sizes = {
        "num_layers": model.num_layers,
        "num_patches": models.count_patches(shape, model.patch_size),
    }
    parameters, make = METHODS[method]
    whole = cost_of(model.clone(cascade=None))

    def share_of(value):
        cascade = make(value, **sizes, **options)
        return cost_of(model.clone(cascade=cascade)) / whole

    # The cost falls along the parameters: the first that fits is the closest.
    values = parameters(sizes["num_patches"])
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        if share_of(values[middle]) <= share:
            high = middle
        else:
            low = middle + 1
    if low == len(values):
        raise ValueError(
            f"{method} needs at least {share_of(values[-1]):.3f} of the cost of the "
            f"whole network, got a budget of {share}."
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
