"""Pruning to exact counts, and networks that really get smaller.

First an importance for every group (by order of entry, by magnitude, at random), then
masks that keep exact counts of them, then either zeros or thinner arrays.

A channel map says what goes when an output channel of a layer goes: its filter, bias,
batch normalisation and the inputs of the next layer. It is plain data,

    {"conv1": (("params/conv1/kernel", 3), ("params/conv1/bias", 0),
               ("params/conv2/kernel", 2)), ...}

(path, axis) in the network's variables, the layer's own kernel first. An axis that is
a whole number of times as long as there are channels comes of a flattened image
(position, channel), channels last. `experiments.networks.lenet.channel_map` and
`experiments.networks.vgg.channel_map` make those of two networks.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lbi import penalty as penalties
from lbi.dessilbi import Rules
from lbi.path import entry_steps, penalties_of

ChannelMap = Mapping[str, Sequence[tuple[str, int]]]
Importance = dict[str, np.ndarray]
# The authors' code gives groups that never entered this epoch.
_NEVER = 2000


def entry_importance(params: Any, opt_state: Any) -> Importance:
    """Importance by order of entry: earlier first, among equals larger ||W_g|| first.

    Args:
      params: the dense weights.
      opt_state: with `record_entry`.

    Returns:
      {layer: float64, one for each group}: places in the order over all layers, the
      most important one the largest.

    Raises:
      ValueError: if the order of entry was not recorded.
    """
    steps = entry_steps(opt_state)
    norms = _norms(params, penalties_of(opt_state))
    entered = _flatten({path: steps[path] for path in norms})
    never = np.iinfo(np.int32).max
    first = np.where(entered < 0, never, entered)
    flat = _flatten(norms)
    # The last key is the first criterion.
    order = np.lexsort((-flat, first))
    places = np.empty(len(order))
    places[order] = np.arange(len(order))[::-1]
    return _unflatten(places, norms)


def magnitude_importance(params: Any, penalty: penalties.Rules = "auto") -> Importance:
    """Importance by ||W_g||, the groups being those of `penalty`."""
    return _norms(params, Rules.make(penalty).assign(params))


def random_importance(
    key: jax.Array, params: Any, penalty: penalties.Rules = "auto"
) -> Importance:
    """A random order of the groups of `penalty`."""
    norms = magnitude_importance(params, penalty)
    total = _flatten(norms).size
    return _unflatten(np.asarray(jax.random.permutation(key, total), float), norms)


def official_importance(
    params: Any, opt_state: Any, steps_per_epoch: int
) -> Importance:
    """The score of the authors' code: ||W_g|| - epoch of entry (2000 for never).

    In float32, as theirs: norms beyond 1 jump an epoch, and near 2000 a score has steps
    of 1e-4, so that many weights tie. Here to repeat published tables.

    Args:
      params: the dense weights.
      opt_state: with `record_entry`.
      steps_per_epoch: updates in an epoch; the first has number 0.

    Returns:
      {layer: float32, one for each group}.
    """
    steps = entry_steps(opt_state)
    importance = {}
    for path, norms in _norms(params, penalties_of(opt_state)).items():
        epochs = np.where(steps[path] < 0, _NEVER, (steps[path] - 1) // steps_per_epoch)
        importance[path] = np.float32(norms) - np.float32(epochs)
    return importance


def keep_masks(
    importance: Importance,
    sparsity: float,
    *,
    scope: Literal["layer", "global"] = "layer",
    min_keep: int = 1,
) -> dict[str, np.ndarray]:
    """Keeps the most important groups, exactly round((1 - sparsity) * count) of them.

    Args:
      importance: {layer: one for each group}; larger is kept first. Among equals the
        first ones are.
      sparsity: share of the groups to remove, in [0, 1].
      scope: "layer" keeps that share of each layer, "global" of all of them together.
      min_keep: groups that every layer keeps at least: a layer without any would cut
        the network in two. With "global" the others then lose more.

    Returns:
      {layer: bool, one for each group, True = keep}.

    Raises:
      ValueError: if a number is out of range or the scope is unknown.
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must be in [0, 1], got {sparsity}.")
    if min_keep < 0:
        raise ValueError(f"min_keep must be >= 0, got {min_keep}.")
    if scope == "layer":
        return {
            path: _keep_largest(values, _num_kept(values.size, sparsity, min_keep))
            for path, values in importance.items()
        }
    if scope != "global":
        raise ValueError(f'scope must be "layer" or "global", got {scope!r}.')
    total = sum(values.size for values in importance.values())
    guarded = {}
    for path, values in importance.items():
        guarded[path] = np.array(values, np.float64)
        guarded[path][_keep_largest(values, min(min_keep, values.size))] = np.inf
    flat = _flatten(guarded)
    kept = _keep_largest(flat, _num_kept(total, sparsity, 0))
    # The guarded ones stay also where they are more than the share allows.
    return _unflatten(kept | np.isposinf(flat), importance)


def percentile_masks(
    importance: Importance, percent: float, ranks: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """The rule of the authors' code, which removes fewer than it is asked for.

    A group of a convolution stays if its score is at least the percentile of its layer,
    a weight of a dense layer if it is above: at 80 % go 4 of 6, 12 of 16, 96 of 120.

    Args:
      importance: {layer: one for each group}.
      percent: in [0, 100].
      ranks: {layer: rank of its parameter}: 4 is a convolution.

    Returns:
      {layer: bool, one for each group, True = keep}.
    """
    if not 0 <= percent <= 100:
        raise ValueError(f"percent must be in [0, 100], got {percent}.")
    masks = {}
    for path, values in importance.items():
        threshold = np.percentile(values, percent)
        strict = ranks[path] != 4
        masks[path] = values > threshold if strict else values >= threshold
    return masks


def spread_masks(
    masks: Mapping[str, np.ndarray], params: Any, penalty: penalties.Rules = "auto"
) -> Any:
    """Masks of groups as a tree like the parameters, True where nothing is removed.

    Args:
      masks: {layer: bool, one for each group}; layers may be missing.
      params: a tree of arrays.
      penalty: whose groups these are.

    Returns:
      A tree of bool arrays, for `apply_masks`.

    Raises:
      ValueError: if a mask names no layer with a penalty, or is not of its groups.
    """
    assigned = Rules.make(penalty).assign(params)
    _check_layers(masks, assigned)

    def one(path, param):
        name = penalties.path_name(path)
        if name not in masks:
            return jnp.ones(param.shape, bool)
        groups = jax.eval_shape(assigned[name].norms, param).shape
        if np.shape(masks[name]) != groups:
            raise ValueError(
                f"{name} has groups {groups}, the mask is {np.shape(masks[name])}."
            )
        return assigned[name].spread(jnp.asarray(masks[name]), param.shape)

    return jax.tree_util.tree_map_with_path(one, params)


def channel_masks(
    keep: Mapping[str, np.ndarray], channel_map: ChannelMap, variables: Any
) -> Any:
    """Masks of whole channels: a tree like the variables, False wherever one went.

    With a channel go its filter, bias, batch normalisation and what reads it, so that
    what a removed channel emits is zero, whatever the activation.

    Args:
      keep: {layer: bool (C,), True = keep}, by names of the channel map.
      channel_map: see the top of this file.
      variables: {"params": ..., "batch_stats": ...}, or any tree that the map names.

    Returns:
      A tree of bool arrays, for `apply_masks`.
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


def apply_masks(tree: Any, masks: Any) -> Any:
    """Zero wherever the mask is False."""
    return jax.tree.map(lambda x, mask: jnp.where(mask, x, 0), tree, masks)


def keep_zero(masks: Any) -> optax.GradientTransformation:
    """Last link of a chain that trains masked parameters: the removed ones stay zero.

    Args:
      masks: a tree of bool arrays like the parameters; start from `apply_masks`.

    Returns:
      A transformation without state.
    """
    return optax.stateless(lambda updates, params: apply_masks(updates, masks))


def thin(
    variables: Any, keep: Mapping[str, np.ndarray], channel_map: ChannelMap
) -> Any:
    """Variables of the smaller network, without the channels that are not kept.

    It computes what the masked network does (`channel_masks`).

    Args:
      variables: of the whole network.
      keep: {layer: bool (C,), True = keep}.
      channel_map: see the top of this file.

    Returns:
      A tree of the same structure with shorter arrays.

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


def _slices(keep, channel_map, variables):
    """{path: [(axis, bool mask along it)]} of everything that removal touches."""
    leaves = penalties.named_leaves(variables)
    _check_layers(keep, channel_map)
    slices = {}
    for name, kept in keep.items():
        kept = np.asarray(kept, bool)
        for number, (path, axis) in enumerate(channel_map[name]):
            if path not in leaves:
                raise ValueError(f"{name}: the variables have no {path}.")
            length = leaves[path].shape[axis]
            # The layer's own kernel says how many channels there are.
            fits = kept.ndim == 1 and kept.size > 0 and length % kept.size == 0
            if not fits or (number == 0 and length != kept.size):
                raise ValueError(
                    f"{name}: a mask {kept.shape} does not fit axis {axis} of {path}, "
                    f"of length {length}."
                )
            tiled = np.tile(kept, length // len(kept))
            slices.setdefault(path, []).append((axis, tiled))
    return slices


def _check_layers(named, known):
    unknown = sorted(set(named) - set(known))
    if unknown:
        raise ValueError(
            f"there is no layer {', '.join(unknown)}; the layers are "
            f"{', '.join(known)}."
        )


def _norms(params, assigned):
    leaves = penalties.named_leaves(params)
    return {
        path: np.asarray(chosen.norms(leaves[path]), np.float64)
        for path, chosen in assigned.items()
    }


def _flatten(layers):
    if not layers:
        raise ValueError("there is no layer with a penalty.")
    return np.concatenate([values.ravel() for values in layers.values()])


def _unflatten(flat, like):
    sizes = np.cumsum([values.size for values in like.values()])[:-1]
    parts = np.split(flat, sizes)
    return {
        path: part.reshape(values.shape)
        for (path, values), part in zip(like.items(), parts, strict=True)
    }


def _num_kept(count, sparsity, min_keep):
    return max(round((1 - sparsity) * count), min(min_keep, count))


def _keep_largest(values, count):
    order = np.argsort(-values.ravel(), kind="stable")
    mask = np.zeros(values.size, bool)
    mask[order[:count]] = True
    return mask.reshape(values.shape)
