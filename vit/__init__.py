"""Vision Transformers with cascade pruning of patches and heads."""

from vit import cascade, cost, importance, slicing
from vit.cascade import Cascade
from vit.checkpoint import load_checkpoint, save_checkpoint
from vit.model import ViT, make

__all__ = [
    "Cascade",
    "ViT",
    "cascade",
    "cost",
    "importance",
    "load_checkpoint",
    "make",
    "save_checkpoint",
    "slicing",
]

__version__ = "0.1.0"
