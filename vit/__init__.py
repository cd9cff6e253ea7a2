"""Vision Transformers with cascade pruning of patches and heads."""

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
