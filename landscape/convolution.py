"""Old name of `experiments.networks.convolution`, for one version."""

import importlib
import sys
import warnings

_NEW = "experiments.networks.convolution"
warnings.warn(f"{__name__} is now {_NEW}.", DeprecationWarning, stacklevel=2)
sys.modules[__name__] = importlib.import_module(_NEW)
