"""Norms of trees whose squares float32 cannot hold.

Vanishing and exploding gradients have entries whose squares under- or overflow: below
1e-19 and above 1e19. They are divided by a power of two first, which rounds nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def rescale(tree: Any) -> tuple[Any, Array]:
    """Divides a tree by a power of two, so that its largest entry is in [1, 2).

    Args:
      tree: floating-point arrays, of at least float32.

    Returns:
      The scaled tree and the power, (); 1 if all entries are zero or one is not finite.
    """
    largest = [jnp.max(jnp.abs(x), initial=0) for x in jax.tree.leaves(tree)]
    largest = jnp.max(jnp.stack(largest))
    _, exponent = jnp.frexp(largest)
    power = jnp.ldexp(jnp.ones_like(largest), exponent - 1)
    power = jnp.where((largest > 0) & jnp.isfinite(largest), power, 1)
    return jax.tree.map(lambda x: x / power.astype(x.dtype), tree), power


def dot(left: Any, right: Any) -> Array:
    """The inner product of two trees, ()."""
    return sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), left, right)))


def norm(tree: Any) -> Array:
    """The Euclidean norm over all entries of a tree, ()."""
    scaled, power = rescale(tree)
    return power * jnp.sqrt(dot(scaled, scaled))


def widen(array: Any) -> Array:
    """An array as float32, or wider if it is."""
    array = jnp.asarray(array)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))
