"""Functa: meta-learned neural fields that represent each signal by a latent."""

import importlib

from functa import deepmind as deepmind
from functa import linear as linear
from functa.functaset import Functaset as Functaset
from functa.functaset import load_functaset as load_functaset
from functa.functaset import make_model as make_model
from functa.functaset import reconstruct as reconstruct
from functa.functaset import render as render
from functa.functaset import save_functaset as save_functaset
from functa.inner_loop import FitInfo as FitInfo
from functa.inner_loop import fit_batch as fit_batch
from functa.inner_loop import fit_latent as fit_latent
from functa.inner_loop import largest_eigenvalue as largest_eigenvalue
from functa.inner_loop import meta_gradient as meta_gradient
from functa.inner_loop import optimize_latent as optimize_latent
from functa.inner_loop import reconstruction_loss as reconstruction_loss
from functa.metrics import mean_psnr as mean_psnr
from functa.metrics import psnr as psnr
from functa.metrics import psnr_of_mean as psnr_of_mean
from functa.siren import LatentModulatedSiren as LatentModulatedSiren
from functa.siren import ModulatedSiren as ModulatedSiren
from functa.siren import Siren as Siren
from functa.siren import coordinate_grid as coordinate_grid
from functa.spatial import SpatialSiren as SpatialSiren

__version__ = "0.1.0"


def __getattr__(name):
    # The old names of modules, for one version.
    if name in ("convert", "pickled", "product"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}.")
