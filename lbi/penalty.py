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
import optax
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

    def axes(self, rank: int) -> tuple[int, ...]:
        """The axes of a parameter that index its groups: all of them."""
        return tuple(range(rank))

    def norms(self, values: Array) -> Array:
        """|V_i|, with the shape of `values`."""
        return jnp.abs(values)

    def thresholds(self, shape: tuple[int, ...]) -> float:
        """The norm above which a group of a parameter of this shape is nonzero."""
        del shape
        return self.lam

    def prox(self, values: Array) -> Array:
        """sign(V) max(|V| - lam, 0), with the shape of `values`."""
        return jnp.sign(values) * jnp.maximum(jnp.abs(values) - self.lam, 0)

    def spread(self, groups: Array, shape: tuple[int, ...]) -> Array:
        """Repeats the value of each group over its entries.

        Args:
          groups: one value per group, shaped like `norms`.
          shape: of the parameter.
        """
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

    def axes(self, rank: int) -> tuple[int, ...]:
        """The axes of a parameter that index its groups, in ascending order."""
        return tuple(sorted(int(a) % rank for a in np.atleast_1d(self.group_axes)))

    def norms(self, values: Array) -> Array:
        """||V_g||_2, with the lengths of the group axes, in their order in `values`."""
        return jnp.sqrt(self._squares(values, keepdims=False))

    def thresholds(self, shape: tuple[int, ...]) -> float:
        """The norm above which a group of a parameter of this shape is nonzero."""
        size = math.prod(shape[axis] for axis in self._other_axes(len(shape)))
        return self.lam * math.sqrt(size) if self.size_scaled else self.lam

    def prox(self, values: Array) -> Array:
        """V_g max(0, 1 - lam / ||V_g||_2), with the shape of `values`."""
        lam = self.thresholds(values.shape)
        squares = self._squares(values, keepdims=True)
        # The inner `where` avoids a division by zero, also in the derivative.
        norms = jnp.sqrt(jnp.where(squares > 0, squares, 1))
        # The same comparison as between `norms` and `thresholds`.
        entered = (squares > 0) & (norms > lam)
        scale = jnp.where(entered, 1 - lam / norms, 0)
        return values * scale.astype(values.real.dtype)

    def spread(self, groups: Array, shape: tuple[int, ...]) -> Array:
        """Repeats the value of each group over its entries.

        Args:
          groups: one value per group, shaped like `norms`.
          shape: of the parameter.
        """
        expanded = jnp.expand_dims(groups, self._other_axes(len(shape)))
        return jnp.broadcast_to(expanded, shape)

    def _other_axes(self, rank):
        return tuple(axis for axis in range(rank) if axis not in self.axes(rank))

    def _squares(self, values, *, keepdims):
        axes = self._other_axes(values.ndim)
        # A sum of squares overflows or rounds in half precision.
        values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
        squares = jnp.square(values.real)
        if jnp.iscomplexobj(values):
            squares += jnp.square(values.imag)
        return jnp.sum(squares, axis=axes, keepdims=keepdims)


@dataclasses.dataclass(frozen=True)
class Layer:
    """What a parameter is; see `lbi.groups`.

    Attributes:
      kind: "convolution" or "product" for a kernel; "bias" (added to activations),
        "scale" (multiplied with them), "embedding" (looked up, or joined to them), or
        "other".
      output: axes of the output channels.
      input: axes of the input channels.
      window: axes of the window of a convolution.
      stacked: axes of several kernels in one array: scanned or vmapped layers, seeds.
      heads: those input or output axes that are the heads of attention.
    """

    kind: str
    output: tuple[int, ...] = ()
    input: tuple[int, ...] = ()
    window: tuple[int, ...] = ()
    stacked: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()

    def penalty(self) -> "Penalty | None":
        """Group lasso on the filters of a convolution, lasso on the other kernels."""
        if self.kind == "convolution":
            return GroupL2(group_axes=tuple(sorted(self.stacked + self.output)))
        return L1() if self.kind == "product" else None


class Layers(Mapping):
    """{path: Layer} of a network, hashable; also a penalty, see `lbi.groups`."""

    def __init__(self, layers: Mapping[str, Layer]):
        self._layers = dict(layers)

    def __getitem__(self, path):
        return self._layers[path]

    def __iter__(self):
        return iter(self._layers)

    def __len__(self):
        return len(self._layers)

    def __hash__(self):
        return hash(tuple(self._layers.items()))

    def __repr__(self):
        return f"Layers({self._layers})"

    def filters(self) -> dict[str, tuple[int, ...]]:
        """{path: axes that index the outputs} of each kernel of a layer.

        `landscape.surface.filter_normalized_direction` takes it.
        """
        return {
            path: tuple(sorted(layer.stacked + layer.output))
            for path, layer in self._layers.items()
            if layer.kind in ("convolution", "product")
        }


Penalty = L1 | GroupL2
# What an argument `penalty` accepts; see `assign`.
PenaltySpec = str | Penalty | Layers | Mapping[str, str | Penalty | None] | None


def assign(spec: PenaltySpec, params: Any) -> dict[str, Penalty]:
    """The penalty of each parameter that has one.

    Args:
      spec: one of
        layers of `lbi.groups`: GroupL2 on the filters of convolutions, L1 on the
          kernels of products, both with lam 1.
        "auto": the same by name and rank: L1 for rank 2, GroupL2 over the last axis for
          rank 4, which is taken as (height, width, in, out). Biases, scales,
          statistics, embeddings and parameters of rank 0 and 1 have no penalty. Neither
          name nor rank tells a scanned layer, or a transposed convolution of another
          name: for these use `lbi.groups`.
        a penalty: applies to every parameter of rank 2 or more, except what is a bias,
          scale, statistic or embedding by name.
        None: no penalty.
        a mapping of patterns to any of these: a parameter uses the first pattern that
          `re.search` finds in its path "block/layer/kernel", and has no penalty if no
          pattern matches.
      params: a tree of arrays.

    Returns:
      {path: penalty}, in the order of the leaves, without empty parameters.

    Raises:
      ValueError: if `spec` is of another kind, a pattern matches no path, "auto" cannot
        tell what a parameter is, or a penalty does not fit the shape or the dtype of a
        parameter.
    """
    assigned = {}
    _check_patterns(spec, params)
    for path, leaf in named_leaves(params).items():
        penalty = _choose(spec, path, np.shape(leaf))
        if penalty is None or 0 in np.shape(leaf):
            continue
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise ValueError(
                f"{path} has the dtype {leaf.dtype}; a penalty needs floating-point "
                "parameters."
            )
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
    """The leaves of a tree by path: {"block/layer/kernel": leaf}.

    Raises:
      ValueError: if two leaves have the same path, as {"a": {"b": x}, "a/b": y}.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {}
    for path, leaf in leaves:
        name = path_name(path)
        if name in named:
            raise ValueError(f"two parameters have the path {name}; rename one.")
        named[name] = leaf
    return named


def check_not_nan(path: str, leaf: Any) -> None:
    """Raises ValueError for a parameter with NaN, unless it is traced."""
    if isinstance(leaf, jax.core.Tracer) or not hasattr(leaf, "dtype"):
        return
    if jnp.issubdtype(leaf.dtype, jnp.inexact) and bool(jnp.isnan(leaf).any()):
        raise ValueError(f"{path} contains NaN.")


def path_name(path: tuple[Any, ...]) -> str:
    """Formats a key path of jax.tree_util as "block/layer/kernel".

    The attribute `value` of a variable of Flax NNX is left out: `nnx.Optimizer` passes
    variables to `init` and their arrays to `update`.
    """
    if len(path) > 1 and isinstance(path[-2], jax.tree_util.DictKey):
        if path[-1] == jax.tree_util.GetAttrKey("value"):
            path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def is_bias_name(path: str, shape: tuple[int, ...]) -> bool:
    """Whether a name of Flax, Haiku or Equinox says bias or scale.

    Haiku calls a bias "b", and so may be called a matrix.

    Args:
      path: "block/layer/kernel".
      shape: of the parameter.
    """
    if path.split("/")[-1] == "b":
        return sum(size > 1 for size in shape) <= 1
    return bool(_BIAS.search(path))


_BIAS = re.compile(r"(^|/)(scale|offset|gamma|beta|[^/]*bias[^/]*)$", re.IGNORECASE)
_EMBEDDING = re.compile(
    r"(^|/)([^/]*_)?(embed[^/]*|posemb[^/]*|tok|tokens?|pos|positions?)\d*(_[^/]*)?$",
    re.IGNORECASE,
)
# Collections of Flax and modules of Haiku, and names that only a vector has for sure.
_STATISTICS = re.compile(r"(^|/)(batch_stats|[^/]*_ema)/", re.IGNORECASE)
_VECTOR = re.compile(r"(^|/)(mean|var|average|hidden|counter|cls)$", re.IGNORECASE)


def _is_kernel_name(path, shape):
    if is_bias_name(path, shape) or _EMBEDDING.search(path):
        return False
    is_vector = sum(size > 1 for size in shape) <= 1
    return not (_STATISTICS.search(path) or (is_vector and _VECTOR.search(path)))


def _choose(spec, path, shape):
    if isinstance(spec, Layers):
        if path not in spec:
            raise ValueError(
                f"{path}: the traced layers do not contain it; they are "
                f"{', '.join(spec)}."
            )
        layer = spec[path]
        if layer.kind == "convolution" and not layer.output:
            raise ValueError(
                f"{path}: its output axis was lost, because an operation that lbi has "
                "no rule for changes this kernel before its convolution. Give its "
                f'penalty first, for example {{"^{re.escape(path)}$": '
                'lbi.GroupL2(group_axes=-1), ".": layers}.'
            )
        return layer.penalty()
    if isinstance(spec, Mapping):
        for pattern, choice in spec.items():
            if re.search(pattern, path):
                explicit = isinstance(choice, Penalty)
                return choice if explicit else _choose(choice, path, shape)
        return None
    if spec is None:
        return None
    if isinstance(spec, Penalty):
        return spec if len(shape) >= 2 and _is_kernel_name(path, shape) else None
    if spec == "auto":
        return _by_name(path, shape)
    raise ValueError(
        'a penalty must be "auto", L1(...), GroupL2(...), lbi.groups(...), None, or a '
        f"mapping of patterns to these, got {spec!r}."
    )


def _by_name(path, shape):
    """The penalty of a parameter whose layer only its name and shape can tell."""
    if len(shape) < 2 or not _is_kernel_name(path, shape):
        return None
    *_, name = path.split("/")
    if len(shape) == 2:
        return L1()
    # Kernels of attention, and of transposed convolutions: (kh, kw, out, in).
    other = re.search(r"(^|/)(query|key|value|out)(/|$)|transpose", path, re.IGNORECASE)
    if len(shape) == 4 and name != "weight" and not other:
        return GroupL2()
    pattern = "/".join(path.split("/")[-2:])
    raise ValueError(
        f'{path}: "auto" cannot tell the axes of shape {shape} by the name. Pass '
        f"penalty=lbi.groups(apply_fn, params, inputs), or patterns, for example "
        f'{{"{pattern}": lbi.GroupL2(group_axes=-1), ...}}.'
    )


def _check_patterns(spec, params):
    """Every pattern must match a parameter, also one that a mask hides."""
    if not isinstance(spec, Mapping) or isinstance(spec, Layers):
        return
    leaves = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda node: isinstance(node, optax.MaskedNode)
    )[0]
    _check_matched(spec, [path_name(path) for path, _ in leaves])


def _check_matched(spec, paths):
    for pattern, choice in spec.items():
        if isinstance(choice, Mapping) and not isinstance(choice, Layers):
            _check_matched(choice, [p for p in paths if re.search(pattern, p)])
    unmatched = [p for p in spec if not any(re.search(p, path) for path in paths)]
    if unmatched and paths:
        raise ValueError(
            f"no parameter matches the pattern {', '.join(unmatched)} of the penalty; "
            f"the paths are {', '.join(paths)}."
        )


def _checked_lam(lam):
    if isinstance(lam, jax.core.Tracer):
        raise ValueError(
            "lam must be a known number, because the penalty is static: make the "
            "optimizer outside of jax.jit and jax.vmap."
        )
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
