"""Old name of `functa.deepmind`, for one version."""

import importlib
import sys
import warnings

_NEW = "functa.deepmind"
warnings.warn(f"{__name__} is now {_NEW}.", DeprecationWarning, stacklevel=2)
sys.modules[__name__] = importlib.import_module(_NEW)
