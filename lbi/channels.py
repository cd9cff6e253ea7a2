"""Channels: the parameters that belong to each, their masks, thinner networks.

`trace` reads from a network which entries of which parameters can only be removed
together: a filter with its bias, its batch normalization and the inputs of the next
layer; the channels of all layers that a residual sum joins; a head of attention with
its query, key, value and output. `thin` removes them, `channel_masks` sets them to
zero.

A map can also be written by hand. It is plain data,

    {"conv1": (("params/conv1/kernel", 3), ("params/conv1/bias", 0),
               ("params/conv2/kernel", 2)), ...}

with pairs (path, axis) in the variables of the network, the layer's own kernel first.
An axis may be a multiple of the number of channels long: it then belongs to a flattened
image, ordered (position, channel).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lbi import penalty as penalties
from lbi.dataflow import Flow

ChannelMap = Mapping[str, Sequence[tuple[str, int]]]


@dataclasses.dataclass(frozen=True, eq=False)
class Graph(Mapping):
    """What `trace` found: a channel map of the whole network.

    A name is the path of the first kernel whose outputs are the channels. Of several
    kinds of channels of one kernel, heads are "path:heads", others "path:axis",
    "path:axis+" ...

    Attributes:
      places: {name: ((path, axis, numbers), ...)}, the kernel of the name first;
        numbers, (n,), int, gives the channel of each index along the axis, or -1.
      fixed: {name: {channel: why it cannot be removed}}.
      shapes: {path: shape} of all parameters.
      outputs: {path: axes} of the kernels; their entries along these axes compute the
        channels.
    """

    places: dict[str, tuple[tuple[str, int, np.ndarray], ...]]
    fixed: dict[str, dict[int, str]]
    shapes: dict[str, tuple[int, ...]]
    outputs: dict[str, tuple[int, ...]]

    def __getitem__(self, name):
        return self.places[name]

    def __iter__(self):
        return iter(self.places)

    def __len__(self):
        return len(self.places)

    def size(self, name: str) -> int:
        """Number of channels."""
        return 1 + int(self.places[name][0][2].max())

    def removable(self) -> dict[str, int]:
        """{name: number of channels} where at least one channel can be removed."""
        sizes = {name: self.size(name) for name in self.places}
        return {
            name: size
            for name, size in sizes.items()
            if size > 1 and len(self.fixed[name]) < size
        }

    def find(self, name: str) -> str:
        """The full name that `name` stands for.

        Args:
          name: a name, also without "params/", or a part of one, such as "conv1".

        Raises:
          ValueError: if no name contains it, or several.
        """
        for full in (name, f"params/{name}"):
            if full in self.places:
                return full
            if full in self.shapes:
                raise ValueError(self._elsewhere(name, [full]))
        found = [n for n in self.places if f"/{name}/" in f"/{n}/"]
        found = [n for n in found if n in self.removable()] or found
        # Layers whose channels have the name of another one.
        named = {places[0][0] for places in self.places.values()}
        tied = {p for n in self.removable() for p in _computing(self, n)} - named
        others = [p for p in self.outputs if p in tied and f"/{name}/" in f"/{p}/"]
        if others and not found:
            raise ValueError(self._elsewhere(name, others))
        if len(found + others) != 1:
            what = "is not a layer" if not found else "is several layers"
            known = ", ".join(found + others or self.removable())
            raise ValueError(f"{name} {what} of the traced network: {known}.")
        return found[0]

    def _elsewhere(self, name, paths):
        """Why the name of these parameters is not one of channels."""
        owners = [n for n in self.places if set(paths) & set(_computing(self, n))]
        if not owners:
            known = ", ".join(self.removable())
            return (
                f"{name} has no channels that can be removed; the layers are {known}."
            )
        return (
            f"{name} computes the channels {', '.join(owners)}: use this name. "
            "lbi.pruning.channel_importance adds up the importance of all layers that "
            "compute them."
        )


def trace(apply_fn: Callable[..., Any], params: Any, *inputs: Any) -> Graph:
    """Finds the channels of a network from its jaxpr, without running it.

    Channels are followed through convolutions (also grouped and depthwise), products,
    attention, normalization, sums, gates, concatenation, reshape, transposition,
    updates at an index, sums over segments, Fourier transforms over other axes, scans
    and functions under jit, vmap, remat or custom derivatives. What cannot be removed
    is fixed: outputs of the network, channels that a mean or softmax is taken over, and
    channels in operations without a rule. `thin` refuses these with the name and the
    line of the operation.

    Trace the network as it is evaluated: with running statistics, without dropout, and
    with an output that does not hold statistics.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from lbi import channels
      >>> def network(params, x):
      ...     return jax.nn.relu(x @ params["a"] + params["bias"]) @ params["b"]
      >>> params = {"a": jnp.ones((2, 3)), "bias": jnp.ones(3), "b": jnp.ones((3, 4))}
      >>> x = jax.ShapeDtypeStruct((2,), jnp.float32)
      >>> graph = channels.trace(network, params, x)
      >>> graph.removable()
      {'a': 3}
      >>> smaller = channels.thin(params, {"a": np.array([True, False, True])}, graph)
      >>> jax.tree.map(jnp.shape, smaller)
      {'a': (2, 2), 'b': (2, 4), 'bias': (2,)}

    Args:
      apply_fn: the network, `apply_fn(params, *inputs)`.
      params: a tree of arrays or of jax.ShapeDtypeStruct: all variables that are to
        be cut, batch statistics included.
      *inputs: arrays or jax.ShapeDtypeStruct.

    Returns:
      The graph, for `thin` and `channel_masks`.

    Raises:
      ValueError: if the function cannot be traced.
    """
    flow = Flow(apply_fn, params, inputs)
    numbers, places, fixed = {}, {}, {}
    outputs = [
        (use.path, axis)
        for use in flow.uses.found
        for axis, role in use.roles.items()
        if role == "output" and use.kind in ("convolution", "product", "embedding")
    ]
    found = []
    for path, axis in dict.fromkeys(outputs):
        for place, units in flow.leaf_columns(path):
            new = [u for u in dict.fromkeys(units.tolist()) if u not in numbers and u]
            if place == axis and new:
                found.append((path, axis, new))
                numbers |= dict.fromkeys(new, None)
    paths = [path for path, _, _ in found]
    free = [path for path, _, units in found if not all(map(flow.reason, units))]
    for path, axis, units in found:
        name = path
        is_free = not all(map(flow.reason, units))
        if paths.count(path) > 1 and not (is_free and free.count(path) == 1):
            name = f"{path}:heads" if flow.is_head(units[0]) else f"{path}:{axis}"
        while name in places:  # two kinds on one axis
            name += "+"
        places[name] = [(path, axis)]
        numbers |= {unit: (name, k) for k, unit in enumerate(units)}
        reasons = {k: flow.reason(unit) for k, unit in enumerate(units)}
        fixed[name] = {k: reason for k, reason in reasons.items() if reason}
    for path in flow.shapes:
        for axis, units in flow.leaf_columns(path):
            for name in dict.fromkeys(
                numbers[u][0] for u in np.unique(units).tolist() if u in numbers
            ):
                own = [numbers.get(unit, ("", 0)) for unit in units.tolist()]
                index = np.array([k if n == name else -1 for n, k in own])
                places[name].append((path, axis, index))
    return Graph(
        {name: _own_first(*found) for name, found in places.items()},
        fixed,
        flow.shapes,
        {
            path: tuple(axis for p, axis in dict.fromkeys(outputs) if p == path)
            for path, _ in outputs
        },
    )


def _computing(graph, name):
    """The kernels that compute the channels."""
    places = graph.places[name]
    return [path for path, axis, _ in places if axis in graph.outputs.get(path, ())]


def _own_first(own, *places):
    """The places with the layer's own axis first."""
    return tuple(sorted(places, key=lambda place: place[:2] != own))


def channel_masks(
    keep: Mapping[str, np.ndarray], channel_map: ChannelMap | Graph, variables: Any
) -> Any:
    """Masks of whole channels, False for every parameter of a removed channel.

    The masks cover the filter, bias and batch normalization of a channel and the
    weights that read it. The contribution of a removed channel is therefore zero for
    every activation function.

    Args:
      keep: {layer: bool (C,), True = keep}, with layers of the channel map.
      channel_map: the graph of `trace`, or a map by hand (top of this module).
      variables: {"params": ..., "batch_stats": ...}, or any tree with the paths of the
        map.

    Returns:
      A tree of bool arrays like `variables`, for `lbi.pruning.apply_masks`.

    Raises:
      ValueError: if a layer is not in the map, a mask has other values than bool, a
        channel cannot be removed, or the map does not fit the variables.
    """
    slices = _slices(keep, channel_map, variables)

    def one(path, leaf):
        mask = np.ones(np.shape(leaf), bool)
        for axis, kept in slices.get(penalties.path_name(path), {}).items():
            mask &= np.expand_dims(kept, [a for a in range(mask.ndim) if a != axis])
        return jnp.asarray(mask)

    return jax.tree_util.tree_map_with_path(one, variables)


def thin(
    variables: Any, keep: Mapping[str, np.ndarray], channel_map: ChannelMap | Graph
) -> Any:
    """Variables of the smaller network, which has only the channels that are kept.

    The smaller network computes the same function as the masked one (`channel_masks`).
    To run it, build the network with the smaller numbers of channels; sizes in its code
    that depend on them must follow, for example the two halves of a split. Parameters
    that the traced network did not use stay as they are.

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
      variables: variables of the whole network, or a tree like them (gradients).
      keep: {layer: bool (C,), True = keep}. With a graph the layer can be a part of its
        path, and the mask can have one entry for each index of the layer's axis.
      channel_map: the graph of `trace`, or a map by hand (top of this module).

    Returns:
      A tree of the same structure with smaller arrays.

    Raises:
      ValueError: if a layer would lose all its channels, a mask has other values than
        bool, a channel cannot be removed, a parameter is NaN, or the map does not fit.
    """
    for name, kept in keep.items():
        if not np.any(kept):
            raise ValueError(f"{name} would lose all its channels.")
    slices = _slices(keep, channel_map, variables)

    def one(path, leaf):
        name = penalties.path_name(path)
        penalties.check_not_nan(name, leaf)
        for axis, kept in slices.get(name, {}).items():
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


def bool_mask(name: str, mask: Any) -> np.ndarray | jax.Array:
    """The mask of a layer as a bool array.

    Args:
      name: of the layer, for the error.
      mask: bool, or numbers that are 0 and 1.

    Raises:
      ValueError: for other numbers, which may be scores or indices.
    """
    mask = mask if isinstance(mask, jax.Array) else np.asarray(mask)
    if mask.dtype == bool:
        return mask
    if isinstance(mask, jax.core.Tracer) or not np.isin(mask, (0, 1)).all():
        raise ValueError(
            f"{name}: the mask must be bool (True = keep), got {mask.dtype}; "
            "lbi.pruning.keep_masks makes masks from scores."
        )
    return mask.astype(bool)


def _slices(keep, channel_map, variables):
    """{path: {axis: bool mask along it}} of every parameter that a mask affects."""
    leaves = penalties.named_leaves(variables)
    is_graph = isinstance(channel_map, Graph)
    if is_graph:
        _check_same_network(channel_map, leaves)
        names = {name: channel_map.find(name) for name in keep}
        if len(set(names.values())) < len(names):
            raise ValueError(f"several masks of one layer: {', '.join(names)}.")
        keep = {names[name]: mask for name, mask in keep.items()}
    else:
        check_layers(keep, channel_map)
    slices = {}
    for name, kept in keep.items():
        kept = np.asarray(bool_mask(name, kept))
        if is_graph:
            kept = _channel_mask(channel_map, name, kept)
        for number, (path, axis, *numbers) in enumerate(channel_map[name]):
            if path not in leaves:
                raise ValueError(f"{name}: the variables contain no {path}.")
            shape = np.shape(leaves[path])
            if not -len(shape) <= axis < len(shape):
                raise ValueError(f"{name}: {path} of shape {shape} has no axis {axis}.")
            if is_graph:
                mask = np.append(kept, True)[numbers[0]]  # -1 is always kept
            else:
                # The layer's own kernel defines the number of channels.
                fits = kept.ndim == 1 and kept.size > 0 and shape[axis] % kept.size == 0
                if not fits or (number == 0 and shape[axis] != kept.size):
                    raise ValueError(
                        f"{name}: a mask {kept.shape} does not fit axis {axis} of "
                        f"{path}, of length {shape[axis]}."
                    )
                mask = np.tile(kept, shape[axis] // len(kept))
            axis %= len(shape)
            of_path = slices.setdefault(path, {})
            of_path[axis] = of_path.get(axis, True) & mask
    return slices


def _channel_mask(graph, name, kept):
    """The mask with one entry for each channel; refuses what cannot be removed."""
    size, (_, _, numbers) = graph.size(name), graph[name][0]
    if kept.shape == numbers.shape != (size,) and (numbers >= 0).all():
        channels = np.zeros(size, bool)
        channels[numbers[kept]] = True
        if (channels[numbers] != kept).any():
            index = int(np.flatnonzero(channels[numbers] != kept)[0])
            other = int(np.flatnonzero((numbers == numbers[index]) & kept)[0])
            raise ValueError(
                f"{name}: entries {other} and {index} can only be removed together."
            )
        kept = channels
    if kept.shape != (size,):
        raise ValueError(
            f"{name}: the mask must have shape ({size},), got {kept.shape}."
        )
    for channel in np.flatnonzero(~kept).tolist():
        if channel in graph.fixed[name]:
            raise ValueError(
                f"{name}: channel {channel} cannot be removed: "
                f"{graph.fixed[name][channel]}."
            )
    return kept


def _check_same_network(graph, leaves):
    """The variables must be those that were traced."""
    for path in [*graph.shapes, *leaves]:
        if path not in leaves or path not in graph.shapes:
            where = "variables" if path not in leaves else "traced parameters"
            raise ValueError(
                f"the graph belongs to another network: the {where} have no {path}."
            )
        shape = np.shape(leaves[path])
        if graph.shapes[path] != shape:
            raise ValueError(
                f"the graph belongs to another network: {path} has shape {shape}, "
                f"in the graph {graph.shapes[path]}."
            )
