"""Removes heads and neurons from the weights: a smaller network with the same logits.

A choice per image or batch (`Cascade.keep_heads`) must compute the scores of every
head. A fixed choice, for example from scores on calibration images, needs no scores:
the other heads are removed from the weights.

Axes: L layers, D width, H heads, d width of a head, M width of an MLP.
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
    """Ascending indices of each layer's largest scores; ties go to the first.

    Args:
      scores: scores of each layer's heads (H,) or neurons (M,); L entries.
      counts: number of indices to keep in each layer, at least 1, (L,).

    Returns:
      L tuples; tuple l has counts[l] indices.

    Raises:
      ValueError: if a count is not between 1 and the number of scores.
    """
    if len(scores) != len(counts):
        raise ValueError(
            "scores and counts must have one entry per layer, got "
            f"{len(scores)} scores and {len(counts)} counts."
        )
    kept = []
    for layer, (score, count) in enumerate(zip(scores, counts, strict=True)):
        if not 1 <= count <= len(score):
            raise ValueError(
                f"the count of layer {layer} must be between 1 and {len(score)}, got "
                f"{count}."
            )
        order = np.argsort(-np.asarray(score), kind="stable")
        kept.append(tuple(sorted(order[:count].tolist())))
    return tuple(kept)


def keep_heads(model: ViT, params: Any, kept: Kept) -> tuple[ViT, Any]:
    """Keeps the given heads of each layer and removes the others.

    Args:
      model: the network; its cascade must not choose heads itself.
      params: its parameters.
      kept: indices of the heads that each layer keeps, L sequences.

    Returns:
      The smaller model and its parameters; `num_heads` is a tuple if layers differ. Its
      logits are those of `mask_heads`, with one exception: a cascade that ranks tokens
      by attention, or merges them, uses all heads there, masked ones included, and only
      the remaining heads here.

    Raises:
      ValueError: if a layer would keep no head, or a head that it does not have.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import vit
      >>> model = vit.make("cifar_128", num_classes=10, patch_size=4, num_layers=2)
      >>> images = jnp.zeros((1, 8, 8, 3))
      >>> params = model.init(jax.random.key(0), images)["params"]
      >>> smaller, params = vit.slicing.keep_heads(model, params, [(0, 2), (3,)])
      >>> smaller.num_heads
      (2, 1)
      >>> smaller.apply({"params": params}, images).shape
      (1, 10)
    """
    heads = _heads(model)
    _check(kept, heads, "heads")
    if model.cascade is not None and model.cascade.keep_heads is not None:
        raise ValueError(
            "the cascade chooses heads itself; set its keep_heads to None first."
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
        num_heads=models.one_or_each([len(index) for index in kept]),
        head_dim=model.head_dim or model.hidden_size // heads[0],
    )
    return smaller, _map_blocks(cut, model, params)


def keep_neurons(model: ViT, params: Any, kept: Kept) -> tuple[ViT, Any]:
    """Keeps the given hidden neurons of each MLP and removes the others.

    Args:
      model: the network.
      params: its parameters.
      kept: indices of the neurons that each layer keeps, L sequences.

    Returns:
      The smaller model and its parameters; `mlp_dim` is a tuple if layers differ. Its
      logits are those of `mask_neurons`.

    Raises:
      ValueError: if a layer would keep no neuron, or a neuron that it does not have.
    """
    _check(kept, _widths(model), "neurons")

    def cut(layer, block):
        index = np.asarray(kept[layer])
        first, second = block[_MLP]["Dense_0"], block[_MLP]["Dense_1"]
        first = {"kernel": first["kernel"][:, index], "bias": first["bias"][index]}
        second = second | {"kernel": second["kernel"][index]}
        return block | {_MLP: {"Dense_0": first, "Dense_1": second}}

    widths = [len(index) for index in kept]
    smaller = model.clone(mlp_dim=models.one_or_each(widths))
    return smaller, _map_blocks(cut, model, params)


def mask_heads(model: ViT, params: Any, kept: Kept) -> Any:
    """Sets the outputs of the other heads to zero; shapes stay as they are.

    Args:
      model: the network.
      params: its parameters.
      kept: indices of the heads that each layer keeps, L sequences.

    Returns:
      Parameters of the same shapes.

    Raises:
      ValueError: if a layer would keep no head, or a head that it does not have.
    """
    _check(kept, _heads(model), "heads")
    return _mask(model, params, kept, (_ATTENTION, "out"))


def mask_neurons(model: ViT, params: Any, kept: Kept) -> Any:
    """Sets the outputs of the other hidden neurons to zero; shapes stay as they are.

    Args:
      model: the network.
      params: its parameters.
      kept: indices of the neurons that each layer keeps, L sequences.

    Returns:
      Parameters of the same shapes.

    Raises:
      ValueError: if a layer would keep no neuron, or a neuron that it does not have.
    """
    _check(kept, _widths(model), "neurons")
    return _mask(model, params, kept, (_MLP, "Dense_1"))


def _heads(model):
    return [models.per_layer(model.num_heads, i) for i in range(model.num_layers)]


def _widths(model):
    return [models.per_layer(model.mlp_dim, i) for i in range(model.num_layers)]


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
        raise ValueError(
            f"kept must have one entry for each of the {len(sizes)} layers, got "
            f"{len(kept)}."
        )
    for layer, (index, size) in enumerate(zip(kept, sizes, strict=True)):
        if len(index) and np.asarray(index).dtype.kind not in "iu":
            raise ValueError(
                f"the {what} that layer {layer} keeps must be indices, got "
                f"{tuple(index)}."
            )
        if not len(index) or min(index) < 0 or max(index) >= size:
            raise ValueError(
                f"layer {layer} has {what} 0 to {size - 1} and must keep at least one "
                f"of them, got {tuple(index)}."
            )
        if len(set(index)) != len(index):
            raise ValueError(
                f"the {what} that layer {layer} keeps must differ, got {tuple(index)}."
            )
