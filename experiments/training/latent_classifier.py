"""Classifiers of latents in other commands: trained ones, and new ones for a score.

Axes: N latents, *Z shape of a latent, K classes, D features.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common import devices, runs, settings
from experiments.networks import heads
from functa import classifier, functaset

# Name of the digest of mean and deviation among the inputs of a classifier.
NORMALIZATION = "normalization of the functaset"


class LatentClassifier(NamedTuple):
    """A network on latents, its weights, and how its latents are normalized."""

    head: heads.Head
    params: Any
    mean: np.ndarray
    std: np.ndarray

    @property
    def sha256(self) -> str:
        """The hash of the weights."""
        return functaset.hash_params(self.params)

    def normalize(self, latents: np.ndarray) -> np.ndarray:
        """(latent - mean) / std, float32 (N, *Z)."""
        return np.float32((latents - self.mean) / self.std)

    def predict(self, latents: np.ndarray) -> np.ndarray:
        """The most likely class of each latent (N, *Z), (N,)."""
        return self._evaluate(latents, 0).argmax(-1)

    def features(self, latents: np.ndarray) -> np.ndarray:
        """What the last layer reads for each latent (N, *Z): (N, D)."""
        return self._evaluate(latents, 1)

    def _evaluate(self, latents, number):
        return devices.in_batches(
            lambda x: _evaluate(self.head, self.params, x)[number],
            self.normalize(latents),
        )


@functools.partial(jax.jit, static_argnums=0)
def _evaluate(head, params, latents):
    return heads.with_features(lambda x: head.apply(params, x), latents)


def load(
    path: str | Path,
    *,
    num_classes: int,
    latent_shape: tuple[int, ...],
    dataset: str,
    params_sha256: str,
) -> LatentClassifier:
    """The classifier of a finished run of classify_functa.

    Args:
      path: the run folder.
      num_classes: K.
      latent_shape: *Z.
      dataset: name of the data set of the latents.
      params_sha256: hash of the weights of the field that made the latents.

    Raises:
      FileNotFoundError: if the run is not finished, or if its functaset is gone.
      ValueError: if it classifies something else than these latents, or if its
        functaset is damaged or has another mean and deviation than in training.
    """
    path = Path(path)
    runs.load_summary(path)
    config, state = runs.load_checkpoint(path)
    if config.get("experiment") != "classify_functa" or config.features != "latents":
        raise ValueError(f"{path} is not a run of classify_functa on latents.")
    [seed] = config.seeds
    # The latents, of which there may be many copies, are not needed.
    source = functaset.load_functaset(
        config.functaset.replace("{seed}", str(seed)), with_signals=False
    )
    # The file may have been written again, with other steps or images.
    known = runs.load_inputs(path).get(NORMALIZATION)
    if known not in (None, functaset.hash_params([source.mean, source.std])):
        raise ValueError(
            f"{path} was trained on another version of the functaset "
            f"{config.functaset}."
        )
    if source.params_sha256 != params_sha256:
        raise ValueError(f"{path} classifies the latents of other weights.")
    classified = source.config.get("dataset")
    if classified != dataset:
        raise ValueError(
            f"{path} classifies {classified}, and the latents here are "
            f"those of {dataset}."
        )
    grid = config.crop
    if not grid and not source.config.get("padding"):
        grid = source.latent.shape[1:-1]
    if grid and tuple(grid) != latent_shape[:-1]:
        raise ValueError(
            f"{path} classifies grids {tuple(grid)}, and the grids here are "
            f"{latent_shape[:-1]}."
        )
    chosen = int(np.argmax(state["best"]["accuracy"]))
    params = jax.tree.map(lambda x: x[chosen], state["best"]["params"])
    head = heads.make_head(config.model.to_dict(), num_classes, latent_shape)
    mean, std = np.zeros(1, np.float32), np.ones(1, np.float32)
    if config.normalize:
        mean, std = source.mean, np.where(source.std > 0, source.std, 1)
    with settings.blamed_on("classifier"):
        jax.eval_shape(head.apply, params, jnp.zeros((1, *latent_shape)))
    return LatentClassifier(head, params, mean, std)


@functools.partial(
    jax.jit, static_argnames=("head", "num_steps", "batch_size", "learning_rate")
)
def fit(
    key: jax.Array,
    head: heads.Head,
    latents: np.ndarray,
    labels: np.ndarray,
    *,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
) -> Any:
    """Trains a network by AdamW with a cosine schedule; returns its weights.

    Args:
      key: PRNG key of the weights, the batches and the regularization.
      head: the network.
      latents: normalized latents, (N, *Z).
      labels: (N,).
      num_steps: number of updates.
      batch_size: latents of an update, drawn with replacement.
      learning_rate: the rate of the first update.
    """
    schedule = optax.cosine_decay_schedule(learning_rate, num_steps)
    optimizer = optax.adamw(schedule, weight_decay=0.01)
    key_init, key_steps = jax.random.split(key)

    def loss_fn(params, latents, labels, key):
        targets = classifier.smooth_labels(labels, head.num_classes, 0.1)
        logits = head.apply(params, latents, key=key)
        return classifier.cross_entropy(logits, targets).mean()

    def step(carry, number):
        params, opt_state = carry
        keys = jax.random.split(jax.random.fold_in(key_steps, number))
        rows = jax.random.randint(keys[0], (batch_size,), 0, len(latents))
        grads = jax.grad(loss_fn)(params, latents[rows], labels[rows], keys[1])
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    params = head.init(key_init)
    carry = params, optimizer.init(params)
    return jax.lax.scan(step, carry, jnp.arange(num_steps))[0][0]
