"""DessiLBI (linearized Bregman iterations): sparsity while training, with optax.

`structural_coupling` is one element of an optax chain; `suggest_lambda` sets its
penalties. `density`, `sparse_params` and the other functions of `lbi.path` read the
optimizer state. `pruning` and `channels` make the network smaller. `lbi.plots`, which
is not imported here, draws figures.
"""

import importlib

from lbi import channels, path, penalty, pruning
from lbi.dessilbi import dessilbi, dessilbi_adam, structural_coupling
from lbi.path import (
    clock,
    density,
    entry_steps,
    final_clock,
    find_states,
    forecast_entries,
    gamma,
    in_support,
    metrics,
    open_groups,
    sparse_params,
    suggest_lambda,
)
from lbi.penalty import L1, GroupL2
from lbi.structure import groups

__all__ = [
    "GroupL2",
    "L1",
    "channels",
    "clock",
    "density",
    "dessilbi",
    "dessilbi_adam",
    "entry_steps",
    "final_clock",
    "find_states",
    "forecast_entries",
    "gamma",
    "groups",
    "in_support",
    "metrics",
    "open_groups",
    "path",
    "penalty",
    "pruning",
    "sparse_params",
    "structural_coupling",
    "suggest_lambda",
]

__version__ = "0.1.0"


def __getattr__(name):
    # Modules that moved, under their old names for one version.
    if name in ("lenet", "support"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}.")
