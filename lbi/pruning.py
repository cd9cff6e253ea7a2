"""Pruning to exact counts: importance of groups, masks of groups, masked training.

A function `..._importance` scores every group (by order of entry, by magnitude, by
first-order effect on the loss, at random). `keep_masks` turns the scores into masks
that keep an exact number of groups, and `spread_masks` expands them to the shapes of
the parameters. To remove whole channels and to shrink the network, turn the scores into
those of channels with `channel_importance`, and see `lbi.channels`.
"""

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lbi import channels
from lbi import penalty as penalties
from lbi.channels import thin as thin
from lbi.dessilbi import FrozenSpec
from lbi.path import entry_steps, penalties_of, require_leaves, require_paths

Importance = dict[str, np.ndarray]
# The released code assigns this epoch to groups that never entered.
_NEVER = 2000


def entry_importance(params: Any, opt_state: Any) -> Importance:
    """Importance by order of entry: earlier first; ties by larger ||W_g||.

    Args:
      params: the dense weights.
      opt_state: state of a chain with `record_entry=True`. For stacked states use
        `jax.vmap(entry_importance)`.

    Returns:
      {layer: one per group}: ranks over all layers together, 0 for the least important
      group; float64, or a traced int32 under `jax.vmap`.

    Raises:
      ValueError: if the entries were not recorded, `params` lacks a path of the state
        or has other shapes, or a parameter contains NaN.
    """
    steps = entry_steps(opt_state)
    norms = _norms(params, penalties_of(opt_state))
    require_leaves(norms, {path: np.shape(step) for path, step in steps.items()})
    entered = _flatten({path: steps[path] for path in norms})
    flat = _flatten(norms)
    numpy = jnp if isinstance(flat, jax.core.Tracer) else np
    first = numpy.where(entered < 0, np.iinfo(np.int32).max, entered)
    # lexsort sorts by the last key first; the inverse of the order are the ranks.
    ranks = numpy.argsort(numpy.lexsort((-flat, first)))
    ranks = len(flat) - 1 - ranks
    return _unflatten(ranks if numpy is jnp else ranks.astype(float), norms)


def magnitude_importance(
    params: Any, penalty: penalties.PenaltySpec = "auto"
) -> Importance:
    """Importance by the norms ||W_g||.

    Args:
      params: a tree of arrays.
      penalty: defines the groups.

    Returns:
      {layer: float64, one norm per group}.

    Raises:
      ValueError: if a parameter with a penalty contains NaN.
    """
    return _norms(params, FrozenSpec.make(penalty).assign(params))


def random_importance(
    key: jax.Array, params: Any, penalty: penalties.PenaltySpec = "auto"
) -> Importance:
    """Importance by a random order of the groups.

    Args:
      key: draws the order.
      params: a tree of arrays; only the shapes matter.
      penalty: defines the groups.

    Returns:
      {layer: float64, one per group}: ranks over all layers together.
    """
    norms = magnitude_importance(params, penalty)
    total = _flatten(norms).size
    return _unflatten(np.asarray(jax.random.permutation(key, total), float), norms)


def taylor_importance(
    params: Any, grads: Any, penalty: penalties.PenaltySpec = "auto"
) -> Importance:
    """First-order importance: how much the loss changes if a group becomes zero.

    I_g^2 = sum over the weights w of g of the mean over batches of (w dL/dw)^2, the
    Taylor-FO score of Molchanov et al. 2019 (arXiv 1906.10771). They sum it over the
    group, as here, or square the sum.

    Example:
      >>> import jax.numpy as jnp
      >>> from lbi import pruning
      >>> params = {"kernel": jnp.array([[3.0, 1.0]])}
      >>> grads = {"kernel": jnp.array([[[0.1, 1.0]], [[-0.1, -1.0]]])}  # two batches
      >>> print(pruning.taylor_importance(params, grads)["kernel"].round(2))
      [[0.3 1. ]]

    Args:
      params: the weights.
      grads: gradients of the loss of several batches, a tree like `params` with the
        batches as an additional first axis.
      penalty: defines the groups.

    Returns:
      {layer: float64, one per group}.
    """

    def score(w, g):
        products = w[None].astype(jnp.promote_types(w.dtype, jnp.float32)) * g
        return jnp.sqrt(jnp.mean(jnp.square(products), axis=0))

    return magnitude_importance(jax.tree.map(score, params, grads), penalty)


def released_code_importance(
    params: Any, opt_state: Any, steps_per_epoch: int
) -> Importance:
    """The score of the authors' released code: ||W_g|| - epoch of entry.

    The score is computed in float32, as in the released code; a group that never
    entered gets epoch 2000. A norm above 1 can outweigh an epoch. Near -2000 float32
    has steps of 1e-4, so many weights tie. Use this score only to reproduce published
    tables.

    Args:
      params: the dense weights.
      opt_state: state of a chain with `record_entry=True`.
      steps_per_epoch: updates per epoch; the first epoch is number 0.

    Returns:
      {layer: float32, one per group}.

    Raises:
      ValueError: if the entries were not recorded.
    """
    steps = entry_steps(opt_state)
    importance = {}
    for path, norms in _norms(params, penalties_of(opt_state)).items():
        epochs = np.where(steps[path] < 0, _NEVER, (steps[path] - 1) // steps_per_epoch)
        importance[path] = np.float32(norms) - np.float32(epochs)
    return importance


def channel_importance(
    importance: Importance,
    graph: channels.Graph,
    penalty: penalties.PenaltySpec = "auto",
) -> Importance:
    """Importance of the channels of a traced network, from that of its groups.

    A channel has the sum over the groups that compute it: over the weights of a neuron,
    and over the filters of several layers where a residual sum joins these.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lbi import channels, pruning
      >>> def network(params, x):
      ...     x = x @ params["a"]
      ...     return (x + jax.nn.relu(x @ params["b"])) @ params["out"]
      >>> params = {"a": jnp.ones((2, 3)), "b": jnp.eye(3), "out": jnp.ones((3, 1))}
      >>> graph = channels.trace(network, params, jnp.ones(2))
      >>> scores = pruning.magnitude_importance(params)
      >>> pruning.channel_importance(scores, graph)["a"].tolist()  # 1 + 1 of a, 1 of b
      [3.0, 3.0, 3.0]

    Args:
      importance: {layer: one per group}; layers may be missing. Their paths are those
        of the graph, also without "params/".
      graph: of `lbi.channels.trace`.
      penalty: defines the groups of the importance.

    Returns:
      {layer: (C,), float64}, for `keep_masks` and then `lbi.channels`. Channels that
      cannot be removed are infinite. Layers whose channels cannot be removed, or have
      no importance, are left out.

    Raises:
      ValueError: if the importance does not fit the graph or the penalty.
    """
    prefix = "params/" if any(p.startswith("params/") for p in graph.shapes) else ""
    shapes = {
        path.removeprefix(prefix): jax.ShapeDtypeStruct(shape, jnp.float32)
        for path, shape in graph.shapes.items()
        if path.startswith(prefix)
    }
    importance = {path.removeprefix(prefix): v for path, v in importance.items()}
    channels.check_layers(importance, shapes)
    assigned = FrozenSpec.make(penalty).assign(shapes)
    for path, scores in importance.items():
        groups = path in assigned and jax.eval_shape(assigned[path].norms, shapes[path])
        if not groups or np.shape(scores) != groups.shape:
            raise ValueError(
                f"{path}: the importance {np.shape(scores)} does not fit its groups, "
                f"{groups.shape if groups else 'of which the penalty has none'}."
            )
    found = {}
    for name, size in graph.removable().items():
        total, is_known = np.zeros(size), False
        for full, axis, numbers in graph[name]:
            path, rank = full.removeprefix(prefix), len(graph.shapes[full])
            if path not in importance or axis not in graph.outputs.get(full, ()):
                continue
            axes = assigned[path].axes(rank)
            if axis in axes:
                others = tuple(k for k, a in enumerate(axes) if a != axis)
                scores = np.asarray(importance[path], np.float64).sum(axis=others)
                inside, is_known = numbers >= 0, True
                np.add.at(total, numbers[inside], scores[inside])
        total[list(graph.fixed[name])] = np.inf
        found |= {name: total} if is_known else {}
    return found


def keep_masks(
    importance: Importance,
    sparsity: float,
    *,
    scope: Literal["layer", "global"] = "layer",
    min_keep: int = 1,
) -> dict[str, np.ndarray]:
    """Keeps the most important groups, exactly round((1 - sparsity) * count) of them.

    Example:
      >>> import numpy as np
      >>> from lbi import pruning
      >>> importance = {"conv": np.array([3.0, 1.0, 2.0, 5.0])}
      >>> pruning.keep_masks(importance, sparsity=0.5)["conv"].tolist()
      [True, False, False, True]

    Args:
      importance: {layer: one per group}; groups with larger values are kept first. Of
        equal groups the first are kept.
      sparsity: fraction of the groups to remove, in [0, 1).
      scope: "layer" removes this fraction of each layer, "global" of all layers
        together.
      min_keep: minimum number of groups kept in every layer, since a layer without
        groups disconnects the network. With "global" the other layers then lose more.

    Returns:
      {layer: bool, one per group, True = keep}.

    Raises:
      ValueError: if a number is out of range, an importance is NaN or the scope is
        unknown.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}.")
    if min_keep < 0:
        raise ValueError(f"min_keep must be >= 0, got {min_keep}.")
    # Unsigned integers and bool have no negative, by which `_keep_largest` sorts.
    importance = {p: np.asarray(v, np.float64) for p, v in importance.items()}
    for path, values in importance.items():
        if np.isnan(values).any():
            raise ValueError(f"{path}: the importance of a group is NaN.")
    if scope == "layer":
        return {
            path: _keep_largest(values, _num_kept(values.size, sparsity, min_keep))
            for path, values in importance.items()
        }
    if scope != "global":
        raise ValueError(f'scope must be "layer" or "global", got {scope!r}.')
    total = sum(values.size for values in importance.values())
    guarded = {
        path: _keep_largest(values, min(min_keep, values.size))
        for path, values in importance.items()
    }
    flat, always = _flatten(importance), _flatten(guarded)
    # Even an infinite importance comes after the groups kept by `min_keep`.
    flat = np.where(always, np.inf, np.minimum(flat, np.finfo(np.float64).max))
    kept = _keep_largest(flat, _num_kept(total, sparsity, 0))
    # Those stay even if they exceed the requested count.
    return _unflatten(kept | always, importance)


def percentile_masks(
    importance: Importance, percent: float, ranks: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """The threshold of the released code, which removes fewer groups than requested.

    A group of a convolution is kept if its score is at least the percentile of its
    layer, a weight of a dense layer if its score is above it. At 80 % this removes 4 of
    6, 12 of 16 and 96 of 120 groups.

    Args:
      importance: {layer: one per group}.
      percent: percentage to remove, in [0, 100].
      ranks: {layer: rank of its parameter}; rank 4 is a convolution.

    Returns:
      {layer: bool, one per group, True = keep}.

    Raises:
      ValueError: if `percent` is out of range.
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
    masks: Mapping[str, np.ndarray],
    params: Any,
    penalty: penalties.PenaltySpec = "auto",
) -> Any:
    """Expands masks of groups to the shapes of the parameters.

    Args:
      masks: {layer: bool, one per group}; layers may be missing.
      params: a tree of arrays.
      penalty: defines the groups.

    Returns:
      A tree of bool arrays like `params`, for `apply_masks`; True where nothing is
      removed.

    Raises:
      ValueError: if a mask names a layer without a penalty, has other values than bool
        or the wrong shape.
    """
    assigned = FrozenSpec.make(penalty).assign(params)
    channels.check_layers(masks, assigned)

    def one(path, param):
        name = penalties.path_name(path)
        if name not in masks:
            return jnp.ones(param.shape, bool)
        groups = jax.eval_shape(assigned[name].norms, param).shape
        if np.shape(masks[name]) != groups:
            raise ValueError(
                f"{name}: the mask must have shape {groups}, got "
                f"{np.shape(masks[name])}."
            )
        mask = channels.bool_mask(name, masks[name])
        return assigned[name].spread(jnp.asarray(mask), param.shape)

    return jax.tree_util.tree_map_with_path(one, params)


def apply_masks(tree: Any, masks: Any) -> Any:
    """Sets entries to zero where the mask is False.

    Args:
      tree: a tree of arrays.
      masks: a tree of bool arrays like `tree`, for example of `spread_masks`.

    Returns:
      A tree like `tree`.
    """

    def one(x, mask):
        # A random key, for example of the dropout of NNX, has no zero.
        dtype = getattr(x, "dtype", float)
        is_key = jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
        return x if is_key else jnp.where(mask, x, 0)

    return jax.tree.map(one, tree, masks)


def keep_zero(masks: Any) -> optax.GradientTransformation:
    """Keeps removed parameters at zero during training, as the last link of a chain.

    Args:
      masks: a tree of bool arrays like the parameters. Apply them to the initial
        parameters with `apply_masks`.

    Returns:
      A transformation without state.
    """
    return optax.stateless(lambda updates, params: apply_masks(updates, masks))


def _norms(params, assigned):
    leaves = penalties.named_leaves(params)
    require_paths(params, assigned)
    norms = {}
    for path, chosen in assigned.items():
        penalties.check_not_nan(path, leaves[path])
        of_layer = chosen.norms(leaves[path])
        traced = isinstance(of_layer, jax.core.Tracer)
        norms[path] = of_layer if traced else np.asarray(of_layer, np.float64)
    return norms


def _flatten(layers):
    if not layers:
        raise ValueError("there is no layer with a penalty.")
    flat = [values.ravel() for values in layers.values()]
    traced = any(isinstance(values, jax.core.Tracer) for values in flat)
    return (jnp if traced else np).concatenate(flat)


def _unflatten(flat, like):
    ends = np.cumsum([values.size for values in like.values()])
    return {
        path: flat[end - values.size : end].reshape(values.shape)
        for (path, values), end in zip(like.items(), ends, strict=True)
    }


def _num_kept(count, sparsity, min_keep):
    return max(round((1 - sparsity) * count), min(min_keep, count))


def _keep_largest(values, count):
    order = np.argsort(-values.ravel(), kind="stable")
    mask = np.zeros(values.size, bool)
    mask[order[:count]] = True
    return mask.reshape(values.shape)


# Names that moved, under their old names for one version.
_MOVED = {
    "ChannelMap": (channels, "ChannelMap"),
    "channel_masks": (channels, "channel_masks"),
    "official_importance": (None, "released_code_importance"),
}


def __getattr__(name):
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}.")
    module, new = _MOVED[name]
    place = module.__name__ if module else __name__
    warnings.warn(
        f"{__name__}.{name} is now {place}.{new}.", DeprecationWarning, stacklevel=2
    )
    return getattr(module, new) if module else globals()[new]
