"""DessiLBI: structural sparsity found while training, as an optax transformation.

Fu et al. 2020 (arXiv 2007.02010); code DessiLBI2020/DessiLBI. Beside the dense
weights W runs a structure parameter Gamma, tied to them by ||W - Gamma||^2 / (2 nu),
that starts at zero and takes in group after group, the important ones first:

    W     <-  W - kappa alpha (grad L(W) + (W - Gamma) / nu)
    V     <-  V + (alpha / nu) (W - Gamma)              of the old W and Gamma
    Gamma <-  kappa prox(V)

While a group is out, its Gamma is zero and the coupling is a decoupled weight decay of
1 / nu; its dual is V_g = sum alpha W_g / nu, and it enters when the norm of that passes
lambda. V needs W, its own state and a step size but never the gradient: hence one link
of a chain is enough, and its place in the chain says which variant it is.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lbi import penalty as penalties

ScalarOrSchedule = float | Array | Callable[[Array], Any]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Rules:
    """The penalties of a state, hashable: what `penalty=` was given."""

    value: Any

    @classmethod
    def make(cls, rules: penalties.Rules) -> "Rules":
        if isinstance(rules, tuple | list):
            raise ValueError(
                "a penalty for several parameters is a mapping of patterns, got "
                f"{rules!r}."
            )
        if isinstance(rules, Mapping):
            return cls(tuple((p, cls.make(rule)) for p, rule in rules.items()))
        return cls(rules)

    def assign(self, params: Any) -> dict[str, penalties.Penalty]:
        """{path: penalty} of the parameters that have one."""
        return penalties.assign(self._unpack(), params)

    def _unpack(self):
        if isinstance(self.value, tuple):
            return {p: rule._unpack() for p, rule in self.value}
        return self.value


class StructuralCouplingState(NamedTuple):
    """State of `structural_coupling`.

    Attributes:
      count: number of updates, (), int32.
      clock: T = sum of alpha / nu so far, (), float32. A group whose mean norm is below
        lambda / T cannot have entered.
      kappa: that of the last update, (), float32.
      dual: V, a tree like the parameters, float32 or wider; zero where no penalty is.
      first_entry: the number of updates after which each group was first in the
        support, int32, -1 if it never was; () without `record_entry`. Its arrays are
        one for each group, which `optax.tree.map_params` does not know.
      rules: the penalties; no leaf of the tree.
    """

    count: Array
    clock: Array
    kappa: Array
    dual: Any
    first_entry: Any
    rules: Rules


def structural_coupling(
    dual_learning_rate: ScalarOrSchedule,
    nu: ScalarOrSchedule,
    kappa: ScalarOrSchedule = 1.0,
    penalty: penalties.Rules = "auto",
    *,
    record_entry: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Adds (W - Gamma) / nu to the updates and advances the dual of Gamma.

    The place in the chain decides the method; `lr` is `optax.scale_by_learning_rate`:

    ================================================  =================================
    chain                                             method
    ================================================  =================================
    coupling, lr(kappa alpha)                         DessiLBI as in the paper
    add_decayed_weights, trace(m), coupling,          the authors' code, with momentum
      lr(kappa alpha)                                   and weight decay
    coupling, trace(m), lr(kappa alpha)               heavy ball on the augmented loss
    scale_by_adam, coupling, lr(alpha)                DessiLBI+Adam, decoupled as AdamW
    coupling, scale_by_adam, lr(alpha)                DessiLBI+Adam on the augmented
                                                        loss (coupled)
    clip, scale_by_anything, coupling, lr(alpha)      any other optimizer
    ================================================  =================================

    The dual sees the parameters only, so it moves at its own rate whatever scales W's
    step: give it the schedule of the learning rate. Wrap the whole chain in
    `optax.apply_if_finite` or `optax.MultiSteps`, that the dual pauses with the rest.

    Args:
      dual_learning_rate: alpha >= 0, or a schedule of it.
      nu: > 0, or a schedule. Smaller ties Gamma closer to W: more weight decay on the
        groups that are out (1 / nu), and earlier entry.
      kappa: > 0, or a schedule. Damping: Gamma is kappa times the shrunk dual.
      penalty: "auto" (GroupL2 over the last axis for rank 4, L1 for rank 2, lambda 1),
        a penalty, or a mapping of path patterns; see `lbi.penalty.assign`. Parameters
        without a penalty are left alone.
      record_entry: also keeps the update at which each group entered, one int32 each;
        `lbi.pruning.entry_importance` needs it.

    Returns:
      A transformation; its update needs `params`.

    Raises:
      ValueError: if a number is out of range, the rules are of no known kind, a group
        axis does not fit (at init), or `params` is missing (at update).
    """
    check_positive(nu=nu, kappa=kappa)
    if not callable(dual_learning_rate) and _is_known(dual_learning_rate):
        if not dual_learning_rate >= 0:
            raise ValueError(
                f"dual_learning_rate must be >= 0, got {dual_learning_rate}."
            )
    rules = Rules.make(penalty)

    def init_fn(params):
        assigned = rules.assign(params)
        paths = list(penalties.named_leaves(params))
        if isinstance(penalty, Mapping) and paths and not assigned:
            raise ValueError(
                f"no pattern of the penalty is found in any path: {', '.join(penalty)} "
                f"in {', '.join(paths)}."
            )

        def groups(path, dual):
            # Without a penalty there are no groups, but the place stays filled.
            chosen = assigned.get(penalties.path_name(path))
            shape = () if chosen is None else jax.eval_shape(chosen.norms, dual).shape
            return jnp.full(shape, -1, jnp.int32)

        dual = jax.tree.map(
            lambda p: jnp.zeros_like(p, dtype=_dual_dtype(p.dtype)), params
        )
        return StructuralCouplingState(
            count=jnp.zeros([], jnp.int32),
            clock=jnp.zeros([], jnp.float32),
            kappa=jnp.asarray(_value(kappa, jnp.zeros([], jnp.int32)), jnp.float32),
            dual=dual,
            first_entry=jax.tree_util.tree_map_with_path(groups, dual)
            if record_entry
            else (),
            rules=rules,
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(
                "structural_coupling needs the parameters: call "
                "update(grads, state, params)."
            )
        assigned = rules.assign(params)
        alpha, nu_now, kappa_now = (
            _value(x, state.count) for x in (dual_learning_rate, nu, kappa)
        )
        count = optax.safe_increment(state.count)

        def pull(path, dual, param):
            """(W - Gamma) / nu."""
            chosen = assigned.get(penalties.path_name(path))
            if chosen is None:
                return jnp.zeros_like(dual)
            # The Gamma that belongs to this dual was made with the last kappa.
            gamma = _cast(state.kappa, dual) * chosen.prox(dual)
            return (param.astype(dual.dtype) - gamma) / _cast(nu_now, dual)

        def enter(path, first_entry, dual):
            chosen = assigned.get(penalties.path_name(path))
            if chosen is None:
                return first_entry
            inside = chosen.norms(dual) > chosen.thresholds(dual.shape)
            return jnp.where((first_entry < 0) & inside, count, first_entry)

        pulls = jax.tree_util.tree_map_with_path(pull, state.dual, params)
        updates = jax.tree.map(lambda u, p: u + p.astype(u.dtype), updates, pulls)
        dual = jax.tree.map(lambda v, p: v + _cast(alpha, v) * p, state.dual, pulls)
        first_entry = state.first_entry
        if record_entry:
            first_entry = jax.tree_util.tree_map_with_path(enter, first_entry, dual)
        return updates, StructuralCouplingState(
            count=count,
            clock=state.clock + jnp.asarray(alpha / nu_now, jnp.float32),
            kappa=jnp.asarray(kappa_now, jnp.float32),
            dual=dual,
            first_entry=first_entry,
            rules=rules,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def dessilbi(
    learning_rate: ScalarOrSchedule,
    nu: ScalarOrSchedule = 100.0,
    kappa: ScalarOrSchedule = 1.0,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    penalty: penalties.Rules = "auto",
    *,
    nesterov: bool = False,
    weight_decay_mask: Any = None,
    record_entry: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """DessiLBI by stochastic gradient descent; the authors' optimizer and defaults.

    Args:
      learning_rate: alpha, or a schedule: W steps by kappa alpha and the dual by
        alpha / nu, the convention of the paper and of the authors' code. To tune kappa
        with W's rate fixed, divide by it here.
      nu: coupling, > 0; `mu` in the authors' code.
      kappa: damping, > 0.
      momentum: of the gradient of the loss; the coupling is not smoothed. 0 is the
        paper's plain iteration.
      weight_decay: added to the gradient before the momentum.
      penalty: see `structural_coupling`.
      nesterov: Nesterov's momentum.
      weight_decay_mask: as of `optax.add_decayed_weights`; None decays all but rank 1.
      record_entry: see `structural_coupling`.

    Returns:
      An optimizer.
    """
    check_positive(nu=nu, kappa=kappa)
    links = []
    if not _is_off(weight_decay):
        links.append(_decay(weight_decay, weight_decay_mask))
    if not _is_off(momentum):
        links.append(optax.trace(decay=momentum, nesterov=nesterov))
    coupling = structural_coupling(
        learning_rate, nu, kappa, penalty, record_entry=record_entry
    )
    return optax.chain(*links, coupling, _scale(learning_rate, kappa))


def dessilbi_adam(
    learning_rate: ScalarOrSchedule,
    nu: ScalarOrSchedule = 100.0,
    kappa: ScalarOrSchedule = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    penalty: penalties.Rules = "auto",
    *,
    mode: Literal["decoupled", "coupled"] = "decoupled",
    weight_decay_mask: Any = None,
    record_entry: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """DessiLBI with Adam's step for W; the dual step is not preconditioned.

    Args:
      learning_rate: alpha, or a schedule: W steps by kappa alpha, the dual by
        alpha / nu.
      nu: coupling, > 0.
      kappa: damping, > 0.
      b1: decay of Adam's first moment.
      b2: decay of its second moment.
      eps: its epsilon.
      weight_decay: decoupled, as AdamW's.
      penalty: see `structural_coupling`.
      mode: decoupled adds the coupling to Adam's step, as AdamW does its decay;
        coupled gives Adam the gradient of the augmented loss. Adam brings each entry to
        order 1, so that a pull of size |W| / nu counts for little in the first and
        may outweigh small gradients in the second.
      weight_decay_mask: as of `optax.add_decayed_weights`; None decays all but rank 1.
      record_entry: see `structural_coupling`.

    Returns:
      An optimizer.
    """
    check_positive(nu=nu, kappa=kappa)
    coupling = structural_coupling(
        learning_rate, nu, kappa, penalty, record_entry=record_entry
    )
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    if mode not in ("decoupled", "coupled"):
        raise ValueError(f"mode must be decoupled or coupled, got {mode!r}.")
    links = [adam, coupling] if mode == "decoupled" else [coupling, adam]
    if not _is_off(weight_decay):
        links.append(_decay(weight_decay, weight_decay_mask))
    return optax.chain(*links, _scale(learning_rate, kappa))


def check_positive(**numbers: Any) -> None:
    """Raises ValueError for a number that is not > 0; schedules and tracers pass."""
    for name, number in numbers.items():
        if not callable(number) and _is_known(number) and not number > 0:
            raise ValueError(f"{name} must be > 0, got {number}.")


def _is_off(number):
    # An array, as optax.inject_hyperparams hands in, may become another number later.
    return isinstance(number, int | float) and number == 0


def _is_known(number):
    return not isinstance(number, jax.core.Tracer)


def _value(number, count):
    return number(count) if callable(number) else number


def _cast(number, like):
    return jnp.asarray(number, like.dtype)


def _dual_dtype(dtype):
    # Increments are of order 1e-5 of the dual: in bfloat16 it would never move.
    return jnp.promote_types(dtype, jnp.float32)


def _decay(weight_decay, mask):
    if mask is None:
        mask = lambda params: jax.tree.map(lambda p: p.ndim != 1, params)  # noqa: E731
    return optax.add_decayed_weights(weight_decay, mask)


def _scale(learning_rate, kappa):
    """The step -kappa alpha."""
    if callable(learning_rate) or callable(kappa):
        return optax.scale_by_learning_rate(
            lambda count: _value(learning_rate, count) * _value(kappa, count)
        )
    return optax.scale_by_learning_rate(learning_rate * kappa)
