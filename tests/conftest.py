"""JAX settings of all tests: two devices, and errors for two silent mistakes.

Most of the time of the tests is compilation. They therefore use few of LLVM's
optimizations (at level 0, which has none, some gradients of VGG are wrong). They share
a cache of compiled functions, also with the processes that they start.
"""

import atexit
import os
import shutil
import tempfile

os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Set once, before pytest-xdist starts its workers.
    cache = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 2)  # before the first computation
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield
