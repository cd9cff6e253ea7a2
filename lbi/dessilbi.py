"""DessiLBI: structural sparsity found during training, as an optax transformation.

Fu et al. 2020 (arXiv 2007.02010); released code: DessiLBI2020/DessiLBI. LBI stands for
linearized Bregman iteration. The method
couples the dense weights W to a structure parameter Gamma of the same shape by
||W - Gamma||^2 / (2 nu). Gamma is zero at first. Groups of its entries become nonzero
one after another, important ones first:

    W     <-  W - kappa alpha (grad L(W) + (W - Gamma) / nu)
    V     <-  V + (alpha / nu) (W - Gamma)              (old W and old Gamma)
    Gamma <-  kappa prox(V)

While the Gamma of a group is zero, the coupling acts on the group as a decoupled weight
decay of 1 / nu, and the dual of the group is V_g = sum alpha W_g / nu. The group enters
the support when ||V_g|| exceeds lambda. The update of V needs W, the state and a step
size, but not the gradient. The method is therefore one link of an optax chain, and its
position in the chain selects the variant.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import serialization
from jax import Array

from lbi import penalty as penalties

ScalarOrSchedule = float | Array | Callable[[Array], Any]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class FrozenSpec:
    """What `penalty` was given, hashable, so that it can be static under jit."""

    value: Any

    @classmethod
    def make(cls, spec: penalties.PenaltySpec) -> "FrozenSpec":
        """Freezes a penalty or a (nested) mapping of patterns.

        Raises:
          ValueError: if it is a list of penalties.
        """
        if isinstance(spec, tuple | list):
            raise ValueError(
                "several penalties must be given as a mapping of patterns, got "
                f"{spec!r}."
            )
        if isinstance(spec, Mapping) and not isinstance(spec, penalties.Layers):
            return cls(tuple((p, cls.make(choice)) for p, choice in spec.items()))
        return cls(spec)

    def assign(self, params: Any) -> dict[str, penalties.Penalty]:
        """Returns {path: penalty} of the parameters that have one."""
        return penalties.assign(self._unpack(), params)

    def _unpack(self):
        if isinstance(self.value, tuple):
            return {p: choice._unpack() for p, choice in self.value}
        return self.value


# A restored state keeps the penalties of the state that it is restored into.
serialization.register_serialization_state(
    FrozenSpec, lambda spec: {}, lambda spec, stored: spec
)


class StructuralCouplingState(NamedTuple):
    """State of `structural_coupling`.

    Attributes:
      count: number of updates, (), int32.
      clock: T = sum of alpha / nu so far, (), float32. A group whose mean norm is below
        lambda / T cannot have entered the support.
      kappa: value at the last update, (), float32.
      dual: V, a tree like the parameters, float32 or wider; zero for parameters without
        a penalty.
      first_entry: number of updates after which each group first entered the support,
        -1 if it never did; int32, one entry per group. () without `record_entry`. Its
        leaves do not have the shapes of the parameters, so `optax.tree.map_params` does
        not recognize them.
      spec: the penalties; static, not a leaf of the tree.
    """

    count: Array
    clock: Array
    kappa: Array
    dual: Any
    first_entry: Any
    spec: FrozenSpec

    @property
    def rules(self) -> FrozenSpec:
        """The old name of `spec`, for one version."""
        warnings.warn(
            "StructuralCouplingState.rules is now spec.",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.spec


def structural_coupling(
    dual_learning_rate: ScalarOrSchedule,
    nu: ScalarOrSchedule,
    kappa: ScalarOrSchedule = 1.0,
    penalty: penalties.PenaltySpec = "auto",
    *,
    record_entry: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Adds (W - Gamma) / nu to the updates and advances the dual of Gamma.

    The position in the chain selects the method. Below, `lr` stands for
    `optax.scale_by_learning_rate`:

    ================================================  =================================
    chain                                             method
    ================================================  =================================
    coupling, lr(kappa alpha)                         DessiLBI as in the paper
    add_decayed_weights, trace(m), coupling,          the authors' released code, with
      lr(kappa alpha)                                   momentum and weight decay
    coupling, trace(m), lr(kappa alpha)               heavy ball on the augmented loss
    scale_by_adam, coupling, lr(alpha)                DessiLBI+Adam, decoupled as AdamW
    coupling, scale_by_adam, lr(alpha)                DessiLBI+Adam on the augmented
                                                        loss (coupled)
    clip, scale_by_anything, coupling, lr(alpha)      any other optimizer
    ================================================  =================================

    The dual depends on the parameters only. It advances at its own rate, whatever
    scales the step of W, so pass the schedule of the learning rate here too. To pause
    the dual together with the other states, wrap the whole chain in
    `optax.apply_if_finite` or `optax.MultiSteps`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import lbi
      >>> coupling = lbi.structural_coupling(0.1, nu=20.0, penalty=lbi.L1(0.5))
      >>> optimizer = optax.chain(
      ...     optax.scale_by_adam(), coupling, optax.scale_by_learning_rate(0.1)
      ... )
      >>> params = {"kernel": jnp.ones((2, 3))}
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update(params, state, params)
      >>> print(f"{lbi.clock(state):.3f}")
      0.005

    Args:
      dual_learning_rate: alpha >= 0, or a schedule of it.
      nu: coupling, > 0, or a schedule. A smaller nu ties Gamma closer to W: weights
        outside the support decay faster (by 1 / nu), and groups enter earlier.
      kappa: damping, > 0, or a schedule. Gamma is kappa times the shrunk dual.
      penalty: layers of `lbi.groups`, "auto" (by names and ranks), one penalty, or a
        mapping of path patterns; see `lbi.penalty.assign`. Parameters without a penalty
        keep their updates.
      record_entry: whether to record the update at which each group entered, one int32
        per group. `lbi.pruning.entry_importance` needs this record.

    Returns:
      A gradient transformation. Its `update` needs `params`.

    Raises:
      ValueError: if a number is out of range, `penalty` is of an unknown kind, applies
        to no parameter or does not fit (in `init`), or `params` is missing or has other
        paths than in `init` (in `update`).
    """
    check_positive(nu=nu, kappa=kappa)
    if not callable(dual_learning_rate) and _is_known(dual_learning_rate):
        if not dual_learning_rate >= 0:
            raise ValueError(
                f"dual_learning_rate must be >= 0, got {dual_learning_rate}."
            )
    spec = FrozenSpec.make(penalty)

    def assign(params):
        assigned = spec.assign(params)
        paths = list(penalties.named_leaves(params))
        if penalty is not None and paths and not assigned:
            raise ValueError(
                f"the penalty {penalty!r} applies to none of the parameters "
                f"{', '.join(paths)}; give patterns, or penalty=None."
            )
        return assigned

    def init_fn(params):
        assigned = assign(params)

        def groups(path, dual):
            # A parameter without a penalty has no groups; () keeps the tree structure.
            chosen = assigned.get(penalties.path_name(path))
            if chosen is None:
                return jnp.full((), -1, jnp.int32)
            # Sharded as the norms, to which `update` compares it.
            return jnp.full_like(chosen.norms(dual), -1, jnp.int32)

        dual = jax.tree.map(
            lambda p: jnp.zeros_like(p, dtype=_dual_dtype(jnp.result_type(p))), params
        )
        return StructuralCouplingState(
            count=jnp.zeros([], jnp.int32),
            clock=jnp.zeros([], jnp.float32),
            # A copy: the state and the hyperparameters may both be donated.
            kappa=jnp.array(_value(kappa, jnp.zeros([], jnp.int32)), jnp.float32),
            dual=dual,
            first_entry=jax.tree_util.tree_map_with_path(groups, dual)
            if record_entry
            else (),
            spec=spec,
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(
                "structural_coupling needs the parameters: call "
                "update(grads, state, params)."
            )
        assigned = assign(params)
        alpha, nu_now, kappa_now = (
            _value(x, state.count) for x in (dual_learning_rate, nu, kappa)
        )
        count = optax.safe_increment(state.count)

        def pull(path, dual, param):
            """(W - Gamma) / nu."""
            chosen = assigned.get(penalties.path_name(path))
            if chosen is None:
                return jnp.zeros_like(dual)
            # The current Gamma was computed with the kappa of the last update.
            gamma = _cast(state.kappa, dual) * chosen.prox(dual)
            return (param.astype(dual.dtype) - gamma) / _cast(nu_now, dual)

        def enter(path, first_entry, dual):
            chosen = assigned.get(penalties.path_name(path))
            if chosen is None:
                return first_entry
            inside = chosen.norms(dual) > chosen.thresholds(dual.shape)
            return jnp.where((first_entry < 0) & inside, count, first_entry)

        pulls = jax.tree_util.tree_map_with_path(pull, state.dual, params)
        updates = jax.tree.map(
            # None: a parameter without a gradient.
            lambda u, p: None if u is None else u + p.astype(u.dtype),
            updates,
            pulls,
            is_leaf=lambda u: u is None,
        )
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
            spec=spec,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def dessilbi(
    learning_rate: ScalarOrSchedule,
    nu: ScalarOrSchedule = 100.0,
    kappa: ScalarOrSchedule = 1.0,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    penalty: penalties.PenaltySpec = "auto",
    *,
    nesterov: bool = False,
    weight_decay_mask: Any = None,
    record_entry: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """DessiLBI with stochastic gradient descent, with the authors' defaults.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import lbi
      >>> target = jnp.array([[3.0, 0.1]])
      >>> loss_fn = lambda params: jnp.sum((params["kernel"] - target) ** 2)
      >>> params = {"kernel": jnp.zeros((1, 2))}
      >>> optimizer = lbi.dessilbi(0.05, nu=1.0, momentum=0.0)
      >>> state = optimizer.init(params)
      >>> for _ in range(40):
      ...     grads = jax.grad(loss_fn)(params)
      ...     updates, state = optimizer.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(lbi.in_support(state)["kernel"])  # only the large weight has entered
      [[ True False]]

    Args:
      learning_rate: alpha, or a schedule. W advances by kappa alpha and the dual by
        alpha / nu, as in the paper and in the released code. To tune kappa at a fixed
        rate of W, pass the rate of W divided by kappa.
      nu: coupling, > 0; named `mu` in the released code.
      kappa: damping, > 0.
      momentum: decay of the momentum of the loss gradient, which excludes the coupling.
        0 gives the paper's iteration.
      weight_decay: coefficient, added to the gradient before the momentum.
      penalty: see `structural_coupling`.
      nesterov: whether to use Nesterov's momentum.
      weight_decay_mask: mask for `optax.add_decayed_weights`; None decays all
        parameters except those of rank 1 and, by name, biases and scales.
      record_entry: see `structural_coupling`.

    Returns:
      An optimizer.

    Raises:
      ValueError: if a number is out of range or `penalty` is of an unknown kind.
    """
    check_positive(nu=nu, kappa=kappa)
    _check_decay(momentum=momentum)
    _check_not_negative(weight_decay=weight_decay)
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
    penalty: penalties.PenaltySpec = "auto",
    *,
    mode: Literal["decoupled", "coupled"] = "decoupled",
    weight_decay_mask: Any = None,
    record_entry: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """DessiLBI with Adam's step for W; Adam does not scale the step of the dual.

    Example:
      >>> import jax.numpy as jnp
      >>> import lbi
      >>> optimizer = lbi.dessilbi_adam(1e-3, nu=4.0, penalty=lbi.GroupL2(0.1))
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> updates, state = optimizer.update(params, optimizer.init(params), params)
      >>> print(f"{updates['kernel'][0, 0]:.5f}")  # -alpha (1 + W / nu)
      -0.00125

    Args:
      learning_rate: alpha, or a schedule. W advances by kappa alpha, the dual by
        alpha / nu.
      nu: coupling, > 0.
      kappa: damping, > 0.
      b1: decay of Adam's first moment.
      b2: decay of Adam's second moment.
      eps: Adam's epsilon.
      weight_decay: coefficient, decoupled as in AdamW.
      penalty: see `structural_coupling`.
      mode: "decoupled" adds the coupling to Adam's step, as AdamW adds its decay;
        "coupled" passes the gradient of the augmented loss to Adam. Adam scales each
        entry to order 1. A coupling of size |W| / nu therefore has little effect in
        decoupled mode and can exceed small gradients in coupled mode.
      weight_decay_mask: mask for `optax.add_decayed_weights`; None decays all
        parameters except those of rank 1 and, by name, biases and scales.
      record_entry: see `structural_coupling`.

    Returns:
      An optimizer.

    Raises:
      ValueError: if a number is out of range, or `mode` or `penalty` is unknown.
    """
    check_positive(nu=nu, kappa=kappa)
    _check_decay(b1=b1, b2=b2)
    _check_not_negative(eps=eps, weight_decay=weight_decay)
    coupling = structural_coupling(
        learning_rate, nu, kappa, penalty, record_entry=record_entry
    )
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    if mode not in ("decoupled", "coupled"):
        raise ValueError(f'mode must be "decoupled" or "coupled", got {mode!r}.')
    links = [adam, coupling] if mode == "decoupled" else [coupling, adam]
    if not _is_off(weight_decay):
        links.append(_decay(weight_decay, weight_decay_mask))
    return optax.chain(*links, _scale(learning_rate, kappa))


def check_positive(**numbers: Any) -> None:
    """Raises ValueError for a number that is not > 0, unless it is traced."""
    _check(lambda number: number > 0, "> 0", numbers)


def _check_decay(**numbers):
    _check(lambda number: 0 <= number < 1, "in [0, 1)", numbers)


def _check_not_negative(**numbers):
    _check(lambda number: number >= 0, "at least 0", numbers)


def _check(holds, wanted, numbers):
    for name, number in numbers.items():
        if not callable(number) and _is_known(number) and not holds(number):
            raise ValueError(f"{name} must be {wanted}, got {number}.")


def _is_off(number):
    # optax.inject_hyperparams passes an array whose value may change later.
    return isinstance(number, int | float) and number == 0


def _is_known(number):
    return not isinstance(number, jax.core.Tracer)


def _value(number, count):
    return number(count) if callable(number) else number


def _cast(number, like):
    return jnp.asarray(number, like.dtype)


def _dual_dtype(dtype):
    # Increments are about 1e-5 of the dual; in bfloat16 they would round to nothing.
    return jnp.promote_types(dtype, jnp.float32)


def _decay(weight_decay, mask):
    if mask is None:

        def mask(params):
            return jax.tree_util.tree_map_with_path(
                lambda path, p: (
                    jnp.ndim(p) != 1
                    and not penalties.is_bias_name(
                        penalties.path_name(path), jnp.shape(p)
                    )
                ),
                params,
            )

    return optax.add_decayed_weights(weight_decay, mask)


def _scale(learning_rate, kappa):
    """The link that multiplies updates by -kappa alpha."""
    if callable(learning_rate) or callable(kappa):
        return optax.scale_by_learning_rate(
            lambda count: _value(learning_rate, count) * _value(kappa, count)
        )
    return optax.scale_by_learning_rate(learning_rate * kappa)


def __getattr__(name):
    # The old name, for one version.
    if name != "Rules":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}.")
    warnings.warn(
        f"{__name__}.Rules is now {__name__}.FrozenSpec.",
        DeprecationWarning,
        stacklevel=2,
    )
    return FrozenSpec
