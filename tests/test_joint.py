"""functa.joint: the outer loss with labels, against NumPy and finite differences."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functa
from functa import joint

pytestmark = pytest.mark.usefixtures("unoptimized")

# Images, values of an image, latent entries, classes, inner steps.
B, N, L, K, S = 6, 7, 3, 4, 2


def problem():
    """A linear field z -> A z + b and a linear head, with their data."""
    rng = np.random.default_rng(0)
    point = {
        "A": rng.normal(size=(N, L)),
        "b": rng.normal(size=N),
        "rates": rng.uniform(0.1, 0.5, size=(S, L)),
        "W": rng.normal(size=(L, K)),
    }
    return point, rng.normal(size=(B, N)), rng.integers(K, size=B)


def losses_by_hand(point, targets, labels):
    """Reconstruction loss and cross-entropy after S steps, in NumPy alone."""
    A, b, W = point["A"], point["b"], point["W"]
    rec, ce = [], []
    for y, label in zip(targets, labels, strict=True):
        z = np.zeros(L)
        for rate in point["rates"]:
            z = z - rate * (2 / N * A.T @ (A @ z + b - y))
        rec.append(np.mean((A @ z + b - y) ** 2))
        logits = z @ W
        ce.append(np.log(np.exp(logits).sum()) - logits[label])
    return np.array([np.mean(rec), np.mean(ce)])


def differences(point, targets, labels, epsilon=1e-5):
    """Gradients of the two losses by central differences: (2, *shape) per leaf."""
    grads = {}
    for name, values in point.items():
        grads[name] = np.zeros((2, *values.shape))
        for index in np.ndindex(values.shape):
            moved = []
            for sign in (1, -1):
                changed = values.copy()
                changed[index] += sign * epsilon
                moved.append(losses_by_hand(point | {name: changed}, targets, labels))
            grads[name][:, *index] = (moved[0] - moved[1]) / (2 * epsilon)
    return grads


def apply_fn(variables, coords, latent):
    return variables["params"]["A"] @ latent + variables["params"]["b"]


def outer_loss(point, targets, labels, **options):
    def task_loss(latents, labels):
        logits = latents @ point["W"]
        picked = jnp.take_along_axis(logits, labels[:, None], 1)[:, 0]
        return jax.nn.logsumexp(logits, -1) - picked, logits

    return joint.joint_loss(
        apply_fn,
        {"A": point["A"], "b": point["b"]},
        jnp.zeros(L),
        jnp.zeros((N, 1)),
        targets,
        task_loss,
        labels,
        learning_rate=point["rates"],
        num_steps=S,
        **options,
    )


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, (1.0, 1.0)),
        ({"reconstruction_weight": 0.5, "label_weight": 0.25}, (0.5, 0.25)),
        ({"label_weight": 0.3, "num_groups": 3}, (1.0, 0.3)),
        ({"label_weight": 0.0}, (1.0, 0.0)),
        ({"reconstruction_weight": 0.0}, (0.0, 1.0)),
        ({"normalize": False, "reconstruction_weight": 2.0}, (2.0, 1.0)),
    ],
)
def test_gradient_through_the_inner_loop_is_that_of_numpy(float64, options, weights):
    point, targets, labels = problem()
    rec, ce = losses_by_hand(point, targets, labels)
    expected = differences(point, targets, labels)
    grad_fn = jax.jit(
        jax.value_and_grad(
            lambda point: outer_loss(point, targets, labels, **options), has_aux=True
        )
    )
    (value, info), grads = grad_fn(point)
    scale = (1, 1) if "normalize" in options else (rec, ce)
    head_weights = (weights[0], 1.0)  # The head has no weight of its own.
    for name, by_hand in expected.items():
        w = head_weights if name == "W" else weights
        total = w[0] * by_hand[0] / scale[0] + w[1] * by_hand[1] / scale[1]
        # Truncation is O(epsilon^2) = 1e-10, cancellation 1e-16 / epsilon = 1e-11.
        np.testing.assert_allclose(
            grads[name], total, rtol=1e-6, atol=1e-8, err_msg=name
        )
    np.testing.assert_allclose(info.fit.loss[:, -1].mean(), rec, rtol=1e-12)
    np.testing.assert_allclose(info.task_loss.mean(), ce, rtol=1e-12)
    # Groups keep the order of the signals.
    np.testing.assert_allclose(info.aux, info.latents @ point["W"], rtol=1e-12)
    expected_value = np.dot(head_weights, np.divide((rec, ce), scale))
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)


def test_without_labels_the_gradient_is_that_of_meta_learning(float64):
    point, targets, labels = problem()
    (expected, rate_grads), info = jax.jit(
        lambda point: functa.meta_gradient(
            apply_fn,
            {name: point[name] for name in "Ab"},
            jnp.zeros(L),
            jnp.zeros((N, 1)),
            targets,
            learning_rate=point["rates"],
            num_steps=S,
        )
    )(point)
    expected["rates"] = rate_grads
    loss = info.loss[:, -1].mean()
    for normalize in (False, True):
        grads = jax.jit(
            jax.grad(
                lambda point, normalize=normalize: outer_loss(
                    point, targets, labels, label_weight=0.0, normalize=normalize
                )[0]
            )
        )(point)
        grads.pop("W")
        scale = loss if normalize else 1
        scaled = {name: grad / scale for name, grad in expected.items()}
        chex.assert_trees_all_close(grads, scaled, rtol=1e-10)


def test_normalized_sum_does_not_depend_on_the_scales():
    def grad(scales, x):
        return jax.grad(
            lambda x: joint.normalized_sum(
                [scales[0] * x**2, scales[1] * jnp.exp(x)], [0.5, 2.0]
            )
        )(x)

    for scales in ((1.0, 1.0), (1e-6, 1e3)):
        np.testing.assert_allclose(grad(scales, 3.0), 0.5 * 2 / 3 + 2.0, rtol=1e-6)
    # A loss of zero gives no NaN, and a weight of zero leaves a loss out.
    assert grad((0.0, 1.0), 3.0) == pytest.approx(2.0)
    left_out = jax.grad(lambda x: joint.normalized_sum([x, jnp.sqrt(x)], [1.0, 0.0]))
    assert left_out(0.0) >= 0


def test_scaled_gradient():
    x = jnp.array([1.5, -2.0])
    for factor in (0.0, 0.25, 1.0):
        value, grad = jax.value_and_grad(
            lambda x, factor=factor: jnp.sum(joint.scale_gradient(x, factor) ** 2)
        )(x)
        assert value == 6.25
        np.testing.assert_allclose(grad, factor * 2 * x)


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_weights_may_follow_a_schedule(weight):
    """A traced weight, 0 included, does what the number does."""

    def gradient(weight):
        def loss(x):
            y = joint.scale_gradient(x, weight)
            return joint.normalized_sum([3 * y**2, 5 * x], [1.0, weight])

        return jax.value_and_grad(loss)(4.0)

    # d log(3 y^2) = 2 / x dy and d log(5 x) = 1 / x.
    expected = 1 + weight, weight * 2 / 4 + weight * 1 / 4
    for found in gradient(weight), jax.jit(gradient)(weight):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_groups_that_do_not_divide_the_batch_are_refused():
    point, targets, labels = problem()
    with pytest.raises(ValueError, match="must divide the batch of 6, got 4"):
        outer_loss(point, targets, labels, num_groups=4)
