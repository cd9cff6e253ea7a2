"""The arrays of a traced network: their axes, and what a removed entry is worth.

In a masked network the weights of a removed channel are zero, and each equation makes a
number of them, such as exp(0) = 1. `removed_entry` follows these numbers, so that
`lbi.dataflow` sees where a removed channel would add something to a sum, or be divided
by zero.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lbi.units import Column

Number = float | complex
# Operations that return their operand.
IDENTITIES = (
    "copy copy_p stop_gradient sharding_constraint reshard layout_constraint "
    "device_put pvary name"
).split()


@dataclasses.dataclass(frozen=True)
class Value:
    """The axes, the dependencies and the known entries of one array.

    Attributes:
      shape: its shape.
      axes: columns of each axis; an axis without columns has a fixed length.
      removed: for each axis, the value of the entries whose index along it is removed,
        or None if it is not known; 0 for an axis without columns, which loses none.
      data: whether the array depends on an input.
      paths: the parameters that it depends on.
      const: its value if it is a known scalar, or filled with one.
    """

    shape: tuple[int, ...]
    axes: tuple[tuple[Column, ...], ...]
    removed: tuple[Number | None, ...]
    data: bool = False
    paths: tuple[str, ...] = ()
    const: Number | None = None

    @property
    def is_param(self) -> bool:
        """Whether it depends on parameters, but on no input."""
        return bool(self.paths) and not self.data

    def along(self, axis: int, shape: tuple[int, ...]) -> Number | None:
        """What it gives to the entries of `shape` that are removed along an axis."""
        if self.const is not None:
            return self.const
        if len(self.shape) != len(shape) or self.shape[axis] != shape[axis]:
            return None  # One entry for all.
        return self.removed[axis] if self.axes[axis] else None


def constant(
    shape: Sequence[int], *, data: bool = False, const: Number | None = None
) -> Value:
    """An array whose axes have fixed lengths.

    Args:
      shape: its shape.
      data: whether it depends on an input.
      const: its value if it is a known scalar, or filled with one.
    """
    axes, removed = ((),) * len(shape), (0.0,) * len(shape)
    return Value(tuple(shape), axes, removed, data=data, const=const)


def scalar(value: Any) -> Number | None:
    """An array of one entry as a number; None for others and for random keys."""
    dtype = getattr(value, "dtype", None)
    if dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.extended):
        return None
    return np.asarray(value).item() if math.prod(np.shape(value)) == 1 else None


def pick(value: Value, axes: Iterable[int]) -> Value:
    """The value with the given axes, in this order."""
    axes = list(axes)
    return dataclasses.replace(
        value,
        shape=tuple(value.shape[k] for k in axes),
        axes=tuple(value.axes[k] for k in axes),
        removed=tuple(value.removed[k] for k in axes),
    )


def index(value: Value, slices: Mapping[int, slice]) -> Value:
    """The value with a slice of some axes."""
    axes, shape = list(value.axes), list(value.shape)
    for k, chosen in slices.items():
        length = len(range(shape[k])[chosen])
        axes[k] = tuple(c.take(chosen) for c in axes[k])
        if length < shape[k]:
            axes[k] = tuple(c._replace(sliced=True) for c in axes[k])
        shape[k] = length
    return dataclasses.replace(value, shape=tuple(shape), axes=tuple(axes))


def blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of axes of two shapes that have equal products.

    Args:
      old: a shape.
      new: a shape with the same number of entries.

    Returns:
      The axes of both in each run, [(axes of old, axes of new)].
    """
    found, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        start, a, b = (i, j), 1, 1
        if i < len(old):
            a, i = old[i], i + 1
        if j < len(new):
            b, j = new[j], j + 1
        while a != b:
            if a < b:
                a, i = a * old[i], i + 1
            else:
                b, j = b * new[j], j + 1
        # An axis of length 1 stays with the axes before it, unless both have one.
        while [*old[i : i + 1], *new[j : j + 1]].count(1) == 1:
            if old[i : i + 1] == (1,):
                i += 1
            elif new[j : j + 1] == (1,):
                j += 1
        found.append((list(range(start[0], i)), list(range(start[1], j))))
    return found


def own_axes(value: Value) -> set[int]:
    """The axes of a value that stem from axes of parameters."""
    return {
        axis
        for axis, columns in enumerate(value.axes)
        if any(column.origins for column in columns)
    }


def with_origins(
    first: tuple[Column, ...], second: tuple[Column, ...]
) -> tuple[Column, ...]:
    """The columns of an axis that is also known as `second`."""
    if len(first) != len(second):
        return first or second
    return tuple(
        a._replace(origins=a.origins | b.origins, sliced=a.sliced | b.sliced)
        for a, b in zip(first, second, strict=True)
    )


def depending(value: Value, operands: Sequence[Value]) -> Value:
    """The value with the inputs and parameters that its operands depend on."""
    paths = value.paths + tuple(path for v in operands for path in v.paths)
    return dataclasses.replace(
        value,
        data=value.data or any(v.data for v in operands),
        paths=tuple(dict.fromkeys(paths)),
    )


def common(parts: Iterable[tuple[tuple[Column, ...], Number | None]]) -> Number | None:
    """The removed entry of an axis that has parts: (columns, removed entry) of each.

    None if two parts with columns differ.
    """
    numbers = [number for columns, number in parts if columns]
    if not numbers:
        return 0.0
    return numbers[0] if all(number == numbers[0] for number in numbers) else None


def zero_or_unknown(number: Number | None) -> Number | None:
    """A removed entry after an operation that only leaves zeros as they are."""
    return 0.0 if number == 0 else None


def removed_entry(
    eqn: Any, numbers: Sequence[Number | None], evaluated: dict
) -> tuple[Number | None, bool]:
    """What an elementwise equation makes of the removed entries of its operands.

    Args:
      eqn: the equation.
      numbers: the entry of each operand, None if it is not known.
      evaluated: keeps the entries that were computed, for later calls.

    Returns:
      The entry of the result, None if it is not known or not finite, and whether the
      equation makes it infinite or NaN.
    """
    name, known = eqn.primitive.name, [n for n in numbers if n is not None]
    if name in ("div", "rem") and numbers[1] == 0:
        return None, True
    if name == "pow" and numbers[0] == 0 and numbers[1] is None:
        return None, True  # The exponent may be negative.
    if name in IDENTITIES:
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
    return None, bool(np.isfinite(known).all())


def reduced(name: str, number: Number | None, count: int) -> Number | None:
    """What a reduction of equal entries gives; None if it is not known.

    Args:
      name: the primitive.
      number: the entry, None if it is not known.
      count: how many there are.
    """
    if number is None or name in ("argmax", "argmin", "reduce_xor"):
        return None
    if name == "reduce_prod":
        return number if number in (0, 1) else None
    return number * count if name == "reduce_sum" else number


def accumulated(name: str, number: Number | None) -> Number | None:
    """What a sort or cumulative operation makes of equal entries, None if not known.

    Args:
      name: the primitive.
      number: the entry, None if it is not known.
    """
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
