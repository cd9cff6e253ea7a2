"""What the tests of channels found by tracing share."""

import jax
import numpy as np

from lbi import channels, pruning


def conv(x, kernel, **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=numbers, **options
    )


def check(graph, keep, params, x, apply_fn, smaller_fn=None):
    """The masked network equals the smaller one, and something was removed."""
    masks = channels.channel_masks(keep, graph, params)
    thinned = pruning.thin(params, keep, graph)
    removed = sum(leaf.size for leaf in jax.tree.leaves(thinned))
    kept = sum(int(mask.sum()) for mask in jax.tree.leaves(masks))
    assert removed == kept < sum(leaf.size for leaf in jax.tree.leaves(params))
    masked = jax.jit(apply_fn)(pruning.apply_masks(params, masks), x)
    smaller = jax.jit(smaller_fn or apply_fn)(thinned, x)
    # Float32 rounding of the same sums in another order.
    np.testing.assert_allclose(smaller, masked, rtol=1e-4, atol=1e-5)
    assert np.abs(jax.jit(apply_fn)(params, x) - masked).max() > 1e-3
    return thinned
