"""The loss landscape of a network: probes, curvature, surfaces.

Every function takes a `loss_fn(params, batch)`. `probes.probe_gradient` takes steps
along the gradient, `curvature.leading_eigenvalues` measures the Hessian, and
`surface.loss_surface` evaluates the loss on a line or a plane. `landscape.plots`, which
is not imported here, draws the arrays.
"""

import importlib

from landscape import checks, curvature, filters, probes, surface

__all__ = ["checks", "curvature", "filters", "probes", "surface"]

__version__ = "0.1.0"


def __getattr__(name):
    # Modules that moved, under their old names for one version.
    if name in ("convolution", "deep_linear", "vgg"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}.")
