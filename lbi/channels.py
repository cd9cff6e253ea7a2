"""Channels: the parameters that belong to each, their masks, thinner networks.

A channel map lists the parameters that are removed together with an output channel of a
layer: its filter, bias and batch normalization, and the inputs of the next layer. It is
plain data,

    {"conv1": (("params/conv1/kernel", 3), ("params/conv1/bias", 0),
               ("params/conv2/kernel", 2)), ...}

with pairs (path, axis) in the variables of the network, the layer's own kernel first.
An axis may be a multiple of the number of channels long: it then belongs to a flattened
image, ordered (position, channel).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lbi import penalty as penalties

ChannelMap = Mapping[str, Sequence[tuple[str, int]]]


def channel_masks(
    keep: Mapping[str, np.ndarray], channel_map: ChannelMap, variables: Any
) -> Any:
    """Masks of whole channels, False for every parameter of a removed channel.

    The masks cover the filter, bias and batch normalization of a channel and the
    weights that read it. The contribution of a removed channel is therefore zero for
    every activation function.

    Args:
      keep: {layer: bool (C,), True = keep}, with layers of the channel map.
      channel_map: see the top of this module.
      variables: {"params": ..., "batch_stats": ...}, or any tree with the paths of the
        map.

    Returns:
      A tree of bool arrays like `variables`, for `lbi.pruning.apply_masks`.

    Raises:
      ValueError: if a layer is not in the map, or the map does not fit the variables.
    """
    slices = _slices(keep, channel_map, variables)

    def one(path, leaf):
        mask = np.ones(leaf.shape, bool)
        for axis, kept in slices.get(penalties.path_name(path), ()):
            mask &= np.expand_dims(
                kept, [a for a in range(leaf.ndim) if a != axis % leaf.ndim]
            )
        return jnp.asarray(mask)

    return jax.tree_util.tree_map_with_path(one, variables)


def thin(
    variables: Any, keep: Mapping[str, np.ndarray], channel_map: ChannelMap
) -> Any:
    """Variables of the smaller network, which has only the channels that are kept.

    The smaller network computes the same function as the masked one (`channel_masks`).

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from lbi import channels
      >>> a, b = {"kernel": jnp.ones((2, 3))}, {"kernel": jnp.ones((3, 4))}
      >>> variables = {"a": a, "b": b}
      >>> channel_map = {"a": (("a/kernel", 1), ("b/kernel", 0))}
      >>> keep = {"a": np.array([True, False, True])}
      >>> smaller = channels.thin(variables, keep, channel_map)
      >>> smaller["a"]["kernel"].shape, smaller["b"]["kernel"].shape
      ((2, 2), (2, 4))

    Args:
      variables: variables of the whole network.
      keep: {layer: bool (C,), True = keep}.
      channel_map: see the top of this module.

    Returns:
      A tree of the same structure with smaller arrays.

    Raises:
      ValueError: if a layer would lose all its channels, or the map does not fit.
    """
    for name, kept in keep.items():
        if not np.any(kept):
            raise ValueError(f"{name} would lose all its channels.")
    slices = _slices(keep, channel_map, variables)

    def one(path, leaf):
        for axis, kept in slices.get(penalties.path_name(path), ()):
            leaf = jnp.take(leaf, np.flatnonzero(kept), axis=axis)
        return leaf

    return jax.tree_util.tree_map_with_path(one, variables)


def check_layers(named: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Raises ValueError unless all names in `named` are layers in `known`."""
    unknown = sorted(set(named) - set(known))
    if unknown:
        raise ValueError(
            f"unknown layer {', '.join(unknown)}; the layers are {', '.join(known)}."
        )


def _slices(keep, channel_map, variables):
    """{path: [(axis, bool mask along it)]} of every parameter that a mask affects."""
    leaves = penalties.named_leaves(variables)
    check_layers(keep, channel_map)
    slices = {}
    for name, kept in keep.items():
        kept = np.asarray(kept, bool)
        for number, (path, axis) in enumerate(channel_map[name]):
            if path not in leaves:
                raise ValueError(f"{name}: the variables contain no {path}.")
            length = leaves[path].shape[axis]
            # The layer's own kernel defines the number of channels.
            fits = kept.ndim == 1 and kept.size > 0 and length % kept.size == 0
            if not fits or (number == 0 and length != kept.size):
                raise ValueError(
                    f"{name}: a mask {kept.shape} does not fit axis {axis} of {path}, "
                    f"of length {length}."
                )
            tiled = np.tile(kept, length // len(kept))
            slices.setdefault(path, []).append((axis, tiled))
    return slices
