"""DessiLBI: structural sparsity while training, as an optax transformation."""

from lbi import lenet, penalty, pruning
from lbi.dessilbi import dessilbi, dessilbi_adam, structural_coupling
from lbi.penalty import L1, GroupL2
from lbi.support import (
    clock,
    density,
    entry_steps,
    final_clock,
    find_states,
    forecast_entries,
    gamma,
    in_support,
    sparse_params,
    suggest_lambda,
)

__all__ = [
    "GroupL2",
    "L1",
    "clock",
    "density",
    "dessilbi",
    "dessilbi_adam",
    "entry_steps",
    "final_clock",
    "find_states",
    "forecast_entries",
    "gamma",
    "in_support",
    "lenet",
    "penalty",
    "pruning",
    "sparse_params",
    "structural_coupling",
    "suggest_lambda",
]
