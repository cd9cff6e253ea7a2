"""Reads the regularization path: support, order of entry, clock, choice of lambda.

Every function reads the state of any optax chain that contains
`lbi.structural_coupling`. Layers are named by path, "block/layer/kernel". States that
`jax.vmap` has stacked, for example over seeds, are refused: use
`jax.vmap(lbi.gamma)(opt_state)`.
"""

import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from lbi import penalty as penalties
from lbi.dessilbi import (
    FrozenSpec,
    ScalarOrSchedule,
    StructuralCouplingState,
    check_positive,
)


def gamma(opt_state: Any, params: Any = None) -> Any:
    """The structure parameter Gamma = kappa prox(V).

    Args:
      opt_state: state of a chain that contains `structural_coupling`, once or, for
        different parameters, several times.
      params: if given, parameters that `optax.masked` hid from the chain get zeros.

    Returns:
      A tree like the parameters, zero where there is no penalty. A masked parameter is
      an `optax.MaskedNode` unless `params` is given.

    Raises:
      ValueError: if `opt_state` has no state of `structural_coupling`.
    """
    gammas = {
        path: state.kappa.astype(dual.dtype) * chosen.prox(dual)
        for path, state, dual, _, chosen in _penalized(opt_state)
    }
    merged = jax.tree_util.tree_map_with_path(
        lambda path, dual: gammas.get(penalties.path_name(path), jnp.zeros_like(dual)),
        _merge([state.dual for state in _require_states(opt_state)]),
    )
    if params is None:
        return merged
    return jax.tree.map(
        lambda g, p: jax.tree.map(jnp.zeros_like, p) if _is_masked(g) else g,
        merged,
        params,
        is_leaf=_is_masked,
    )


def in_support(opt_state: Any) -> dict[str, Array]:
    """Whether each group is nonzero in Gamma now.

    Args:
      opt_state: state of a chain that contains `structural_coupling`.

    Returns:
      {layer: bool, one per group}. Groups of filters have the shape (filters,), single
      weights that of the parameter.

    Raises:
      ValueError: if `opt_state` has no state of `structural_coupling`, or it is
        stacked.
    """
    return {
        path: chosen.norms(dual) > chosen.thresholds(dual.shape)
        for path, _, dual, _, chosen in _penalized(opt_state)
    }


def density(opt_state: Any) -> dict[str, Array]:
    """Fraction of each layer's groups that are nonzero in Gamma.

    Args:
      opt_state: state of a chain that contains `structural_coupling`.

    Returns:
      {layer: (), in [0, 1]}.

    Raises:
      ValueError: if `opt_state` has no state of `structural_coupling`, or it is
        stacked.

    Example:
      >>> import jax.numpy as jnp
      >>> import lbi
      >>> params = {"kernel": jnp.array([[2.0, 0.5, -3.0, 0.0]])}
      >>> optimizer = lbi.dessilbi(1.0, nu=1.0)
      >>> _, state = optimizer.update(params, optimizer.init(params), params)
      >>> print(lbi.density(state)["kernel"])  # lambda = 1, and V = W after one step
      0.5
    """
    return {path: jnp.mean(inside) for path, inside in in_support(opt_state).items()}


def sparse_params(params: Any, opt_state: Any) -> Any:
    """Projects the parameters on the support: W where Gamma is nonzero, else 0.

    Parameters without a penalty do not change.

    Example:
      >>> import jax.numpy as jnp
      >>> import lbi
      >>> params = {"kernel": jnp.array([[2.0, 0.5, -3.0, 0.0]])}
      >>> optimizer = lbi.dessilbi(1.0, nu=1.0)
      >>> _, state = optimizer.update(params, optimizer.init(params), params)
      >>> print(lbi.sparse_params(params, state)["kernel"])
      [[ 2.  0. -3.  0.]]

    Args:
      params: the parameters, with the paths and shapes of those that the optimizer has.
      opt_state: state of a chain that contains `structural_coupling`.

    Returns:
      A tree like the parameters.

    Raises:
      ValueError: if `params` lacks a path of the state or has other shapes, or the
        state is stacked.
    """
    penalized = {path: (v, c) for path, _, v, _, c in _penalized(opt_state)}
    require_leaves(params, {path: v.shape for path, (v, _) in penalized.items()})

    def project(path, param):
        if (found := penalized.get(penalties.path_name(path))) is None:
            return param
        dual, chosen = found
        inside = chosen.norms(dual) > chosen.thresholds(dual.shape)
        return jnp.where(chosen.spread(inside, dual.shape), param, 0)

    return jax.tree_util.tree_map_with_path(project, params)


def entry_steps(opt_state: Any) -> dict[str, np.ndarray]:
    """Number of updates after which each group first entered the support.

    Args:
      opt_state: state of a chain with `record_entry=True`.

    Returns:
      {layer: int32, one per group}; -1 if a group never entered.

    Raises:
      ValueError: if the entries were not recorded.
    """
    steps = {}
    for path, _, _, first_entry, _ in _penalized(opt_state):
        if first_entry is None:
            raise ValueError(
                "the entries were not recorded: create the optimizer with "
                "record_entry=True."
            )
        traced = isinstance(first_entry, jax.core.Tracer)
        steps[path] = first_entry if traced else np.asarray(first_entry)
    return steps


def clock(opt_state: Any) -> Array:
    """T = sum of alpha / nu over the updates so far.

    A group whose mean weight over these updates has a norm below lambda / T has not
    entered. Under `optax.partition` this is the clock of the first coupling.

    Args:
      opt_state: state of a chain that contains `structural_coupling`.

    Returns:
      T, ().

    Raises:
      ValueError: if `opt_state` has no state of `structural_coupling`, or it is
        stacked.
    """
    # nnx.Optimizer stores variables, which cannot be formatted as numbers.
    return jnp.asarray(_require_states(opt_state)[0].clock)


def metrics(opt_state: Any) -> dict[str, Array]:
    """Numbers for a log, also inside `jax.jit`.

    Args:
      opt_state: state of a chain that contains `structural_coupling`.

    Example:
      >>> import jax.numpy as jnp
      >>> import lbi
      >>> params = {"kernel": jnp.array([[2.0, 0.5, -3.0, 0.0]])}
      >>> optimizer = lbi.dessilbi(1.0, nu=1.0)
      >>> _, state = optimizer.update(params, optimizer.init(params), params)
      >>> {name: float(value) for name, value in lbi.metrics(state).items()}
      {'clock': 1.0, 'density/kernel': 0.5, 'entered/kernel': 2.0}

    Returns:
      Scalars: "clock"; for each layer "density/LAYER", the fraction of its groups that
      are nonzero in Gamma, and "entered/LAYER", their number.

    Raises:
      ValueError: if `opt_state` has no state of `structural_coupling`, or it is
        stacked.
    """
    found = {"clock": clock(opt_state)}
    for path, inside in in_support(opt_state).items():
        found[f"density/{path}"] = jnp.mean(inside)
        found[f"entered/{path}"] = jnp.sum(inside)
    return found


def final_clock(
    learning_rate: ScalarOrSchedule, nu: ScalarOrSchedule, num_steps: int
) -> float:
    """The clock after `num_steps` updates: T = sum over k of alpha_k / nu_k.

    Args:
      learning_rate: alpha, or a schedule.
      nu: coupling, > 0, or a schedule.
      num_steps: number of updates, >= 1.

    Returns:
      T.

    Raises:
      ValueError: if a number is out of range.
    """
    return float(_clock_path(learning_rate, nu, num_steps)[-1])


def forecast_entries(
    params: Any,
    learning_rate: ScalarOrSchedule,
    nu: ScalarOrSchedule,
    num_steps: int,
    penalty: penalties.PenaltySpec = "auto",
    *,
    decaying: bool = False,
    kappa: float = 1.0,
) -> dict[str, float]:
    """Fraction of each layer's groups that would enter if their norms stayed constant.

    Before a group enters, its dual is V_g = sum alpha W_g / nu. With a constant norm it
    enters if T ||W_g|| > lambda at the end. If all fractions are zero, the run would
    only decay its weights: lower lambda (see `suggest_lambda`) or nu, or train longer
    or with a higher learning rate.

    Norms shrink where the gradient does not balance the coupling. The norm of a group
    without gradient decays as exp(-kappa T), and its dual ends at
    (1 - exp(-kappa T)) ||W_g|| / kappa. Filters before a batch normalization are close
    to this case, because their gradient is orthogonal to them.

    Args:
      params: the parameters, initial or at any later time.
      learning_rate: alpha, or a schedule.
      nu: coupling, > 0, or a schedule.
      num_steps: length of the run in updates, >= 1.
      penalty: see `structural_coupling`.
      decaying: whether to forecast for groups without gradient instead.
      kappa: damping, > 0; used only if `decaying`.

    Returns:
      {layer: fraction in [0, 1]}.

    Raises:
      ValueError: if a number is out of range, `penalty` is of an unknown kind, or a
        parameter is traced or contains NaN.
    """
    total = final_clock(learning_rate, nu, num_steps)
    if decaying:
        check_positive(kappa=kappa)
        total = -math.expm1(-kappa * total) / kappa
    leaves = penalties.named_leaves(params)
    shares = {}
    for path, chosen in FrozenSpec.make(penalty).assign(params).items():
        norms = _known_norms(path, leaves[path], chosen)
        entering = total * norms > chosen.thresholds(leaves[path].shape)
        shares[path] = float(np.mean(entering))
    return shares


def open_groups(params: Any, opt_state: Any, total_clock: float) -> dict[str, Array]:
    """Number of groups of each layer that are out and would still enter.

    The forecast assumes that the weights stay as they are: the dual of a group that is
    out then ends at V + (total_clock - T) W. If all numbers are zero, nothing enters
    any more, and the rest of the training only decays what is out.

    Example:
      >>> import jax.numpy as jnp
      >>> import lbi
      >>> params = {"kernel": jnp.array([[2.0, 0.5, -0.1]])}
      >>> optimizer = lbi.dessilbi(1.0, nu=1.0)  # lambda = 1
      >>> _, state = optimizer.update(params, optimizer.init(params), params)
      >>> int(lbi.open_groups(params, state, total_clock=3.0)["kernel"])
      1

    Args:
      params: the weights now.
      opt_state: state of a chain that contains `structural_coupling`.
      total_clock: the clock at the end of the training, from `final_clock`.

    Returns:
      {layer: (), int32}, also inside `jax.jit`.

    Raises:
      ValueError: as `sparse_params`, or if a parameter contains NaN.
    """
    left = total_clock - clock(opt_state)
    penalized = _penalized(opt_state)
    require_leaves(params, {path: dual.shape for path, _, dual, _, _ in penalized})
    leaves = penalties.named_leaves(params)
    found = {}
    for path, _, dual, _, chosen in penalized:
        penalties.check_not_nan(path, leaves[path])
        threshold = chosen.thresholds(dual.shape)
        at_end = chosen.norms(dual + left.astype(dual.dtype) * leaves[path])
        found[path] = jnp.sum((chosen.norms(dual) <= threshold) & (at_end > threshold))
    return found


def suggest_lambda(
    params: Any,
    learning_rate: ScalarOrSchedule,
    nu: ScalarOrSchedule,
    num_steps: int,
    penalty: penalties.PenaltySpec = "auto",
    *,
    enter_at: float = 0.4,
) -> dict[str, penalties.Penalty]:
    """Penalties with which the median group of each layer enters at a given time.

    lambda = T(enter_at) * median ||W_g||, where T(enter_at) is the clock at that
    fraction of the run. The formula assumes that the norms stay constant.

    Example:
      >>> import jax.numpy as jnp
      >>> import lbi
      >>> params = {"kernel": jnp.array([[1.0, 2.0, 3.0]])}
      >>> lbi.suggest_lambda(params, 0.1, nu=5.0, num_steps=100, enter_at=0.5)
      {'^kernel$': L1(lam=2.0...)}

    Args:
      params: the initial parameters.
      learning_rate: alpha, or a schedule.
      nu: coupling, > 0, or a schedule.
      num_steps: length of the run in updates, >= 1.
      penalty: defines the groups; only its lambda is replaced.
      enter_at: fraction of the updates after which the median group enters, in (0, 1].

    Returns:
      A mapping of patterns for `structural_coupling(penalty=...)`.

    Raises:
      ValueError: if a number is out of range, the learning rate is zero up to
        `enter_at`, the median norm of a layer is zero, or a parameter is traced or
        contains NaN.
    """
    if not 0 < enter_at <= 1:
        raise ValueError(f"enter_at must be in (0, 1], got {enter_at}.")
    path_of_clock = _clock_path(learning_rate, nu, num_steps)
    total = path_of_clock[max(round(enter_at * num_steps), 1) - 1]
    if total == 0:
        raise ValueError(
            f"the learning rate is zero up to enter_at={enter_at}: no group can enter."
        )
    leaves = penalties.named_leaves(params)
    suggested = {}
    for path, chosen in FrozenSpec.make(penalty).assign(params).items():
        leaf = leaves[path]
        median = float(np.median(np.float64(_known_norms(path, leaf, chosen))))
        if median == 0:
            raise ValueError(
                f"{path}: the median norm of the groups is zero; set lam by hand."
            )
        # thresholds() is proportional to lam.
        unit = penalties.with_lam(chosen, 1.0).thresholds(leaf.shape)
        suggested[f"^{re.escape(path)}$"] = penalties.with_lam(
            chosen, total * median / unit
        )
    return suggested


def penalties_of(opt_state: Any) -> dict[str, penalties.Penalty]:
    """The penalty of each layer that has one: {layer: penalty}."""
    return {path: chosen for path, _, _, _, chosen in _penalized(opt_state)}


def find_states(opt_state: Any) -> list[StructuralCouplingState]:
    """All states of `structural_coupling` in an optimizer state; may be empty."""
    leaves = jax.tree.leaves(opt_state, is_leaf=_is_coupling)
    return [leaf for leaf in leaves if _is_coupling(leaf)]


def _require_states(opt_state):
    states = find_states(opt_state)
    if not states:
        raise ValueError("this optimizer state contains no lbi.structural_coupling.")
    if any(jnp.ndim(state.count) for state in states):
        raise ValueError(
            f"the optimizer state is stacked {jnp.shape(states[0].count)}: use "
            "jax.vmap, for example jax.vmap(lbi.sparse_params)(params, opt_state)."
        )
    return states


def require_paths(params: Any, paths: Iterable[str]) -> None:
    """Raises ValueError unless the parameters have these paths."""
    leaves = penalties.named_leaves(params)
    missing = [path for path in paths if path not in leaves]
    if missing:
        raise ValueError(
            f"the parameters lack {', '.join(missing)}, which the optimizer state has; "
            f"their paths are {', '.join(leaves)}."
        )


def require_leaves(params: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError unless the parameters have these paths, with these shapes."""
    require_paths(params, shapes)
    leaves = penalties.named_leaves(params)
    for path, shape in shapes.items():
        if tuple(leaves[path].shape) != tuple(shape):
            raise ValueError(
                f"{path} has shape {tuple(leaves[path].shape)}, in the optimizer state "
                f"{tuple(shape)}; use jax.vmap for stacked parameters."
            )


def _penalized(opt_state):
    """(path, state, dual, first_entry or None, penalty) of what has a penalty."""
    rows = {}
    for state in _require_states(opt_state):
        duals = penalties.named_leaves(state.dual)
        entries = penalties.named_leaves(state.first_entry)
        for path, chosen in state.spec.assign(state.dual).items():
            if path in rows:
                raise ValueError(
                    f"{path} has two couplings; give each parameter one penalty."
                )
            rows[path] = (path, state, duals[path], entries.get(path), chosen)
    return list(rows.values())


def _known_norms(path, leaf, chosen):
    if isinstance(leaf, jax.core.Tracer):
        raise ValueError(
            f"{path} is traced, but its values must be known: call this outside of "
            "jax.jit and jax.vmap."
        )
    penalties.check_not_nan(path, leaf)
    return np.asarray(chosen.norms(leaf))


def _clock_path(learning_rate, nu, num_steps):
    """T after each of the updates, (num_steps,), float64."""
    check_positive(nu=nu)
    if not isinstance(num_steps, int | np.integer):
        raise ValueError(f"num_steps must be an integer, got {num_steps!r}.")
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}.")
    rates = _schedule("learning_rate", learning_rate, num_steps)
    couplings = _schedule("nu", nu, num_steps)
    for name, values, allowed, wanted in (
        ("learning_rate", rates, rates >= 0, ">= 0"),
        ("nu", couplings, couplings > 0, "> 0"),
    ):
        wrong = np.flatnonzero(~(allowed & np.isfinite(values)))
        if wrong.size:
            raise ValueError(
                f"{name} must be finite and {wanted}, got {values[wrong[0]]} at update "
                f"{wrong[0]}."
            )
    return np.cumsum(rates / couplings)


def _schedule(name, number, num_steps):
    """A number or schedule at each of the updates, (num_steps,), float64."""
    if callable(number):
        try:
            number = jax.vmap(number)(jnp.arange(num_steps))
        except jax.errors.JAXTypeError:  # written in Python or NumPy
            number = [number(count) for count in np.arange(num_steps, dtype=np.int32)]
    values = np.asarray(number, np.float64)
    if values.shape not in ((), (num_steps,)):
        raise ValueError(
            f"{name} must be one number at each update, got the shape "
            f"{values.shape} for {num_steps} updates."
        )
    return np.broadcast_to(values, (num_steps,))


def _is_coupling(node):
    return isinstance(node, StructuralCouplingState)


def _is_masked(node):
    return isinstance(node, optax.MaskedNode)


def _merge(trees):
    """Fills the masked leaves and subtrees of the first tree from the other trees."""
    return functools.reduce(_fill, trees)


def _fill(first, second):
    if _is_masked(first) or _is_masked(second):
        return second if _is_masked(first) else first
    children, structure = jax.tree.flatten(
        first, is_leaf=lambda node: node is not first
    )
    if jax.tree_util.treedef_is_leaf(structure):
        return first
    pairs = zip(children, structure.flatten_up_to(second), strict=True)
    return structure.unflatten([_fill(*pair) for pair in pairs])
