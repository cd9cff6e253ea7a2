"""Penalties of the structure parameter: lasso and group lasso.

A penalty Omega divides a parameter into groups. Its proximal map

    prox(V) = argmin_G 1/2 ||G - V||^2 + Omega(G)

sets those groups to zero whose norm is at most lambda. Fu et al. 2020 (arXiv
2007.02010), section 2, use single weights as groups in fully connected layers and
filters in convolutions.
"""

import dataclasses
import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclasses.dataclass(frozen=True)
class L1:
    """Lasso: Omega(G) = lam sum |G_i|; every entry is its own group.

    Attributes:
      lam: the threshold lambda, >= 0.
    """

    lam: float = 1.0

    def __post_init__(self):
        object.__setattr__(self, "lam", _checked_lam(self.lam))

    def check(self, shape: tuple[int, ...]) -> None:
        """Accepts every shape."""

    def norms(self, values: Array) -> Array:
        """|V_i|, with the shape of `values`."""
        return jnp.abs(values)

    def thresholds(self, shape: tuple[int, ...]) -> float:
        """The norm above which a group of a parameter of this shape is nonzero."""
        del shape
        return self.lam

    def prox(self, values: Array) -> Array:
        """sign(V) max(|V| - lam, 0)."""
        return jnp.sign(values) * jnp.maximum(jnp.abs(values) - self.lam, 0)

    def spread(self, groups: Array, shape: tuple[int, ...]) -> Array:
        """Repeats the value of each group over its entries."""
        del shape
        return groups


@dataclasses.dataclass(frozen=True)
class GroupL2:
    """Group lasso: Omega(G) = lam sum_g ||G_g||_2.

    Attributes:
      lam: the threshold lambda, >= 0.
      group_axes: the axis or axes that index the groups; a group holds all entries that
        share these indices. -1 selects the filters of a Flax convolution (kh, kw, in,
        out) and the units of a Dense layer (in, out); 1 selects the heads of an
        attention projection (features, heads, head_dim).
      size_scaled: whether to multiply lam by the square root of the group's size. The
        threshold then applies to the root mean square of a group, so that one lam suits
        layers of any width.
    """

    lam: float = 1.0
    group_axes: int | tuple[int, ...] = -1
    size_scaled: bool = False

    def __post_init__(self):
        object.__setattr__(self, "lam", _checked_lam(self.lam))
        if np.ndim(self.group_axes):
            # A list is converted, so that the penalty is hashable.
            object.__setattr__(self, "group_axes", tuple(self.group_axes))

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError if a parameter of this shape lacks these axes."""
        axes = np.atleast_1d(self.group_axes).tolist()
        rank = len(shape)
        inside = all(-rank <= axis < rank for axis in axes)
        if not inside or len({axis % rank for axis in axes}) < len(axes):
            raise ValueError(
                f"group_axes {self.group_axes} does not fit a parameter of shape "
                f"{tuple(shape)}."
            )

    def norms(self, values: Array) -> Array:
        """||V_g||_2, with the lengths of the group axes, in their order in `values`."""
        return jnp.sqrt(self._squares(values, keepdims=False))

    def thresholds(self, shape: tuple[int, ...]) -> float:
        """The norm above which a group of a parameter of this shape is nonzero."""
        size = math.prod(shape[axis] for axis in self._other_axes(len(shape)))
        return self.lam * math.sqrt(size) if self.size_scaled else self.lam

    def prox(self, values: Array) -> Array:
        """V_g max(0, 1 - lam / ||V_g||_2)."""
        lam = self.thresholds(values.shape)
        squares = self._squares(values, keepdims=True)
        # The inner `where` avoids a division by zero, also in the derivative.
        norms = jnp.sqrt(jnp.where(squares > 0, squares, 1))
        # The same comparison as between `norms` and `thresholds`.
        entered = (squares > 0) & (norms > lam)
        return values * jnp.where(entered, 1 - lam / norms, 0)

    def spread(self, groups: Array, shape: tuple[int, ...]) -> Array:
        """Repeats the value of each group over its entries."""
        expanded = jnp.expand_dims(groups, self._other_axes(len(shape)))
        return jnp.broadcast_to(expanded, shape)

    def _other_axes(self, rank):
        axes = {int(axis) % rank for axis in np.atleast_1d(self.group_axes)}
        return tuple(axis for axis in range(rank) if axis not in axes)

    def _squares(self, values, *, keepdims):
        axes = self._other_axes(values.ndim)
        return jnp.sum(jnp.square(values), axis=axes, keepdims=keepdims)


Penalty = L1 | GroupL2
# What an argument `penalty` accepts; see `assign`.
PenaltySpec = str | Penalty | Mapping[str, str | Penalty | None] | None


def assign(spec: PenaltySpec, params: Any) -> dict[str, Penalty]:
    """The penalty of each parameter that has one.

    Args:
      spec: one of
        "auto": GroupL2 over the last axis for rank 4, L1 for rank 2, both with lam 1;
        no
          penalty for other ranks (biases, normalizations, position embeddings).
        a penalty: applies to every parameter of rank 2 or more.
        None: no penalty.
        a mapping of patterns to any of these: a parameter uses the first pattern that
          `re.search` finds in its path "block/layer/kernel", and has no penalty if no
          pattern matches.
      params: a tree of arrays.

    Returns:
      {path: penalty}, in the order of the leaves.

    Raises:
      ValueError: if `spec` is of another kind, or a penalty does not fit a parameter.
    """
    assigned = {}
    for path, leaf in named_leaves(params).items():
        penalty = _choose(spec, path, len(leaf.shape))
        if penalty is None:
            continue
        try:
            penalty.check(leaf.shape)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        assigned[path] = penalty
    return assigned


def with_lam(penalty: Penalty, lam: float) -> Penalty:
    """A copy of the penalty with another lambda."""
    return dataclasses.replace(penalty, lam=lam)


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path: {"block/layer/kernel": leaf}."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_name(path): leaf for path, leaf in leaves}


def path_name(path: tuple[Any, ...]) -> str:
    """Formats a key path of jax.tree_util as "block/layer/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _choose(spec, path, rank):
    if isinstance(spec, Mapping):
        for pattern, choice in spec.items():
            if re.search(pattern, path):
                explicit = isinstance(choice, Penalty)
                return choice if explicit else _choose(choice, path, rank)
        return None
    if spec is None:
        return None
    if isinstance(spec, Penalty):
        return spec if rank >= 2 else None
    if spec == "auto":
        return {2: L1(), 4: GroupL2()}.get(rank)
    raise ValueError(
        'a penalty must be "auto", L1(...), GroupL2(...), None, or a mapping of '
        f"patterns to these, got {spec!r}."
    )


def _checked_lam(lam):
    if not lam >= 0:
        raise ValueError(f"lam must be >= 0, got {lam}.")
    return float(lam)


def __getattr__(name):
    # The old name, for one version.
    if name != "Rules":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}.")
    warnings.warn(
        f"{__name__}.Rules is now {__name__}.PenaltySpec.",
        DeprecationWarning,
        stacklevel=2,
    )
    return PenaltySpec
