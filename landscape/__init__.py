"""The landscape that a network trains on: probes, curvature, surfaces, networks."""

from landscape import convolution, curvature, deep_linear, probes, surface, vgg

__all__ = ["convolution", "curvature", "deep_linear", "probes", "surface", "vgg"]
