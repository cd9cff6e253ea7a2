"""The networks that a config can name, with their layers and costs."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import lbi
from experiments.networks.deep_linear import DeepLinear
from experiments.networks.lenet import LeNet
from experiments.networks.resnet import ResNet
from experiments.networks.vgg import VGG

_MODELS = {"LeNet": LeNet, "VGG": VGG, "ResNet": ResNet, "DeepLinear": DeepLinear}


def make_model(settings: dict[str, Any], num_classes: int) -> nn.Module:
    """Makes the network config.model.type with the other fields of config.model."""
    settings = dict(settings)
    kind = settings.pop("type")
    if kind not in _MODELS:
        raise ValueError(
            f"config.model.type must be one of {', '.join(_MODELS)}; got {kind!r}."
        )
    try:
        fields = {name: _as_tuples(value) for name, value in settings.items()}
        return _MODELS[kind](num_classes=num_classes, **fields)
    except TypeError as error:
        raise ValueError(f"config.model: {error}") from None


def _as_tuples(value):
    """Lists of a stored config as tuples: a module must be hashable."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value


def thin_model(model: nn.Module, keep: dict[str, np.ndarray]) -> nn.Module:
    """A LeNet or VGG with only the channels of `keep` in each layer."""

    def width(layer, full):
        return int(np.sum(keep[layer])) if layer in keep else full

    if isinstance(model, LeNet):
        features = [width(f"conv{i + 1}", n) for i, n in enumerate(model.features)]
        return model.clone(features=tuple(features), hidden=width("fc1", model.hidden))
    numbers = itertools.count(1)
    stages = [
        tuple(width(f"conv{next(numbers)}", n) for n in stage) for stage in model.stages
    ]
    hidden = [width(f"fc{i + 1}", n) for i, n in enumerate(model.hidden)]
    return model.clone(stages=tuple(stages), hidden=tuple(hidden))


def channel_graph(model: nn.Module, image_shape: tuple[int, ...]) -> lbi.channels.Graph:
    """The channels of a network for images (H, W, C), found by tracing it."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return lbi.channels.trace(model.apply, variables, images)


def count_multiply_adds(
    model: nn.Module, variables: dict[str, Any], image_shape: tuple[int, ...]
) -> int:
    """Multiply-adds of convolutions and dense layers per image, in closed form."""
    _, captured = jax.eval_shape(
        lambda v, x: model.apply(v, x, capture_intermediates=True),
        variables,
        jnp.zeros((1, *image_shape)),
    )

    def count(params, outputs):
        total = 0
        for name, layer in params.items():
            if not isinstance(layer, dict):
                continue  # a parameter of the module itself, in no matrix product
            if "kernel" in layer:
                # Each weight is used once per position of the output.
                positions = outputs[name]["__call__"][0].shape[1:-1]
                total += math.prod(positions) * layer["kernel"].size
            else:
                total += count(layer, outputs[name])
        return total

    return count(variables["params"], captured["intermediates"])
