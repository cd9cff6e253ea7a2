"""Penalties of the structure parameter: lasso and group lasso.

A penalty Omega cuts a parameter into groups and sets, with its proximal map

    prox(V) = argmin_G 1/2 ||G - V||^2 + Omega(G),

the groups to zero whose norm is at most lambda. Fu et al. 2020 (arXiv 2007.02010),
section 2: weights one by one in fully connected layers, filters in convolutions.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclasses.dataclass(frozen=True)
class L1:
    """Lasso: Omega(G) = lam sum |G_i|; every entry is a group of its own.

    Attributes:
      lam: the threshold lambda, >= 0.
    """

    lam: float = 1.0

    def __post_init__(self):
        object.__setattr__(self, "lam", _checked_lam(self.lam))

    def check(self, shape: tuple[int, ...]) -> None:
        """Fits every shape."""

    def norms(self, values: Array) -> Array:
        """|V_i|: of the shape of `values`."""
        return jnp.abs(values)

    def thresholds(self, shape: tuple[int, ...]) -> float:
        """The norm beyond which a group of a parameter of this shape is nonzero."""
        del shape
        return self.lam

    def prox(self, values: Array) -> Array:
        """sign(V) max(|V| - lam, 0)."""
        return jnp.sign(values) * jnp.maximum(jnp.abs(values) - self.lam, 0)

    def spread(self, groups: Array, shape: tuple[int, ...]) -> Array:
        """Gives every entry of a parameter the value of its group."""
        del shape
        return groups


@dataclasses.dataclass(frozen=True)
class GroupL2:
    """Group lasso: Omega(G) = lam sum_g ||G_g||_2.

    Attributes:
      lam: the threshold lambda, >= 0.
      group_axes: the axis, or axes, whose indices number the groups; a group is all
        that shares them. -1 makes the filters of a Flax convolution (kh, kw, in, out)
        and the units of a Dense layer (in, out); 1 the heads of an attention
        projection (features, heads, head_dim).
      size_scaled: multiplies lam by the root of the group's size, so that one lam fits
        layers of any width (the norm is then compared per entry).
    """

    lam: float = 1.0
    group_axes: int | tuple[int, ...] = -1
    size_scaled: bool = False

    def __post_init__(self):
        object.__setattr__(self, "lam", _checked_lam(self.lam))
        if np.ndim(self.group_axes):
            # Hashable also where a list was given.
            object.__setattr__(self, "group_axes", tuple(self.group_axes))

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError if a parameter of this shape has no such axes."""
        axes = np.atleast_1d(self.group_axes).tolist()
        rank = len(shape)
        inside = all(-rank <= axis < rank for axis in axes)
        if not inside or len({axis % rank for axis in axes}) < len(axes):
            raise ValueError(
                f"group_axes {self.group_axes} does not fit a parameter of shape "
                f"{tuple(shape)}."
            )

    def norms(self, values: Array) -> Array:
        """||V_g||_2: of the lengths of the group axes, in their order in `values`."""
        return jnp.sqrt(self._squares(values, keepdims=False))

    def thresholds(self, shape: tuple[int, ...]) -> float:
        """The norm beyond which a group of a parameter of this shape is nonzero."""
        size = math.prod(shape[axis] for axis in self._other_axes(len(shape)))
        return self.lam * math.sqrt(size) if self.size_scaled else self.lam

    def prox(self, values: Array) -> Array:
        """V_g max(0, 1 - lam / ||V_g||_2)."""
        lam = self.thresholds(values.shape)
        squares = self._squares(values, keepdims=True)
        # Twice `where`: a norm of zero, and its derivative, never meet a division.
        norms = jnp.sqrt(jnp.where(squares > 0, squares, 1))
        # The comparison of `norms` and `thresholds`: what is zero here is out there.
        entered = (squares > 0) & (norms > lam)
        return values * jnp.where(entered, 1 - lam / norms, 0)

    def spread(self, groups: Array, shape: tuple[int, ...]) -> Array:
        """Gives every entry of a parameter the value of its group."""
        expanded = jnp.expand_dims(groups, self._other_axes(len(shape)))
        return jnp.broadcast_to(expanded, shape)

    def _other_axes(self, rank):
        axes = {int(axis) % rank for axis in np.atleast_1d(self.group_axes)}
        return tuple(axis for axis in range(rank) if axis not in axes)

    def _squares(self, values, *, keepdims):
        axes = self._other_axes(values.ndim)
        return jnp.sum(jnp.square(values), axis=axes, keepdims=keepdims)


Penalty = L1 | GroupL2
# What `penalty=` takes; see `assign`.
Rules = str | Penalty | Mapping[str, str | Penalty | None] | None


def assign(rules: Rules, params: Any) -> dict[str, Penalty]:
    """The penalty of each parameter that has one.

    Args:
      rules: one of
        "auto": GroupL2 over the last axis for rank 4, L1 for rank 2, lam 1; none for
          other ranks (biases, normalisations, embeddings of positions).
        a penalty: that one for every parameter of rank 2 or more.
        a mapping of patterns to any of these or None: a parameter follows the first
          pattern that `re.search` finds in its path "block/layer/kernel", and has no
          penalty if none is found.
      params: a tree of arrays.

    Returns:
      {path: penalty}, in the order of the leaves.

    Raises:
      ValueError: if the rules are of another kind, or a penalty does not fit.
    """
    assigned = {}
    for path, leaf in named_leaves(params).items():
        penalty = _choose(rules, path, len(leaf.shape))
        if penalty is None:
            continue
        try:
            penalty.check(leaf.shape)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        assigned[path] = penalty
    return assigned


def with_lam(penalty: Penalty, lam: float) -> Penalty:
    """The same penalty with another lambda."""
    return dataclasses.replace(penalty, lam=lam)


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path: {"block/layer/kernel": leaf}."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_name(path): leaf for path, leaf in leaves}


def path_name(path: tuple[Any, ...]) -> str:
    """A key path of jax.tree_util as "block/layer/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _choose(rules, path, rank):
    if isinstance(rules, Mapping):
        for pattern, choice in rules.items():
            if re.search(pattern, path):
                explicit = isinstance(choice, Penalty)
                return choice if explicit else _choose(choice, path, rank)
        return None
    if rules is None:
        return None
    if isinstance(rules, Penalty):
        return rules if rank >= 2 else None
    if rules == "auto":
        return {2: L1(), 4: GroupL2()}.get(rank)
    raise ValueError(
        'a penalty is "auto", L1(...), GroupL2(...), None, or a mapping of patterns to '
        f"these, got {rules!r}."
    )


def _checked_lam(lam):
    if not lam >= 0:
        raise ValueError(f"lam must be >= 0, got {lam}.")
    return float(lam)
