"""Equations that contract axes: products, also of experts, and convolutions.

A product with a kernel ties the channels of its other operand to the rows of the
kernel. A removed channel contributes nothing to the sum, because its row is zero. A
product of two activations sums over an axis that must keep its length.

A rule takes the pass (`lbi.dataflow.Flow`), the equation and the values of its
operands, and returns the values of its outputs.
"""

import numpy as np

from lbi.units import Column
from lbi.uses import roles_of
from lbi.values import SELECTED, Value, pick, zero_or_unknown

_CONTRIBUTES = "a removed channel would still contribute to a sum"


def _dot(flow, eqn, operands):
    return [_product(flow, *operands, *eqn.params["dimension_numbers"])]


def _ragged_dot(flow, eqn, operands):
    """Each row of the left side meets one of the kernels on the right side."""
    (lhs, rhs, *_), numbers = operands, eqn.params["ragged_dot_dimension_numbers"]
    contract, batch = numbers.dot_dimension_numbers
    (rows,), groups = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
    if len(groups) != 1 or rows in (*contract[0], *batch[0]):
        return None
    flow.fix([*lhs.axes[rows], *rhs.axes[groups[0]]], SELECTED)
    flow.uses.add("stacked", [rhs], roles_of({"stacked": rhs.axes[groups[0]]}))
    kept = [k for k in range(len(rhs.shape)) if k != groups[0]]
    contract, batch = (
        (ours, [kept.index(k) for k in theirs]) for ours, theirs in (contract, batch)
    )
    return [_product(flow, lhs, pick(rhs, kept), contract, batch)]


def _product(flow, lhs, rhs, contract, batch):
    operands = (lhs, rhs)
    for i, j in zip(*contract, strict=True):
        _contract(flow, lhs, i, rhs, j)
    free = [
        [k for k in range(len(v.shape)) if k not in {*c, *b}]
        for v, c, b in zip(operands, contract, batch, strict=True)
    ]
    shared = [flow.join(lhs.axes[i], rhs.axes[j]) for i, j in zip(*batch, strict=True)]
    for columns in shared:
        if not (lhs.data and rhs.data):
            flow.uses.stacked += columns
        elif contract[0]:  # without a sum it is a gate
            flow.uses.heads += columns
    for number, value in enumerate(operands):
        if not value.is_param:
            continue
        other = operands[1 - number]
        windows, inputs = _windows([value.axes[k] for k in contract[number]])
        roles = roles_of(
            {
                "input": inputs,
                "window": windows,
                "output": [c for k in free[number] for c in value.axes[k]],
                "stacked": [c for k in batch[number] for c in value.axes[k]],
            }
        )
        if other.data:
            flow.uses.add("product", [value], roles)
        else:
            uses = flow.uses.of("product", value, roles)
            flow.uses.pending |= {use.path: use for use in uses}
            if not other.is_param:
                flow.uses.mixed |= set(value.paths)
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


def _contract(flow, lhs, i, rhs, j):
    flow.tie(lhs.axes[i], rhs.axes[j])
    columns = (*lhs.axes[i], *rhs.axes[j])
    sides = ((lhs, i), (rhs, j))
    if lhs.data and rhs.data:
        why = "a product of activations sums over them, and its scale may depend "
        flow.fix(columns, why + "on their number")
    elif not any(v.is_param and v.removed[k] == 0 for v, k in sides) and (
        lhs.paths or rhs.paths
    ):
        flow.fix(columns, _CONTRIBUTES)
    elif not all(np.isfinite(v.removed[k] or 0) for v, k in sides):
        flow.fix(columns, "a removed channel would be infinite or NaN")


def _conv(flow, eqn, operands):
    params, (lhs, rhs) = eqn.params, operands
    if params["batch_group_count"] != 1 or rhs.data:
        return None
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    lhs_batch, lhs_feature, *lhs_space = numbers.lhs_spec
    rhs_out, rhs_in, *rhs_space = numbers.rhs_spec
    out_batch, out_feature, *_ = numbers.out_spec
    for value, places in ((lhs, lhs_space), (rhs, rhs_space)):
        for k in places:
            flow.fix(value.axes[k], "they are positions of a convolution")
    outputs, stacked = rhs.axes[rhs_out], ()
    if groups == 1:
        _contract(flow, lhs, lhs_feature, rhs, rhs_in)
    else:
        group_in, within = _in_groups(flow, lhs.axes[lhs_feature], groups)
        group_out, last = _in_groups(flow, outputs, groups)
        flow.tie(group_in, group_out)
        if rhs.shape[rhs_in] > 1:
            flow.tie(within, rhs.axes[rhs_in])
            if rhs.removed[rhs_in] != 0:
                flow.fix(within, _CONTRIBUTES)
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
            flow.uses.stacked += stacked
    if rhs.is_param:
        roles = {
            "input": rhs.axes[rhs_in],
            "window": [c for k in rhs_space for c in rhs.axes[k]],
            "output": outputs,
            "stacked": stacked,
        }
        flow.uses.add("convolution", [rhs], roles_of(roles))
        flow.uses.add("embedding", [lhs])
    shape = tuple(eqn.outvars[0].aval.shape)
    axes, removed = [()] * len(shape), [0.0] * len(shape)
    axes[out_batch], axes[out_feature] = lhs.axes[lhs_batch], outputs
    removed[out_batch] = zero_or_unknown(lhs.removed[lhs_batch])
    removed[out_feature] = zero_or_unknown(rhs.removed[rhs_out])
    # What meets the kernel of a convolution is an activation.
    return [Value(shape, tuple(axes), tuple(removed), rhs.is_param)]


def _windows(axes):
    """Divides contracted columns in those of a window and those of channels.

    A window that is merged with the channels stands before them.
    """
    windows = [column for columns in axes for column in columns[:-1]]
    return windows, [column for columns in axes for column in columns[-1:]]


def _in_groups(flow, columns, groups):
    """Columns of an axis of n = groups * m channels as those of (groups, m)."""
    first, second = (), ()
    for column in columns:
        sizes = [groups, len(column.units) // groups]
        parts = flow.units.split(column, sizes, flow.equation)
        first, second = first + parts[0], second + parts[1]
    return first, second


RULES = {
    "dot_general": _dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _conv,
}
