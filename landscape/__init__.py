"""The landscape that a network trains on: probes, curvature, surfaces."""

import importlib

from landscape import checks, curvature, filters, probes, surface

__all__ = ["checks", "curvature", "filters", "probes", "surface"]

__version__ = "0.1.0"


def __getattr__(name):
    # Modules that moved, under their old names for one version.
    if name in ("convolution", "deep_linear", "vgg"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}.")
