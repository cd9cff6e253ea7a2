"""Cascades for a budget of multiply-adds or of time in place of a ratio.

A pruning ratio is not a cost saving: the same ratio saves different shares with other
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
from vit.positions import pair


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
      **options: other arguments of the method, such as fields of `Cascade`. Method
        "range" needs `ranges`, the attention range of each layer, (L,); its mean ratio
        is at most 0.9. "released_code" is compact and without stale thresholds unless
        the options say otherwise; masked it saves nothing.

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


def units_for_budget(
    model: ViT,
    image_size: int | tuple[int, int],
    multiply_adds: float,
    *,
    units: str,
    channels: int = 3,
) -> tuple[int, ...]:
    """How many heads or neurons each layer may keep within a budget.

    Args:
      model: the network, with or without a cascade.
      image_size: side, or (height, width), in pixels.
      multiply_adds: budget as a share of the multiply-adds of `model`, in (0, 1].
      units: "heads" or "neurons".
      channels: channels of the images.

    Returns:
      The largest count that fits for each layer, at least 1, (L,). Every layer loses
      the same share. `slicing.largest` turns scores and counts into the units that
      `slicing.keep_heads` or `slicing.keep_neurons` keeps.

    Raises:
      ValueError: if the budget is out of range or cannot be reached, or the units are
        unknown.

    Example:
      >>> import vit
      >>> model = vit.make("S", num_classes=1000, patch_size=16)
      >>> vit.budget.units_for_budget(model, 224, 0.8, units="heads")[0]
      2
      >>> vit.budget.units_for_budget(model, 224, 0.8, units="neurons")[0]
      1029
    """
    _check_share("multiply_adds", multiply_adds)
    if units not in _UNITS:
        raise ValueError(f"units must be one of {', '.join(_UNITS)}; got {units!r}.")
    field = _UNITS[units]
    layers = range(model.num_layers)
    totals = [models.per_layer(getattr(model, field), i) for i in layers]
    whole = cost.count(model, image_size, channels=channels).total
    heads = models.per_layer(model.num_heads, 0)
    head_dim = model.head_dim or model.hidden_size // heads

    def keep(removed):
        share = removed / max(totals)
        return tuple(max(schedules.keep_counts([share], n)[0], 1) for n in totals)

    def share_of(removed):
        smaller = model.clone(head_dim=head_dim, **{field: keep(removed)})
        return cost.count(smaller, image_size, channels=channels).total / whole

    values = range(max(totals))
    return keep(_first_that_fits(units, values, share_of, multiply_adds))


_UNITS = {"heads": "num_heads", "neurons": "mlp_dim"}


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
    if method == "heads":
        raise ValueError(
            "time is predicted from the numbers of tokens, which the method heads "
            "does not change."
        )

    def cost_of(model):
        return predict_latency(model, image_size, table)

    return _search(method, model, image_size, latency, cost_of, options)


def predict_latency(
    model: ViT, image_size: int | tuple[int, int], table: Mapping[int, float]
) -> float:
    """Predicts the time of a network as the sum of its layers.

    Args:
      model: the network, with its cascade.
      image_size: side, or (height, width), in pixels.
      table: {tokens: time of the network with so many tokens in every layer}, CLS
        included. Between its entries the time is interpolated linearly; below the first
        one it is that of the first. A time that is shorter than one of fewer tokens is
        noise and counts as that one.

    Returns:
      The time, in the unit of the table.

    Raises:
      ValueError: if a layer has more tokens than the table, or a time is not positive.
    """
    counted = cost.count(model, image_size)
    # The keys of a table that was read from JSON are strings.
    table = {int(number): time for number, time in table.items()}
    tokens = sorted(table)
    times = [table[number] for number in tokens]
    if not all(0 < time < np.inf for time in times):
        raise ValueError(f"the times of the table must be > 0, got {times}.")
    times = np.maximum.accumulate(times or [0.0])
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
    if method == "neurons":
        raise ValueError(
            "a cascade cannot leave out neurons; to cut them out of the weights, use "
            "vit.budget.units_for_budget and vit.slicing.keep_neurons."
        )
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}.")
    num_patches = models.count_patches(pair(image_size), model.patch_size)
    sizes = {"num_layers": model.num_layers, "num_patches": num_patches}
    parameters, make = METHODS[method]
    whole = cost_of(model.clone(cascade=None))

    def share_of(value):
        cascade = make(value, **sizes, **options)
        return cost_of(model.clone(cascade=cascade)) / whole

    # The cost falls along the parameters: the first that fits is the closest.
    value = _first_that_fits(method, parameters(model, num_patches), share_of, share)
    return make(value, **sizes, **options)


def _first_that_fits(name, values, share_of, share):
    """The first of the values, from the dearest on, that costs at most a share."""
    # Merging one token costs more than none, by the similarities; then the cost falls.
    if share_of(values[0]) <= share:
        return values[0]
    low, high = 1, len(values)
    while low < high:
        middle = (low + high) // 2
        if share_of(values[middle]) <= share:
            high = middle
        else:
            low = middle + 1
    if low == len(values):
        raise ValueError(
            f"{name} needs at least {share_of(values[-1]):.3f} of the cost of the "
            f"whole network, got a budget of {share}."
        )
    return values[low]


def _constant(ratio, *, num_layers, num_patches, first_layer=1, **options):
    ratios = schedules.constant_ratios(ratio, num_layers, first_layer=first_layer)
    return schedules.from_ratios(ratios, num_patches, **options)


def _range(
    ratio, *, num_layers, num_patches, ranges=(), gamma=0.5, first_layer=1, **options
):
    if len(ranges) != num_layers:
        raise ValueError(
            "the method range needs `ranges`, the attention range of each of the "
            f"{num_layers} layers (importance.attention_range); got {len(ranges)}."
        )
    ratios = schedules.range_ratios(ratio, ranges, gamma=gamma, first_layer=first_layer)
    return schedules.from_ratios(ratios, num_patches, **options)


def _released_code(plateau, **sizes_and_options):
    # The authors' own program masks, and its stale thresholds only exist there.
    compact = {"mode": "compact", "stale_threshold": False}
    return schedules.released_code(plateau=plateau, **(compact | sizes_and_options))


def _heads(keep_heads, *, num_layers, num_patches, **options):
    return Cascade(keep=(num_patches,) * num_layers, keep_heads=keep_heads, **options)


def _up_to(largest):
    """Ratios from 0 up to a limit that is not reached."""
    return largest * np.arange(1000) / 1000


# method -> (its parameter from the dearest to the cheapest, for a model and the number
# of patches; constructor).
METHODS: dict[str, tuple[Callable, Callable[..., Cascade]]] = {
    "cp_vit": (lambda model, _: _up_to(1.0), schedules.cp_vit),
    "constant": (lambda model, _: _up_to(1.0), _constant),
    "range": (lambda model, _: _up_to(0.9), _range),
    "released_code": (
        lambda model, _: _up_to(schedules.largest_plateau(model.num_layers)),
        _released_code,
    ),
    "evit": (lambda model, _: 1 - _up_to(1.0), schedules.evit),
    "token_merging": (
        lambda _, num_patches: range(num_patches // 2 + 1),
        schedules.token_merging,
    ),
    "heads": (lambda model, _: _kept_heads(model), _heads),
}


def _kept_heads(model):
    """The same number of heads in each layer, or all where a layer has fewer."""
    heads = [models.per_layer(model.num_heads, i) for i in range(model.num_layers)]
    return [
        tuple(min(keep, total) for total in heads) for keep in range(max(heads), 0, -1)
    ]
