"""Which axes of a parameter index its filters.

A filter is the set of weights that compute one output: `kernel[..., f]` of a
convolution or a Dense layer in Flax, `weight[f]` in Equinox, `kernel[:, h, d]` of a
query projection. Rank and name do not always tell. The functions of this package
therefore take the axes as an argument,

    filters = {"conv/kernel": (3,), "attention/query/kernel": (1, 2), ...}

with the path of each parameter that has filters. `lbi.groups(...).filters()` reads them
from the traced network.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from landscape.checks import path_name

Filters = Mapping[str, Sequence[int]]

_NO_KERNEL = re.compile(
    r"(^|/)(scale|offset|gamma|beta|cls|[^/]*(bias|embed|token|pos)[^/]*)$",
    re.IGNORECASE,
)
_ATTENTION = re.compile(r"(^|/)(query|key|value|out)(/|$)")


def entry_axes(
    params: Any, filters: Filters | None = None
) -> list[tuple[int, ...] | None]:
    """The axes that run over the entries of a filter, for each leaf of `params`.

    Args:
      params: a tree of arrays.
      filters: {path: axes that index the filters}; parameters without an entry have no
        filters. None decides by name and rank: biases, scales, statistics, embeddings
        and parameters of rank 0 and 1 have no filters, the filters of other parameters
        of rank 2 and 4 are on the last axis.

    Returns:
      One entry for each leaf: the other axes, or None if it has no filters.

    Raises:
      ValueError: if name and rank do not tell, or `filters` do not fit `params`.
    """
    leaves = {
        path_name(path): jnp.shape(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    if filters is None:
        filters = {path: _by_name(path, shape) for path, shape in leaves.items()}
    elif unknown := sorted(set(filters) - set(leaves)):
        raise ValueError(
            f"filters name {', '.join(unknown)}, but the parameters are "
            f"{', '.join(leaves)}."
        )
    return [_others(path, shape, filters.get(path)) for path, shape in leaves.items()]


def filter_size(shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    """Number of entries of one filter, from the axes of `entry_axes`."""
    return math.prod(shape[axis] for axis in axes)


def _others(path, shape, axes):
    if axes is None:
        return None
    rank = len(shape)
    is_known = isinstance(axes, Sequence)
    chosen = {axis % rank for axis in axes if -rank <= axis < rank} if is_known else ()
    if not is_known or not axes or len(chosen) < len(axes):
        raise ValueError(
            f"filters[{path!r}] must be different axes of a parameter of shape "
            f"{shape}, as a tuple, got {axes!r}."
        )
    return tuple(axis for axis in range(rank) if axis not in chosen)


def _by_name(path, shape):
    name = path.split("/")[-1]
    # Haiku calls a bias "b"; one of a convolution may have the shape (C, 1, 1).
    is_vector = sum(size > 1 for size in shape) <= 1
    if len(shape) < 2 or _NO_KERNEL.search(path) or (name == "b" and is_vector):
        return None
    known = name != "weight"  # PyTorch and Equinox: outputs first
    if known and (len(shape) == 2 or (len(shape) == 4 and not _ATTENTION.search(path))):
        return (-1,)
    raise ValueError(
        f"{path}: name and shape {shape} do not tell which axes index its filters. "
        "Pass filters=lbi.groups(apply_fn, params, inputs).filters(), or a dict, for "
        f"example {{{path!r}: (-1,), ...}}; parameters that it leaves out have no "
        "filters."
    )
