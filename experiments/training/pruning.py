"""Pruning at equal sparsity: grains, importance, masks, and training under masks.

The grains are those of Mao et al. 2017 (arXiv 1705.08922): single weights, rows of the
window of a convolution, whole windows ("kernels"), and filters. Filters are removed
with everything that belongs to them (`lbi.channels`), so that the network is smaller;
the other grains only set weights to zero.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import lbi
from experiments.networks import registry
from experiments.training.classifier import TrainState
from lbi import pruning

GRAINS = ("weights", "rows", "kernels", "filters")


class Structure(NamedTuple):
    """What one grain removes from a network.

    Attributes:
      penalty: {pattern of a path: the penalty whose groups are removed}.
      graph: the channels, for filters; None for the other grains.
    """

    penalty: dict[str, lbi.penalty.Penalty]
    graph: lbi.channels.Graph | None = None


def make_structure(
    grain: str, model: nn.Module, image_shape: tuple[int, ...]
) -> Structure:
    """Finds the groups of a grain in a network for images (H, W, C), by tracing it.

    Weights, rows and kernels are those of all convolutions and dense layers; a dense
    layer has windows of one weight. Filters are also the units of dense layers, and
    leave out what cannot be removed, such as the logits.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    layers = lbi.groups(model.apply, shapes, images)
    kernels = {
        path: layer
        for path, layer in layers.items()
        if layer.kind in ("convolution", "product")
    }
    if grain != "filters":
        return Structure(
            {_pattern(path): _group(layer, grain) for path, layer in kernels.items()}
        )
    graph = registry.channel_graph(model, image_shape)
    outputs = {
        path: axis
        for name in graph.removable()
        for path, axis, _ in graph[name]
        if path in kernels and kernels[path].output == (axis,)
    }
    return Structure(
        {_pattern(p): lbi.GroupL2(group_axes=axis) for p, axis in outputs.items()},
        graph,
    )


def _pattern(path):
    """Matches the path without "params/", as optimizers see it."""
    return f"^{re.escape(path.removeprefix('params/'))}$"


def _group(layer, grain):
    kept = {"weights": len(layer.window), "rows": 1, "kernels": 0}[grain]
    if layer.kind == "product" or kept >= len(layer.window):
        return lbi.L1()
    axes = layer.stacked + layer.window[:kept] + layer.input + layer.output
    return lbi.GroupL2(group_axes=tuple(sorted(axes)))


def make_masks(
    structure: Structure,
    importance: pruning.Importance,
    sparsity: float,
    scope: str,
    variables: dict[str, Any],
) -> dict[str, Any]:
    """Masks like `variables` that remove the least important groups.

    Args:
      structure: the groups.
      importance: {path: one per group of structure.penalty}.
      sparsity: fraction of the groups to remove, in [0, 1).
      scope: see `lbi.pruning.keep_masks`.
      variables: parameters and batch statistics.
    """
    if structure.graph is None:
        keep = pruning.keep_masks(importance, sparsity, scope=scope)
        params = pruning.spread_masks(keep, variables["params"], structure.penalty)
        rest = jax.tree.map(lambda x: jnp.ones(x.shape, bool), variables)
        return rest | {"params": params}
    scores = pruning.channel_importance(importance, structure.graph, structure.penalty)
    keep = pruning.keep_masks(scores, sparsity, scope=scope)
    return lbi.channels.channel_masks(keep, structure.graph, variables)


def masked(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """The optimizer with updates only where a mask is True.

    Its state is (state of `optimizer`, masks). The masks are True at first; `prune`
    replaces them.
    """

    def init_fn(params):
        everywhere = jax.tree.map(lambda x: jnp.ones(x.shape, bool), params)
        return optimizer.init(params), everywhere

    def update_fn(updates, state, params=None):
        inner, masks = state
        updates, inner = optimizer.update(updates, inner, params)
        return pruning.apply_masks(updates, masks), (inner, masks)

    return optax.GradientTransformation(init_fn, update_fn)


def prune(state: TrainState, masks: dict[str, Any]) -> TrainState:
    """Sets variables to zero and keeps them there; the optimizer is `masked`."""
    return state.replace(
        **pruning.apply_masks(state.variables, masks),
        opt_state=(state.opt_state[0], masks["params"]),
    )


def gradually(
    update: Callable[[TrainState, int, int], TrainState],
    choose: Callable[[dict[str, Any], float], dict[str, Any]],
    sparsities: Mapping[int, float],
) -> Callable[[TrainState, int, int], TrainState]:
    """`update`, which prunes before the steps that `sparsities` names.

    Args:
      update: (state, first, last) -> state, of a `masked` optimizer.
      choose: (variables, sparsity) -> masks.
      sparsities: {step: sparsity}, see `cubic`. A call must begin at each of them.
    """

    def run(state, first, last):
        if first in sparsities:
            state = prune(state, choose(state.variables, sparsities[first]))
        return update(state, first, last)

    return run


def cubic(sparsity: float, num_steps: int, num_prunings: int) -> dict[int, float]:
    """{step: sparsity}: s (1 - (1 - i / n)^3) for i = 1, ..., n, at equal distances.

    The schedule of Zhu & Gupta 2017 (arXiv 1710.01878), equation 1, from a dense
    network: most weights go early.

    Args:
      sparsity: s, at the end.
      num_steps: the step of the last pruning.
      num_prunings: n; of several prunings at one step the last one counts.
    """
    return {
        round(i * num_steps / num_prunings): sparsity
        * (1 - (1 - i / num_prunings) ** 3)
        for i in range(1, num_prunings + 1)
    }


def proximal_sgd(
    learning_rate: optax.Schedule,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    penalty: lbi.penalty.PenaltySpec = None,
) -> optax.GradientTransformation:
    """Group lasso by proximal steps: each step of SGD, then the prox of alpha Omega.

    Args:
      learning_rate: alpha.
      momentum: of the gradient.
      weight_decay: coefficient, added to the gradient of parameters of rank 2 or more.
      penalty: Omega; None gives SGD.
    """
    return optax.chain(
        optax.add_decayed_weights(
            weight_decay, mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
        ),
        optax.sgd(learning_rate, momentum=momentum),
        proximal_step(learning_rate, penalty),
    )


def proximal_step(
    learning_rate: optax.Schedule, penalty: lbi.penalty.PenaltySpec
) -> optax.GradientTransformation:
    """Applies the proximal map of alpha Omega after the step; the last link of a chain.

    As Omega is a norm, prox of alpha Omega (V) = alpha prox of Omega (V / alpha).

    Args:
      learning_rate: alpha.
      penalty: Omega; None changes nothing.
    """

    def update_fn(updates, count, params):
        assigned = lbi.penalty.assign(penalty, params)
        alpha = learning_rate(count)
        divisor = jnp.where(alpha > 0, alpha, 1)

        def one(path, update, param):
            if (chosen := assigned.get(lbi.penalty.path_name(path))) is None:
                return update
            stepped = param + update
            shrunk = divisor * chosen.prox(stepped / divisor)
            return jnp.where(alpha > 0, shrunk, stepped) - param

        updates = jax.tree_util.tree_map_with_path(one, updates, params)
        return updates, optax.safe_increment(count)

    return optax.GradientTransformation(
        lambda params: jnp.zeros([], jnp.int32), update_fn
    )


def lasso_penalty(
    params: Any,
    learning_rate: optax.Schedule,
    num_steps: int,
    groups: lbi.penalty.PenaltySpec,
    strength: float,
) -> lbi.penalty.PenaltySpec:
    """Penalties whose proximal steps take a share of the median group of each layer.

    lambda = strength * median ||W_g|| / sum of alpha. Over the whole training the steps
    then take `strength * median ||W_g||` from a group without gradient.

    Args:
      params: the initial parameters.
      learning_rate: alpha.
      num_steps: steps of the training.
      groups: defines the groups; only its lambda is replaced.
      strength: the share.

    Returns:
      {pattern of a path: penalty}.
    """
    # With a clock of 1 at its end, the suggested lambda is the median norm.
    medians = lbi.suggest_lambda(params, 1.0, 1.0, 1, groups, enter_at=1.0)
    total = lbi.final_clock(learning_rate, 1.0, num_steps)
    return {
        pattern: lbi.penalty.with_lam(chosen, strength * chosen.lam / total)
        for pattern, chosen in medians.items()
    }
