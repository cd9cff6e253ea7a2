"""Sine and cosine from one range reduction, for networks dominated by sines.

`jnp.sin` on a CPU is several times slower than the matrix products of a SIREN, and
every derivative of a sine layer evaluates it again. `sin` computes the sine and the
cosine together, and its derivatives of any order reuse both.

Method: Cody & Waite (1980) reduction by multiples of pi/2 in three parts, then one
even and one odd polynomial on [-pi/4, pi/4].
"""

import jax
import jax.numpy as jnp

# pi / 2 in three parts. The first two have 8 and 11 significant bits, so that their
# products with a quadrant index below 2^13 are exact in float32.
_PI_2_HIGH = 1.5703125
_PI_2_MIDDLE = 4.837512969970703e-4
_PI_2_LOW = 7.549789954891882e-8


def sin(x: jax.Array) -> jax.Array:
    """Computes the sine of float32 values, to within 2e-7 for |x| <= 1000.

    For larger |x| the error grows in proportion to |x|; use `jnp.sin` there.

    Args:
      x: float32, any shape, in radians. bfloat16 and float16 are computed in float32
        and rounded; float64 is no more exact than float32.

    Returns:
      sin(x), same shape and dtype.
    """
    return sincos(x)[0]


@jax.custom_jvp
def sincos(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes (sin(x), cos(x)) for |x| <= 1000; the derivatives reuse both."""
    dtype = jnp.result_type(x, 1.0)
    # The reduction would lose all digits of narrow types.
    x = jnp.asarray(x, jnp.promote_types(dtype, jnp.float32))
    quadrant = jnp.round(x * (2 / jnp.pi))
    r = ((x - quadrant * _PI_2_HIGH) - quadrant * _PI_2_MIDDLE) - quadrant * _PI_2_LOW
    z = r * r
    # Weighted least-squares fits on [0, (pi/4)^2], with errors of 2e-9 and 1e-10.
    odd = r + r * z * (-0.1666665066 + z * (0.00833197839 + z * -0.000194956019))
    even = (1 - 0.5 * z) + z * z * (
        0.04166664686 + z * (-0.00138873672 + z * 2.44384155e-05)
    )
    quadrant = quadrant.astype(jnp.int32)
    is_odd = (quadrant & 1) == 1
    sine = jnp.where(is_odd, even, odd)
    cosine = jnp.where(is_odd, odd, even)
    sine = jnp.where((quadrant & 2) == 0, sine, -sine)
    cosine = jnp.where(((quadrant + 1) & 2) == 0, cosine, -cosine)
    # Without the barrier, XLA evaluates the polynomials again in every consumer.
    return jax.lax.optimization_barrier((sine.astype(dtype), cosine.astype(dtype)))


@sincos.defjvp
def _sincos_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    sine, cosine = sincos(x)
    return (sine, cosine), (cosine * dx, -sine * dx)
