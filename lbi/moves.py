"""Equations that move entries: reshape, slice, concatenate, pad, gather, scatter ...

The entries keep their values, and the indices along the axes of the result keep the
units of those that they come from. A rule takes the pass (`lbi.dataflow.Flow`), the
equation and the values of its operands, and returns the values of its outputs.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from lbi.units import FIXED, Column
from lbi.uses import roles_of
from lbi.values import SELECTED, Value, common, pick


def _reshape(flow, eqn, operands):
    value, shape = operands[0], tuple(eqn.outvars[0].aval.shape)
    if 0 in value.shape:
        return None
    if eqn.params["dimensions"] is not None:
        value = pick(value, eqn.params["dimensions"])
    axes, removed = [()] * len(shape), [0.0] * len(shape)
    for ins, outs in _blocks(value.shape, shape):
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
                    flow.fix([flat], SELECTED)
                    for j in outs if np.any(flat.sliced) else ():
                        axes[j] += (flat,)  # for `_rejoin`
                elif sum(size > 1 for size in new_sizes) == 1:
                    for j in outs:
                        if shape[j] > 1:
                            axes[j] += (flat,)
                else:
                    parts = flow.units.split(flat, new_sizes, flow.equation)
                    for j, part in zip(outs, parts, strict=True):
                        axes[j] += part
    return [Value(shape, tuple(axes), tuple(removed), const=value.const)]


def _broadcast(flow, eqn, operands):
    value, shape = operands[0], tuple(eqn.params["shape"])
    places = eqn.params["broadcast_dimensions"]
    axes, removed = [None] * len(shape), [value.const] * len(shape)
    for i, j in enumerate(places):
        if value.shape[i] == shape[j]:
            axes[j], removed[j] = value.axes[i], value.removed[i]
        else:
            flow.fix(value.axes[i], SELECTED)
    axes = [flow.fresh(n) if a is None else a for a, n in zip(axes, shape, strict=True)]
    return [Value(shape, tuple(axes), tuple(removed), const=value.const)]


def _iota(flow, eqn, operands):
    shape, axis = tuple(eqn.params["shape"]), eqn.params["dimension"]
    axes = [() if k == axis else flow.fresh(n) for k, n in enumerate(shape)]
    removed = tuple(0.0 if k == axis else None for k in range(len(shape)))
    return [Value(shape, tuple(axes), removed)]


def _transpose(flow, eqn, operands):
    return [pick(operands[0], eqn.params["permutation"])]


def _squeeze(flow, eqn, operands):
    value = operands[0]
    gone = {d % len(value.shape) for d in eqn.params["dimensions"]}
    for axis in gone:
        flow.fix(value.axes[axis], SELECTED)
    return [pick(value, [k for k in range(len(value.shape)) if k not in gone])]


def _rev(flow, eqn, operands):
    flipped = eqn.params["dimensions"]
    return [_index(operands[0], {axis: slice(None, None, -1) for axis in flipped})]


def _slice(flow, eqn, operands):
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    for columns, start, stride in zip(operands[0].axes, starts, strides, strict=True):
        for column in columns if stride > 1 else ():
            # Whole periods, or the next ones would change places.
            rest = column.units[start // stride * stride :]
            firsts = np.arange(len(rest)) // stride * stride
            flow.units.tie(rest[firsts], rest, f"a stride ({flow.equation})")
    bounds = zip(starts, limits, strides, strict=True)
    return [_index(operands[0], {k: slice(*b) for k, b in enumerate(bounds)})]


def _split(flow, eqn, operands):
    axis, ends = eqn.params["axis"], np.cumsum(eqn.params["sizes"]).tolist()
    starts = [0, *ends[:-1]]
    pieces = zip(starts, ends, strict=True)
    return [_index(operands[0], {axis: slice(*piece)}) for piece in pieces]


def _concatenate(flow, eqn, operands):
    axis, shape = eqn.params["dimension"], tuple(eqn.outvars[0].aval.shape)
    if any(v.data for v in operands):
        flow.uses.add("embedding", operands)
    axes = list(operands[0].axes)
    removed = [
        common((v.axes[k], v.removed[k]) for v in operands) for k in range(len(shape))
    ]
    for value in operands[1:]:
        for k in range(len(shape)):
            if k != axis:
                axes[k] = flow.join(axes[k], value.axes[k])
    _rejoin(flow, [c for v in operands for c in v.axes[axis]])
    pieces = [flow.units.leaves(v.axes[axis]) for v in operands]
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


def _rejoin(flow, parts):
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
            why = f"parts of one axis are joined ({flow.equation})"
            flow.units.tie(first.units, second.units, why)
        else:
            flow.fix([first, second], "unequal parts of one axis are joined")


def _stack(flow, eqn, operands):
    first, axis = operands[0], eqn.params["axis"]
    out = first
    for value in operands[1:]:
        out = flow.merge(out, value)
    shape, axes, removed = list(out.shape), list(out.axes), list(out.removed)
    shape.insert(axis, len(operands))
    axes.insert(axis, ())
    removed.insert(axis, 0.0)
    return [Value(tuple(shape), tuple(axes), tuple(removed))]


def _unstack(flow, eqn, operands):
    axis = eqn.params["axis"] % len(operands[0].shape)
    flow.fix(operands[0].axes[axis], SELECTED)
    kept = [k for k in range(len(operands[0].shape)) if k != axis]
    return [pick(operands[0], kept) for _ in eqn.outvars]


def _tile(flow, eqn, operands):
    value, axes = operands[0], []
    for size, reps, columns in zip(
        value.shape, eqn.params["reps"], value.axes, strict=True
    ):
        if size == 1 < reps:
            flow.fix(columns, SELECTED)
            axes.append(flow.fresh(reps))
        else:
            places = np.tile(np.arange(size), reps)
            axes.append(tuple(c.take(places) for c in columns))
    shape = tuple(eqn.outvars[0].aval.shape)
    removed = tuple(
        number if size > 1 else value.const
        for number, size in zip(value.removed, value.shape, strict=True)
    )
    return [Value(shape, tuple(axes), removed)]


def _barrier(flow, eqn, operands):
    return list(operands)


def _pad(flow, eqn, operands):
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
            flow.fix(value.axes[k], "they are dilated or cropped")
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
            first.units[:low] = flow.units.fresh(low)
            first.units[low + value.shape[k] :] = flow.units.fresh(high)
            axes[k] = (first, *others)
    return [Value(shape, tuple(axes), tuple(removed))]


def _dynamic_slice(flow, eqn, operands):
    value, shape = operands[0], tuple(eqn.params["slice_sizes"])
    axes = list(value.axes)
    for k, (size, full) in enumerate(zip(shape, value.shape, strict=True)):
        if size != full:
            flow.fix(axes[k], "a part of them is selected")
            axes[k] = ()
    return [Value(shape, tuple(axes), value.removed)]


def _dynamic_update_slice(flow, eqn, operands):
    value, update = operands[:2]
    axes = list(value.axes)
    for k, (size, full) in enumerate(zip(update.shape, value.shape, strict=True)):
        if size == full:
            flow.tie(axes[k], update.axes[k])
        else:
            flow.fix([*axes[k], *update.axes[k]], "a part of them is replaced")
    removed = tuple(
        common([(columns, a), (columns, b)])
        for columns, a, b in zip(axes, value.removed, update.removed, strict=True)
    )
    return [Value(value.shape, tuple(axes), removed)]


def _gather(flow, eqn, operands):
    value, indices = operands
    numbers = eqn.params["dimension_numbers"]
    sizes = eqn.params["slice_sizes"]
    shape = tuple(eqn.outvars[0].aval.shape)
    if value.is_param and indices.data:
        flow.uses.add("embedding", [value], roles_of({"output": _gathered(eqn, value)}))
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    passed = [k for k in range(len(value.shape)) if k not in dropped]
    axes, removed = [()] * len(shape), [0.0] * len(shape)
    for k in dropped:
        flow.fix(value.axes[k], "some of them are selected")
    for k, j in zip(passed, numbers.offset_dims, strict=True):
        if sizes[k] == value.shape[k]:
            axes[j], removed[j] = value.axes[k], value.removed[k]
        else:
            flow.fix(value.axes[k], "some of them are selected")
    for columns in indices.axes[:-1]:
        flow.fix(columns, "they are indices")
    return [Value(shape, tuple(axes), tuple(removed))]


def _scatter(flow, eqn, operands):
    """`x.at[...].set`, and sums over segments as those of graph networks."""
    (value, indices, update), name = operands, eqn.primitive.name
    if name == "scatter" and eqn.params["update_jaxpr"] is not None:
        return None  # `x.at[...].apply`
    if any(v.data for v in operands):
        flow.uses.add(_SCATTERED.get(name, ("embedding",))[0], [value, update])
    numbers = eqn.params["dimension_numbers"]
    dropped = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    windows = numbers.update_window_dims
    axes, removed = list(value.axes), list(value.removed)
    for k in dropped:
        flow.fix(axes[k], "some of them are replaced")
    passed = [k for k in range(len(value.shape)) if k not in dropped]
    for k, j in zip(passed, windows, strict=True):
        if update.shape[j] != value.shape[k]:
            flow.fix([*axes[k], *update.axes[j]], "a part of them is replaced")
            continue
        axes[k] = flow.join(axes[k], update.axes[j])
        removed[k] = _scattered(name, axes[k], removed[k], update.removed[j])
    rows = [c for j, c in enumerate(update.axes) if j not in windows]
    for columns in (*rows, *indices.axes[:-1]):
        flow.fix(columns, "they are indices")
    return [Value(value.shape, tuple(axes), tuple(removed))]


def _scattered(name, columns, old, new):
    """The removed entry of an axis with these columns, some of which are updated."""
    if name not in _SCATTERED:
        return common([(columns, old), (columns, new)])
    return old if new == _SCATTERED[name][1] else None


# {primitive: what a parameter in it is, the update that changes nothing}
_SCATTERED = {
    "scatter-add": ("bias", 0),
    "scatter-sub": ("bias", 0),
    "scatter-mul": ("scale", 1),
}


def _gathered(eqn, value):
    """Columns of the axes that a lookup passes on."""
    sizes = eqn.params["slice_sizes"]
    return [
        column
        for size, full, columns in zip(sizes, value.shape, value.axes, strict=True)
        for column in columns
        if size == full
    ]


def _index(value: Value, slices: Mapping[int, slice]) -> Value:
    """The value with a slice of some axes."""
    axes, shape = list(value.axes), list(value.shape)
    for k, chosen in slices.items():
        length = len(range(shape[k])[chosen])
        axes[k] = tuple(c.take(chosen) for c in axes[k])
        if length < shape[k]:
            axes[k] = tuple(c._replace(sliced=True) for c in axes[k])
        shape[k] = length
    return dataclasses.replace(value, shape=tuple(shape), axes=tuple(axes))


def _blocks(
    old: Sequence[int], new: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
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


RULES = {
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast,
    "iota": _iota,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "rev": _rev,
    "slice": _slice,
    "split": _split,
    "concatenate": _concatenate,
    "stack": _stack,
    "unstack": _unstack,
    "tile": _tile,
    "pad": _pad,
    "optimization_barrier": _barrier,
    "gather": _gather,
    **dict.fromkeys(["scatter", "scatter-min", "scatter-max", *_SCATTERED], _scatter),
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
}
