"""Classification of latents: an MLP, its loss, and a linear probe as the baseline.

The student report whose experiments this project repeats (docs/report.md) uses two MLPs
with ReLU: hidden_sizes (256, 128) and (256, 128, 64).

Axes: B batch, L latent size, K classes.
"""

from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn


class MLP(nn.Module):
    """Dense layers with dropout after each activation: latents (..., L) -> logits.

    Attributes:
      hidden_sizes: widths of the hidden layers; () makes a linear classifier.
      num_classes: K.
      activation: name of a function in `flax.linen`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from functa.classifier import MLP
      >>> model = MLP(hidden_sizes=(8, 4), num_classes=10)
      >>> latents = jnp.ones((5, 16))
      >>> variables = model.init(jax.random.key(0), latents)
      >>> model.apply(variables, latents).shape
      (5, 10)

      Given a key, the model applies dropout:

      >>> key = jax.random.key(1)
      >>> model.apply(variables, latents, dropout_rate=0.5, key=key).shape
      (5, 10)
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
        """Returns the logits (..., K).

        Args:
          x: latents (..., L).
          dropout_rate: fraction of the hidden units set to zero, in [0, 1). Unlike the
            rate of `flax.linen.Dropout`, it may be a traced value. One vmap can
            therefore train networks with different rates.
          key: PRNG key of dropout; None disables dropout.
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
    """Computes -sum_k targets_k log softmax(logits)_k for each example.

    Args:
      logits: (B, K).
      targets: probabilities of the classes, (B, K).
      double_softmax: apply a softmax to the logits first. The report's networks end in
        a softmax, and its cross-entropy applies a second one. Such a loss cannot fall
        below log(1 + (K - 1) / e), which is 1.46 for ten classes.

    Returns:
      The loss of each example, (B,).
    """
    chex.assert_equal_shape([logits, targets])
    chex.assert_rank(logits, 2)
    if double_softmax:
        logits = nn.softmax(logits)
    return -jnp.sum(targets * nn.log_softmax(logits), axis=-1)  # (B,)


def smooth_labels(
    labels: jax.Array, num_classes: int, amount: jax.typing.ArrayLike
) -> jax.Array:
    """Computes (1 - amount) one_hot(labels) + amount / K (Szegedy et al. 2016).

    Args:
      labels: (B,).
      num_classes: K.
      amount: probability spread over all classes, in [0, 1].

    Returns:
      Probabilities of the classes, (B, K).
    """
    return (1 - amount) * jax.nn.one_hot(labels, num_classes) + amount / num_classes


def mixup(
    key: jax.Array,
    latents: jax.Array,
    targets: jax.Array,
    largest: jax.typing.ArrayLike,
) -> tuple[jax.Array, jax.Array]:
    """Mixes each example with another one of the batch (mixup; Zhang et al. 2018).

    This differs from the source. Each example draws its own weight, uniform in
    [0, largest]; the source draws one weight per batch from a Beta distribution.

    Args:
      key: PRNG key.
      latents: (B, ...), vectors or grids.
      targets: (B, K).
      largest: upper bound of the weight of the other example; 0 disables mixing.

    Returns:
      Mixed latents (B, ...) and targets (B, K).
    """
    weights = largest * jax.random.uniform(key, (len(latents), 1))

    def mix(x):
        weight = weights.reshape(-1, *[1] * (x.ndim - 1))
        # Batches are shuffled, so the next example is a random one.
        return (1 - weight) * x + weight * jnp.roll(x, 1, axis=0)

    return mix(latents), mix(targets)


def predict(
    apply_fn: Callable[[jax.Array], jax.Array],
    latents: jax.Array,
    *,
    batch_size: int = 1000,
) -> jax.Array:
    """Computes the most likely class of each latent, batch by batch.

    Args:
      apply_fn: maps one latent (*Z,) to logits (K,).
      latents: (N, *Z), vectors or grids.
      batch_size: number of latents classified at once, which limits the memory.

    Returns:
      Classes, int32 (N,).
    """
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
    """Fits a logistic regression with full-batch AdamW, starting at zero.

    Args:
      latents: (N, L), of unit variance.
      labels: (N,).
      num_classes: K.
      num_steps: number of updates.
      learning_rate: rate of the first update; a cosine schedule lowers it to zero.
      weight_decay: decoupled weight decay of kernel and bias.

    Returns:
      A function that maps latents (..., L) to logits (..., K).
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
