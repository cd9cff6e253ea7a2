"""The arrays of a traced network: their axes, and what a removed entry is worth.

In a masked network the weights of a removed channel are zero, and each equation makes a
number of them, such as exp(0) = 1, which `lbi.entries` computes.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from lbi.units import Column

Number = float | complex
# Why an axis keeps its length.
SELECTED = "one of them is selected"


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
      summed: columns of parameters that were summed over, as in the norm of a kernel.
      const: its value if it is a known scalar, or filled with one.
    """

    shape: tuple[int, ...]
    axes: tuple[tuple[Column, ...], ...]
    removed: tuple[Number | None, ...]
    data: bool = False
    paths: tuple[str, ...] = ()
    summed: tuple[Column, ...] = ()
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
    data = value.data or any(v.data for v in operands)
    # A factor of an activation is one of the network, not part of a mean of parameters.
    summed = value.summed + tuple(c for v in operands for c in v.summed)
    return dataclasses.replace(
        value,
        data=data,
        paths=tuple(dict.fromkeys(paths)),
        summed=() if data else tuple({id(c): c for c in summed}.values()),
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
