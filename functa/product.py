"""Old name of `functa.matmul`, for one version."""

import importlib
import sys
import warnings

_NEW = "functa.matmul"
warnings.warn(f"{__name__} is now {_NEW}.", DeprecationWarning, stacklevel=2)
sys.modules[__name__] = importlib.import_module(_NEW)
