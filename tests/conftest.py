"""JAX settings of all tests: two devices, and errors for two silent mistakes.

Compilation takes most of the time of the tests. XLA therefore emits small code with few
of LLVM's optimizations, which compiles three times as fast; level 0, without any
optimization, computes some gradients of VGG wrongly. Modules that train no such network
use `unoptimized` to compile at level 0. The processes that tests start share a cache of
compiled functions; the tests do not, because few of them compile the same function.
"""

import atexit
import collections
import gc
import os
import shutil
import tempfile

os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=1"
    # Of a program that is cut into parts, each part has fixed costs.
    " --xla_cpu_parallel_codegen_split_count=1"
    # XLA ignores the names here that it does not know.
    " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    ",xla_cpu_disable_loop_unrolling,xla_cpu_disable_slp_vectorizer"
    ",xla_cpu_optimize_for_size",
)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Set once, before pytest-xdist starts its workers.
    cache = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_enable_compilation_cache", False)
jax.config.update("jax_num_cpu_devices", 2)  # before the first computation
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)


@pytest.hookimpl(tryfirst=True)  # before "slow" is selected
def pytest_collection_modifyitems(items):
    """Marks what follows the first `n` cases of a test with `slow_after(n)` as slow."""
    numbers = collections.Counter()
    for item in items:
        if mark := item.get_closest_marker("slow_after"):
            name = item.nodeid.partition("[")[0]
            numbers[name] += 1
            if numbers[name] > mark.args[0]:
                item.add_marker("slow")


@pytest.fixture(autouse=True)
def _own_numbers(request, monkeypatch):
    """What a test draws from a generator of its module does not depend on others."""
    for name, value in vars(request.module).items():
        if isinstance(value, np.random.Generator):
            monkeypatch.setattr(request.module, name, np.random.default_rng(0))


def pytest_collection_finish():
    """Keeps the garbage collector from the modules, which tracing makes it visit."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def unoptimized():
    """Compiles at level 0, which takes half of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield
