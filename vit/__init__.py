"""Vision Transformers with cascade pruning of patches and heads.

`make` or `load_checkpoint` gives a model. `for_budget` gives the `Cascade` that needs a
share of its multiply-adds, and `model.clone(cascade=cascade)` is the pruned model, with
the same parameters. `vit.plots`, which is not imported here, draws figures.
"""

from vit import (
    attention,
    budget,
    cascade,
    cost,
    importance,
    schedules,
    slicing,
    tokens,
)
from vit.budget import for_budget, for_latency, predict_latency
from vit.cascade import Cascade
from vit.checkpoint import load_checkpoint, load_normalization, save_checkpoint
from vit.model import ViT, make, observe

__all__ = [
    "Cascade",
    "ViT",
    "attention",
    "budget",
    "cascade",
    "cost",
    "for_budget",
    "for_latency",
    "importance",
    "load_checkpoint",
    "load_normalization",
    "make",
    "observe",
    "predict_latency",
    "save_checkpoint",
    "schedules",
    "slicing",
    "tokens",
]

__version__ = "0.1.0"
