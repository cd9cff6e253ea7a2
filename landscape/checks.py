"""Checks of arguments that the modules of landscape/ share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

LossFn = Callable[[Any, Any], Array]


def check_floating(params: Any) -> None:
    """Raises ValueError if a parameter is not floating point and has no gradient."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError("params contains no arrays.")
    for path, leaf in leaves:
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"params must be floating point to have gradients, got {dtype} at "
                f"{path_name(path)!r}."
            )


def check_scalar(loss: Any) -> None:
    """Raises ValueError if a loss is not a floating-point scalar."""
    if not jax.tree_util.all_leaves([loss]):
        got = f"a {type(loss).__name__}"
    elif jnp.shape(loss) or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        got = f"{jnp.result_type(loss)} of shape {jnp.shape(loss)}"
    else:
        return
    raise ValueError(f"loss_fn must return a floating-point scalar, got {got}.")


def scalar_loss(loss_fn: LossFn, params: Any, batch: Any) -> Array:
    """Evaluates a loss.

    Args:
      loss_fn: maps (params, batch) to a scalar.
      params: a tree of arrays.
      batch: passed to `loss_fn`.

    Returns:
      The loss, ().

    Raises:
      ValueError: if the loss is not a floating-point scalar.
    """
    loss = loss_fn(params, batch)
    check_scalar(loss)
    return loss


def check_like(name: str, tree: Any, params: Any) -> None:
    """Checks that a tree has the structure and the shapes of the parameters.

    Args:
      name: names the tree in the message of the error.
      tree: what is checked.
      params: a tree of arrays.

    Raises:
      ValueError: if it does not.
    """
    expected, found = (jax.tree.structure(x) for x in (params, tree))
    if expected != found:
        raise ValueError(
            f"{name} must have the structure of params, {expected}, got {found}."
        )
    shapes = zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(tree), strict=True
    )
    for (path, param), leaf in shapes:
        if jnp.shape(param) != jnp.shape(leaf):
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} must have the shape "
                f"{jnp.shape(param)} of params, got {jnp.shape(leaf)}."
            )


def path_name(path: tuple[Any, ...]) -> str:
    """Formats a key path of jax.tree_util as "block/layer/kernel".

    The attribute `value` of a variable of Flax NNX is left out: the name is that of the
    same parameter in a dict.
    """
    if len(path) > 1 and isinstance(path[-2], jax.tree_util.DictKey):
        if path[-1] == jax.tree_util.GetAttrKey("value"):
            path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def check_values(
    name: str, tree: Any, holds: Callable[[Array], Array], what: str
) -> None:
    """Checks numbers that are known, as those of a function under `jax.jit` are not.

    Args:
      name: names the numbers in the message of the error.
      tree: arrays or numbers.
      holds: the condition, elementwise.
      what: the condition in words.

    Raises:
      ValueError: if an array does not satisfy the condition.
    """
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.core.Tracer):
            continue
        with jax.ensure_compile_time_eval():  # Under jit, a comparison is traced.
            known = bool(jnp.all(holds(leaf)))
        if not known:
            raise ValueError(f"{name} must be {what}.")
