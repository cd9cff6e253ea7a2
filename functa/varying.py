"""Values that differ between the devices of `jax.shard_map`.

By default JAX knows over which axes of the mesh a value varies. The gradient in a value
that is the same on all devices is then the sum over the devices. This is right for
weights, but not for a latent that each device fits to a signal of its own. Outside of
`jax.shard_map`, and with `check_vma=False`, the functions return their arguments.
"""

from collections.abc import Callable
from typing import Any

import jax


def vary_like(x: jax.Array, *others: Any) -> jax.Array:
    """Returns x, varying over the axes over which it or any of the others varies.

    Args:
      x: an array.
      others: trees of arrays; other leaves are ignored.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return x
    leaves = [leaf for leaf in jax.tree.leaves(others) if isinstance(leaf, jax.Array)]
    names = _axes(jax.typeof(x))
    missing = frozenset().union(*(_axes(jax.typeof(leaf)) for leaf in leaves)) - names
    return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x


def vary_latent(
    field: Callable[[jax.Array], jax.Array], latent: jax.Array, *others: Any
) -> jax.Array:
    """Returns the latent, varying as the prediction of the field and the others.

    Args:
      field: maps a latent to a prediction.
      latent: (*Z).
      others: trees of what the fit of the latent depends on, such as the signal.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return latent
    # Its weights may vary. The prediction itself is not used and costs nothing.
    return vary_like(latent, others, field(latent))


def _axes(aval):
    return aval.manual_axis_type.varying
