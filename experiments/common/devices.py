"""Where arrays lie: one mesh of all devices, states on each of them, batches split.

Every command runs unchanged on one device or many, of one process or several: `jax.jit`
divides the work by where its arguments lie. Numbers do not depend on how many devices
there are, but for the order in which sums are rounded. A batch normalisation sees the
whole batch.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def initialize(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Joins the processes of a run; before anything else that uses a device.

    Args:
      coordinator: HOST:PORT of process 0. None leaves all three to be found, as on
        Slurm, Open MPI, Kubernetes and TPUs they are.
      num_processes: of the run.
      process_id: of this process, from 0.
    """
    jax.distributed.initialize(coordinator, num_processes, process_id)


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns when all processes have come to the point of this name."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def mesh(*, local: bool = False) -> Mesh:
    """All devices in a row, or those of this process."""
    devices = jax.local_devices() if local else jax.devices()
    return Mesh(np.array(devices), "data", axis_types=AxisType.Auto)


def replicated(*, local: bool = False) -> NamedSharding:
    """The whole array on each device."""
    return NamedSharding(mesh(local=local), PartitionSpec())


def divided(*, axis: int = 0, local: bool = False) -> NamedSharding:
    """An equal part of one axis on each device."""
    return NamedSharding(mesh(local=local), PartitionSpec(*[None] * axis, "data"))


def replicate(tree: Any, *, local: bool = False) -> Any:
    """Puts the same arrays, which every process must hold, on each device."""
    return _put(tree, replicated(local=local))


def divide(tree: Any, *, axis: int = 0, local: bool = False) -> Any:
    """Splits an axis of arrays over the devices; of each, a process puts its part.

    Raises:
      ValueError: if the devices do not divide the axis.
    """
    for leaf in jax.tree.leaves(tree):
        check_divisible(leaf.shape[axis], local=local)
    return _put(tree, divided(axis=axis, local=local))


def divide_traced(tree: Any, *, axis: int = 0) -> Any:
    """What `divide` does, for arrays within a jitted function."""
    for leaf in jax.tree.leaves(tree):
        check_divisible(leaf.shape[axis])
    return jax.lax.with_sharding_constraint(tree, divided(axis=axis))


def check_divisible(batch_size: int, *, local: bool = False) -> None:
    """Raises ValueError if a batch cannot be split into equal parts."""
    num_devices = mesh(local=local).size
    if batch_size % num_devices:
        raise ValueError(
            f"a batch of {batch_size} cannot be split over {num_devices} devices; "
            f"take a multiple of {num_devices}."
        )


def _put(tree, sharding):
    def put(x):
        # Within a jitted function there is nothing to put anywhere.
        if isinstance(x, jax.core.Tracer):
            return x
        if isinstance(x, jax.Array) and x.sharding == sharding:
            return x
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree)
