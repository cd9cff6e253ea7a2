"""Measures the time and memory of the hot paths of the project.

    python -m experiments.benchmark --config=experiments/configs/benchmark.py:VARIANT

Variants:
  all: every path. About 5 minutes on two cores (results/benchmark_all).
  functa: meta-learning, encoding and fitting.
  optimizers: one step of LeNet and of VGG-A with each optimizer; DessiLBI is compared
    with SGD, which it extends. The variant all compares it with Adam.
  lenet: the paths of LeNet.
  vgg: the paths of VGG-A.
  scaling: the meta-step at several batch sizes, image sizes, latent sizes and numbers
    of inner steps; one of them varies at a time. About a minute on two cores
    (results/benchmark_scaling).
  latents: compression of images, from pixels to bytes and back, and sampling of
    latents, with random weights; about a minute on two cores. It needs the range coder
    of constriction (pip install constriction).
  tracing: the channel graph and the structure of ViT-B/16, traced by lbi without
    compiling.
  patches: the meta-step over 1,024 patches of 4x4 pixels, in groups of several sizes;
    under a minute on two cores.
  spatial: encoding of 32 images into grids of 8x8 latents, with and without neighboring
    cells, and a training step of the ConvNeXt on 32 grids (results/benchmark_spatial).
  curvature: eigenvalues, trace and density of the Hessian of an MLP; with
    --config.peer_python those of PyHessian too; two minutes.
  paper: the meta-step at the size of the paper, with each sine and dtype. It needs a
    GPU; results/ has no run of it.
  vit_b16: ViT-B/16 at 224 pixels in bfloat16, dense and with CP-ViT's cascade at 0.3
    and 0.6, by score and implementation of the attention. It needs a GPU.
  smoke: a few paths at tiny sizes, to check that the command runs.
"""

import functools

from experiments.common import settings

_METHODS = ("adam", "dessilbi", "dessilbi_adam")


def _sizes():
    """The paths of all variants except smoke, scaling and paper."""
    sizes = {}
    for width, depth, latent_dim, batch_size in (
        (128, 5, 128, 16),
        (256, 5, 256, 16),
        (256, 10, 256, 8),
    ):
        name = f"meta_{width}x{depth}"
        sizes[name] = _meta_step(width, depth, latent_dim, batch_size)
        rounded = {"dtype": "bfloat16", "reference": name}
        sizes[f"{name}_bfloat16"] = sizes[name] | rounded
    sizes["meta_digits"] = _meta_step(128, 5, 64, 32) | {
        "variant": "digits",
        "image_size": 8,
        "channels": 1,
    }
    # The simplest implementation: jnp.sin, and one vmap over the batch.
    sizes["meta_digits_plain"] = sizes["meta_digits"] | {
        "fast_sine": False,
        "points_per_group": 0,
        "reference": "meta_digits",
    }
    sizes["encode"] = _encode("cifar10_cpu", 8, 32)
    sizes |= _fits("best", "fit", (1, 8), image_size=32, num_steps=5)
    sizes |= _trainings("lenet", "mnist", _METHODS, batch_size=128, num_steps=10)
    methods = (*_METHODS, "sgd")
    sizes |= _trainings("vgg", "cifar10", methods, batch_size=128, num_steps=2)
    sizes |= _vits("cifar10_cpu", 32)
    return sizes | _probes("cifar10_cpu", 128, 8)


def _tiny_sizes():
    sizes = _products(64, 2)
    tiny = _meta_step(16, 3, 8, 4)
    rounded = {"dtype": "bfloat16", "reference": "meta"}
    sizes |= {"meta": tiny, "meta_bfloat16": tiny | rounded}
    sizes["encode"] = _encode("smoke", 4, 8)
    sizes["encode_grids"] = _encode("smoke_spatial", 4, 8)
    convnext = {"widths": (6, 8), "depths": (1, 1)}
    sizes["head"] = _head(shape=(2, 2, 3), batch_size=4, num_steps=2) | convnext
    sizes |= _fits("smoke", "num_images", (1, 2), image_size=8, num_steps=2)
    methods = ("adam", "dessilbi_adam")
    sizes |= _trainings("lenet", "mnist", methods, batch_size=8, num_steps=2)
    sizes |= _vits("smoke", 4, num_layers=2, hidden_size=16, mlp_dim=16, num_heads=2)
    return sizes | _probes("deep_linear", 8, 2, width=16, depth=4)


def _products(size, num_steps):
    path = dict(kind="product", size=size, num_steps=num_steps)
    return {f"product_{d}": path | {"dtype": d} for d in ("float32", "bfloat16")}


def _meta_step(width, depth, latent_dim, batch_size):
    return dict(
        kind="meta_step",
        variant="cifar10",
        width=width,
        depth=depth,
        latent_dim=latent_dim,
        batch_size=batch_size,
        image_size=32,
        channels=3,
        num_steps=3,
        dtype="float32",
        fast_sine=True,
        points_per_group=1024,
    )


def _encode(variant, batch_size, image_size):
    return dict(
        kind="encode", variant=variant, batch_size=batch_size, image_size=image_size
    )


def _head(**sizes):
    return dict(kind="head", variant="cifar10_spatial_cpu", **sizes)


def _spatial():
    """Encoding of grids of latents, and the head on them."""
    return _measured(
        {
            "encode_grids": _encode("cifar10_spatial_cpu", 32, 32),
            "encode_cells": _encode("cifar10_cells_cpu", 32, 32),
            # A group of images of the variant's batches.
            "head": _head(shape=(8, 8, 16), batch_size=32, num_steps=2),
            "head_float32": _head(shape=(8, 8, 16), batch_size=32, num_steps=2)
            | {"product_dtype": "float32", "reference": "head"},
        }
    )


def _fits(variant, name, counts, **sizes):
    path = dict(kind="fit_image", variant=variant, **sizes)
    return {f"{name}_{count}": path | {"num_images": count} for count in counts}


def _trainings(name, variant, methods, **sizes):
    path = dict(kind="train", variant=variant, **sizes)
    return {
        f"{name}_{method}": path
        | {"method": method}
        | ({} if method == "adam" else {"reference": f"{name}_adam"})
        for method in methods
    }


def _vits(variant, batch_size, **model):
    dense = dict(kind="vit_forward", variant=variant, batch_size=batch_size, **model)
    return {
        "vit_dense": dense | {"ratio": 0.0},
        "vit_cascade": dense | {"ratio": 0.4, "reference": "vit_dense"},
    }


def _probes(variant, batch_size, num_step_sizes, **model):
    gradient = dict(kind="probe", variant=variant, batch_size=batch_size, **model)
    return {
        "gradient": gradient | {"num_step_sizes": 0},
        "probe": gradient | {"num_step_sizes": num_step_sizes, "reference": "gradient"},
    }


def _scaling():
    """One path for each value of each axis; the other axes are fixed."""
    axes = {
        "batch_size": (4, 8, 16, 32, 64),
        "image_size": (8, 16, 32, 64),
        "latent_dim": (16, 64, 256, 1024),
        "num_steps": (1, 2, 3, 4, 5),
    }
    fixed = _meta_step(64, 4, 64, 16) | {"image_size": 16}
    sizes = {
        f"{axis}_{value}": fixed | {axis: value}
        for axis, values in axes.items()
        for value in values
    }
    return {"num_rounds": 5, "axes": axes} | _measured(sizes)


def _patches():
    """The meta-step over patches of 4x4 pixels, the cells of a latent grid."""
    patches = _meta_step(128, 5, 16, 1024) | {"image_size": 4}
    whole = {"points_per_group": 0, "reference": "groups_of_64"}
    sizes = {
        "groups_of_64": patches,
        "groups_of_256": patches | whole | {"points_per_group": 4096},
        "one_group": patches | whole,
    }
    return _measured(sizes)


def _curvature():
    """Measures of the Hessian of an MLP, as in experiments/peers."""
    sizes = {"kind": "curvature", "width": 128, "depth": 3, "batch_size": 512}
    counts = {
        "eigenvalues": {"num": 5, "num_steps": 40},
        "trace": {"num": 100, "num_steps": 1},
        "density": {"num": 5, "num_steps": 40},
    }
    paths = {
        name: sizes | count | {"measure": name, "tolerance": 1e-2}
        for name, count in counts.items()
    }
    return _measured(paths)


def _paper():
    whole = _meta_step(512, 15, 256, 32) | {"points_per_group": 0}
    exact = whole | {"fast_sine": False}
    compared = {"reference": "exact_sine"}
    rounded = compared | {"dtype": "bfloat16"}
    return _measured(
        _products(8192, 8)
        | {
            "exact_sine": exact,
            "fast_sine": whole | compared,
            "exact_sine_bfloat16": exact | rounded,
            "fast_sine_bfloat16": whole | rounded,
            "groups_of_8": exact | compared | {"points_per_group": 8192},
        }
    )


def _vit_b16():
    """Each score with the fastest attention; the maxima also with the others."""
    model = dict(
        kind="vit_forward",
        variant="cifar10",
        batch_size=128,
        image_size=224,
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        mlp_dim=3072,
        patch_size=16,
        dtype="bfloat16",
        drop_path_rate=0.0,
    )
    sizes = {
        "dense": model | {"ratio": 0.0, "attention": "cudnn"},
        "dense_xla": model | {"ratio": 0.0, "attention": "xla", "reference": "dense"},
    }
    for percent in (30, 60):
        pruned = model | {"ratio": percent / 100, "reference": "dense"}
        fastest = pruned | {"attention": "pallas"}
        for score in ("max", "sum", "cls", "norm"):
            sizes[f"{score}_{percent}"] = fastest | {"score": score}
        for name in ("xla", "plain"):
            sizes[f"max_{percent}_{name}"] = pruned | {"attention": name}
    return {"seconds_per_turn": 0.3} | _measured(_products(8192, 8) | sizes)


def _optimizers():
    """The trainings of LeNet and VGG-A; the reference of DessiLBI is SGD."""
    methods = (*_METHODS, "sgd")
    sizes = _trainings("lenet", "mnist", methods, batch_size=128, num_steps=10)
    sizes |= _trainings("vgg", "cifar10", methods, batch_size=128, num_steps=2)
    for name in ("lenet", "vgg"):
        sizes[f"{name}_dessilbi"]["reference"] = f"{name}_sgd"
    return sizes


def _latents():
    compress = dict(
        kind="compress",
        variant="cifar10_spatial_cpu",
        batch_size=32,
        image_size=32,
        step=0.25,
    )
    sample = dict(kind="sample", variant="digits", batch_size=64, shape=(2, 2, 16))
    return _measured(
        {
            "pixels_to_bytes": compress | {"direction": "encode"},
            "bytes_to_pixels": compress | {"direction": "decode"},
            "sample": sample,
        }
    )


def _tracing():
    path = dict(kind="trace", variant="B", patch_size=16, image_size=224)
    names = ("channels", "groups")
    return _measured({f"trace_{name}": path | {"function": name} for name in names})


def _measured(sizes, *prefixes):
    """Settings that measure the paths whose names have one of these prefixes.

    Without prefixes all paths are measured. Matrix products do not count as paths; the
    default ones are added.
    """
    sizes = _products(1024, 8) | sizes
    names = [name for name in sizes if not name.startswith("product")]
    return {
        "sizes": settings.Open(sizes),
        "paths": tuple(n for n in names if not prefixes or n.startswith(prefixes)),
    }


BASE = {
    # The paths take turns in each round. A turn lasts at least this many seconds and
    # ends after a complete call.
    "num_rounds": 7,
    "seconds_per_turn": 0.2,
    # A Python that has torch, and PyHessian for curvature. It runs the programs of
    # experiments/peers that do the same work as a path, at the start of every
    # `peer_every` rounds; None leaves them out.
    "peer_python": settings.Optional(str),
    "peer_every": 3,
    # sizes: name -> {"kind": one of the KINDS in experiments/timing, and its keywords}.
    # `variant` is one of the measured command's config, for the other settings.
    # The time is compared with that of the path `reference` if both are measured.
    # paths: names of the paths to run.
    **_measured(_sizes()),
    # Axes of the figure: {keyword: values}. Each value is a path named KEYWORD_VALUE.
    "axes": settings.Open(),
}

VARIANTS = {
    "all": {},
    "functa": _measured(_sizes(), "meta", "encode", "fit"),
    "optimizers": _measured(_optimizers()),
    "lenet": _measured(_optimizers(), "lenet"),
    "vgg": _measured(_optimizers(), "vgg"),
    "latents": _latents(),
    "tracing": _tracing(),
    "scaling": _scaling(),
    "patches": _patches(),
    "spatial": _spatial(),
    "curvature": _curvature(),
    "paper": _paper(),
    "vit_b16": _vit_b16(),
    "smoke": {
        "num_rounds": 3,
        "seconds_per_turn": 0.0,
        "axes": {"num_images": (1, 2)},
        **_measured(_tiny_sizes()),
    },
}

RULES = {
    "num_rounds": settings.whole(1),
    "seconds_per_turn": settings.at_least(0),
    "peer_every": settings.whole(1),
}

get_config = functools.partial(settings.build, "benchmark", BASE, VARIANTS)
