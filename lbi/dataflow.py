"""Dataflow of channels: which entries of which axes of a network go together.

One pass over the jaxpr of a network. Each index along each axis of each array belongs
to units, and an entry of the array is removed if any of its units is removed. Every
index of every axis of every parameter starts with a unit of its own; the equations tie
units that can only be removed together. A sum of two arrays ties their channels, a
product with a kernel ties the channels to the rows of the kernel, and a reshape
(H, W, C) -> (H W C) gives each index the units of its row, column and channel. Where
an equation does not allow entries to be removed, the units are fixed, with the reason.

The pass also records how each parameter is used: as kernel of a convolution or product
(with the role of each axis), as scale, bias or embedding. `lbi.groups` reads these
uses, `lbi.channels.trace` reads the units.

Torch-Pruning (Fang et al. 2023, arXiv 2301.12900) builds a dependency graph of the
layers of torch; here the primitives of JAX take the place of the layers.
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import Literal

from lbi.penalty import named_leaves
from lbi.units import FIXED, Column, Units
from lbi.values import (
    IDENTITIES,
    Value,
    accumulated,
    blocks,
    common,
    constant,
    depending,
    index,
    own_axes,
    pick,
    reduced,
    removed_entry,
    scalar,
    with_origins,
    zero_or_unknown,
)

_CONTRIBUTES = "a removed channel would still contribute to a sum"
_SELECTED = "one of them is selected"
_OUTPUT = "they are an output of the network"


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


class Flow:
    """The result of the pass.

    Attributes:
      shapes: {path of a parameter: its shape}.
      uses: uses of the parameters, in the order of the equations.
    """

    def __init__(
        self, apply_fn: Callable[..., Any], params: Any, inputs: tuple[Any, ...]
    ):
        jaxpr = _trace(apply_fn, params, inputs)
        leaves = named_leaves(params)
        self.shapes = {path: tuple(np.shape(leaf)) for path, leaf in leaves.items()}
        self.uses = []
        self._units = Units()
        self._evaluated = {}
        self._heads, self._stacked, self._mixed = [], [], set()
        self._pending = {}  # uses in products that have not met an input yet
        self._line = self._reason = "an unknown line"
        self._constants_are_data = not jax.tree.leaves(inputs)
        self._columns = {
            path: tuple(self._fresh(size, {(path, axis)}) for axis, size in shape_of)
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
                self._units.fix(columns, _OUTPUT)
        self._reasons = self._units.reasons()
        self._heads = self._classes(self._heads)
        self._stacked = self._classes(self._stacked)

    def leaf_columns(self, path: str) -> list[tuple[int, np.ndarray]]:
        """(axis, classes of its indices) of a parameter; several for a product axis."""
        return [
            (axis, column.units)
            for axis, columns in enumerate(self._columns[path])
            for column in self._units.leaves(columns)
        ]

    def reason(self, unit: int) -> str | None:
        """Why a class is fixed; None if it is not."""
        return self._reasons.get(unit)

    def marked(self, path: str, axis: int) -> tuple[bool, bool]:
        """Whether an axis of a parameter indexes heads, and stacked layers."""
        columns = self._units.leaves(self._columns[path][axis])
        units = set(columns[0].units.tolist()) if len(columns) == 1 else {None}
        return units <= self._heads, units <= self._stacked

    def is_head(self, unit: int) -> bool:
        """Whether a class is a head of attention."""
        return unit in self._heads

    def is_mixed(self, path: str) -> bool:
        """Whether entries of a parameter are added to each other before use."""
        return path in self._mixed

    def _classes(self, marks):
        columns = self._units.leaves(marks)
        return {unit for column in columns for unit in column.units.tolist()}

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
            self._reason = f"{name} at {self._line}"
            operands = [read(var) for var in eqn.invars]
            if name in _NESTED:
                outs = _NESTED[name](
                    self, eqn, operands, [var in live for var in eqn.outvars]
                )
            else:
                outs = _RULES.get(name, Flow._unknown)(self, eqn, operands)
                outs = outs or self._unknown(eqn, operands)
                outs = [depending(out, operands) for out in outs]
            values.update(zip(eqn.outvars, outs, strict=True))
        return [read(var) for var in jaxpr.outvars]

    def _known(self, value):
        shape = np.shape(value)
        data = self._constants_are_data and len(shape) > 0
        return constant(shape, data=data, const=scalar(value))

    def _fresh(self, size, origins=()):
        # The only channel of an axis cannot be removed; its origin is still of use.
        units = self._units.fresh(size) if size > 1 else np.array([FIXED])
        return (Column(units, frozenset(origins)),) if size > 1 or origins else ()

    def _fix(self, columns, why):
        self._units.fix(columns, f"{why} ({self._reason})")

    def _tie(self, first, second):
        why = "they are combined with an axis of fixed length"
        self._units.tie_axes(first, second, f"{why} ({self._reason})")

    def _unknown(self, eqn, operands):
        """An equation without a rule keeps the lengths of all its axes."""
        for value in operands:
            for columns in value.axes:
                self._fix(columns, "there is no rule for this operation")
        return [constant(var.aval.shape) for var in eqn.outvars]

    def _join(self, first, second):
        """The columns of an axis that two arrays have in common."""
        self._tie(first, second)
        return with_origins(first, second)

    def _use(self, kind, values, roles=None):
        for value in values:
            if value.is_param:
                self.uses += self._uses_of(kind, value, roles or {})

    def _uses_of(self, kind, value, roles):
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
            and whole[path] >= {a for a, n in enumerate(self.shapes[path]) if n > 1}
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
        if self._pending.keys().isdisjoint(product.paths):
            bias, product = product, bias
        axes = own_axes(bias)
        if not axes <= own_axes(product) or len(axes) == len(product.shape):
            return False
        outputs = {p for k in axes for c in product.axes[k] for p, _ in c.origins}
        if not self._activate(product, outputs):
            return False
        self._use("bias", [bias])
        return True

    def _activate(self, value, outputs=()):
        """Records what a product without an input holds, which is an activation."""
        found = {p: use for p in value.paths if (use := self._pending.get(p))}
        kernels = {path for path, use in found.items() if use.kind == "product"}
        if not kernels:
            return False
        others = kernels - set(outputs) if kernels & set(outputs) else set()
        for path in value.paths:
            embedding = path in others or path not in found
            self.uses.append(Use(path, "embedding", {}) if embedding else found[path])
        return True

    # Rules. Each returns the values of the outputs.

    def _elementwise(self, eqn, operands):
        name = eqn.primitive.name
        shape = tuple(eqn.outvars[0].aval.shape)
        active = any(v.data for v in operands)
        if name in ("mul", "div", "add", "sub", "add_any"):
            kind = "scale" if name in ("mul", "div") else "bias"
            if active:
                self._use(kind, operands)
            elif kind == "bias" and sum(v.is_param for v in operands) > 1:
                paths = [set(v.paths) for v in operands if v.is_param]
                self._mixed |= set.intersection(*paths)
            active = active or (kind == "bias" and self._is_bias(operands))
        elif name in _ACTIVATIONS and not active:
            active = self._activate(operands[0])
        axes = [None] * len(shape)
        for value in operands:  # of this rank or scalars; an axis may have length 1
            for number, columns in enumerate(value.axes):
                if value.shape[number] != shape[number]:
                    self._fix(columns, _SELECTED)
                elif axes[number] is None:
                    axes[number] = columns
                else:
                    self._tie(axes[number], columns)
                    axes[number] = with_origins(axes[number], columns)
        removed = []
        for k, columns in enumerate(axes):
            number, pole = 0.0, False
            if columns:
                numbers = [value.along(k, shape) for value in operands]
                number, pole = removed_entry(eqn, numbers, self._evaluated)
            if pole:
                divided = name in ("div", "rem", "integer_pow")
                what = "divided by zero" if divided else "infinite or NaN"
                self._fix(columns, f"a removed channel would be {what}")
            removed.append(number)
        axes = tuple(columns or () for columns in axes)
        constants = [value.const for value in operands]
        const, _ = removed_entry(eqn, constants, self._evaluated)
        return [Value(shape, axes, tuple(removed), active, const=const)]

    def _reshape(self, eqn, operands):
        value, shape = operands[0], tuple(eqn.outvars[0].aval.shape)
        if 0 in value.shape:
            return None
        if eqn.params["dimensions"] is not None:
            value = pick(value, eqn.params["dimensions"])
        axes, removed = [()] * len(shape), [0.0] * len(shape)
        for ins, outs in blocks(value.shape, shape):
            sizes, new_sizes = [value.shape[i] for i in ins], [shape[j] for j in outs]
            number = common((value.axes[i], value.removed[i]) for i in ins)
            for j in outs:
                removed[j] = number
            for position, i in enumerate(ins):
                for column in value.axes[i]:
                    view = [1] * len(ins)
                    view[position] = sizes[position]
                    places = np.arange(sizes[position]).reshape(view)
                    flat = column.take(np.broadcast_to(places, sizes).ravel())
                    if all(size == 1 for size in new_sizes):
                        self._fix([flat], _SELECTED)
                        for j in outs if np.any(flat.sliced) else ():
                            axes[j] += (flat,)  # for `_rejoin`
                    elif sum(size > 1 for size in new_sizes) == 1:
                        for j in outs:
                            if shape[j] > 1:
                                axes[j] += (flat,)
                    else:
                        self._split(flat, outs, new_sizes, axes)
        return [Value(shape, tuple(axes), tuple(removed), const=value.const)]

    def _split(self, column, outs, sizes, axes):
        """Distributes a column over the axes `outs` that its axis is split into."""
        for leaf in self._units.leaves([column]):
            array = leaf.units.reshape(sizes)
            varies = [
                k for k in range(len(sizes)) if (array != array.take([0], k)).any()
            ]
            if not varies:
                self._fix([leaf], "they are reshaped as a whole")
            elif len(varies) == 1:
                [k] = varies
                places = np.moveaxis(np.arange(array.size).reshape(sizes), k, 0)
                axes[outs[k]] += (leaf.take(places.reshape(sizes[k], -1)[:, 0]),)
            else:
                parts, sliced = [], np.any(leaf.sliced)
                for k in varies:
                    units = self._units.fresh(sizes[k])
                    axes[outs[k]] += (Column(units, leaf.origins, sliced),)
                    view = [1] * len(sizes)
                    view[k] = sizes[k]
                    parts.append(np.broadcast_to(units.reshape(view), sizes).ravel())
                self._units.expand(leaf.units, parts, f"reshaped ({self._reason})")

    def _broadcast(self, eqn, operands):
        value, shape = operands[0], tuple(eqn.params["shape"])
        places = eqn.params["broadcast_dimensions"]
        axes, removed = [None] * len(shape), [value.const] * len(shape)
        for i, j in enumerate(places):
            if value.shape[i] == shape[j]:
                axes[j], removed[j] = value.axes[i], value.removed[i]
            else:
                self._fix(value.axes[i], _SELECTED)
        axes = [
            self._fresh(n) if a is None else a for a, n in zip(axes, shape, strict=True)
        ]
        return [Value(shape, tuple(axes), tuple(removed), const=value.const)]

    def _iota(self, eqn, operands):
        shape, axis = tuple(eqn.params["shape"]), eqn.params["dimension"]
        axes = [() if k == axis else self._fresh(n) for k, n in enumerate(shape)]
        removed = tuple(0.0 if k == axis else None for k in range(len(shape)))
        return [Value(shape, tuple(axes), removed)]

    def _transpose(self, eqn, operands):
        return [pick(operands[0], eqn.params["permutation"])]

    def _squeeze(self, eqn, operands):
        value = operands[0]
        gone = {d % len(value.shape) for d in eqn.params["dimensions"]}
        for axis in gone:
            self._fix(value.axes[axis], _SELECTED)
        return [pick(value, [k for k in range(len(value.shape)) if k not in gone])]

    def _rev(self, eqn, operands):
        flipped = eqn.params["dimensions"]
        return [index(operands[0], {axis: slice(None, None, -1) for axis in flipped})]

    def _slice(self, eqn, operands):
        starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
        strides = eqn.params["strides"] or (1,) * len(starts)
        for columns, start, stride in zip(
            operands[0].axes, starts, strides, strict=True
        ):
            for column in columns if stride > 1 else ():
                # Whole periods, or the next ones would change places.
                rest = column.units[start // stride * stride :]
                firsts = np.arange(len(rest)) // stride * stride
                self._units.tie(rest[firsts], rest, f"a stride ({self._reason})")
        bounds = zip(starts, limits, strides, strict=True)
        return [index(operands[0], {k: slice(*b) for k, b in enumerate(bounds)})]

    def _split_rule(self, eqn, operands):
        axis, ends = eqn.params["axis"], np.cumsum(eqn.params["sizes"]).tolist()
        starts = [0, *ends[:-1]]
        pieces = zip(starts, ends, strict=True)
        return [index(operands[0], {axis: slice(*piece)}) for piece in pieces]

    def _concatenate(self, eqn, operands):
        axis, shape = eqn.params["dimension"], tuple(eqn.outvars[0].aval.shape)
        if any(v.data for v in operands):
            self._use("embedding", operands)
        axes = list(operands[0].axes)
        removed = [
            common((v.axes[k], v.removed[k]) for v in operands)
            for k in range(len(shape))
        ]
        for value in operands[1:]:
            for k in range(len(shape)):
                if k != axis:
                    axes[k] = self._join(axes[k], value.axes[k])
        self._rejoin([c for v in operands for c in v.axes[axis]])
        pieces = [self._units.leaves(v.axes[axis]) for v in operands]
        columns = []
        for number in range(max(map(len, pieces))):
            parts = [
                piece[number]
                if number < len(piece)
                else Column(np.full(value.shape[axis], FIXED))
                for value, piece in zip(operands, pieces, strict=True)
            ]
            units = np.concatenate([p.units for p in parts])
            origins = frozenset().union(*(p.origins for p in parts))
            sliced = [np.broadcast_to(p.sliced, p.units.shape) for p in parts]
            columns.append(Column(units, origins, np.concatenate(sliced)))
        axes[axis] = tuple(columns)
        return [Value(shape, tuple(axes), tuple(removed))]

    def _rejoin(self, parts):
        """Parts of one axis that are concatenated, as by `jnp.roll`.

        Where the axis is cut may depend on its length, or not. Equal parts stay equal.
        """
        parts = [
            c.take(np.broadcast_to(c.sliced, c.units.shape))
            for c in parts
            if np.any(c.sliced)
        ]
        for first, second in itertools.combinations(parts, 2):
            if first.origins.isdisjoint(second.origins):
                continue
            if len(first.units) == len(second.units):
                why = f"parts of one axis are joined ({self._reason})"
                self._units.tie(first.units, second.units, why)
            else:
                self._fix([first, second], "unequal parts of one axis are joined")

    def _stack(self, eqn, operands):
        first, axis = operands[0], eqn.params["axis"]
        out = first
        for value in operands[1:]:
            out = self._merge(out, value)
        shape, axes, removed = list(out.shape), list(out.axes), list(out.removed)
        shape.insert(axis, len(operands))
        axes.insert(axis, ())
        removed.insert(axis, 0.0)
        return [Value(tuple(shape), tuple(axes), tuple(removed))]

    def _unstack(self, eqn, operands):
        axis = eqn.params["axis"] % len(operands[0].shape)
        self._fix(operands[0].axes[axis], _SELECTED)
        kept = [k for k in range(len(operands[0].shape)) if k != axis]
        return [pick(operands[0], kept) for _ in eqn.outvars]

    def _tile(self, eqn, operands):
        value, axes = operands[0], []
        for size, reps, columns in zip(
            value.shape, eqn.params["reps"], value.axes, strict=True
        ):
            if size == 1 < reps:
                self._fix(columns, _SELECTED)
                axes.append(self._fresh(reps))
            else:
                places = np.tile(np.arange(size), reps)
                axes.append(tuple(c.take(places) for c in columns))
        shape = tuple(eqn.outvars[0].aval.shape)
        removed = tuple(
            number if size > 1 else value.const
            for number, size in zip(value.removed, value.shape, strict=True)
        )
        return [Value(shape, tuple(axes), removed)]

    def _barrier(self, eqn, operands):
        return list(operands)

    def _pad(self, eqn, operands):
        value, filling = operands
        shape = tuple(eqn.outvars[0].aval.shape)
        axes, removed = list(value.axes), list(value.removed)
        for k, (low, high, interior) in enumerate(eqn.params["padding_config"]):
            if (low, high, interior) == (0, 0, 0):
                continue
            # The new entries of a removed channel have another value.
            removed = [
                number if not columns or number == filling.const else None
                for number, columns in zip(removed, axes, strict=True)
            ]
            if value.axes[k] and (interior or min(low, high) < 0):
                self._fix(value.axes[k], "they are dilated or cropped")
                axes[k] = ()
            elif value.axes[k]:
                first, *others = (
                    Column(
                        np.pad(c.units, (low, high)),  # with FIXED
                        c.origins,
                        np.pad(np.broadcast_to(c.sliced, c.units.shape), (low, high)),
                    )
                    for c in value.axes[k]
                )
                first.units[:low] = self._units.fresh(low)
                first.units[low + value.shape[k] :] = self._units.fresh(high)
                axes[k] = (first, *others)
        return [Value(shape, tuple(axes), tuple(removed))]

    def _reduce(self, eqn, operands):
        gone = set(eqn.params["axes"])
        for value in operands:
            for axis in gone:
                self._fix(value.axes[axis], "an operation over all of them")
        kept = [k for k in range(len(operands[0].shape)) if k not in gone]
        for value in operands[1:]:
            if value.shape == operands[0].shape:
                for k in kept:
                    self._tie(operands[0].axes[k], value.axes[k])
        out = pick(operands[0], kept)
        count = math.prod(operands[0].shape[axis] for axis in gone)
        removed = tuple(
            reduced(eqn.primitive.name, number, count) if columns else 0.0
            for number, columns in zip(out.removed, out.axes, strict=True)
        )
        out = dataclasses.replace(out, removed=removed, const=None)
        return [out for _ in eqn.outvars]

    def _along(self, eqn, operands):
        """Sorts and cumulative sums: one axis mixes, the others pass."""
        key = "dimension" if "dimension" in eqn.params else "axis"
        rank = len(operands[0].shape)
        axis = eqn.params.get(key, rank - 1) % rank
        for value in operands:
            self._fix(value.axes[axis], "an operation over all of them")
            for k in range(rank):
                if value is not operands[0] and k != axis:
                    self._tie(operands[0].axes[k], value.axes[k])
        axes = [() if k == axis else c for k, c in enumerate(operands[0].axes)]
        # Of top_k the second result is indices.
        sources = operands if eqn.primitive.name == "sort" else operands[:1]
        outs = []
        for var, value in itertools.zip_longest(eqn.outvars, sources):
            removed = tuple(
                accumulated(eqn.primitive.name, value and value.removed[k])
                if columns
                else 0.0
                for k, columns in enumerate(axes)
            )
            outs.append(Value(tuple(var.aval.shape), tuple(axes), removed))
        return outs

    def _window(self, eqn, operands):
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
                self._fix(columns, "an operation over windows of them")
        axes = tuple(c if s else () for c, s in zip(value.axes, plain, strict=True))
        removed = value.removed
        if eqn.primitive.name == "reduce_window_sum":
            removed = tuple(map(zero_or_unknown, removed))
        return [Value(shape, axes, removed) for _ in eqn.outvars]

    def _dynamic_slice(self, eqn, operands):
        value, shape = operands[0], tuple(eqn.params["slice_sizes"])
        axes = list(value.axes)
        for k, (size, full) in enumerate(zip(shape, value.shape, strict=True)):
            if size != full:
                self._fix(axes[k], "a part of them is selected")
                axes[k] = ()
        return [Value(shape, tuple(axes), value.removed)]

    def _dynamic_update_slice(self, eqn, operands):
        value, update = operands[:2]
        axes = list(value.axes)
        for k, (size, full) in enumerate(zip(update.shape, value.shape, strict=True)):
            if size == full:
                self._tie(axes[k], update.axes[k])
            else:
                self._fix([*axes[k], *update.axes[k]], "a part of them is replaced")
        removed = tuple(
            common([(columns, a), (columns, b)])
            for columns, a, b in zip(axes, value.removed, update.removed, strict=True)
        )
        return [Value(value.shape, tuple(axes), removed)]

    def _gather(self, eqn, operands):
        value, indices = operands
        numbers = eqn.params["dimension_numbers"]
        sizes = eqn.params["slice_sizes"]
        shape = tuple(eqn.outvars[0].aval.shape)
        if value.is_param and indices.data:
            self._use(
                "embedding", [value], _roles({"output": self._gathered(eqn, value)})
            )
        dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
        passed = [k for k in range(len(value.shape)) if k not in dropped]
        axes, removed = [()] * len(shape), [0.0] * len(shape)
        for k in dropped:
            self._fix(value.axes[k], "some of them are selected")
        for k, j in zip(passed, numbers.offset_dims, strict=True):
            if sizes[k] == value.shape[k]:
                axes[j], removed[j] = value.axes[k], value.removed[k]
            else:
                self._fix(value.axes[k], "some of them are selected")
        for columns in indices.axes[:-1]:
            self._fix(columns, "they are indices")
        return [Value(shape, tuple(axes), tuple(removed))]

    def _gathered(self, eqn, value):
        """Columns of the axes that a lookup passes on."""
        sizes = eqn.params["slice_sizes"]
        return [
            column
            for size, full, columns in zip(sizes, value.shape, value.axes, strict=True)
            for column in columns
            if size == full
        ]

    def _dot(self, eqn, operands):
        return [self._product(*operands, *eqn.params["dimension_numbers"])]

    def _ragged_dot(self, eqn, operands):
        """Each row of the left side meets one of the kernels on the right side."""
        (lhs, rhs, *_), numbers = operands, eqn.params["ragged_dot_dimension_numbers"]
        contract, batch = numbers.dot_dimension_numbers
        (rows,), groups = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
        if len(groups) != 1 or rows in (*contract[0], *batch[0]):
            return None
        self._fix([*lhs.axes[rows], *rhs.axes[groups[0]]], _SELECTED)
        self._use("stacked", [rhs], _roles({"stacked": rhs.axes[groups[0]]}))
        kept = [k for k in range(len(rhs.shape)) if k != groups[0]]
        contract, batch = (
            (ours, [kept.index(k) for k in theirs])
            for ours, theirs in (contract, batch)
        )
        return [self._product(lhs, pick(rhs, kept), contract, batch)]

    def _product(self, lhs, rhs, contract, batch):
        operands = (lhs, rhs)
        for i, j in zip(*contract, strict=True):
            self._contract(lhs, i, rhs, j)
        free = [
            [k for k in range(len(v.shape)) if k not in {*c, *b}]
            for v, c, b in zip(operands, contract, batch, strict=True)
        ]
        shared = [
            self._join(lhs.axes[i], rhs.axes[j]) for i, j in zip(*batch, strict=True)
        ]
        for columns in shared:
            if not (lhs.data and rhs.data):
                self._stacked += columns
            elif contract[0]:  # without a sum it is a gate
                self._heads += columns
        for number, value in enumerate(operands):
            if not value.is_param:
                continue
            other = operands[1 - number]
            windows, inputs = _windows([value.axes[k] for k in contract[number]])
            roles = _roles(
                {
                    "input": inputs,
                    "window": windows,
                    "output": [c for k in free[number] for c in value.axes[k]],
                    "stacked": [c for k in batch[number] for c in value.axes[k]],
                }
            )
            if other.data:
                self._use("product", [value], roles)
            else:
                uses = self._uses_of("product", value, roles)
                self._pending |= {use.path: use for use in uses}
                if not other.is_param:
                    self._mixed |= set(value.paths)
        parts = [pick(lhs, batch[0]), pick(lhs, free[0]), pick(rhs, free[1])]
        shared_removed = [
            0.0 if 0 in (lhs.removed[i], rhs.removed[j]) else None
            for i, j in zip(*batch, strict=True)
        ]
        removed = [*parts[1].removed, *parts[2].removed]
        return Value(
            tuple(n for part in parts for n in part.shape),
            (*shared, *parts[1].axes, *parts[2].axes),
            (*shared_removed, *map(zero_or_unknown, removed)),
        )

    def _contract(self, lhs, i, rhs, j):
        self._tie(lhs.axes[i], rhs.axes[j])
        columns = (*lhs.axes[i], *rhs.axes[j])
        if lhs.data and rhs.data:
            why = "a product of activations sums over them, and its scale may depend "
            self._fix(columns, why + "on their number")
        elif not any(
            v.is_param and v.removed[k] == 0 for v, k in ((lhs, i), (rhs, j))
        ) and (lhs.paths or rhs.paths):
            self._fix(columns, _CONTRIBUTES)

    def _conv(self, eqn, operands):
        params, (lhs, rhs) = eqn.params, operands
        if params["batch_group_count"] != 1 or rhs.data:
            return None
        numbers, groups = params["dimension_numbers"], params["feature_group_count"]
        lhs_batch, lhs_feature, *lhs_space = numbers.lhs_spec
        rhs_out, rhs_in, *rhs_space = numbers.rhs_spec
        out_batch, out_feature, *_ = numbers.out_spec
        for value, places in ((lhs, lhs_space), (rhs, rhs_space)):
            for k in places:
                self._fix(value.axes[k], "they are positions of a convolution")
        outputs, stacked = rhs.axes[rhs_out], ()
        if groups == 1:
            self._contract(lhs, lhs_feature, rhs, rhs_in)
        else:
            group_in, within = self._in_groups(lhs.axes[lhs_feature], groups)
            group_out, last = self._in_groups(outputs, groups)
            self._tie(group_in, group_out)
            if rhs.shape[rhs_in] > 1:
                self._tie(within, rhs.axes[rhs_in])
                if rhs.removed[rhs_in] != 0:
                    self._fix(within, _CONTRIBUTES)
            count = rhs.shape[rhs_out] // groups
            outputs = tuple(
                [Column(np.repeat(c.units, count), c.origins) for c in group_out]
                + [Column(np.tile(c.units, groups), c.origins) for c in last]
            )
            own = frozenset().union(*(c.origins for c in last))
            if own:
                stacked = [
                    c._replace(origins=c.origins - own)
                    for c in group_out
                    if not c.origins <= own
                ]
                self._stacked += stacked
        if rhs.is_param:
            roles = {
                "input": rhs.axes[rhs_in],
                "window": [c for k in rhs_space for c in rhs.axes[k]],
                "output": outputs,
                "stacked": stacked,
            }
            self._use("convolution", [rhs], _roles(roles))
            self._use("embedding", [lhs])
        shape = tuple(eqn.outvars[0].aval.shape)
        axes, removed = [()] * len(shape), [0.0] * len(shape)
        axes[out_batch], axes[out_feature] = lhs.axes[lhs_batch], outputs
        removed[out_batch] = zero_or_unknown(lhs.removed[lhs_batch])
        removed[out_feature] = zero_or_unknown(rhs.removed[rhs_out])
        # What meets the kernel of a convolution is an activation.
        return [Value(shape, tuple(axes), tuple(removed), rhs.is_param)]

    def _in_groups(self, columns, groups):
        """Columns of an axis of n = groups * m channels as those of (groups, m)."""
        axes = [(), ()]
        for column in columns:
            sizes = [groups, len(column.units) // groups]
            self._split(column, [0, 1], sizes, axes)
        return axes

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
            self._fix(value.axes[0], "they are layers of a scan")
            roles = _roles({"stacked": value.axes[0]})
            self._use("stacked", [value], roles)
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
        first = self.uses, self._heads, self._stacked, self._mixed
        while True:
            # Only the last time the body meets what it carries in fact.
            self.uses, self._heads, self._stacked = map(list, first[:3])
            self._mixed = set(first[3])
            outs = body(carry)
            merged = [self._merge(c, out) for c, out in zip(carry, outs, strict=False)]
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
            merged = [self._merge(a, b) for a, b in zip(merged, result, strict=True)]
        return merged

    def _merge(self, first, second):
        """The value of an array that equals one of two others."""
        pairs = zip(first.axes, second.axes, strict=True)
        return dataclasses.replace(
            first,
            axes=tuple(self._join(a, b) for a, b in pairs),
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
            const=None,
        )


# Operations on each entry.
_ELEMENTWISE = (
    "add sub mul div rem add_any neg sign abs floor ceil round sqrt rsqrt cbrt square "
    "pow integer_pow exp exp2 expm1 log log1p logistic erf erfc erf_inv lgamma digamma "
    "sin cos tan asin acos atan atan2 sinh cosh tanh asinh acosh atanh real imag conj "
    "complex max min clamp select_n eq ne lt le gt ge is_finite and or xor not "
    "nextafter shift_left shift_right_logical shift_right_arithmetic population_count "
    "clz convert_element_type reduce_precision"
).split()
# Nonlinear, and not used to normalize a kernel.
_ACTIVATIONS = ("exp", "tanh", "logistic", "sin", "cos", "erf", "erfc")
_KERNELS = ("convolution", "product")
_RULES = {
    **dict.fromkeys([*_ELEMENTWISE, *IDENTITIES], Flow._elementwise),
    "reshape": Flow._reshape,
    "broadcast_in_dim": Flow._broadcast,
    "iota": Flow._iota,
    "transpose": Flow._transpose,
    "squeeze": Flow._squeeze,
    "rev": Flow._rev,
    "slice": Flow._slice,
    "split": Flow._split_rule,
    "concatenate": Flow._concatenate,
    "stack": Flow._stack,
    "unstack": Flow._unstack,
    "tile": Flow._tile,
    "pad": Flow._pad,
    "optimization_barrier": Flow._barrier,
    "gather": Flow._gather,
    "dynamic_slice": Flow._dynamic_slice,
    "dynamic_update_slice": Flow._dynamic_update_slice,
    "dot_general": Flow._dot,
    "ragged_dot_general": Flow._ragged_dot,
    "conv_general_dilated": Flow._conv,
    "while": Flow._while,
    "cond": Flow._cond,
    **dict.fromkeys(
        "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor "
        "argmax argmin".split(),
        Flow._reduce,
    ),
    **dict.fromkeys(
        "sort top_k cumsum cumprod cummax cummin cumlogsumexp".split(), Flow._along
    ),
    **dict.fromkeys(
        "reduce_window_sum reduce_window_max reduce_window_min".split(), Flow._window
    ),
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


def _roles(columns):
    return {
        origin: role
        for role, found in columns.items()
        for column in found
        for origin in column.origins
    }


def _windows(axes):
    """Divides contracted columns in those of a window and those of channels.

    A window that is merged with the channels stands before them.
    """
    windows = [column for columns in axes for column in columns[:-1]]
    return windows, [column for columns in axes for column in columns[-1:]]
