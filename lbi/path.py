"""What the structure parameter says: support, order of entry, clock, lambda.

All of it is read from the state of any optax chain that contains
`lbi.structural_coupling`. Layers are named by path, "block/layer/kernel". Of a state
that `jax.vmap` has stacked, say over seeds, take `jax.vmap(lbi.gamma)(opt_state)`.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from lbi import penalty as penalties
from lbi.dessilbi import (
    Rules,
    ScalarOrSchedule,
    StructuralCouplingState,
    check_positive,
)


def gamma(opt_state: Any, params: Any = None) -> Any:
    """The structure parameter Gamma = kappa prox(V).

    Args:
      opt_state: of a chain that contains `structural_coupling`, once or, under
        `optax.partition`, several times.
      params: fills zeros in where the chain never saw a parameter (`optax.masked`).

    Returns:
      A tree like the parameters, zero where there is no penalty; a masked parameter is
      an `optax.MaskedNode` unless `params` is given.

    Raises:
      ValueError: if there is no such state in `opt_state`.
    """

    def gamma_of(state):
        assigned = state.rules.assign(state.dual)

        def one(path, dual):
            chosen = assigned.get(penalties.path_name(path))
            if chosen is None:
                return jnp.zeros_like(dual)
            return state.kappa.astype(dual.dtype) * chosen.prox(dual)

        return jax.tree_util.tree_map_with_path(one, state.dual)

    merged = _merge([gamma_of(state) for state in _require_states(opt_state)])
    if params is None:
        return merged
    return jax.tree.map(
        lambda g, p: jnp.zeros_like(p) if _is_masked(g) else g,
        merged,
        params,
        is_leaf=_is_masked,
    )


def in_support(opt_state: Any) -> dict[str, Array]:
    """Which groups are nonzero in Gamma now: {layer: bool, one for each group}."""
    return {
        path: chosen.norms(dual) > chosen.thresholds(dual.shape)
        for path, dual, _, chosen in _penalised(opt_state)
    }


def density(opt_state: Any) -> dict[str, Array]:
    """Share of each layer's groups that are nonzero in Gamma: {layer: ()}."""
    return {path: jnp.mean(inside) for path, inside in in_support(opt_state).items()}


def sparse_params(params: Any, opt_state: Any) -> Any:
    """The parameters projected on the support of Gamma: W where Gamma is not zero.

    Parameters without a penalty stay as they are.
    """
    penalised = {path: (v, c) for path, v, _, c in _penalised(opt_state)}

    def project(path, param):
        if (found := penalised.get(penalties.path_name(path))) is None:
            return param
        dual, chosen = found
        inside = chosen.norms(dual) > chosen.thresholds(dual.shape)
        return jnp.where(chosen.spread(inside, dual.shape), param, 0)

    return jax.tree_util.tree_map_with_path(project, params)


def entry_steps(opt_state: Any) -> dict[str, np.ndarray]:
    """After how many updates each group first entered the support.

    Returns:
      {layer: int32, one for each group}, -1 if it never did.

    Raises:
      ValueError: if the coupling was made without `record_entry`.
    """
    steps = {}
    for path, _, first_entry, _ in _penalised(opt_state):
        if first_entry is None:
            raise ValueError(
                "the order of entry was not recorded: make the coupling with "
                "record_entry=True."
            )
        steps[path] = np.asarray(first_entry)
    return steps


def clock(opt_state: Any) -> Array:
    """T = sum of alpha / nu so far, (): no mean norm below lambda / T has entered.

    Under `optax.partition` that of the first coupling.
    """
    return _require_states(opt_state)[0].clock


def final_clock(
    learning_rate: ScalarOrSchedule, nu: ScalarOrSchedule, num_steps: int
) -> float:
    """The clock T after `num_steps` updates: sum over k of alpha_k / nu_k."""
    return float(_clock_path(learning_rate, nu, num_steps)[-1])


def forecast_entries(
    params: Any,
    learning_rate: ScalarOrSchedule,
    nu: ScalarOrSchedule,
    num_steps: int,
    penalty: penalties.Rules = "auto",
    *,
    decaying: bool = False,
    kappa: float = 1.0,
) -> dict[str, float]:
    """Share of each layer's groups that would enter if their norms stayed.

    A dual grows as V_g = sum alpha W_g / nu until it enters, so T ||W_g|| > lambda at
    the end is what it takes. All zeros mean that the run would only decay its weights:
    lower lambda (see `suggest_lambda`) or nu, or train longer or at a higher rate.

    Norms do not stay where the gradient does not hold them against the coupling: a
    group without gradient shrinks as exp(-kappa T), and its dual ends at
    (1 - exp(-kappa T)) ||W_g|| / kappa. Filters before a batch normalisation are near
    that, their gradient being orthogonal to them.

    Args:
      params: the parameters, at the start or at any time.
      learning_rate: alpha, or a schedule.
      nu: coupling, or a schedule.
      num_steps: length of the run.
      penalty: as of `structural_coupling`.
      decaying: forecasts for groups without gradient instead.
      kappa: damping; matters to `decaying` alone.

    Returns:
      {layer: share in [0, 1]}.
    """
    total = final_clock(learning_rate, nu, num_steps)
    if decaying:
        check_positive(kappa=kappa)
        total = -math.expm1(-kappa * total) / kappa
    leaves = penalties.named_leaves(params)
    return {
        path: float(
            np.mean(
                total * np.asarray(chosen.norms(leaves[path]))
                > chosen.thresholds(leaves[path].shape)
            )
        )
        for path, chosen in Rules.make(penalty).assign(params).items()
    }


def suggest_lambda(
    params: Any,
    learning_rate: ScalarOrSchedule,
    nu: ScalarOrSchedule,
    num_steps: int,
    penalty: penalties.Rules = "auto",
    *,
    enter_at: float = 0.4,
) -> dict[str, penalties.Penalty]:
    """Penalties under which the median group of each layer enters at a given time.

    lambda = T(enter_at) * median ||W_g||, with T the clock at that share of the run; it
    takes the norms as constant.

    Args:
      params: the parameters at the start.
      learning_rate: alpha, or a schedule.
      nu: coupling, or a schedule.
      num_steps: length of the run.
      penalty: whose groups to keep; only its lambda is replaced.
      enter_at: share of the updates after which the median group enters, in (0, 1].

    Returns:
      A mapping of patterns for `structural_coupling(penalty=...)`.

    Raises:
      ValueError: if `enter_at` is out of range, the rate is zero up to then, or the
        median of a layer is zero.
    """
    if not 0 < enter_at <= 1:
        raise ValueError(f"enter_at must be in (0, 1], got {enter_at}.")
    path_of_clock = _clock_path(learning_rate, nu, num_steps)
    total = path_of_clock[max(round(enter_at * num_steps), 1) - 1]
    if total == 0:
        raise ValueError(
            f"the learning rate is zero up to enter_at={enter_at}: nothing can enter."
        )
    leaves = penalties.named_leaves(params)
    suggested = {}
    for path, chosen in Rules.make(penalty).assign(params).items():
        leaf = leaves[path]
        median = float(np.median(np.asarray(chosen.norms(leaf), np.float64)))
        if median == 0:
            raise ValueError(f"{path}: half of the groups are zero; set lam by hand.")
        # thresholds() is proportional to lam.
        unit = penalties.with_lam(chosen, 1.0).thresholds(leaf.shape)
        suggested[f"^{re.escape(path)}$"] = penalties.with_lam(
            chosen, total * median / unit
        )
    return suggested


def penalties_of(opt_state: Any) -> dict[str, penalties.Penalty]:
    """The penalty of each layer that has one: {layer: penalty}."""
    return {path: chosen for path, _, _, chosen in _penalised(opt_state)}


def find_states(opt_state: Any) -> list[StructuralCouplingState]:
    """Every state of `structural_coupling` in an optimizer state, maybe none."""
    leaves = jax.tree.leaves(opt_state, is_leaf=_is_coupling)
    return [leaf for leaf in leaves if _is_coupling(leaf)]


def _require_states(opt_state):
    states = find_states(opt_state)
    if not states:
        raise ValueError("this optimizer state holds no lbi.structural_coupling.")
    return states


def _penalised(opt_state):
    """(path, dual, first_entry or None, penalty) of each parameter with a penalty."""
    rows = []
    for state in _require_states(opt_state):
        duals = penalties.named_leaves(state.dual)
        entries = penalties.named_leaves(state.first_entry)
        for path, chosen in state.rules.assign(state.dual).items():
            rows.append((path, duals[path], entries.get(path), chosen))
    return rows


def _clock_path(learning_rate, nu, num_steps):
    """T after each of the updates, (num_steps,), float64."""
    check_positive(nu=nu)
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}.")
    counts = jnp.arange(num_steps)

    def values(number: float | Callable[[Array], Any]):
        if callable(number):
            number = jax.vmap(number)(counts)
        return np.broadcast_to(np.asarray(number, np.float64), (num_steps,))

    return np.cumsum(values(learning_rate) / values(nu))


def _is_coupling(node):
    return isinstance(node, StructuralCouplingState)


def _is_masked(node):
    return isinstance(node, optax.MaskedNode)


def _merge(trees):
    """Fills the masked places of the first tree from the others."""
    merged = trees[0]
    for tree in trees[1:]:
        merged = jax.tree.map(
            lambda a, b: b if _is_masked(a) else a, merged, tree, is_leaf=_is_masked
        )
    return merged
