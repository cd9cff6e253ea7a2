"""Removes heads and neurons for good: a smaller network with the same logits.

A choice per image or batch (`Cascade.keep_heads`) must still look at every head. One
that is fixed, out of scores over calibration images, is cut out of the weights.

Axes: L layers, H heads, M width of an MLP.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from vit import model as models
from vit.model import ViT

Kept = Sequence[Sequence[int]]
_ATTENTION, _MLP = "MultiHeadDotProductAttention_0", "MlpBlock_0"


def largest(scores: Sequence[np.ndarray], counts: Sequence[int]) -> Kept:
    """Indices, rising, of each layer's `counts[l]` largest scores; ties to the first.

    Args:
      scores: for each layer, (H,) or (M,).
      counts: how many to keep of each layer, at least one.

    Raises:
      ValueError: if a count is not between 1 and the number of scores.
    """
    if len(scores) != len(counts):
        raise ValueError(f"{len(scores)} layers of scores, {len(counts)} counts.")
    kept = []
    for layer, (score, count) in enumerate(zip(scores, counts, strict=True)):
        if not 1 <= count <= len(score):
            raise ValueError(
                f"layer {layer} can keep 1 to {len(score)}, got the count {count}."
            )
        order = np.argsort(-np.asarray(score), kind="stable")
        kept.append(tuple(sorted(order[:count].tolist())))
    return tuple(kept)


def keep_heads(model: ViT, params: Any, kept: Kept) -> tuple[ViT, Any]:
    """The network with these heads of each layer alone, and its parameters.

    Args:
      model: the network; its cascade must not choose heads itself.
      params: its parameters.
      kept: for each layer the indices of the heads that stay.

    Returns:
      The smaller model and parameters: the logits are those of `mask_heads`, but for a
      cascade that ranks tokens by attention or merges them: there the heads that are
      gone have no say, while masked ones still do.

    Raises:
      ValueError: if a layer would keep no head or one that it has not.
    """
    heads = [models.per_layer(model.num_heads, i) for i in range(model.num_layers)]
    _check(kept, heads, "heads")
    if model.cascade is not None and model.cascade.keep_heads is not None:
        raise ValueError(
            "the cascade chooses heads (keep_heads); set it to None first."
        )

    def cut(layer, block):
        index = np.asarray(kept[layer])
        attention = dict(block[_ATTENTION])
        for name in ("query", "key", "value"):
            kernel, bias = attention[name]["kernel"], attention[name]["bias"]
            attention[name] = {"kernel": kernel[:, index], "bias": bias[index]}
        out = attention["out"]
        attention["out"] = out | {"kernel": out["kernel"][index]}
        return block | {_ATTENTION: attention}

    smaller = model.clone(
        num_heads=tuple(len(index) for index in kept),
        head_dim=model.head_dim or model.hidden_size // heads[0],
    )
    return smaller, _map_blocks(cut, model, params)


def keep_neurons(model: ViT, params: Any, kept: Kept) -> tuple[ViT, Any]:
    """The network with these hidden neurons of each MLP alone, and its parameters.

    Args:
      model: the network.
      params: its parameters.
      kept: for each layer the indices of the neurons that stay.

    Returns:
      The smaller model and parameters: the logits are those of `mask_neurons`.

    Raises:
      ValueError: if a layer would keep no neuron or one that it has not.
    """
    widths = [models.per_layer(model.mlp_dim, i) for i in range(model.num_layers)]
    _check(kept, widths, "neurons")

    def cut(layer, block):
        index = np.asarray(kept[layer])
        first, second = block[_MLP]["Dense_0"], block[_MLP]["Dense_1"]
        first = {"kernel": first["kernel"][:, index], "bias": first["bias"][index]}
        second = second | {"kernel": second["kernel"][index]}
        return block | {_MLP: {"Dense_0": first, "Dense_1": second}}

    smaller = model.clone(mlp_dim=tuple(len(index) for index in kept))
    return smaller, _map_blocks(cut, model, params)


def mask_heads(model: ViT, params: Any, kept: Kept) -> Any:
    """Parameters in which all but these heads have no effect: they put out zeros."""
    return _mask(model, params, kept, (_ATTENTION, "out"))


def mask_neurons(model: ViT, params: Any, kept: Kept) -> Any:
    """Parameters in which all but these hidden neurons have no effect."""
    return _mask(model, params, kept, (_MLP, "Dense_1"))


def _mask(model, params, kept, place):
    module, name = place

    def zero(layer, block):
        layers = block[module]
        kernel = layers[name]["kernel"]
        mask = np.zeros((kernel.shape[0],) + (1,) * (kernel.ndim - 1), kernel.dtype)
        mask[np.asarray(kept[layer])] = 1
        masked = layers[name] | {"kernel": kernel * mask}
        return block | {module: layers | {name: masked}}

    return _map_blocks(zero, model, params)


def _map_blocks(function, model, params):
    encoder = dict(params["Transformer"])
    for layer in range(model.num_layers):
        name = f"encoderblock_{layer}"
        encoder[name] = function(layer, encoder[name])
    return jax.tree.map(lambda x: x, params | {"Transformer": encoder})


def _check(kept, sizes, what):
    if len(kept) != len(sizes):
        raise ValueError(f"kept has {len(kept)} layers, the network {len(sizes)}.")
    for layer, (index, size) in enumerate(zip(kept, sizes, strict=True)):
        if not len(index) or min(index) < 0 or max(index) >= size:
            raise ValueError(
                f"layer {layer} has the {what} 0 to {size - 1} and must keep at least "
                f"one of them, got {tuple(index)}."
            )
        if len(set(index)) != len(index):
            raise ValueError(f"layer {layer} keeps some {what} twice: {tuple(index)}.")
