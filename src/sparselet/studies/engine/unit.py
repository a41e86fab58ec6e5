"""A unit of a study's work, and the key of all that determines it."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

# Raised when the same settings would give another result: units done before are then done again.
ALGORITHM = 1

Kind = Literal["train", "merge", "evaluate"]


@dataclass(frozen=True, eq=False)
class Unit:
    """Something to train, merge or evaluate.

    settings: JSON values; all that determines the result beside the inputs, and no path. Train and evaluate: `model`, `base`
        (its fingerprint), `dtype`, `threads`. Train: `task` (names), `data` (name to fingerprint of its training and validation
        rows), `train` (what differs from the defaults of `TrainSettings`, without model and task). Merge: `method`,
        `parameters`. Evaluate: `task`, `data` (fingerprint of its test rows), `eval` (what differs from the defaults of
        `EvalSettings`), and `mask`, true where only the entries in the second input's masks are left of the first.
    inputs: what it reads. Train: nothing, or the merge that a second stage starts from. Merge: experts. Evaluate: nothing for
        the base model, else an expert or a merge, and for `mask` the expert whose masks count.
    label: what a person calls it; no part of the key.
    """

    kind: Kind
    settings: Mapping[str, Any]
    inputs: tuple["Unit", ...] = ()
    label: str = field(default="", compare=False)

    @cached_property
    def key(self) -> str:
        """SHA-256 of the settings and the inputs' keys, 32 hex digits."""
        told = [ALGORITHM, self.kind, self.settings, [unit.key for unit in self.inputs]]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]


def closure(units: Iterable[Unit]) -> dict[str, Unit]:
    """The units and all that they read, by key, each after its inputs."""
    found: dict[str, Unit] = {}

    def visit(unit: Unit) -> Iterator[Unit]:
        for one in unit.inputs:
            yield from visit(one)
        yield unit

    for unit in units:
        for one in visit(unit):
            found.setdefault(one.key, one)
    return found


def packed(units: Iterable[Unit]) -> list[dict[str, Any]]:
    """The units and all that they read as JSON values, each after its inputs, which it names by key."""
    return [
        {"kind": u.kind, "settings": dict(u.settings), "inputs": [i.key for i in u.inputs], "label": u.label}
        for u in closure(units).values()
    ]


def unpacked(content: Iterable[Mapping[str, Any]]) -> dict[str, Unit]:
    """What `packed` was given, by key, from its JSON."""
    units: dict[str, Unit] = {}
    for one in content:
        unit = Unit(one["kind"], one["settings"], tuple(units[key] for key in one["inputs"]), one["label"])
        units[unit.key] = unit
    return units
