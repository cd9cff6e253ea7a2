"""The matrix products of a SIREN and of its derivatives of any order.

Three products occur. The derivatives of each in its two arguments are the other two:

    forward    h, w -> h w
    backward   g, w -> g w^T
    weights    h, g -> sum over points and leading axes of h^T g

JAX can derive all of them from `jax.lax.dot_general`, with two disadvantages. It
computes the gradient of a kernel transposed; on a CPU, copying it into the right layout
took a fifth of a meta-learning step. It also offers no way to round the gradients
alone. This module therefore defines the three products as one primitive.

With `dtype="bfloat16"`, `backward` and `weights` round their operands to bfloat16. They
are two thirds of the products of a meta-learning step, and many machines compute them
in half the time. `forward` computes the values. It stays exact by default, because
rounding them lowers the quality of a field; a classifier can do without.

Axes: N points, K and M features of the input and of the output.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from functa.varying import vary_like


def matmul(
    h: jax.Array,
    w: jax.Array,
    *,
    dtype: str = "float32",
    round_values: bool = False,
) -> jax.Array:
    """Multiplies activations by a kernel; differentiable in both modes, to any order.

    Args:
      h: activations, (..., N, K).
      w: kernel, (K, M).
      dtype: "float32" or "bfloat16". The products of the derivatives round their
        operands to it; sums are never rounded. `jax.default_matmul_precision` sets the
        precision of products in float32.
      round_values: whether the product itself rounds its operands too.

    Returns:
      (..., N, M), in float32, or in float64 if an operand is float64.

    Raises:
      ValueError: if `dtype` has another value.

    Example:
      >>> import jax.numpy as jnp
      >>> from functa.matmul import matmul
      >>> matmul(jnp.ones((5, 2)), jnp.ones((2, 3))).shape
      (5, 3)
    """
    # Read the precision now: compilation may happen after the
    # `default_matmul_precision` context has exited.
    precision = jax.config.jax_default_matmul_precision
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be float32 or bfloat16; got {dtype!r}.")
    h, w = jnp.asarray(h), jnp.asarray(w)
    # As JAX's own products do.
    h, w = vary_like(h, w), vary_like(w, h)
    exact = jnp.promote_types(h.dtype, w.dtype)
    rounded = ("backward", "weights") + ("forward",) * round_values
    return _product_p.bind(
        h.astype(exact),
        w.astype(exact),
        kind="forward",
        rounded=rounded if dtype == "bfloat16" else (),
        precision=precision,
        sharding=None,
    )


_product_p = Primitive("siren_product")


def _multiply(a, b, *, kind, rounded, precision, sharding):
    """Computes the product that the primitive stands for.

    `sharding` is that of the result on a mesh with explicit axes; None derives it from
    the operands.
    """
    exact = a.dtype
    if kind in rounded:
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    if kind == "weights":
        contracted = (tuple(range(a.ndim - 1)),) * 2
    else:
        contracted = (a.ndim - 1,), (0 if kind == "forward" else 1,)
    return lax.dot_general(
        a,
        b,
        (contracted, ((), ())),
        precision=precision,
        preferred_element_type=exact,
        out_sharding=sharding,
    )


def _abstract_eval(a, b, **params):
    # The type has more than a shape: how the result is divided over a mesh.
    [result] = jax.make_jaxpr(functools.partial(_multiply, **params))(a, b).out_avals
    return result


def _transpose_first(cotangent, a, b, *, kind, **settings):
    settings["sharding"] = _sharding(a.aval)
    if kind == "weights":  # b holds activations; the cotangent has a kernel's shape.
        return _product_p.bind(b, cotangent, kind="backward", **settings)
    other = {"forward": "backward", "backward": "forward"}[kind]
    return _product_p.bind(cotangent, b, kind=other, **settings)


def _transpose_second(cotangent, a, b, *, kind, **settings):
    settings["sharding"] = _sharding(b.aval)
    if kind == "weights":
        return _product_p.bind(a, cotangent, kind="forward", **settings)
    pair = (a, cotangent) if kind == "forward" else (cotangent, a)
    return _product_p.bind(*pair, kind="weights", **settings)


def _sharding(aval):
    """How a derivative in a value of this type is divided: as the value."""
    return None if aval.sharding.mesh.empty else aval.sharding


def _batch(args, dims, *, kind, sharding, **settings):
    if kind != "weights" and dims[1] is None:
        activations = jnp.moveaxis(args[0], dims[0], 0)
        if sharding is not None:
            first = jax.typeof(activations).sharding.spec[0]
            spec = jax.sharding.PartitionSpec(first, *sharding.spec)
            sharding = jax.sharding.NamedSharding(sharding.mesh, spec)
        settings |= {"kind": kind, "sharding": sharding}
        return _product_p.bind(activations, args[1], **settings), 0
    # Each example has its own kernel or gradient of a kernel: JAX batches the product.
    product = functools.partial(_multiply, kind=kind, sharding=sharding, **settings)
    return jax.vmap(product, dims)(*args), 0


@functools.partial(
    jax.jit, static_argnames=("kind", "rounded", "precision", "sharding")
)
def _run(a, b, **params):
    return _product_p.bind(a, b, **params)


_product_p.def_impl(_run)
_product_p.def_abstract_eval(_abstract_eval)
ad.defbilinear(_product_p, _transpose_first, _transpose_second)
batching.primitive_batchers[_product_p] = _batch
mlir.register_lowering(_product_p, mlir.lower_fun(_multiply, multiple_results=False))


product = matmul  # The old name, for one version.
