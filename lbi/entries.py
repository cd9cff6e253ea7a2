"""Equations that compute entries: elementwise, reductions, sorts, transforms.

In a masked network the weights of a removed channel are zero, and each equation makes a
number of them, such as exp(0) = 1. The rules follow these numbers, so that they see
where a removed channel would add something to a sum, or be divided by zero.

A rule takes the pass (`lbi.dataflow.Flow`), the equation and the values of its
operands, and returns the values of its outputs.
"""

import dataclasses
import itertools
import math

import jax
import numpy as np

from lbi.values import SELECTED, Value, pick, with_origins, zero_or_unknown

# Operations on each entry.
_ELEMENTWISE = (
    "add sub mul div rem add_any neg sign abs floor ceil round sqrt rsqrt cbrt square "
    "pow integer_pow exp exp2 expm1 log log1p logistic erf erfc erf_inv lgamma digamma "
    "igamma igammac polygamma zeta regularized_incomplete_beta bessel_i0e bessel_i1e "
    "sin cos tan asin acos atan atan2 sinh cosh tanh asinh acosh atanh real imag conj "
    "complex max min clamp select_n eq ne lt le gt ge eq_to lt_to le_to is_finite and "
    "or xor not nextafter shift_left shift_right_logical shift_right_arithmetic "
    "population_count clz convert_element_type reduce_precision"
).split()
# Operations that return their operand.
_IDENTITIES = (
    "copy copy_p stop_gradient sharding_constraint reshard layout_constraint "
    "device_put pvary name"
).split()


def _elementwise(flow, eqn, operands):
    name = eqn.primitive.name
    shape = tuple(eqn.outvars[0].aval.shape)
    active = flow.uses.elementwise(name, operands)
    if name in ("mul", "div") and not all(v.paths or v.data for v in operands):
        for value in operands:
            flow.fix(value.summed, "a mean, or another multiple of a sum over them")
    axes = [None] * len(shape)
    for value in operands:  # of this rank or scalars; an axis may have length 1
        for number, columns in enumerate(value.axes):
            if value.shape[number] != shape[number]:
                flow.fix(columns, SELECTED)
            elif axes[number] is None:
                axes[number] = columns
            else:
                flow.tie(axes[number], columns)
                axes[number] = with_origins(axes[number], columns)
    removed = []
    for k, columns in enumerate(axes):
        number, pole = 0.0, False
        if columns:
            numbers = [value.along(k, shape) for value in operands]
            number, pole = _removed_entry(eqn, numbers, flow.evaluated)
        if pole:
            divided = name in ("div", "rem", "integer_pow")
            what = "divided by zero" if divided else "infinite or NaN"
            flow.fix(columns, f"a removed channel would be {what}")
        removed.append(number)
    axes = tuple(columns or () for columns in axes)
    constants = [value.const for value in operands]
    const, _ = _removed_entry(eqn, constants, flow.evaluated)
    return [Value(shape, axes, tuple(removed), active, const=const)]


def _reduce(flow, eqn, operands):
    gone, summed = set(eqn.params["axes"]), ()
    for value in operands:
        for axis in gone:
            if (
                eqn.primitive.name == "reduce_sum"
                and value.is_param
                and value.removed[axis] == 0
            ):
                summed += value.axes[axis]
            else:
                flow.fix(value.axes[axis], "an operation over all of them")
    kept = [k for k in range(len(operands[0].shape)) if k not in gone]
    for value in operands[1:]:
        if value.shape == operands[0].shape:
            for k in kept:
                flow.tie(operands[0].axes[k], value.axes[k])
    out = pick(operands[0], kept)
    count = math.prod(operands[0].shape[axis] for axis in gone)
    removed = tuple(
        _reduced(eqn.primitive.name, number, count) if columns else 0.0
        for number, columns in zip(out.removed, out.axes, strict=True)
    )
    out = dataclasses.replace(out, removed=removed, summed=summed, const=None)
    return [out for _ in eqn.outvars]


def _along(flow, eqn, operands):
    """Sorts and cumulative sums: one axis mixes, the others pass."""
    key = "dimension" if "dimension" in eqn.params else "axis"
    rank = len(operands[0].shape)
    axis = eqn.params.get(key, rank - 1) % rank
    for value in operands:
        flow.fix(value.axes[axis], "an operation over all of them")
        for k in range(rank):
            if value is not operands[0] and k != axis:
                flow.tie(operands[0].axes[k], value.axes[k])
    axes = [() if k == axis else c for k, c in enumerate(operands[0].axes)]
    # Of top_k the second result is indices.
    sources = operands if eqn.primitive.name == "sort" else operands[:1]
    outs = []
    for var, value in itertools.zip_longest(eqn.outvars, sources):
        removed = tuple(
            _accumulated(eqn.primitive.name, value and value.removed[k])
            if columns
            else 0.0
            for k, columns in enumerate(axes)
        )
        outs.append(Value(tuple(var.aval.shape), tuple(axes), removed))
    return outs


def _fourier(flow, eqn, operands):
    """The last axes are transformed, the others pass."""
    value, kept = operands[0], len(operands[0].shape) - len(eqn.params["fft_lengths"])
    for columns in value.axes[kept:]:
        flow.fix(columns, "an operation over all of them")
    shape = tuple(eqn.outvars[0].aval.shape)
    rest = (len(shape) - kept) * ((),)
    removed = map(zero_or_unknown, value.removed[:kept])
    return [Value(shape, (*value.axes[:kept], *rest), (*removed, *len(rest) * (0.0,)))]


def _window(flow, eqn, operands):
    shape = tuple(eqn.outvars[0].aval.shape)
    params = eqn.params
    plain = [
        window == 1 and stride == 1 and tuple(pads) == (0, 0)
        for window, stride, pads in zip(
            params["window_dimensions"],
            params["window_strides"],
            params["padding"],
            strict=True,
        )
    ]
    value = operands[0]
    for columns, same in zip(value.axes, plain, strict=True):
        if not same:
            flow.fix(columns, "an operation over windows of them")
    axes = tuple(c if s else () for c, s in zip(value.axes, plain, strict=True))
    removed = value.removed
    if eqn.primitive.name == "reduce_window_sum":
        removed = tuple(map(zero_or_unknown, removed))
    return [Value(shape, axes, removed) for _ in eqn.outvars]


def _removed_entry(eqn, numbers, evaluated):
    """What an elementwise equation makes of the removed entries of its operands.

    `numbers` has the entry of each operand, None if it is not known. Returns that of
    the result, None if it is not known, and whether the equation makes it infinite or
    NaN from finite numbers. `evaluated` keeps what was computed.
    """
    name, known = eqn.primitive.name, [n for n in numbers if n is not None]
    if name in ("div", "rem") and numbers[1] == 0:
        return None, True
    if name == "pow" and numbers[0] == 0 and numbers[1] is None:
        return None, True  # The exponent may be negative.
    if name in _IDENTITIES:
        number = numbers[0]
    elif name == "select_n":
        number = _selected(*numbers)
    elif len(known) == len(numbers):
        number = _evaluate(eqn, numbers, evaluated)
    elif name in ("mul", "and") and 0 in known:
        number = 0.0
    elif name in ("div", "rem") and numbers[0] == 0:
        number = 0.0
    else:
        number = None
    if number is None or np.isfinite(number):
        return number, False
    return number, bool(np.isfinite(known).all())


def _reduced(name, number, count):
    """What a reduction of `count` equal entries gives; None if it is not known."""
    if number is None or name == "reduce_xor":
        return None
    if name in ("argmax", "argmin"):
        return 0  # the first of equal entries
    if name == "reduce_prod":
        return number if number in (0, 1) else None
    return number * count if name == "reduce_sum" else number


def _accumulated(name, number):
    """What a sort or cumulative operation makes of equal entries, None if not known."""
    changes = {"cumsum": (0,), "cumprod": (0, 1), "cumlogsumexp": ()}
    return number if number in changes.get(name, (number,)) else None


def _selected(which, *cases):
    """An entry of `select_n`, whose first operand is the number of the case."""
    if which is not None:
        return cases[int(which)]
    # jnp.std takes NaN where it is not defined.
    cases = [case for case in cases if case is None or not np.isnan(case)]
    return cases[0] if cases and all(case == cases[0] for case in cases) else None


def _evaluate(eqn, numbers, evaluated):
    """Computes one entry of an equation; None if its type is not one of numbers."""
    dtypes = [var.aval.dtype for var in (*eqn.invars, *eqn.outvars)]
    if any(jax.dtypes.issubdtype(dtype, jax.dtypes.extended) for dtype in dtypes):
        return None
    key = (eqn.primitive, str(eqn.params), tuple(numbers), tuple(dtypes))
    if key not in evaluated:
        with np.errstate(all="ignore"):  # NaN becomes some integer.
            entries = [
                np.asarray(number).astype(dtype)
                for number, dtype in zip(numbers, dtypes, strict=False)
            ]
        # The caller may trace, and look for NaN.
        with jax.ensure_compile_time_eval(), jax.debug_nans(False):
            result = eqn.primitive.bind(*entries, **eqn.params)
        evaluated[key] = np.asarray(result).item()
    return evaluated[key]


RULES = {
    **dict.fromkeys([*_ELEMENTWISE, *_IDENTITIES], _elementwise),
    **dict.fromkeys(
        "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor "
        "argmax argmin".split(),
        _reduce,
    ),
    **dict.fromkeys(
        "sort top_k cumsum cumprod cummax cummin cumlogsumexp".split(), _along
    ),
    "fft": _fourier,
    **dict.fromkeys(
        "reduce_window_sum reduce_window_max reduce_window_min".split(), _window
    ),
}
