"""A small study whose every table can be made, and results to fill it with."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from sparselet.studies.engine.unit import Unit, closure
from sparselet.studies.settings import StudySettings
from sparselet.studies.study import Study
from sparselet.studies.table import Table

SETTINGS = StudySettings(
    held_in=("one", "two", "three", "four"),
    held_out=("five", "six", "seven"),
    sweep_tasks=("one", "two", "three"),
    learning_rate={"sparse": 1e-3, "block": 2e-3, "lora": 3e-4, "full": 1e-5, "multitask": 2e-5},
    lora_ranks=(2, 21),
    lora_rank=21,
    targets={"QKV + O": ("q_proj", "o_proj"), "MLP down": ("down_proj",)},
    full_merges={"uniform": {}, "ties": {"scale": 0.5}},
    train_rows=10,
    test_rows=5,
    epochs=2.0,
    densities=(0.01, 0.1, 0.5, 1.0),
    learning_rates=(1e-4, 1e-3),
    n_experts=(2, 4),
    draws=3,
)


def made(**changes: Any) -> Study:
    """A study with made-up fingerprints."""
    settings = replace(SETTINGS, **changes)
    tasks = (*settings.held_in, *settings.held_out)
    return Study(settings, {task: {split: f"{split} {task}" for split in ("train", "test", "all")} for task in tasks}, "base")


def measured(tables: Mapping[str, Table], value: Callable[[Unit], float]) -> dict[str, dict[str, float]]:
    """A result for each training and evaluation of the tables."""
    plan = closure(unit for table in tables.values() for unit in table.units())
    return {
        key: dict.fromkeys(("rougeL", "exact_match", "parameters", "active_layers"), value(unit))
        for key, unit in plan.items()
        if unit.kind != "merge"
    }


def by_hash(unit: Unit) -> float:
    """A number from 0 to 100 that looks random."""
    return int(hashlib.sha256(unit.key.encode()).hexdigest()[:8], 16) / 2**32 * 100
