"""sparselet: sparse experts for language models, trained apart and merged into one.

    import sparselet as sl

    expert = sl.train("my-task", model="HuggingFaceTB/SmolLM2-135M-Instruct")
    merged = sl.merge([expert, "their/lora", "other-expert"], "ties", density=0.3)
    sl.evaluate(merged, ["my-task", "other-task"])

Names are loaded when they are first used. Deltas, adapters and `sparselet.merging` need torch and safetensors only, the verbs
transformers, training PEFT. `from sparselet import SparseletConfig` also registers the method with PEFT.
"""

import importlib
from typing import TYPE_CHECKING, Any

from sparselet.errors import MissingExtra, SparseletError

if TYPE_CHECKING:
    from sparselet.activations.callback import ProbeCallback
    from sparselet.adapter import SparseAdapter
    from sparselet.api.evaluation import evaluate
    from sparselet.api.exporting import convert, export
    from sparselet.api.grafting import graft
    from sparselet.api.grouping import merge_groups
    from sparselet.api.hub import pull, push
    from sparselet.api.inspection import inspect
    from sparselet.api.isolating import isolate
    from sparselet.api.locating import locate
    from sparselet.api.merging import merge, merge_recipe, split, update
    from sparselet.api.opening import load
    from sparselet.api.probing import ProbeSettings, probe
    from sparselet.api.profiling import ProfileSettings, profile
    from sparselet.api.routing import evaluate_routed, route
    from sparselet.api.searching import auto_merge, search, tune
    from sparselet.api.serving import serve
    from sparselet.api.steering import evaluate_steering, fit_steering
    from sparselet.api.studying import study
    from sparselet.api.training import train
    from sparselet.attention import sparse_attention
    from sparselet.delta import SparseDelta
    from sparselet.evaluation import EvalSettings
    from sparselet.merging import METHODS
    from sparselet.scores import SCORES
    from sparselet.serving.sync_patches import SyncPatches
    from sparselet.steering import SteeringVector, steered
    from sparselet.training.schedule import MaskSchedule
    from sparselet.training.settings import TrainSettings
    from sparselet.tuner import SparseletConfig, SparseletModel, freeze_masks, reselect, to_adapter
    from sparselet.workflows.auto_merge import AutoSettings
    from sparselet.workflows.cores import core, group
    from sparselet.workflows.demonstrations import order_demonstrations
    from sparselet.workflows.fast_slow_settings import FastSlowSettings
    from sparselet.workflows.graft import GraftSettings
    from sparselet.workflows.isolate import IsolateSettings
    from sparselet.workflows.probing import probe_rows
    from sparselet.workflows.routing import RouteSettings
    from sparselet.workflows.search import SearchSettings
    from sparselet.workflows.steering import SteerSettings
    from sparselet.workflows.tune import TuneSettings

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "SCORES",
    "AutoSettings",
    "EvalSettings",
    "FastSlowSettings",
    "GraftSettings",
    "IsolateSettings",
    "MaskSchedule",
    "ProbeCallback",
    "ProbeSettings",
    "ProfileSettings",
    "RouteSettings",
    "SearchSettings",
    "SparseAdapter",
    "SparseDelta",
    "SparseletConfig",
    "SparseletError",
    "SparseletModel",
    "SteerSettings",
    "SteeringVector",
    "SyncPatches",
    "TrainSettings",
    "TuneSettings",
    "auto_merge",
    "convert",
    "core",
    "evaluate",
    "evaluate_routed",
    "evaluate_steering",
    "export",
    "fit_steering",
    "freeze_masks",
    "graft",
    "group",
    "inspect",
    "isolate",
    "load",
    "locate",
    "merge",
    "merge_groups",
    "merge_recipe",
    "order_demonstrations",
    "probe",
    "probe_rows",
    "profile",
    "pull",
    "push",
    "reselect",
    "route",
    "search",
    "serve",
    "sparse_attention",
    "split",
    "steered",
    "study",
    "to_adapter",
    "train",
    "tune",
    "update",
]

_LAZY = {
    "METHODS": "sparselet.merging",
    "SCORES": "sparselet.scores",
    "AutoSettings": "sparselet.workflows.auto_merge",
    "EvalSettings": "sparselet.evaluation",
    "FastSlowSettings": "sparselet.workflows.fast_slow_settings",
    "GraftSettings": "sparselet.workflows.graft",
    "IsolateSettings": "sparselet.workflows.isolate",
    "MaskSchedule": "sparselet.training.schedule",
    "ProbeCallback": "sparselet.activations.callback",
    "ProbeSettings": "sparselet.api.probing",
    "ProfileSettings": "sparselet.api.profiling",
    "RouteSettings": "sparselet.workflows.routing",
    "SearchSettings": "sparselet.workflows.search",
    "SparseAdapter": "sparselet.adapter",
    "SparseDelta": "sparselet.delta",
    "SparseletConfig": "sparselet.tuner",
    "SparseletModel": "sparselet.tuner",
    "SteerSettings": "sparselet.workflows.steering",
    "SteeringVector": "sparselet.steering",
    "SyncPatches": "sparselet.serving.sync_patches",
    "TrainSettings": "sparselet.training.settings",
    "TuneSettings": "sparselet.workflows.tune",
    "auto_merge": "sparselet.api.searching",
    "convert": "sparselet.api.exporting",
    "core": "sparselet.workflows.cores",
    "evaluate": "sparselet.api.evaluation",
    "evaluate_routed": "sparselet.api.routing",
    "evaluate_steering": "sparselet.api.steering",
    "export": "sparselet.api.exporting",
    "fit_steering": "sparselet.api.steering",
    "freeze_masks": "sparselet.tuner",
    "graft": "sparselet.api.grafting",
    "group": "sparselet.workflows.cores",
    "inspect": "sparselet.api.inspection",
    "isolate": "sparselet.api.isolating",
    "load": "sparselet.api.opening",
    "locate": "sparselet.api.locating",
    "merge": "sparselet.api.merging",
    "merge_groups": "sparselet.api.grouping",
    "merge_recipe": "sparselet.api.merging",
    "order_demonstrations": "sparselet.workflows.demonstrations",
    "probe": "sparselet.api.probing",
    "probe_rows": "sparselet.workflows.probing",
    "profile": "sparselet.api.profiling",
    "pull": "sparselet.api.hub",
    "push": "sparselet.api.hub",
    "reselect": "sparselet.tuner",
    "route": "sparselet.api.routing",
    "search": "sparselet.api.searching",
    "serve": "sparselet.api.serving",
    "sparse_attention": "sparselet.attention",
    "split": "sparselet.api.merging",
    "steered": "sparselet.steering",
    "study": "sparselet.api.studying",
    "to_adapter": "sparselet.tuner",
    "train": "sparselet.api.training",
    "tune": "sparselet.api.searching",
    "update": "sparselet.api.merging",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'sparselet' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        _extra = "serve" if name == "serve" else "train"
        raise MissingExtra(f"sparselet.{name} needs {error.name}: pip install 'sparselet[{_extra}]'.") from error


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
