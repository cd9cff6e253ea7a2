"""Functa: meta-learned neural fields that represent each signal by a latent.

The networks are `LatentModulatedSiren` (a latent vector) and `SpatialSiren` (a grid of
latents). `fit_latent` fits a latent to one signal, `meta_gradient` gives the gradients
that train the weights, and `load_functaset` reads the latents of a data set. Not
imported here: `functa.classifier`, `compression`, `flow`, `generation`, `joint` and
`plots`.
"""

import importlib

from functa import deepmind, linear
from functa.functaset import (
    Functaset,
    load_functaset,
    make_model,
    reconstruct,
    render,
    save_functaset,
)
from functa.inner_loop import (
    FitInfo,
    fit_batch,
    fit_latent,
    largest_eigenvalue,
    meta_gradient,
    optimize_latent,
    reconstruction_loss,
)
from functa.metrics import mean_psnr, psnr, psnr_of_mean
from functa.siren import (
    LatentModulatedSiren,
    ModulatedSiren,
    Siren,
    coordinate_grid,
)
from functa.spatial import SpatialSiren

__all__ = [
    "FitInfo",
    "Functaset",
    "LatentModulatedSiren",
    "ModulatedSiren",
    "Siren",
    "SpatialSiren",
    "coordinate_grid",
    "deepmind",
    "fit_batch",
    "fit_latent",
    "largest_eigenvalue",
    "linear",
    "load_functaset",
    "make_model",
    "mean_psnr",
    "meta_gradient",
    "optimize_latent",
    "psnr",
    "psnr_of_mean",
    "reconstruct",
    "reconstruction_loss",
    "render",
    "save_functaset",
]

__version__ = "0.1.0"


def __getattr__(name):
    # The old names of modules, for one version.
    if name in ("convert", "pickled", "product"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}.")
