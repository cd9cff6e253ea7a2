"""Measures the time and memory of every hot path of the project in one run.

    python -m experiments.benchmark --config=experiments/configs/benchmark.py:all

The paths take turns in each round, so that other load on the machine affects all of
them. Medians over the rounds are reported. Square matrix products also take turns.
Their best rate is the ceiling of the machine, and the rate of each path is given
relative to it. With --config.peers programs that do the same work in torch run between
the rounds: those of experiments/peers, and the others from the folder that is named.

Operations are counted in closed form: two for each multiply-add of a matrix product,
and none for anything else. XLA's own count is not used, because it counts the body of a
loop only once. A convolution is counted by its definition. An algorithm with fewer
products (Winograd's) can therefore exceed the ceiling.
"""

import contextlib
import functools
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

import functa
import lbi
import vit
from experiments.common import (
    devices,
    figures,
    files,
    launch,
    runs,
    settings,
    streams,
)
from experiments.configs import benchmark as configs
from experiments.configs import classify_functa as classify_functa_configs
from experiments.configs import compress_functa as compress_functa_configs
from experiments.configs import fit_image as fit_image_configs
from experiments.configs import generate_functa as generate_functa_configs
from experiments.configs import meta_learn as meta_learn_configs
from experiments.configs import probe_landscape as probe_landscape_configs
from experiments.configs import train_lbi as train_lbi_configs
from experiments.configs import train_vit as train_vit_configs
from experiments.networks import dit, heads, registry
from experiments.peers import pyhessian_curvature as pyhessian
from experiments.training import classifier, encoding, flow, meta, siren
from experiments.training import lbi as lbi_training
from landscape import curvature, probes

_NUM_CLASSES = 10
# The paths whose best rate is the ceiling of all paths of the same dtype.
_CEILINGS = {dtype: f"product_{dtype}" for dtype in ("float32", "bfloat16")}


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


def train_and_evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs one benchmark; returns its summary."""
    settings.check(config, configs.RULES)
    names = _check_paths(config)
    with runs.open_run(workdir, config) as run, _nothing_kept():
        if run.summary is not None:
            run.say((run.workdir / "table.md").read_text())
            return run.show_summary()
        paths, compiled, summary, programs = {}, {}, {}, set()
        for name in names:
            path = paths[name] = make_path(config, name)
            if config.peers is not None and path.peer:
                programs.add(_find_peer(config, path.peer[0]).name)
            run.say(f"compiling {name} ...")
            compiled[name], summary[name] = _compile(path)
        times, peer_rates = _take_turns(run, paths, compiled, sorted(programs))
        ceilings = {
            dtype: paths[name].flops / min(times[name])
            for dtype, name in _CEILINGS.items()
        }
        for name, path in paths.items():
            summary[name] |= _rates(path, times[name], ceilings[path.dtype])
            reference = config.sizes[name].get("reference")
            if reference in paths:
                # Ratios within a round: other load on the machine affects both.
                ratios = np.divide(times[name], times[reference])
                summary[name] |= {
                    "reference": reference,
                    "time_over_reference": np.median(ratios),
                    "arithmetic_over_reference": path.flops / paths[reference].flops,
                }
            rates = peer_rates.get(path.peer)
            if rates:
                summary[name] |= {
                    "peer_per_second": np.median(rates),
                    "over_peer": summary[name]["per_second"] / np.median(rates),
                    "peer_rounds": rates,
                }
        text = _make_table(summary)
        files.write_atomic(run.workdir / "table.md", lambda file: file.write(text))
        run.say(text)
        figures.draw(run.workdir, summary)
        totals = {
            f"{dtype}_product_gflops_per_second": ceiling / 1e9
            for dtype, ceiling in ceilings.items()
        }
        return run.finish(totals | summary)


def count_siren(
    *, width: int, depth: int, channels: int, num_points: int, latent_dim: int = 0
) -> int:
    """Multiply-adds of one forward pass of a SIREN over an image.

    The linear map from the latent to the shifts is counted once per image.
    """
    per_point = 2 * width + (depth - 2) * width**2 + width * channels
    return num_points * per_point + latent_dim * (depth - 1) * width


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


def count_meta_passes(num_steps: int, batch_size: int) -> int:
    """Cost of a second-order meta-step, in forward passes of one image.

    Each image has 2 S + 1 passes: forward and backward of each inner step, then the
    last loss. Differentiating a pass takes two products, one for its activations and
    one for its weights: 3 (2 S + 1) in all. The first forward pass and its derivative
    are shared by all images.
    """
    return 6 * num_steps * batch_size + 3


def make_path(config: ConfigDict, name: str) -> HotPath:
    """Makes the path `name` of config.sizes."""
    sizes = config.sizes[name].to_dict()
    sizes.pop("reference", None)
    return _KINDS[sizes.pop("kind")](**sizes)


def _product(*, size, dtype, num_steps):
    x = np.random.default_rng(0).normal(size=(2, size, size))
    x, w = jnp.asarray(x / np.sqrt(size), dtype)

    def step(state, x, w):
        for _ in range(num_steps):
            x = x @ w
        return state, x

    flops = 2 * size**3
    return HotPath(step, (), (x, w), "products", 1, flops, num_steps, dtype)


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

    images = _random_images(batch_size, image_size, channels)
    coords = functa.coordinate_grid((image_size, image_size)).reshape(-1, 2)
    targets = np.float32(images).reshape(batch_size, -1, channels) / 255  # (B, N, C)
    width, depth, latent_dim = model["width"], model["depth"], model["latent_dim"]
    key = jax.random.key(config.seeds[0])
    name = f"width={width} depth={depth}"
    # The peers have RGB images and three inner steps: whole images, or patches of 4x4
    # pixels, the cells of a latent grid.
    peers = {
        32: ("torch_functa.py", f"{name} latent={latent_dim} B={batch_size}"),
        4: ("torch_spatial.py", f"{name} channels={latent_dim} patches={batch_size}"),
    }
    multiply_adds = count_siren(
        width=width,
        depth=depth,
        channels=channels,
        num_points=len(coords),
        latent_dim=latent_dim,
    )
    return HotPath(
        step,
        meta.init_state(config, network, optimizer),
        (devices.replicate(coords), devices.divide(targets), key),
        unit="images",
        units=batch_size,
        flops=2 * multiply_adds * count_meta_passes(num_steps, batch_size),
        dtype=dtype,
        peer=peers.get(image_size) if (channels, num_steps) == (3, 3) else None,
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
    images = devices.divide(_random_images(batch_size, image_size, 3), local=True)

    def step(state, *inputs):
        outputs = encoding.fit_batch(
            *inputs, model=learner.model, inner=tuple(learner.inner.items())
        )
        return state, outputs

    is_grid = isinstance(network, functa.SpatialSiren)
    multiply_adds = count_siren(
        width=network.width,
        depth=network.depth,
        channels=3,
        num_points=image_size**2,
        # Of a grid, each latent is an input of the cells of its window.
        latent_dim=math.prod(network.latent_shape)
        * (network.kernel_size ** len(network.grid) if is_grid else 1),
    )
    # Each step has a forward pass and a backward pass to the latent; the last error has
    # a forward pass. All images share the first forward pass, but for grids.
    passes = 2 * learner.inner["num_steps"] * batch_size + (
        batch_size if is_grid else 1
    )
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
    images = _random_images(batch_size, image_size, 3)

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
    network = learner.model
    multiply_adds = count_siren(
        width=network.width,
        depth=network.depth,
        channels=3,
        num_points=image_size**2,
        latent_dim=latents[0].size * network.kernel_size**2,
    )
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


def _sample(*, variant, batch_size, shape, **model):
    config = generate_functa_configs.get_config(variant)
    config.model.update(model)
    network = flow.make_model(config, _NUM_CLASSES)
    part = flow.Part(np.zeros((1, *shape), np.float32), np.zeros(1, np.int32))
    params = flow.init_state(config, network, part).average
    numbers = np.arange(batch_size, dtype=np.int32)
    sample = flow.make_sampler(config, network, tuple(shape))
    sizes = config.model.to_dict()
    sizes.pop("num_heads")
    *grid, channels = shape
    multiply_adds = count_dit(num_tokens=math.prod(grid), channels=channels, **sizes)
    # Heun's method evaluates the network twice, with guidance for two labels each.
    passes = 2 * config.sampling.num_steps * (1 + (config.sampling.guidance != 1))
    return HotPath(
        lambda state, params, *inputs: (state, sample(params, *inputs)),
        (),
        devices.replicate((params, numbers, numbers % _NUM_CLASSES)),
        unit="samples",
        units=batch_size,
        flops=2 * multiply_adds * passes * batch_size,
    )


def _trace(*, function, variant, patch_size, image_size, **model):
    """The graph of the channels of a ViT, or what its parameters are."""
    network = vit.make(variant, _NUM_CLASSES, patch_size, **model)
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    params = jax.eval_shape(network.init, jax.random.key(0), images)["params"]
    trace = {"channels": lbi.channels.trace, "groups": lbi.groups}[function]

    def step(state):
        # A new function in each call: JAX remembers the jaxprs of known ones.
        trace(lambda params, x: network.apply({"params": params}, x), params, images)
        return state, ()

    return HotPath(step, (), (), unit="networks", units=1, flops=0, jitted=False)


def _head(*, variant, shape, batch_size, num_steps, **model):
    """Steps of AdamW of a head on grids of latents, without augmentation."""
    config = classify_functa_configs.get_config(variant)
    config.model.update(model)
    head = heads.make_head(config.model.to_dict(), _NUM_CLASSES, tuple(shape))
    params = jax.jit(head.init)(jax.random.key(0))
    optimizer = optax.adamw(1e-3)
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(batch_size, *shape)).astype(np.float32)
    labels = rng.integers(0, _NUM_CLASSES, batch_size)

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

    multiply_adds = registry.count_multiply_adds(head.model, {"params": params}, shape)
    return HotPath(
        step,
        devices.replicate((params, optimizer.init(params))),
        devices.divide((latents, labels)),
        unit="latents",
        units=batch_size,
        flops=2 * 3 * multiply_adds * batch_size,
        num_steps=num_steps,
    )


def _fit_image(*, variant, num_images, image_size, num_steps, **model):
    config = fit_image_configs.get_config(variant)
    config.model.update(model, out_channels=3)
    network = functa.make_model(config.model.to_dict())
    task = siren.Task(
        "benchmark",
        _random_images(num_images, image_size, 3),
        np.full(num_images, -1),
        num_steps,
        snapshots=(num_steps,),
    )
    update = siren.make_update(config, network, task)
    multiply_adds = count_siren(
        width=network.width,
        depth=network.depth,
        channels=3,
        num_points=image_size**2,
    )
    return HotPath(
        lambda state: (update(state, 0, num_steps), ()),
        siren.init_state(config, network, task),
        (),
        unit="image steps",
        units=num_images,
        flops=2 * 3 * multiply_adds * num_images,
        num_steps=num_steps,
    )


def _train(*, variant, method, batch_size, num_steps):
    config = train_lbi_configs.get_config(variant)
    channels = 1 if config.model.type == "LeNet" else 3
    images = _labeled_images(batch_size * num_steps, config.image_size, channels)
    model = registry.make_model(config.model.to_dict(), _NUM_CLASSES)
    # Copies: the buffers of the state are donated.
    variables = jax.tree.map(jnp.copy, _init(model, images.train[0].shape[1:]))
    optimizer = optax.sgd(0.01)  # the peer's
    if method != "sgd":
        # The schedules are those of a run of 20 epochs of 60,000 images.
        config.methods = (method,)
        optimizer = lbi_training.make_optimizer(
            config, variables["params"], 20 * 60_000 // batch_size
        )
    update = classifier.make_update(
        model, images, optimizer, batch_size=batch_size, augmented=False, seed=0
    )
    state = classifier.init_state(variables, optimizer, num_steps)
    further = {
        "state_over_params": _num_bytes(state.opt_state) / _num_bytes(state.params)
    }
    is_peers = method == "sgd" and variant == "cifar10" and batch_size == 128
    return HotPath(
        lambda state: (update(state, 0, num_steps), ()),
        devices.replicate(state),
        (),
        unit="images",
        units=batch_size,
        flops=_count_gradient(model, variables, images, batch_size),
        num_steps=num_steps,
        peer=("torch_vgg.py", "B=128") if is_peers else None,
        further=further,
    )


def _vit_forward(
    *, variant, batch_size, ratio, score="max", attention=None, image_size=None, **model
):
    config = train_vit_configs.get_config(variant)
    options = config.model.to_dict() | model
    dtype = options.pop("dtype")
    model = vit.make(num_classes=_NUM_CLASSES, dtype=jnp.dtype(dtype), **options)
    side = image_size or config.image_size
    images = np.float32(_random_images(batch_size, side, 3)) / 255
    params = _init(model, images.shape[1:])["params"]
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


def _probe(*, variant, batch_size, num_step_sizes, **model):
    """A gradient, or with step sizes the loss profile along the gradient."""
    config = probe_landscape_configs.get_config(variant)
    fields = config.model.to_dict() | {"batch_norm": True, **model}
    model = registry.make_model(fields, _NUM_CLASSES)
    images = _labeled_images(batch_size, config.image_size, 3)
    variables = _init(model, images.train[0].shape[1:])
    loss_fn = classifier.make_loss(model, config.bn_mode)
    pixels, labels = images.train
    batch = {
        "inputs": devices.divide(np.asarray(classifier.normalize(images, pixels))),
        "labels": devices.divide(labels),
        "batch_stats": devices.replicate(variables["batch_stats"]),
    }
    step_sizes = np.float32(0.4 / 2.0 ** np.arange(num_step_sizes)[::-1])

    def step(state, params, batch):
        if num_step_sizes:
            return state, probes.probe_gradient(loss_fn, params, batch, step_sizes)
        with jax.default_matmul_precision("highest"):  # as in the probe
            return state, jax.value_and_grad(loss_fn)(params, batch)

    flops = _count_gradient(model, variables, images, batch_size)
    return HotPath(
        step,
        (),
        (devices.replicate(variables["params"]), batch),
        unit="images",
        units=batch_size,
        flops=(1 + num_step_sizes) * flops,
    )


def _curvature(*, measure, width, depth, batch_size, num, num_steps, tolerance):
    """A measure of the Hessian of an MLP, as in experiments/peers.

    eigenvalues: the `num` largest, with their residual; trace: the mean over `num`
    vectors; density: the quadrature of `num` vectors of `num_steps` products each.
    """
    weights, inputs, labels = pyhessian.make_problem(
        width=width, depth=depth, batch_size=batch_size
    )

    def loss_fn(weights, batch):
        x = batch["inputs"]
        for kernel in weights[:-1]:
            x = jnp.tanh(x @ kernel)
        return classifier.cross_entropy(x @ weights[-1], batch["labels"])

    measures = {
        "eigenvalues": functools.partial(
            curvature.leading_eigenvalues, num=num, num_steps=num_steps
        ),
        "trace": functools.partial(curvature.trace, num_matvecs=num),
        "density": functools.partial(
            curvature.lanczos_quadrature, num_samples=num, num_steps=num_steps
        ),
    }
    num_products = {"eigenvalues": num_steps, "trace": num, "density": num * num_steps}

    def step(state, weights, batch):
        matvec = functools.partial(
            curvature.hessian_vector_product, loss_fn, weights, batch
        )
        return state, measures[measure](jax.random.key(0), matvec, weights)

    batch = {"inputs": inputs, "labels": labels}
    _, found = jax.jit(step)((), weights, batch)
    further = {}
    if measure == "eigenvalues":
        residual = float(jnp.max(found.residuals) / found.values[0])
        if residual > tolerance:
            raise ValueError(
                f"num_steps must be larger: the residual is {residual:.1e}, above "
                f"{tolerance}."
            )
        further = {"residual": residual}
    elif measure == "trace":
        further = {"trace": float(found.mean), "error": float(found.standard_error)}
    products = 2 * batch_size * sum(kernel.size for kernel in weights)
    return HotPath(
        step,
        (),
        devices.replicate((weights, batch)),
        unit="images",
        units=batch_size,
        # A gradient is three forward passes, a Hessian product two gradients.
        flops=num_products[measure] * 6 * products,
        peer=(
            "pyhessian_curvature.py",
            f"{measure} width={width} depth={depth} B={batch_size}",
        ),
        further=further,
    )


_KINDS = {
    "product": _product,
    "meta_step": _meta_step,
    "encode": _encode,
    "compress": _compress,
    "sample": _sample,
    "trace": _trace,
    "head": _head,
    "fit_image": _fit_image,
    "train": _train,
    "vit_forward": _vit_forward,
    "probe": _probe,
    "curvature": _curvature,
}


@functools.cache
def _init(model, shape):
    """Variables of a network, made once for all paths that share it."""
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *shape)))
    return {"batch_stats": {}, **variables}


def _random_images(count, side, channels):
    shape = (count, side, side, channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def _labeled_images(count, side, channels):
    labels = np.random.default_rng(1).integers(0, _NUM_CLASSES, count)
    split = _random_images(count, side, channels), labels.astype(np.int32)
    scale = np.full((1, 1, 1, channels), 0.5, np.float32)
    return classifier.Images(split, split, scale, scale, _NUM_CLASSES)


def _count_gradient(model, variables, images, batch_size):
    """Forward pass, and backward pass to the activations and to the weights."""
    shape = images.train[0].shape[1:]
    multiply_adds = registry.count_multiply_adds(model, variables, shape)
    return 2 * 3 * multiply_adds * batch_size


def _num_bytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


@contextlib.contextmanager
def _nothing_kept():
    """Disables the compilation cache, so that compile times are measured."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def _compile(path):
    """Compiles the call; also returns the compile time and the memory needed."""
    if not path.jitted:
        return path.step, {}
    outputs = (devices.replicated(), None)
    function = jax.jit(path.step, donate_argnums=0, out_shardings=outputs)
    started = time.perf_counter()
    compiled = function.lower(path.state, *path.inputs).compile()
    seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    num_bytes = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes  # outputs in the buffers of donated arguments
    )
    return compiled, {"compile_seconds": seconds, "mebibytes": num_bytes / 2**20}


def _take_turns(run, paths, compiled, programs):
    """Per round: seconds per step of each path, images per second of each peer."""
    config = run.config
    states = {name: path.state for name, path in paths.items()}

    def call(name, at_least):
        """Repeats the call for `at_least` seconds; returns the seconds per step."""
        path, calls = paths[name], 0
        started = time.perf_counter()
        while calls == 0 or time.perf_counter() - started < at_least:
            result = compiled[name](states[name], *path.inputs)
            states[name] = jax.block_until_ready(result)[0]
            calls += 1
        return (time.perf_counter() - started) / (calls * path.num_steps)

    for name in paths:
        call(name, 0.0)  # warms up
    times, peer_rates = {name: [] for name in paths}, {}
    for number in range(config.num_rounds):
        started = time.monotonic()
        if number % config.peer_every == 0:
            for program in programs:
                run.say(f"{program} ...")
                for name, rate in run_peer(config, program).items():
                    peer_rates.setdefault((program, name), []).append(rate)
        for name in paths:
            times[name].append(call(name, config.seconds_per_turn))
        seconds = time.monotonic() - started
        run.say(f"round {number + 1}/{config.num_rounds}: {seconds:.1f} s")
    return times, peer_rates


def _rates(path, times, ceiling):
    """The summary of a path from its seconds per step in each round."""
    low, seconds, high = np.quantile(times, (0.25, 0.5, 0.75))
    return {
        "milliseconds": 1000 * seconds,
        "milliseconds_quartiles": [1000 * low, 1000 * high],
        "unit": path.unit,
        "per_second": path.units / seconds,
        "dtype": path.dtype,
        "gflops_per_second": path.flops / seconds / 1e9,
        "share_of_product": path.flops / seconds / ceiling,
        **path.further,
        "rounds": [1000 * t for t in times],
    }


def _make_table(summary):
    """The results as a Markdown table."""
    with_peers = any("over_peer" in row for row in summary.values())
    columns = ["path", "ms (quartiles)", "per second", "GFLOP/s", "share of products"]
    columns += ["MiB", "compile s", "time (arithmetic) over"]
    columns += ["over torch in float32"] * with_peers
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name, row in summary.items():
        low, high = row["milliseconds_quartiles"]
        cells = [
            name,
            f"{row['milliseconds']:.4g} ({low:.4g} to {high:.4g})",
            f"{row['per_second']:.4g} {row['unit']}",
            f"{row['gflops_per_second']:.3g}",
            f"{100 * row['share_of_product']:.0f} %",
            f"{row['mebibytes']:.3g}" if "mebibytes" in row else "",
            f"{row['compile_seconds']:.1f}" if "mebibytes" in row else "",
            f"{row['time_over_reference']:.3g} "
            f"({row['arithmetic_over_reference']:.3g}) {row['reference']}"
            if "reference" in row
            else "",
        ]
        if with_peers:
            cells.append(f"{row['over_peer']:.2f}" if "over_peer" in row else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def run_peer(config: ConfigDict, program: str) -> dict[str, float]:
    """Runs a program of config.peers; returns {name: images per second}.

    Raises:
      ValueError: if it fails, or if its output cannot be parsed.
    """
    path = _find_peer(config, program)
    python = config.peer_python or sys.executable
    try:
        done = subprocess.run([python, path], capture_output=True, text=True)
    except OSError as error:
        raise ValueError(f"peer_python {python} cannot be run: {error}") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"{path} failed under {python}: {last}")
    rates = PEERS[program](done.stdout)
    if not rates:
        raise ValueError(f"the output of {path} contains no times.")
    return rates


def _find_peer(config, program):
    """The path of a program, of this project or of the folder config.peers."""
    for folder in (Path(__file__).parent / "peers", Path(config.peers)):
        if (folder / program).is_file():
            return folder / program
    raise ValueError(f"peers: there is no {program} in {config.peers}.")


def read_torch_functa(text: str) -> dict[str, float]:
    """Parses lines "torch width=256 depth=5 latent=256 B=16: step 1.639s 9.8 img/s"."""
    pattern = r"torch (width=\d+ depth=\d+ latent=\d+ B=(\d+)): step (\d+\.\d+)s"
    found = re.findall(pattern, text)
    return {name: int(b) / float(s) for name, b, s in found if float(s)}


def read_torch_vgg(text: str) -> dict[str, float]:
    """Parses "torch 0.58 torch 0.57 ...", seconds per step; drops the warm-up."""
    seconds = [float(s) for s in re.findall(r"torch (\d+\.\d+)", text)][1:]
    return {"B=128": 128 / np.median(seconds)} if any(seconds) else {}


def read_torch_spatial(text: str) -> dict[str, float]:
    """Parses lines "torch width=128 depth=5 channels=16 patches=1024: step 0.5s"."""
    pattern = (
        r"torch (width=\d+ depth=\d+ channels=\d+ patches=(\d+)): step (\d+\.\d+)s"
    )
    found = re.findall(pattern, text)
    return {name: int(n) / float(s) for name, n, s in found if float(s)}


def read_pyhessian(text: str) -> dict[str, float]:
    """Parses lines "torch trace width=128 depth=3 B=512: 0.5s, ..."."""
    pattern = r"torch (\w+ width=\d+ depth=\d+ B=(\d+)): (\d+\.\d+)s"
    found = re.findall(pattern, text)
    return {name: int(b) / float(s) for name, b, s in found if float(s)}


PEERS = {
    "pyhessian_curvature.py": read_pyhessian,
    "torch_functa.py": read_torch_functa,
    "torch_spatial.py": read_torch_spatial,
    "torch_vgg.py": read_torch_vgg,
}


def _check_paths(config):
    """Names of all paths, those of the ceilings first."""
    unknown = [name for name in config.paths if name not in config.sizes]
    if unknown or not config.paths:
        raise ValueError(
            f"paths {tuple(config.paths)} must be some of {', '.join(config.sizes)}."
        )
    if config.peers is not None and not Path(config.peers).is_dir():
        raise ValueError(f"peers must be a folder, got {config.peers}.")
    names = list(dict.fromkeys((*_CEILINGS.values(), *config.paths)))
    for name in names:
        sizes = config.sizes[name]
        if sizes.kind not in _KINDS:
            raise ValueError(
                f"sizes.{name}.kind must be one of {', '.join(_KINDS)}; got "
                f"{sizes.kind!r}."
            )
        for field, value in sizes.items():
            smallest = field not in ("points_per_group", "num_step_sizes")
            if type(value) is int and value < smallest:
                raise ValueError(
                    f"sizes.{name}.{field} must be at least {smallest:d}, got {value}."
                )
    return names


if __name__ == "__main__":
    launch.launch("benchmark", train_and_evaluate)
