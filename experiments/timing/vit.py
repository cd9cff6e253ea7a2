"""Paths of Vision Transformers: the forward pass, with and without a cascade."""

import jax.numpy as jnp
import numpy as np

import vit
from experiments.common import devices
from experiments.configs import train_vit as train_vit_configs
from experiments.timing.hot_path import (
    NUM_CLASSES,
    HotPath,
    init_variables,
    random_images,
)


def _vit_forward(
    *, variant, batch_size, ratio, score="max", attention=None, image_size=None, **model
):
    config = train_vit_configs.get_config(variant)
    options = config.model.to_dict() | model
    dtype = options.pop("dtype")
    model = vit.make(num_classes=NUM_CLASSES, dtype=jnp.dtype(dtype), **options)
    side = image_size or config.image_size
    images = np.float32(random_images(batch_size, side, 3)) / 255
    params = init_variables(model, images.shape[1:])["params"]
    model = model.clone(attention_implementation=attention)
    if ratio:
        chosen = vit.schedules.cp_vit(
            ratio,
            num_layers=model.num_layers,
            num_patches=(side // model.patch_size) ** 2,
            mode="compact",
            score=score,
        )
        model = model.clone(cascade=chosen)
    return HotPath(
        lambda state, params, images: (state, model.apply({"params": params}, images)),
        (),
        (devices.replicate(params), devices.divide(images)),
        unit="images",
        units=batch_size,
        flops=2 * vit.cost.count(model, side).total * batch_size,
        dtype=dtype,
    )


KINDS = {"vit_forward": _vit_forward}
