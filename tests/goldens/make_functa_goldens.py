"""Writes functa_film_sgd.npz and functa_shift_metasgd.npz: Haiku networks and numbers.

    python tests/goldens/make_functa_goldens.py

The networks are those of google-deepmind/functa (Dupont et al. 2022, arXiv 2201.12204),
written in Haiku in tests/functa_oracle.py, with random weights. Plain JAX autodiff in
float64 gives the inner loop and the gradient through it. Nothing of functa/ is used.

A file holds float32 arrays under these keys (B images, R rows and columns, C channels,
L latent size, S inner steps):

  config                        JSON: the keywords of the network and the inner loop
  params/<module>/<name>        all parameters, with the latent and the learned rates
  coords                        (R, R, 2)
  images                        (B, R, R, C) in [0, 1]
  forward                       (R, R, C), the field of the stored latent
  fitted_latents                (B, L), from the stored latent
  psnr_per_step, loss_per_step  (B, S + 1)
  outer_loss                    (), mean over B of the last loss
  outer_grad/<module>/<name>    its gradient through all inner steps
"""

import json
import math
import sys
from pathlib import Path

import jax
import numpy as np

HERE = Path(__file__).resolve().parent
COMMON = {"out_channels": 3, "resolution": 9}
CONFIGS = {
    "functa_film_sgd": {
        "width": 16,
        "depth": 4,
        "latent_dim": 6,
        "layer_sizes": [10],
        "w0": 10.0,
        "modulate_scale": True,
        "modulate_shift": True,
        "use_meta_sgd": False,
        "inner_steps": 2,
        "inner_lr": 0.5,
        "l2_weight": 0.02,
        **COMMON,
    },
    "functa_shift_metasgd": {
        "width": 20,
        "depth": 5,
        "latent_dim": 7,
        "layer_sizes": [],
        "w0": 30.0,
        "modulate_scale": False,
        "modulate_shift": True,
        "use_meta_sgd": True,
        "inner_steps": 3,
        "inner_lr": 0.01,  # Unused: the learned rates replace it.
        "l2_weight": 0.0,
        **COMMON,
    },
}
NUM_IMAGES = 2


def make_params(rng, shapes, omega_0):
    """Draws {module: {name: float32}} for {module: {name: shape}}; no entry is zero."""
    params = {}
    for module, arrays in shapes.items():
        params[module] = {}
        for name, shape in arrays.items():
            if name == "meta_sgd_lrs":
                value = rng.uniform(0.1, 1.0, shape)
            elif name == "latent_vector":
                value = rng.normal(0, 0.3, shape)
            elif name == "b":
                value = rng.normal(0, 0.1, shape)
            elif "mlp" in module:
                value = rng.normal(0, 0.5 / math.sqrt(shape[0]), shape)
            else:  # The kernels of a SIREN (Sitzmann et al. 2020).
                first = module.endswith("modulated_siren_layer/linear")
                bound = 1 / shape[0] if first else math.sqrt(6 / shape[0]) / omega_0
                value = rng.uniform(-bound, bound, shape)
            params[module][name] = np.float32(value)
    return params


def make_images(rng, coords, num_channels):
    """Draws smooth images (B, R, R, C): one wave for each channel."""
    size = (NUM_IMAGES, num_channels)
    waves = rng.uniform(-6, 6, (*size, 2))
    phases = rng.uniform(0, 2 * np.pi, size)
    angles = np.einsum("xyd,bcd->bxyc", coords, waves) + phases[:, None, None]
    return np.float32(0.5 + 0.45 * np.sin(angles))


def make_golden(config, seed):
    """Returns the arrays of a file."""
    import functa_oracle

    rng = np.random.default_rng(seed)
    centers = (np.arange(config["resolution"]) + 0.5) / config["resolution"]
    coords = np.float32(np.stack(np.meshgrid(centers, centers, indexing="ij"), -1))
    tree = jax.eval_shape(
        functa_oracle.latent_siren(config).init, jax.random.key(0), coords
    )
    shapes = {
        module: {name: array.shape for name, array in arrays.items()}
        for module, arrays in tree.items()
    }
    params = make_params(rng, shapes, config["w0"])
    images = make_images(rng, coords, config["out_channels"])
    numbers = functa_oracle.golden_numbers(config, params, coords, images)
    return {
        "config": json.dumps(config),
        **functa_oracle.flat(params, "params/"),
        "coords": coords,
        "images": images,
        **{key: np.float32(array) for key, array in numbers.items()},
    }


def main():
    sys.path.insert(0, str(HERE.parent))
    for seed, (name, config) in enumerate(CONFIGS.items()):
        np.savez_compressed(HERE / f"{name}.npz", **make_golden(config, seed))


if __name__ == "__main__":
    main()
