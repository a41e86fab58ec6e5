"""sparselet: sparse experts for language models, trained apart and merged into one.

The core (deltas, adapters, merging) needs torch and safetensors only; the rest PEFT and transformers. Names are loaded when
first used, so that importing the package costs nothing. `from sparselet import SparseletConfig` also makes PEFT know the
method.
"""

import importlib
from typing import TYPE_CHECKING, Any

from sparselet.errors import MissingExtra, SparseletError

if TYPE_CHECKING:
    from sparselet.adapter import SparseAdapter
    from sparselet.delta import SparseDelta
    from sparselet.merging import METHODS, merge
    from sparselet.scores import SCORES
    from sparselet.training.schedule import MaskSchedule
    from sparselet.tuner import SparseletConfig, SparseletModel, freeze_masks, reselect, to_adapter

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "SCORES",
    "MaskSchedule",
    "SparseAdapter",
    "SparseDelta",
    "SparseletConfig",
    "SparseletError",
    "SparseletModel",
    "freeze_masks",
    "merge",
    "reselect",
    "to_adapter",
]

_LAZY = {
    "METHODS": "sparselet.merging",
    "SCORES": "sparselet.scores",
    "MaskSchedule": "sparselet.training.schedule",
    "SparseAdapter": "sparselet.adapter",
    "SparseDelta": "sparselet.delta",
    "SparseletConfig": "sparselet.tuner",
    "SparseletModel": "sparselet.tuner",
    "freeze_masks": "sparselet.tuner",
    "merge": "sparselet.merging",
    "reselect": "sparselet.tuner",
    "to_adapter": "sparselet.tuner",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'sparselet' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        raise MissingExtra(f"sparselet.{name} needs {error.name}: pip install 'sparselet[train]'.") from error


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
