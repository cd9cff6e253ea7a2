"""Placement of arrays on devices: states on each device, batches split over them.

All devices form one mesh. Every command runs unchanged on one or more devices and
processes: `jax.jit` divides the work according to the placement of its arguments.
Results do not depend on the number of devices, except for the rounding of sums. Batch
normalization uses the whole batch.
"""

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.common import partners, settings


def initialize(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Connects the processes of a run. Call it before any use of a device.

    If one of them ends early, the others end within seconds, with one line.

    Args:
      coordinator: HOST:PORT of process 0. With None JAX detects all three arguments;
        this works on Slurm, Open MPI, Kubernetes and TPUs.
      num_processes: number of processes of the run.
      process_id: index of this process, from 0.
    """
    if None not in (num_processes, process_id) and not (
        0 <= process_id < num_processes
    ):
        raise ValueError(
            f"--process_id must be from 0 to {num_processes - 1}, below "
            f"--num_processes, got {process_id}."
        )
    # Nothing uses this service, which prints lines when process 0 ends.
    if hasattr(jax.config, "jax_enable_preemption_service"):
        jax.config.update("jax_enable_preemption_service", False)
    # What it lacks or cannot reach, only the user can give.
    with settings.blamed_on("--multihost"):
        jax.distributed.initialize(coordinator, num_processes, process_id)
    if jax.process_count() > 1:
        partners.connect(coordinator)


def keep_freed_memory() -> None:
    """Lets the process use the memory again that a computation on the CPU frees.

    By default the C library returns every block above 32 MB to the system, and the next
    step gets it back in pages of 4 kB, which the system clears one by one. A training
    step with some hundred MB of activations spends a good part of its time on that.
    Nothing happens on systems without GNU's library. The calls are those of mallopt(3).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mmap_max, trim_threshold, arena_max = -4, -1, -8
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)  # never
    mallopt(arena_max, 1)  # Memory that one thread freed serves all.


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def say(message: str) -> None:
    """Prints one line, from the main process; escapes what the terminal cannot show."""
    if is_main():
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        print(message.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def wait_for_all(name: str) -> None:
    """Waits until all processes have reached the point of this name."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def mesh(*, local: bool = False) -> Mesh:
    """A mesh of all devices, or of those of this process."""
    devices = jax.local_devices() if local else jax.devices()
    return Mesh(np.array(devices), "data", axis_types=AxisType.Auto)


def replicated(*, local: bool = False) -> NamedSharding:
    """Sharding with the whole array on each device."""
    return NamedSharding(mesh(local=local), PartitionSpec())


def divided(*, axis: int = 0, local: bool = False) -> NamedSharding:
    """Sharding with an equal part of one axis on each device."""
    return NamedSharding(mesh(local=local), PartitionSpec(*[None] * axis, "data"))


def replicate(tree: Any, *, local: bool = False) -> Any:
    """Copies arrays to each device. Every process must have the same arrays."""
    return _put(tree, replicated(local=local))


def divide(tree: Any, *, axis: int = 0, local: bool = False) -> Any:
    """Splits an axis of arrays over the devices; each process copies its own part.

    Raises:
      ValueError: if the number of devices does not divide the axis.
    """
    for leaf in jax.tree.leaves(tree):
        check_divisible(leaf.shape[axis], local=local)
    return _put(tree, divided(axis=axis, local=local))


def divide_traced(tree: Any, *, axis: int = 0) -> Any:
    """As `divide`, for arrays within a jitted function."""
    for leaf in jax.tree.leaves(tree):
        check_divisible(leaf.shape[axis])
    return jax.lax.with_sharding_constraint(tree, divided(axis=axis))


def check_divisible(batch_size: int, *, local: bool = False) -> None:
    """Raises ValueError if a batch cannot be split into equal parts."""
    num_devices = mesh(local=local).size
    if batch_size % num_devices:
        raise ValueError(
            f"a batch of {batch_size} cannot be split over {num_devices} devices; "
            f"use a multiple of {num_devices}."
        )


def _put(tree, sharding):
    def put(x):
        # Within a jitted function arrays cannot be copied to a device.
        if isinstance(x, jax.core.Tracer):
            return x
        if isinstance(x, jax.Array) and x.sharding == sharding:
            return x
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree)


def in_batches(
    function: Callable[..., jax.Array], *arrays: np.ndarray, batch_size: int = 500
) -> np.ndarray:
    """function(*arrays), evaluated for `batch_size` rows of the arrays at once."""
    num_rows = len(arrays[0])
    size, results = min(batch_size, num_rows), []
    for start in range(0, num_rows, size):
        # The last batch overlaps the one before; another size would be compiled.
        first = min(start, num_rows - size)
        batch = function(*(values[first : first + size] for values in arrays))
        results.append(np.asarray(batch)[start - first :])
    return np.concatenate(results)
