"""Paths of fields and their latents: fitting, compression, sampling, classification."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import functa
from experiments.common import devices, streams
from experiments.configs import classify_functa as classify_functa_configs
from experiments.configs import compress_functa as compress_functa_configs
from experiments.configs import fit_image as fit_image_configs
from experiments.configs import generate_functa as generate_functa_configs
from experiments.configs import meta_learn as meta_learn_configs
from experiments.networks import dit, heads
from experiments.timing.hot_path import (
    NUM_CLASSES,
    HotPath,
    count_gradient,
    random_images,
)
from experiments.training import encoding, flow, meta, siren


def count_siren(
    *, width: int, depth: int, channels: int, num_points: int, latent_dim: int = 0
) -> int:
    """Multiply-adds of one forward pass of a SIREN over an image.

    The linear map from the latent to the shifts is counted once per image.
    """
    per_point = 2 * width + (depth - 2) * width**2 + width * channels
    return num_points * per_point + latent_dim * (depth - 1) * width


def _count_network(network: nn.Module, num_points: int) -> int:
    latent_dim = math.prod(getattr(network, "latent_shape", (0,)))
    if isinstance(network, functa.SpatialSiren):
        # Each latent is an input of the cells of its window.
        latent_dim *= network.kernel_size ** len(network.grid)
    return count_siren(
        width=network.width,
        depth=network.depth,
        channels=network.out_channels,
        num_points=num_points,
        latent_dim=latent_dim,
    )


def count_meta_passes(num_steps: int, batch_size: int) -> int:
    """Cost of a second-order meta-step, in forward passes of one image.

    Each image has 2 S + 1 passes: forward and backward of each inner step, then the
    last loss. Differentiating a pass takes two products, one for its activations and
    one for its weights: 3 (2 S + 1) in all. The first forward pass and its derivative
    are shared by all images.
    """
    return 6 * num_steps * batch_size + 3


def count_dit(
    *,
    hidden_size: int,
    num_layers: int,
    mlp_dim: int,
    num_tokens: int,
    channels: int,
) -> int:
    """Multiply-adds of one evaluation of a DiT for one latent.

    The embedding of the time and the modulations are computed once per latent.
    """
    width = hidden_size
    block = 4 * width**2 + 2 * num_tokens * width + 2 * width * mlp_dim
    per_token = 2 * channels * width + num_layers * block
    time = 2 * dit.NUM_WAVES * width + width**2
    modulations = (6 * num_layers + 2) * width**2
    return num_tokens * per_token + time + modulations


def _meta_step(
    *,
    variant,
    batch_size,
    image_size,
    channels,
    points_per_group,
    num_steps,
    dtype,
    **model,
):
    config = meta_learn_configs.get_config(variant)
    config.model.update(model, out_channels=channels, derivative_dtype=dtype)
    config.inner.num_steps = num_steps
    config.points_per_group = points_per_group
    network = functa.make_model(config.model.to_dict())
    optimizer = meta.make_optimizer(config)
    update = meta.make_update(config, network, optimizer)

    def step(state, coords, targets, key):
        state, *outputs = update(state, coords, targets, key)
        return state, outputs

    images = random_images(batch_size, image_size, channels)
    coords = functa.coordinate_grid((image_size, image_size)).reshape(-1, 2)
    targets = np.float32(images).reshape(batch_size, -1, channels) / 255  # (B, N, C)
    width, depth, latent_dim = model["width"], model["depth"], model["latent_dim"]
    key = jax.random.key(config.seeds[0])
    name = f"width={width} depth={depth} latent={latent_dim} side={image_size} "
    name += f"B={batch_size}"
    multiply_adds = _count_network(network, len(coords))
    return HotPath(
        step,
        meta.init_state(config, network, optimizer),
        (devices.replicate(coords), devices.divide(targets), key),
        unit="images",
        units=batch_size,
        flops=2 * multiply_adds * count_meta_passes(num_steps, batch_size),
        dtype=dtype,
        # The peer has RGB images and three inner steps.
        peer=("torch_functa.py", name) if (channels, num_steps) == (3, 3) else None,
    )


def _make_learner(variant, model):
    """A learner of RGB images with random weights, by a variant of meta_learn."""
    config = meta_learn_configs.get_config(variant)
    config.model.update(model, out_channels=3)
    network = functa.make_model(config.model.to_dict())
    state = meta.init_state(config, network, meta.make_optimizer(config))
    return encoding.make_learner(config, vars(state))


def _encode(*, variant, batch_size, image_size, **model):
    learner = _make_learner(variant, model)
    network = learner.model
    fixed = devices.replicate(learner[1:4], local=True)
    images = devices.divide(random_images(batch_size, image_size, 3), local=True)

    def step(state, *inputs):
        outputs = encoding.fit_batch(
            *inputs, model=network, inner=tuple(learner.inner.items())
        )
        return state, outputs

    multiply_adds = _count_network(network, image_size**2)
    # Each step has a forward pass and a backward pass to the latent; the last error has
    # a forward pass. All images share the first forward pass, but for grids.
    first = batch_size if isinstance(network, functa.SpatialSiren) else 1
    passes = 2 * learner.inner["num_steps"] * batch_size + first
    return HotPath(
        step,
        (),
        (*fixed, images),
        unit="latents",
        units=batch_size,
        flops=2 * multiply_adds * passes,
    )


def _compress(*, variant, direction, batch_size, image_size, step, **model):
    """From pixels to bytes ("encode"), or from bytes to pixels ("decode").

    The steps of the quantizer are `step` deviations of each channel.
    """
    learner = _make_learner(variant, model)
    images = random_images(batch_size, image_size, 3)

    def fit(images):
        batches = encoding.encode(learner, images, batch_size=batch_size)
        return np.concatenate([latents for latents, _ in batches])

    latents = fit(images)
    deviation = latents.reshape(-1, latents.shape[-1]).std(0)
    options = compress_functa_configs.BASE
    codec = streams.fit_codec(latents, step * deviation, **options["model"])
    encoded = streams.encode(codec, latents)
    field, _ = encoding.make_field(learner, (image_size, image_size))
    render = encoding.make_render(field, options["batch_size"])
    functions = {
        "encode": lambda images: streams.encode(codec, fit(images)),
        "decode": lambda encoded: render(streams.decode(codec, encoded)),
    }
    multiply_adds = _count_network(learner.model, image_size**2)
    # The fit has a forward and a backward pass in each step, and one for the error.
    passes = {"encode": 2 * learner.inner["num_steps"] + 1, "decode": 1}
    inputs = {"encode": images, "decode": encoded}
    num_bits = 8 * sum(map(len, encoded))
    return HotPath(
        lambda state, inputs: (state, functions[direction](inputs)),
        (),
        (inputs[direction],),
        unit="images",
        units=batch_size,
        flops=2 * multiply_adds * passes[direction] * batch_size,
        further={"bits_per_pixel": num_bits / (batch_size * image_size**2)},
        jitted=False,
    )


def _fit_image(*, variant, num_images, image_size, num_steps, **model):
    config = fit_image_configs.get_config(variant)
    config.model.update(model, out_channels=3)
    network = functa.make_model(config.model.to_dict())
    task = siren.Task(
        "benchmark",
        random_images(num_images, image_size, 3),
        np.full(num_images, -1),
        num_steps,
        snapshots=(num_steps,),
    )
    update = siren.make_update(config, network, task)
    multiply_adds = _count_network(network, image_size**2)
    return HotPath(
        lambda state: (update(state, 0, num_steps), ()),
        siren.init_state(config, network, task),
        (),
        unit="image steps",
        units=num_images,
        flops=2 * 3 * multiply_adds * num_images,
        num_steps=num_steps,
    )


def _sample(*, variant, batch_size, shape, **model):
    config = generate_functa_configs.get_config(variant)
    config.model.update(model)
    network = flow.make_model(config, NUM_CLASSES)
    latents = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    part = flow.Part(latents, np.zeros(2, np.int32))
    sampled = flow.init_state(config, network, part).sampled
    numbers = np.arange(batch_size, dtype=np.int32)
    sample = flow.make_sampler(config, network, tuple(shape))
    sizes = config.model.to_dict()
    sizes.pop("num_heads")
    *grid, channels = shape
    multiply_adds = count_dit(num_tokens=math.prod(grid), channels=channels, **sizes)
    if config.gaussian:  # to and from the principal axes of each class and of all
        multiply_adds += 2 * (NUM_CLASSES + 1) * math.prod(shape) ** 2
    # Heun's method evaluates the network twice, with guidance for two labels each.
    passes = 2 * config.sampling.num_steps * (1 + (config.sampling.guidance != 1))
    return HotPath(
        lambda state, *inputs: (state, sample(*inputs)),
        (),
        devices.replicate((sampled, numbers, numbers % NUM_CLASSES)),
        unit="samples",
        units=batch_size,
        flops=2 * multiply_adds * passes * batch_size,
    )


def _head(*, variant, shape, batch_size, num_steps, **model):
    """Steps of AdamW of a head on grids of latents, without augmentation."""
    config = classify_functa_configs.get_config(variant)
    config.model.update(model)
    head = heads.make_head(config.model.to_dict(), NUM_CLASSES, tuple(shape))
    params = jax.jit(head.init)(jax.random.key(0))
    optimizer = optax.adamw(1e-3)
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(batch_size, *shape)).astype(np.float32)
    labels = rng.integers(0, NUM_CLASSES, batch_size)

    def step(state, latents, labels):
        def loss_fn(params, key):
            logits = head.apply(params, latents, key=key)
            cross_entropy = optax.softmax_cross_entropy_with_integer_labels
            return cross_entropy(logits, labels).mean()

        def update(state, number):
            params, opt_state = state
            key = jax.random.fold_in(jax.random.key(1), number)
            grads = jax.grad(loss_fn)(params, key)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.lax.scan(update, state, jnp.arange(num_steps))[0], ()

    return HotPath(
        step,
        devices.replicate((params, optimizer.init(params))),
        devices.divide((latents, labels)),
        unit="latents",
        units=batch_size,
        flops=count_gradient(head.model, {"params": params}, latents),
        num_steps=num_steps,
        dtype=getattr(head.model, "product_dtype", "float32"),
    )


KINDS = {
    "meta_step": _meta_step,
    "encode": _encode,
    "compress": _compress,
    "fit_image": _fit_image,
    "sample": _sample,
    "head": _head,
}
