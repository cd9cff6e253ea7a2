"""How a network uses its parameters: as kernel, scale, bias or embedding.

`lbi.dataflow` records the uses while it walks over the equations; `lbi.structure` reads
what each parameter is.
"""

from collections.abc import Sequence
from typing import NamedTuple

from lbi.units import Column
from lbi.values import Value

# Nonlinear, and not used to normalize a kernel.
_ACTIVATIONS = ("exp", "tanh", "logistic", "sin", "cos", "erf", "erfc")
_KERNELS = ("convolution", "product")


class Use(NamedTuple):
    """One use of a parameter.

    Attributes:
      path: the parameter.
      kind: convolution, product, scale, bias, embedding, or stacked (scanned layers).
      roles: the role of its axes, {axis: output, input, window or stacked}.
    """

    path: str
    kind: str
    roles: dict[int, str]


class Uses:
    """The uses of the parameters.

    Attributes:
      found: the uses, in the order of the equations.
      heads: columns that index heads of attention.
      stacked: columns that index stacked layers.
      mixed: paths of parameters whose entries are added to each other before use.
      pending: {path: use} in products that have not met an input yet.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        self.found, self.heads, self.stacked = [], [], []
        self.mixed, self.pending = set(), {}
        self._shapes = shapes

    def copy(self) -> "Uses":
        """The uses up to now, to return to; what is pending stays common to both."""
        new = Uses(self._shapes)
        new.found, new.heads, new.stacked = map(
            list, (self.found, self.heads, self.stacked)
        )
        new.mixed, new.pending = set(self.mixed), self.pending
        return new

    def add(
        self,
        kind: str,
        values: Sequence[Value],
        roles: dict[tuple[str, int], str] | None = None,
    ) -> None:
        """Records a use of those values that consist of parameters.

        Args:
          kind: as in `Use`.
          values: arrays.
          roles: {(path, axis): role}.
        """
        for value in values:
            if value.is_param:
                self.found += self.of(kind, value, roles or {})

    def of(
        self, kind: str, value: Value, roles: dict[tuple[str, int], str]
    ) -> list[Use]:
        """What a use of an array is for the parameters that it is made of.

        Args:
          kind: as in `Use`.
          value: the array.
          roles: {(path, axis): role}.
        """
        own = {
            path: {axis: role for (p, axis), role in roles.items() if p == path}
            for path in value.paths
        }
        gains = self._gains(value) if kind in _KERNELS else ()
        if kind in _KERNELS and any(own.values()):
            # What was summed over, for example in a norm, is not the kernel.
            own = {path: found for path, found in own.items() if found}
        uses = [Use(path, kind, found) for path, found in own.items()]
        return [use for use in uses if use.path not in gains] + [
            Use(path, "scale", {}) for path in gains
        ]

    def elementwise(self, name: str, operands: Sequence[Value]) -> bool:
        """Records an elementwise equation; whether its result is an activation.

        Args:
          name: the primitive.
          operands: its operands.
        """
        active = any(v.data for v in operands)
        if name in ("mul", "div", "add", "sub", "add_any"):
            kind = "scale" if name in ("mul", "div") else "bias"
            if active:
                self.add(kind, operands)
            elif kind == "bias" and sum(v.is_param for v in operands) > 1:
                paths = [set(v.paths) for v in operands if v.is_param]
                self.mixed |= set.intersection(*paths)
            active = active or (kind == "bias" and self._is_bias(operands))
        elif name in _ACTIVATIONS and not active:
            active = self._activate(operands[0])
        return active

    def _gains(self, value):
        """The parameters that are broadcast to a kernel, as in weight normalization."""
        places = {path: set() for path in value.paths}
        whole = {path: set() for path in value.paths}
        for k, columns in enumerate(value.axes):
            for path, axis in {o for column in columns for o in column.origins}:
                places[path].add(k)
                whole[path].add(axis)
        return [
            path
            for path in value.paths
            if any(places[path] < other for other in places.values())
            and whole[path] >= {a for a, n in enumerate(self._shapes[path]) if n > 1}
        ]

    def _is_bias(self, operands):
        """Whether a parameter is broadcast to a product that has met no input.

        The product is then an activation, such as a learned query or the first layer on
        a constant grid. Its kernel shares the axes of the bias. A sum over all axes is
        one of kernels, as of low-rank factors.
        """
        if len(operands) != 2 or not all(v.is_param for v in operands):
            return False
        bias, product = operands
        if self.pending.keys().isdisjoint(product.paths):
            bias, product = product, bias
        axes = _own_axes(bias)
        if not axes <= _own_axes(product) or len(axes) == len(product.shape):
            return False
        outputs = {p for k in axes for c in product.axes[k] for p, _ in c.origins}
        if not self._activate(product, outputs):
            return False
        self.add("bias", [bias])
        return True

    def _activate(self, value, outputs=()):
        """Records what a product without an input holds, which is an activation."""
        found = {p: use for p in value.paths if (use := self.pending.get(p))}
        kernels = {path for path, use in found.items() if use.kind == "product"}
        if not kernels:
            return False
        others = kernels - set(outputs) if kernels & set(outputs) else set()
        for path in value.paths:
            embedding = path in others or path not in found
            self.found.append(Use(path, "embedding", {}) if embedding else found[path])
        return True


def roles_of(columns: dict[str, Sequence[Column]]) -> dict[tuple[str, int], str]:
    """{axis of a parameter: role}, from the columns of each role."""
    return {
        origin: role
        for role, found in columns.items()
        for column in found
        for origin in column.origins
    }


def _own_axes(value):
    """The axes of a value that stem from axes of parameters."""
    return {
        axis
        for axis, columns in enumerate(value.axes)
        if any(column.origins for column in columns)
    }
