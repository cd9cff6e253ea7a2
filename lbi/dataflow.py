"""Dataflow of channels: which entries of which axes of a network go together.

One pass over the jaxpr of a network. Each index along each axis of each array belongs
to units, and an entry of the array is removed if any of its units is removed. Every
index of every axis of every parameter starts with a unit of its own; the equations tie
units that can only be removed together. A sum of two arrays ties their channels, a
product with a kernel ties the channels to the rows of the kernel, and a reshape
(H, W, C) -> (H W C) gives each index the units of its row, column and channel. Where
an equation does not allow entries to be removed, the units are fixed, with the reason.

The pass also records how each parameter is used (`lbi.uses`). `lbi.groups` reads these
uses, `lbi.channels.trace` reads the units. This module walks over the equations, also
those of nested functions such as the body of a scan. The rules of all other equations
are in `lbi.moves`, `lbi.entries` and `lbi.products`.

Torch-Pruning (Fang et al. 2023, arXiv 2301.12900) builds a dependency graph of the
layers of torch; here the primitives of JAX take the place of the layers.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from lbi import entries, moves, products
from lbi.penalty import named_leaves
from lbi.units import FIXED, Column, Units
from lbi.uses import Uses, roles_of
from lbi.values import Value, common, constant, depending, pick, scalar, with_origins

_OUTPUT = "they are an output of the network"


class Flow:
    """The result of the pass.

    Attributes:
      shapes: {path of a parameter: its shape}.
      uses: how the parameters are used.
      units: the units of all indices.
      equation: name and line of the equation that is looked at.
      evaluated: removed entries that were computed, see `lbi.entries`.
    """

    def __init__(
        self, apply_fn: Callable[..., Any], params: Any, inputs: tuple[Any, ...]
    ):
        jaxpr = _trace(apply_fn, params, inputs)
        leaves = named_leaves(params)
        self.shapes = {path: tuple(np.shape(leaf)) for path, leaf in leaves.items()}
        self.uses = Uses(self.shapes)
        self.units = Units()
        self.evaluated = {}
        self._line = self.equation = "an unknown line"
        self._constants_are_data = not jax.tree.leaves(inputs)
        self._columns = {
            path: tuple(self.fresh(size, {(path, axis)}) for axis, size in shape_of)
            for path, shape_of in (
                (path, tuple(enumerate(shape))) for path, shape in self.shapes.items()
            )
        }
        arguments = [
            Value(shape, self._columns[path], (0.0,) * len(shape), paths=(path,))
            for path, shape in self.shapes.items()
        ]
        for var in jaxpr.jaxpr.invars[len(arguments) :]:
            arguments.append(constant(var.aval.shape, data=True))
        for value in self._run(jaxpr, arguments):
            for columns in value.axes:
                self.units.fix(columns, _OUTPUT)
        self._reasons = self.units.reasons()
        self._heads = self._classes(self.uses.heads)
        self._stacked = self._classes(self.uses.stacked)

    def leaf_columns(self, path: str) -> list[tuple[int, np.ndarray]]:
        """(axis, classes of its indices) of a parameter; several for a product axis."""
        return [
            (axis, column.units)
            for axis, columns in enumerate(self._columns[path])
            for column in self.units.leaves(columns)
        ]

    def reason(self, unit: int) -> str | None:
        """Why a class is fixed; None if it is not."""
        return self._reasons.get(unit)

    def marked(self, path: str, axis: int) -> tuple[bool, bool]:
        """Whether an axis of a parameter indexes heads, and stacked layers."""
        columns = self.units.leaves(self._columns[path][axis])
        units = set(columns[0].units.tolist()) if len(columns) == 1 else {None}
        return units <= self._heads, units <= self._stacked

    def is_head(self, unit: int) -> bool:
        """Whether a class is a head of attention."""
        return unit in self._heads

    def is_mixed(self, path: str) -> bool:
        """Whether entries of a parameter are added to each other before use."""
        return path in self.uses.mixed

    def _classes(self, marks):
        columns = self.units.leaves(marks)
        return {unit for column in columns for unit in column.units.tolist()}

    # What the rules of the equations call.

    def fresh(self, size: int, origins: Iterable = ()) -> tuple[Column, ...]:
        """The columns of an axis of its own, which stems from axes of parameters."""
        # The only channel of an axis cannot be removed; its origin is still of use.
        units = self.units.fresh(size) if size > 1 else np.array([FIXED])
        return (Column(units, frozenset(origins)),) if size > 1 or origins else ()

    def fix(self, columns: Sequence[Column], why: str) -> None:
        """Forbids removing these units, because of this equation."""
        self.units.fix(columns, f"{why} ({self.equation})")

    def tie(self, first: Sequence[Column], second: Sequence[Column]) -> None:
        """Ties the columns of an axis of one operand to those of another."""
        why = "they are combined with an axis of fixed length"
        self.units.tie_axes(first, second, f"{why} ({self.equation})")

    def join(
        self, first: tuple[Column, ...], second: tuple[Column, ...]
    ) -> tuple[Column, ...]:
        """Ties two axes, and returns the columns of an axis that comes from both."""
        self.tie(first, second)
        return with_origins(first, second)

    def merge(self, first: Value, second: Value) -> Value:
        """The value of an array that equals one of two others."""
        self.fix(first.summed + second.summed, "an operation over all of them")
        pairs = zip(first.axes, second.axes, strict=True)
        return dataclasses.replace(
            first,
            axes=tuple(self.join(a, b) for a, b in pairs),
            removed=tuple(
                common(parts)
                for parts in zip(
                    zip(first.axes, first.removed, strict=True),
                    zip(second.axes, second.removed, strict=True),
                    strict=True,
                )
            ),
            data=first.data or second.data,
            paths=tuple(dict.fromkeys(first.paths + second.paths)),
            summed=(),
            const=None,
        )

    # The walk over the equations.

    def _run(self, jaxpr, arguments, needed=None):
        """Values of the outputs; of those that are not `needed` only the shape."""
        constants = []
        if hasattr(jaxpr, "jaxpr"):  # closed
            constants = [self._known(value) for value in jaxpr.consts]
            jaxpr = jaxpr.jaxpr
        places = [*jaxpr.constvars, *jaxpr.invars]
        values = dict(zip(places, [*constants, *arguments], strict=True))

        def read(var):
            if isinstance(var, Literal):
                return self._known(var.val)
            return values.get(var) or constant(var.aval.shape)

        line = self._line
        needed = [True] * len(jaxpr.outvars) if needed is None else needed
        live = {
            var
            for var, need in zip(jaxpr.outvars, needed, strict=True)
            if need and not isinstance(var, Literal)
        }
        eqns = []
        for eqn in reversed(jaxpr.eqns):
            if not live.isdisjoint(eqn.outvars):
                eqns.append(eqn)
                live.update(v for v in eqn.invars if not isinstance(v, Literal))
        for eqn in reversed(eqns):
            name = eqn.primitive.name
            # A library function that is compiled once has no line of the user.
            self._line = _line(eqn) or line
            self.equation = f"{name} at {self._line}"
            operands = [read(var) for var in eqn.invars]
            if name in _NESTED:
                outs = _NESTED[name](
                    self, eqn, operands, [var in live for var in eqn.outvars]
                )
            else:
                outs = _RULES[name](self, eqn, operands) if name in _RULES else None
                outs = outs or self._unknown(eqn, operands)
                outs = [depending(out, operands) for out in outs]
            values.update(zip(eqn.outvars, outs, strict=True))
        return [read(var) for var in jaxpr.outvars]

    def _known(self, value):
        shape = np.shape(value)
        data = self._constants_are_data and len(shape) > 0
        return constant(shape, data=data, const=scalar(value))

    def _unknown(self, eqn, operands):
        """An equation without a rule keeps the lengths of all its axes."""
        for value in operands:
            for columns in value.axes:
                self.fix(columns, "there is no rule for this operation")
        return [constant(var.aval.shape) for var in eqn.outvars]

    def _call(self, eqn, operands, needed):
        """A function that is called once: jit, remat, custom derivatives."""
        keys = [key for key in ("jaxpr", "call_jaxpr") if key in eqn.params]
        return self._run(eqn.params[keys[0]], operands, needed)

    def _scan(self, eqn, operands, needed):
        params = eqn.params
        # Constants, carry and rows are known by their shapes, because the names of the
        # parameters with their numbers differ between versions of JAX.
        body = params["jaxpr"].jaxpr
        second = sum(map(_same_rank, eqn.invars, body.invars))
        first = second - sum(map(_same_rank, eqn.outvars, body.outvars))
        constants, carry, xs = (
            operands[:first],
            operands[first:second],
            operands[second:],
        )
        rows = []
        for value in xs:
            self.fix(value.axes[0], "they are layers of a scan")
            roles = roles_of({"stacked": value.axes[0]})
            self.uses.add("stacked", [value], roles)
            rows.append(pick(value, range(1, len(value.shape))))
        outs = self._loop(
            lambda carry: self._run(
                params["jaxpr"],
                [*constants, *carry, *rows],
                [True] * len(carry) + needed[len(carry) :],
            ),
            carry,
        )
        ys = [
            dataclasses.replace(
                y,
                shape=(params["length"], *y.shape),
                axes=((), *y.axes),
                removed=(0.0, *y.removed),
                const=None,
            )
            for y in outs[len(carry) :]
        ]
        return [*outs[: len(carry)], *ys]

    def _while(self, eqn, operands):
        params = eqn.params
        first = params["cond_nconsts"]
        second = first + params["body_nconsts"]
        constants, carry = operands[first:second], operands[second:]
        outs = self._loop(
            lambda carry: self._run(params["body_jaxpr"], [*constants, *carry]), carry
        )
        self._run(params["cond_jaxpr"], [*operands[:first], *outs])
        return outs

    def _loop(self, body, carry):
        """Runs the body until the values of the carry no longer change."""
        carry = [dataclasses.replace(value, const=None) for value in carry]
        before = self.uses
        while True:
            # Only the last time the body meets what it carries in fact.
            self.uses = before.copy()
            outs = body(carry)
            merged = [self.merge(c, out) for c, out in zip(carry, outs, strict=False)]
            if all(
                (a.removed, a.data, a.paths) == (b.removed, b.data, b.paths)
                for a, b in zip(carry, merged, strict=True)
            ):
                return [*merged, *outs[len(carry) :]]
            carry = merged

    def _cond(self, eqn, operands):
        results = [self._run(branch, operands[1:]) for branch in eqn.params["branches"]]
        merged = results[0]
        for result in results[1:]:
            merged = [self.merge(a, b) for a, b in zip(merged, result, strict=True)]
        return merged


_RULES = {
    **moves.RULES,
    **entries.RULES,
    **products.RULES,
    "while": Flow._while,
    "cond": Flow._cond,
}
# Functions of functions, which say themselves what their outputs depend on.
_NESTED = {
    "scan": Flow._scan,
    **dict.fromkeys(
        "jit pjit closed_call call core_call remat remat2 checkpoint custom_jvp_call "
        "custom_vjp_call custom_vjp_call_jaxpr composite".split(),
        Flow._call,
    ),
}


def _same_rank(outer, inner):
    return len(outer.aval.shape) == len(inner.aval.shape)


def _trace(apply_fn, params, inputs):
    try:
        return jax.make_jaxpr(apply_fn)(params, *inputs)
    except (jax.errors.JAXTypeError, TypeError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"the function cannot be traced: {line}") from error


def _line(eqn):
    """file:line of the code outside of JAX that made an equation, or None."""
    traceback = eqn.source_info.traceback
    frames = [] if traceback is None else traceback.frames
    library = os.path.dirname(jax.__file__)
    outside = [f for f in frames if not f.file_name.startswith(library)]
    own = [f for f in outside if "site-packages" not in f.file_name]
    for frame in own + outside:
        return f"{os.path.basename(frame.file_name)}:{frame.line_num}"
    return None
