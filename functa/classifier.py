"""Classes from latents: an MLP, its loss, and a linear probe to compare with.

The two MLPs of the CIFAR-10 report that this project follows are hidden_sizes
(256, 128) and (256, 128, 64) with ReLU.

Axes: B batch, L latent size, K classes.
"""

from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn


class MLP(nn.Module):
    """Dense layers with dropout behind each activation: latents (..., L) -> logits.

    Attributes:
      hidden_sizes: widths of the hidden layers; () is a linear classifier.
      num_classes: K.
      activation: the name of a function of `flax.linen`.
    """

    hidden_sizes: Sequence[int]
    num_classes: int
    activation: str = "relu"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        dropout_rate: jax.typing.ArrayLike = 0.0,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Logits (..., K).

        Args:
          x: latents (..., L).
          dropout_rate: share of the hidden units set to zero, in [0, 1). It may be
            traced, unlike that of `flax.linen.Dropout`, so that networks with
            different rates can be trained under one vmap.
          key: PRNG key of dropout; None switches it off.
        """
        for i, size in enumerate(self.hidden_sizes):
            x = nn.Dense(size, name=f"linear_{i}")(x)
            x = getattr(nn, self.activation)(x)
            if key is not None:
                keep = jax.random.bernoulli(
                    jax.random.fold_in(key, i), 1 - dropout_rate, x.shape
                )
                x = jnp.where(keep, x / (1 - dropout_rate), 0)
        return nn.Dense(self.num_classes, name=f"linear_{len(self.hidden_sizes)}")(x)


def cross_entropy(
    logits: jax.Array, targets: jax.Array, *, double_softmax: bool = False
) -> jax.Array:
    """-sum_k targets_k log softmax(logits)_k for each example, (B,).

    Args:
      logits: (B, K).
      targets: probabilities of the classes, (B, K).
      double_softmax: takes softmax(logits) for the logits. The report's networks end
        in a softmax, and a cross-entropy that holds another one behind it can not
        fall below log(1 + (K - 1) / e): 1.46 for ten classes.
    """
    chex.assert_equal_shape([logits, targets])
    chex.assert_rank(logits, 2)
    if double_softmax:
        logits = nn.softmax(logits)
    return -jnp.sum(targets * nn.log_softmax(logits), axis=-1)  # (B,)


def smooth_labels(
    labels: jax.Array, num_classes: int, amount: jax.typing.ArrayLike
) -> jax.Array:
    """(1 - amount) one_hot(labels) + amount / K, (B, K) (Szegedy et al. 2016)."""
    return (1 - amount) * jax.nn.one_hot(labels, num_classes) + amount / num_classes


def mixup(
    key: jax.Array,
    latents: jax.Array,
    targets: jax.Array,
    largest: jax.typing.ArrayLike,
) -> tuple[jax.Array, jax.Array]:
    """Mixes every example with another one of the batch (mixup; Zhang et al. 2018).

    Differs from the source: the weight of the other example is uniform in
    [0, largest], one for each example, instead of Beta distributed, one for the batch.

    Args:
      key: PRNG key.
      latents: (B, L).
      targets: (B, K).
      largest: 0 returns the arguments, 0.5 mixes up to halves.

    Returns:
      Mixed latents (B, L) and targets (B, K).
    """
    weight = largest * jax.random.uniform(key, (len(latents), 1))

    def mix(x):
        # Batches are shuffled: the neighbour is a random other example.
        return (1 - weight) * x + weight * jnp.roll(x, 1, axis=0)

    return mix(latents), mix(targets)


def predict(
    apply_fn: Callable[[jax.Array], jax.Array],
    latents: jax.Array,
    *,
    batch_size: int = 1000,
) -> jax.Array:
    """The most likely class of each latent, int32 (N,), computed batch by batch."""
    return jax.lax.map(
        lambda latent: jnp.argmax(apply_fn(latent), axis=-1).astype(jnp.int32),
        latents,
        batch_size=min(batch_size, len(latents)),
    )


def linear_probe(
    latents: jax.Array,
    labels: jax.Array,
    num_classes: int,
    *,
    num_steps: int = 200,
    learning_rate: float = 0.05,
    weight_decay: float = 1e-4,
) -> Callable[[jax.Array], jax.Array]:
    """Fits logistic regression by Adam on all examples at once, from zero.

    Args:
      latents: (N, L), of unit variance.
      labels: (N,).
      num_classes: K.
      num_steps: updates, under a cosine schedule.
      learning_rate: of the first of them.
      weight_decay: decoupled, of the weights.

    Returns:
      A function from latents (..., L) to logits (..., K).
    """
    schedule = optax.cosine_decay_schedule(learning_rate, num_steps)
    optimizer = optax.adamw(schedule, weight_decay=weight_decay)
    kernel = jnp.zeros((latents.shape[-1], num_classes))
    params = {"kernel": kernel, "bias": jnp.zeros(num_classes)}

    def apply(params, x):
        return nn.Dense(num_classes).apply({"params": params}, x)

    def loss_fn(params):
        logits = apply(params, latents)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(carry, _):
        params, opt_state = carry
        updates, opt_state = optimizer.update(
            jax.grad(loss_fn)(params), opt_state, params
        )
        return (optax.apply_updates(params, updates), opt_state), None

    carry = params, optimizer.init(params)
    (params, _), _ = jax.lax.scan(step, carry, length=num_steps)
    return lambda x: apply(params, x)
