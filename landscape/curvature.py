"""Curvature of a loss: Hessian products, eigenvalues, trace, spectral density.

The vector products take a `loss_fn(params, batch)`. The other functions take `matvec`,
which multiplies a tree like the parameters by a symmetric matrix. To track the
sharpness during training:

    @jax.jit
    def sharpness(key, params, batch, vector):
        matvec = functools.partial(hessian_vector_product, loss_fn, params, batch)
        found = leading_eigenvalues(
            key, matvec, params, num_steps=10, initial_vector=vector
        )
        return found.values[0], jax.tree.map(lambda x: x[0], found.vectors)

Pass the second result as `vector` in the next call. Gradient descent is stable if the
learning rate times the sharpness is below 2. This bound does not apply to Adam: see
`preconditioned`. Make the parameters an argument of the jitted function: XLA would
treat captured parameters as constants and spend minutes on folding them. For data too
large for one batch use `mean_over_batches`:

    matvec = lambda v: mean_over_batches(
        lambda batch: hessian_vector_product(loss_fn, params, batch, v), batches
    )

Axes: n parameters in all, S Lanczos steps, R random vectors, K batches.
"""

import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from landscape.checks import (
    LossFn,
    check_floating,
    check_like,
    check_values,
    scalar_loss,
)
from landscape.norms import norm, widen

Matvec = Callable[[Any], Any]


def hessian_vector_product(
    loss_fn: LossFn, params: Any, batch: Any, vector: Any
) -> Any:
    """H v by forward-over-reverse differentiation (Pearlmutter 1994).

    The cost is about three gradients.

    Args:
      loss_fn: maps (params, batch) to a scalar.
      params: where the Hessian is evaluated.
      batch: passed to `loss_fn`.
      vector: v, a tree like `params`.

    Returns:
      A tree like `params`.

    Raises:
      ValueError: if the loss is not a scalar, or `vector` is not a tree like `params`.
    """
    vector = _cast_like("vector", vector, params)
    with jax.default_matmul_precision("highest"):
        gradient = jax.grad(lambda p: scalar_loss(loss_fn, p, batch))
        return jax.jvp(gradient, (params,), (vector,))[1]


def gauss_newton_vector_product(
    outputs_fn: Callable[[Any, Any], Any],
    loss_of_outputs: LossFn,
    params: Any,
    batch: Any,
    vector: Any,
) -> Any:
    """J^T H_L J v for a loss L(f(params)), with J the Jacobian of f (Schraudolph 2002).

    This is the Hessian without the curvature of f. It is positive semi-definite for a
    convex L, and equals the Fisher information if L is the cross-entropy of the logits
    f.

    Args:
      outputs_fn: f, maps (params, batch) to outputs of any structure. Those that are
        not floating point have no derivative and pass to L as they are.
      loss_of_outputs: L, maps (outputs, batch) to a scalar.
      params: where the matrix is evaluated.
      batch: passed to both functions.
      vector: v, a tree like `params`.

    Returns:
      A tree like `params`.

    Raises:
      ValueError: if the loss is not a scalar, or `vector` is not a tree like `params`.
    """
    vector = _cast_like("vector", vector, params)

    def split(params):
        whole = outputs_fn(params, batch)
        return jax.tree.map(lambda x: x if _is_inexact(x) else None, whole), whole

    def loss(outputs):
        merged = jax.tree.map(lambda x, o: x if o is None else o, whole, outputs)
        return scalar_loss(loss_of_outputs, merged, batch)

    with jax.default_matmul_precision("highest"):
        outputs, forward, whole = jax.linearize(split, params, has_aux=True)
        curved = jax.jvp(jax.grad(loss), (outputs,), (forward(vector),))[1]
        return jax.linear_transpose(forward, params)(curved)[0]


def preconditioned(matvec: Matvec, preconditioner: Any) -> Matvec:
    """Products with P^(-1/2) A P^(-1/2) for a diagonal P > 0.

    This symmetric matrix has the eigenvalues of P^-1 A, which decide the stability of
    the steps eta P^-1 g of an adaptive optimizer (Cohen et al. 2022, arXiv 2207.14484,
    section 3). Its largest eigenvalue is the preconditioned sharpness.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from landscape import curvature
      >>> hessian, preconditioner = jnp.array([8.0, 3.0]), jnp.array([4.0, 1.0])
      >>> matvec = curvature.preconditioned(lambda v: hessian * v, preconditioner)
      >>> found = curvature.leading_eigenvalues(
      ...     jax.random.key(0), matvec, jnp.ones(2), num_steps=2
      ... )
      >>> print(f"{found.values[0]:.3f}")  # 3 / 1, not 8 / 4
      3.000

    Args:
      matvec: product with a symmetric matrix A.
      preconditioner: the diagonal of P, a tree like the parameters, for example of
        `adam_preconditioner`.

    Returns:
      A function like `matvec`.

    Raises:
      ValueError: if an entry of P is not positive.
    """
    check_values("preconditioner", preconditioner, lambda x: x > 0, "positive")
    scale = jax.tree.map(lax.rsqrt, preconditioner)

    def product(vector):
        check_like("preconditioner", preconditioner, vector)
        scaled = jax.tree.map(lambda v, s: v * s.astype(v.dtype), vector, scale)
        return jax.tree.map(lambda x, s: x * s.astype(x.dtype), matvec(scaled), scale)

    return product


def adam_preconditioner(
    nu: Any,
    count: Any,
    *,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    eps_root: Any = 0.0,
) -> Any:
    """P of Adam, whose update is -eta P^-1 m with the mean m of the gradients.

    P = (1 - b1^t) (sqrt(nu / (1 - b2^t) + eps_root) + eps); the first factor is the
    correction of m (Cohen et al. 2022, arXiv 2207.14484, section 2).

    Args:
      nu: mean of the squared gradients, a tree like the parameters; with optax
        `optax.tree.get(opt_state, "nu")`.
      count: t >= 1, the number of updates that are in `nu`.
      b1: decay of m.
      b2: decay of `nu`.
      eps: epsilon of Adam, added outside the square root.
      eps_root: added inside the square root.

    Returns:
      The diagonal of P, a tree like `nu`.

    Raises:
      ValueError: if there was no update, or a decay is not below 1.
    """
    check_values("count", count, lambda x: x >= 1, "at least 1")
    for name, decay in (("b1", b1), ("b2", b2)):
        check_values(name, decay, _is_decay, "in [0, 1)")
    count = jnp.asarray(count, jnp.float32)
    first, second = 1 - b1**count, 1 - b2**count
    return jax.tree.map(lambda x: first * (jnp.sqrt(x / second + eps_root) + eps), nu)


def gradient_descent_bound(momentum: Any = 0.0, *, nesterov: bool = False) -> Any:
    """Learning rate times sharpness at which gradient descent becomes unstable.

    2 (1 + momentum), and with Nesterov's momentum 2 (1 + momentum) / (1 + 2 momentum)
    (Cohen et al. 2021, arXiv 2103.00065, appendix B), with the momentum of `optax.sgd`.

    Args:
      momentum: in [0, 1); a number or an array.
      nesterov: whether it is that of Nesterov.

    Returns:
      The bound, with the shape of `momentum`.

    Raises:
      ValueError: if the momentum is out of range.
    """
    check_values("momentum", momentum, _is_decay, "in [0, 1)")
    return 2 * (1 + momentum) / (1 + 2 * momentum if nesterov else 1)


def adam_bound(b1: Any = 0.9, *, nesterov: bool = False) -> Any:
    """Learning rate times preconditioned sharpness at which Adam becomes unstable.

    2 (1 + b1) / (1 - b1): 38 for b1 = 0.9, and 2, gradient descent's bound, for b1 = 0.
    It holds for a preconditioner that changes slowly (Cohen et al. 2022, arXiv
    2207.14484, section 3). Full-batch training stays near it.

    Args:
      b1: decay of the first moment, in [0, 1); a number or an array.
      nesterov: whether the momentum is that of Nesterov, as in NAdam.

    Returns:
      The bound, with the shape of `b1`.

    Raises:
      ValueError: if b1 is out of range.
    """
    check_values("b1", b1, _is_decay, "in [0, 1)")
    return gradient_descent_bound(b1, nesterov=nesterov) / (1 - b1)


def _is_decay(values):
    return (values >= 0) & (values < 1)


class Eigenpairs(NamedTuple):
    """Result of `leading_eigenvalues`; k = num + num_smallest.

    Attributes:
      values: (k,); the `num` largest in descending order, then the smallest, ascending.
      vectors: a tree like the parameters, with a leading axis k; of norm 1.
      residuals: |A v - value v|, (k,); the distance to the nearest eigenvalue is at
        most this, apart from the rounding of `matvec` and of float32, which is relative
        to the eigenvalue of largest magnitude.
    """

    values: Array
    vectors: Any
    residuals: Array


def leading_eigenvalues(
    key: Array,
    matvec: Matvec,
    params: Any,
    *,
    num: int = 1,
    num_smallest: int = 0,
    num_steps: int = 30,
    initial_vector: Any = None,
    start: Any = None,
) -> Eigenpairs:
    """The algebraically largest eigenvalues, and the smallest, by Lanczos' method.

    The matrix may be indefinite. The sharpness is the largest eigenvalue, even if a
    negative one has a larger magnitude. The largest eigenvalues are never
    overestimated; `residuals` measure their accuracy. Copies of a repeated eigenvalue
    appear only if the iteration continues after the first copy has converged.

    Example:
      >>> import functools, jax, jax.numpy as jnp
      >>> from landscape import curvature
      >>> loss_fn = lambda params, batch: 0.5 * jnp.sum(batch * params**2)
      >>> params, diagonal = jnp.ones(3), jnp.array([1.0, -4.0, 2.0])
      >>> matvec = functools.partial(
      ...     curvature.hessian_vector_product, loss_fn, params, diagonal
      ... )
      >>> found = curvature.leading_eigenvalues(
      ...     jax.random.key(0), matvec, params, num_steps=3
      ... )
      >>> print(f"{found.values[0]:.3f}")
      2.000

    Args:
      key: draws the initial vector, and a new one whenever the Krylov space is
        exhausted.
      matvec: product with a symmetric matrix. If its result is not finite, neither are
        the eigenvalues.
      params: a tree of the shapes and dtypes that `matvec` takes.
      num: number of eigenvalues from the upper end, >= 0.
      num_smallest: number of eigenvalues from the lower end, >= 0; at no extra cost.
      num_steps: S, number of products; the basis takes S times the memory of the
        parameters.
      initial_vector: a tree like `params`, of any norm, instead of a random one: the
        eigenvector of an earlier training step, or the sum of several.
      start: the old name of `initial_vector`, for one version.

    Returns:
      Eigenpairs, the `num` largest and then the `num_smallest` smallest.

    Raises:
      ValueError: if a number is out of range, a parameter is not floating point, or a
        tree is not like `params`.
    """
    product, size, dtype, unravel = _flatten(matvec, params)
    _check_steps(num_steps, size)
    if min(num, num_smallest) < 0 or not 1 <= num + num_smallest <= num_steps:
        raise ValueError(
            "num and num_smallest must be >= 0 and together between 1 and num_steps "
            f"({num_steps}), got {num} and {num_smallest}."
        )
    if start is not None:
        warnings.warn(
            "leading_eigenvalues(start=...) is now initial_vector.",
            DeprecationWarning,
            stacklevel=2,
        )
        initial_vector = start
    key, vector_key = jax.random.split(key)
    if initial_vector is None:
        first = jax.random.normal(vector_key, (size,), dtype)
    else:
        initial_vector = _cast_like("initial_vector", initial_vector, params)
        first = ravel_pytree(initial_vector)[0].astype(dtype)
    with jax.default_matmul_precision("highest"):
        basis, tridiagonal, remainder = _lanczos(key, product, first, num_steps)
        values, rotation = jnp.linalg.eigh(tridiagonal)
        places = [num_steps - 1 - i for i in range(num)]
        places += [num_smallest - 1 - i for i in range(num_smallest)]
        rotation = rotation[:, jnp.array(places)]
        return Eigenpairs(
            values=values[jnp.array(places)],
            vectors=jax.vmap(unravel)(rotation.T @ basis),
            residuals=remainder * jnp.abs(rotation[-1]),
        )


class Estimate(NamedTuple):
    """A mean over random vectors, (), and its standard error, ()."""

    mean: Array
    standard_error: Array


def trace(
    key: Array,
    matvec: Matvec,
    params: Any,
    *,
    num_matvecs: int,
    method: Literal["hutchinson", "hutch++"] = "hutchinson",
) -> Estimate:
    """Estimates the trace from products with random sign vectors.

    Hutchinson 1989: the mean of z^T A z, exact for a diagonal A. Hutch++ (Meyer et al.
    2021, arXiv 2010.09649, algorithm 1) uses a third of the products to find an
    orthonormal Q that approximates the dominant eigenspace of A, a third for tr(Q^T A
    Q), and the rest for Hutchinson's estimate on the complement of Q. It is more
    accurate if few eigenvalues make up most of the trace, and exact if Q spans the
    range of A. It stores Q, which takes `num_matvecs` / 3 times the memory of the
    parameters.

    Args:
      key: draws the signs.
      matvec: product with a symmetric matrix.
      params: a tree of the shapes and dtypes that `matvec` takes.
      num_matvecs: total number of products; at least 2 for hutchinson, 4 for hutch++.
      method: "hutchinson" or "hutch++".

    Returns:
      The unbiased estimate. Its standard error is that of Hutchinson's mean. For
      Hutch++ it covers the last part, the only random one once Q is drawn.

    Raises:
      ValueError: if `num_matvecs` is too small, `method` is unknown, or a parameter is
        not floating point.
    """
    if method not in ("hutchinson", "hutch++"):
        raise ValueError(f'method must be "hutchinson" or "hutch++", got {method!r}.')
    least = 2 if method == "hutchinson" else 4
    if num_matvecs < least:
        raise ValueError(
            f"{method} needs num_matvecs >= {least} for a standard error, got "
            f"{num_matvecs}."
        )
    product, size, dtype, _ = _flatten(matvec, params)
    num_sketched = 0 if method == "hutchinson" else num_matvecs // 3
    sketch_key, key = jax.random.split(key)

    def signs(key):
        return jax.random.rademacher(key, (size,), dtype)

    with jax.default_matmul_precision("highest"):
        known, project = 0.0, lambda vector: vector
        if num_sketched:
            sketch = _map_keys(lambda k: product(signs(k)), sketch_key, num_sketched)
            q = jnp.linalg.qr(sketch.T)[0].T  # (R, n)
            known = jnp.sum(lax.map(lambda row: row @ product(row), q))
            project = lambda vector: vector - (q @ vector) @ q  # noqa: E731

        def quadratic_form(key):
            vector = project(signs(key))
            return vector @ product(vector)

        samples = _map_keys(quadratic_form, key, num_matvecs - 2 * num_sketched)
        error = jnp.std(samples, ddof=1) / jnp.sqrt(jnp.asarray(samples.size, dtype))
        return Estimate(known + jnp.mean(samples), error)


class Quadrature(NamedTuple):
    """The spectrum as weighted points: the mean of f is sum(weights * f(nodes)).

    Attributes:
      nodes: approximate eigenvalues, (R, S).
      weights: (R, S), >= 0; they sum to 1.
    """

    nodes: Array
    weights: Array


def lanczos_quadrature(
    key: Array,
    matvec: Matvec,
    params: Any,
    *,
    num_samples: int = 10,
    num_steps: int = 80,
) -> Quadrature:
    """The distribution of all eigenvalues, by stochastic Lanczos quadrature.

    Golub & Welsch 1969; Ghorbani et al. 2019 (arXiv 1901.10159), here with random signs
    instead of Gaussian vectors. Started from z / sqrt(n), Lanczos' method returns a
    tridiagonal matrix. Its eigenvalues (nodes) and the squared first entries of its
    eigenvectors (weights) give z^T f(A) z / n exactly for polynomials f of degree up to
    2 S - 1.

    Args:
      key: draws the vectors.
      matvec: product with a symmetric matrix.
      params: a tree of the shapes and dtypes that `matvec` takes.
      num_samples: R, number of vectors, processed one after the other. 10 vectors with
        80 steps give a first impression.
      num_steps: S, number of products per vector.

    Returns:
      Nodes and weights; `spectral_density` smooths them.

    Raises:
      ValueError: if a number is out of range, or a parameter is not floating point.
    """
    product, size, dtype, _ = _flatten(matvec, params)
    _check_steps(num_steps, size)
    if num_samples < 1:
        raise ValueError(f"num_samples must be >= 1, got {num_samples}.")

    def one_sample(key):
        key, signs_key = jax.random.split(key)
        signs = jax.random.rademacher(signs_key, (size,), dtype)
        _, tridiagonal, _ = _lanczos(key, product, signs, num_steps)
        nodes, rotation = jnp.linalg.eigh(tridiagonal)
        return nodes, jnp.square(rotation[0])

    with jax.default_matmul_precision("highest"):
        nodes, weights = _map_keys(one_sample, key, num_samples)
    return Quadrature(nodes, weights / jnp.sum(weights))


def spectral_density(quadrature: Quadrature, grid: Array, *, sigma: float) -> Array:
    """Density of the quadrature: each node is a Gaussian that integrates to its weight.

    Args:
      quadrature: result of `lanczos_quadrature`.
      grid: eigenvalues at which to evaluate, (G,).
      sigma: width of the Gaussians, > 0, in the unit of the eigenvalues; 1% of their
        range is usual.

    Returns:
      Density per unit of eigenvalue, (G,); its integral over the line is 1.

    Raises:
      ValueError: if sigma is not positive, or the grid is not (G,).
    """
    check_values("sigma", sigma, lambda x: x > 0, "> 0")
    nodes, weights = quadrature.nodes.ravel(), quadrature.weights.ravel()
    grid = jnp.asarray(grid, nodes.dtype)
    if grid.ndim != 1:
        raise ValueError(f"grid must be (G,), got shape {grid.shape}.")
    bells = jax.scipy.stats.norm.pdf(
        grid[:, None], loc=nodes[None, :], scale=jnp.full((1, 1), sigma, nodes.dtype)
    )
    return jnp.sum(bells * weights[None, :], axis=1)


def sam_sharpness(loss_fn: LossFn, params: Any, batch: Any, radius: float) -> Array:
    """Increase of the loss after one step of length `radius` along its gradient.

    L(w + radius g / |g|) - L(w), the first-order approximation of the largest increase
    in a ball, as in sharpness-aware minimization (Foret et al. 2021, arXiv 2010.01412,
    eq. 2).

    Args:
      loss_fn: maps (params, batch) to a scalar.
      params: w, a tree of floating-point arrays. Arrays narrower than float32 reach
        `loss_fn` as float32.
      batch: passed to `loss_fn`.
      radius: Euclidean length over all parameters together, > 0.

    Returns:
      (); 0 if the gradient is zero.

    Raises:
      ValueError: if the loss is not a scalar, a parameter is not floating point, or the
        radius is not positive or not one number.
    """
    if jnp.shape(radius):
        raise ValueError(
            f"radius must be one number, got shape {jnp.shape(radius)}; use jax.vmap."
        )
    if not isinstance(radius, jax.core.Tracer) and not radius > 0:
        raise ValueError(f"radius must be > 0, got {radius}.")
    check_floating(params)
    params = jax.tree.map(widen, params)
    with jax.default_matmul_precision("highest"):
        loss, grads = jax.value_and_grad(lambda p: scalar_loss(loss_fn, p, batch))(
            params
        )
        length = norm(grads)
        # First the unit gradient: radius / length may be too large for float32.
        length = jnp.where(length == 0, 1, length)
        uphill = jax.tree.map(
            lambda p, g: p + (radius * (g / length)).astype(p.dtype), params, grads
        )
        return scalar_loss(loss_fn, uphill, batch) - loss


def mean_over_batches(function: Callable[[Any], Any], batches: Any) -> Any:
    """Mean of function(batch) over batches, processed one at a time to save memory.

    Args:
      function: maps a batch to arrays of any structure: a loss, a gradient, H v.
      batches: K batches of equal size, a tree of leaves (K, B, ...).

    Returns:
      The average, with the structure of the result of `function`.

    Raises:
      ValueError: if there is no batch, or the leaves have different numbers of batches.
    """
    counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batches)}
    if len(counts) != 1 or counts <= {(), (0,)}:
        raise ValueError(
            "the leaves of batches must share a first axis, the number of batches; got "
            f"{sorted(counts)}."
        )
    [[count]] = counts
    one = jax.eval_shape(function, jax.tree.map(lambda x: x[0], batches))

    # In 16 bits a sum of many batches would stop growing, or overflow.
    def add(total, batch):
        return jax.tree.map(lambda t, x: t + widen(x), total, function(batch)), None

    zeros = jax.tree.map(lambda x: widen(jnp.zeros(x.shape, x.dtype)), one)
    total, _ = lax.scan(add, zeros, batches)
    means = jax.tree.map(lambda t: t / count, total)
    return jax.tree.map(
        lambda m, x: m.astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else m,
        means,
        one,
    )


def _cast_like(name, tree, params):
    check_floating(params)
    check_like(name, tree, params)
    return jax.tree.map(lambda x, p: jnp.asarray(x, jnp.result_type(p)), tree, params)


def _is_inexact(array):
    return jnp.issubdtype(jnp.result_type(array), jnp.inexact)


def _check_steps(num_steps, size):
    if not 1 <= num_steps <= size:
        raise ValueError(
            f"num_steps must be between 1 and the number of parameters ({size}), got "
            f"{num_steps}."
        )


def _map_keys(function, key, num):
    """Stacks function(key) for `num` keys, evaluated one after the other."""
    # JAX reports key reuse for a loop over an array of keys under vmap.
    return lax.map(lambda i: function(jax.random.fold_in(key, i)), jnp.arange(num))


def _flatten(matvec, params):
    """`matvec` on vectors (n,), n, their dtype, and vector -> tree."""
    check_floating(params)
    flat, unravel_flat = ravel_pytree(params)
    # The recurrence needs at least float32, whatever the dtype of the parameters.
    dtype = jnp.promote_types(flat.dtype, jnp.float32)

    def unravel(vector):
        return unravel_flat(vector.astype(flat.dtype))

    def product(vector):
        result = matvec(unravel(vector))
        check_like("the result of matvec", result, params)
        return ravel_pytree(result)[0].astype(dtype)

    return product, flat.size, dtype, unravel


# The recurrence of matfree divides by zero when the Krylov space is exhausted, which
# happens when the initial vector is a converged eigenvector.
def _lanczos(key, product, first, num_steps):
    """Lanczos' recurrence with full reorthogonalization.

    Returns:
      The basis (S, n), the tridiagonal matrix (S, S) and the norm of the remainder, ().
      When the Krylov space is exhausted, the recurrence continues from a random vector
      orthogonal to the basis. It finds new directions, which have no weight in the
      quadrature of the first vector.
    """
    eps = jnp.finfo(first.dtype).eps

    def orthogonalize(vector, basis):
        # Two passes are necessary and sufficient (Parlett 1998, section 6.9).
        for _ in range(2):
            vector = vector - (basis @ vector) @ basis
        return vector

    def coupling(vector, scale):
        # Below rounding error the remainder has no meaningful direction. Replacing it
        # by zero changes no eigenvalue by more than this norm.
        length = norm(vector)
        return jnp.where(length <= 10 * eps * scale, 0, length)

    def step(carry, index):
        basis, left, scale = carry
        beta = coupling(left, scale)

        # Drawn in every step: under vmap both branches run, and JAX reports a key that
        # is used inside one of them as reused. The cost is small next to the product.
        step_key = jax.random.fold_in(key, index)
        fresh = jax.random.normal(step_key, left.shape, left.dtype)

        def begin_again():
            direction = orthogonalize(fresh, basis)
            return direction / norm(direction)

        vector = lax.cond(beta == 0, begin_again, lambda: left / beta)
        basis = basis.at[index].set(vector)
        image = product(vector)
        scale = jnp.maximum(scale, norm(image))
        return (basis, orthogonalize(image, basis), scale), (vector @ image, beta)

    basis = jnp.zeros((num_steps, first.size), first.dtype)
    carry = basis, first, jnp.zeros([], first.dtype)
    indices = jnp.arange(num_steps)
    (basis, left, scale), (diagonal, betas) = lax.scan(step, carry, indices)
    off_diagonal = jnp.diag(betas[1:], 1)
    tridiagonal = jnp.diag(diagonal) + off_diagonal + off_diagonal.T
    return basis, tridiagonal, coupling(left, scale)
