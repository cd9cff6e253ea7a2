"""Old name of `lbi.path`, for one version."""

import importlib
import sys
import warnings

_NEW = "lbi.path"
warnings.warn(f"{__name__} is now {_NEW}.", DeprecationWarning, stacklevel=2)
sys.modules[__name__] = importlib.import_module(_NEW)
