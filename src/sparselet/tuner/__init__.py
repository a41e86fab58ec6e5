"""The PEFT method. Importing this package registers it with PEFT."""

from sparselet.tuner.adapted import sparselet_layers
from sparselet.tuner.config import SparseletConfig
from sparselet.tuner.layer import SparseletLayer
from sparselet.tuner.model import SparseletModel, UnselectedMaskWarning, to_adapter
from sparselet.tuner.selection import Selection, freeze_masks, reselect

__all__ = [
    "Selection",
    "SparseletConfig",
    "SparseletLayer",
    "SparseletModel",
    "UnselectedMaskWarning",
    "freeze_masks",
    "reselect",
    "sparselet_layers",
    "to_adapter",
]
