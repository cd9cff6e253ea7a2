"""A call that the benchmark times, and the random inputs that several of them share."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments.networks import registry
from experiments.training.classifier import Images

NUM_CLASSES = 10


class HotPath(NamedTuple):
    """A call of `num_steps` steps that is timed.

    Attributes:
      step: (state, *inputs) -> (state, outputs), traceable if `jitted`.
      state: the state before the first call; its buffers are donated.
      inputs: the other arguments, the same for every call.
      unit: name of the counted items, such as "images".
      units: number of these items per step.
      flops: floating-point operations of the matrix products of a step.
      num_steps: steps per call.
      dtype: dtype of most of the matrix products.
      peer: (program, name of its measurement) that does the same work, or None.
      further: additional numbers for the summary.
      jitted: whether the call is compiled as a whole. Otherwise it runs in Python, and
        neither its memory nor its compile time is measured.
    """

    step: Callable[..., tuple[Any, Any]]
    state: Any
    inputs: tuple[Any, ...]
    unit: str
    units: int
    flops: int
    num_steps: int = 1
    dtype: str = "float32"
    peer: tuple[str, str] | None = None
    further: dict[str, float] = {}
    jitted: bool = True


def _product(*, size, dtype, num_steps):
    x = np.random.default_rng(0).normal(size=(2, size, size))
    x, w = jnp.asarray(x / np.sqrt(size), dtype)

    def step(state, x, w):
        for _ in range(num_steps):
            x = x @ w
        return state, x

    flops = 2 * size**3
    return HotPath(step, (), (x, w), "products", 1, flops, num_steps, dtype)


@functools.cache
def init_variables(model: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
    """Variables of a network, made once for all paths that share it."""
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *shape)))
    return {"batch_stats": {}, **variables}


def random_images(count: int, side: int, channels: int) -> np.ndarray:
    """Images (count, side, side, channels), uint8."""
    shape = (count, side, side, channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def image_classifier(
    fields: dict[str, Any], num_images: int, side: int
) -> tuple[Images, nn.Module, dict[str, Any]]:
    """Random labeled images, a network of them and its variables.

    Args:
      fields: those of the network; see `registry.make_model`.
      num_images: number of images, which are those of the test too.
      side: of an image, in pixels.
    """
    channels = 1 if fields["type"] == "LeNet" else 3
    labels = np.random.default_rng(1).integers(0, NUM_CLASSES, num_images)
    split = random_images(num_images, side, channels), labels.astype(np.int32)
    scale = np.full((1, 1, 1, channels), 0.5, np.float32)
    images = Images(split, split, scale, scale, NUM_CLASSES)
    model = registry.make_model(fields, NUM_CLASSES)
    return images, model, init_variables(model, (side, side, channels))


def count_gradient(model: nn.Module, variables: dict[str, Any], inputs: Any) -> int:
    """Operations of a gradient with respect to the weights, for a batch.

    A forward pass, and a backward pass to the activations and to the weights.

    Args:
      model: the network.
      variables: its variables.
      inputs: the batch, (B, ...).
    """
    multiply_adds = registry.count_multiply_adds(model, variables, inputs.shape[1:])
    return 2 * 3 * multiply_adds * len(inputs)


KINDS = {"product": _product}
