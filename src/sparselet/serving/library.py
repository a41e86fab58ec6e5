"""`Library`: what the page shows of the served experts: what their files say, where their changes lie, where two meet."""

import contextlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparselet.adapter_format import CONFIG_FILE
from sparselet.analysis.pairs import overlap_of
from sparselet.delta import block_name
from sparselet.errors import RequestRefused, WrongBase
from sparselet.io.printable import printable
from sparselet.masks import layer_of, natural_order, projection_of
from sparselet.merging.methods import METHODS
from sparselet.serving.latest import Latest
from sparselet.serving.registry import Registration
from sparselet.serving.served_expert import ServedExpert
from sparselet.serving.service import Service

MAX_SHOWN = 16  # experts whose changes are shown side by side
KEPT_RESULTS = 1024  # of maps and overlaps


class Library:
    """A service's experts as JSON values, without the server's paths. Maps and overlaps are computed once for each content of
    an expert or of a pair."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._results: Latest[str, dict[str, Any]] = Latest(KEPT_RESULTS)

    def cards(self) -> dict[str, Any]:
        """The base model, all experts, those that are not served, and the methods by which experts can be merged here."""
        registry = self.service.registry
        registrations = registry.registrations()
        paths = registry.paths()
        refused = [
            {
                "name": name,
                "reason": printable(error).replace(f"{paths[name].parent}{os.sep}", ""),
                "other_base": isinstance(error, WrongBase),
            }
            for name, error in sorted(registry.refused.items())
            if name in paths
        ]
        methods = [
            {
                "name": method.name,
                "formula": method.formula,
                "source": method.source,
                "parameters": method.defaults,
                "needs_profiles": method.needs_profiles,
            }
            for method in METHODS.values()
        ]
        return {
            "base": {"name": _model_name(self.service.name), "digest": registry.base.digest},
            "experts": [_card(name, registration) for name, registration in registrations.items()],
            "refused": refused,
            "methods": methods,
            "can_route": sum(registration.profile is not None for registration in registrations.values()) > 1,
        }

    def where(self, names: Sequence[str]) -> dict[str, Any]:
        """Where the changes of these experts lie, and where each two of them meet.

        Raises RequestRefused (no names, more than 16), UnknownExpert.
        """
        if not 0 < len(names) <= MAX_SHOWN:
            raise RequestRefused(f"names must be 1 to {MAX_SHOWN} experts, got {len(names)}.", "names")
        experts = {name: self.service.registry[name] for name in dict.fromkeys(names)}
        maps, pairs, earlier = [], [], dict[str, ServedExpert]()
        for name, expert in experts.items():
            maps.append({"name": name, **self._once(expert.digest, lambda expert=expert: _map(expert))})
            for other, partner in earlier.items():
                key = " ".join([partner.digest, expert.digest])
                meeting = self._once(key, lambda first=partner, second=expert: _meeting(first, second))
                pairs.append({"first": other, "second": name, **meeting})
            earlier[name] = expert
        return {"maps": maps, "pairs": pairs}

    def _once(self, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        kept = self._results.get(key)
        return self._results.keep(key, compute()) if kept is None else kept


def _card(name: str, registration: Registration) -> dict[str, Any]:
    """What an expert's file says of it. written: when, in seconds since 1970; None where the file is gone."""
    expert, metadata = registration.expert, registration.expert.metadata
    adapter = expert.adapter
    assert adapter is not None
    written = None
    with contextlib.suppress(OSError):
        written = (registration.path / CONFIG_FILE).stat().st_mtime
    merge = metadata.merge or {}
    members = merge.get("experts")
    return {
        "name": name,
        "digest": expert.digest,
        "bytes": expert.bytes,
        "task": _text(metadata.task),
        "metrics": {printable(k): v for k, v in (metadata.metrics or {}).items() if _is_number(v)},
        "entries": adapter.nnz,
        "targets": len(adapter),
        "density": adapter.density,
        "block": ", ".join(sorted({block_name(delta.block, delta.shape) for delta in adapter.values() if delta.nnz})),
        "base": None if metadata.base_model_name_or_path is None else _model_name(metadata.base_model_name_or_path),
        "fingerprints": sum(adapter.fingerprints.get(target) is not None for target in adapter),
        "written": written,
        "method": _text(merge.get("method")),
        "members": [_member(m) for m in members if isinstance(m, dict)] if isinstance(members, list) else [],
        "profile": registration.profile is not None,
    }


def _map(expert: ServedExpert) -> dict[str, Any]:
    """Each target's layer, projection, selected entries, share of the change's energy, and root mean square of ΔW."""
    cells, total = [], 0.0
    for target in sorted(expert.adapter or {}, key=natural_order):
        assert expert.adapter is not None
        delta = expert.adapter[target]
        energy = float(delta.values.double().square().sum())
        total += energy
        layer, projection = layer_of(target).rpartition(".")[2], projection_of(target).rpartition(".")[2]
        cell = {"layer": printable(layer), "projection": printable(projection), "target": printable(target)}
        cells.append({**cell, "entries": delta.nnz, "rms": (energy / delta.size) ** 0.5, "energy": energy})
    for cell in cells:
        cell["share"] = cell.pop("energy") / total if total else 0.0
    return {"cells": cells}


def _meeting(first: ServedExpert, second: ServedExpert) -> dict[str, Any]:
    """Overlap of two experts' masks over the targets of both, beside chance; null where they share no target."""
    left, right = first.adapter or {}, second.adapter or {}
    overlaps = [overlap_of(left[target], right[target]) for target in left if target in right]
    if not overlaps:
        return {"overlap": None}
    total = sum(overlaps[1:], overlaps[0])
    return {
        "overlap": total.jaccard,
        "chance": total.chance,
        "shared": total.shared,
        "sign_agreement": total.sign_agreement if total.signed else None,
        "cosine": total.cosine,
    }


def _member(record: Mapping[str, Any]) -> str:
    """An expert of a merge: its task, with its weight where that is not 1."""
    task, weight = printable(record.get("task") or "expert"), record.get("weight")
    return f"{weight:g} · {task}" if _is_number(weight) and weight != 1 else task


def _model_name(name: str) -> str:
    """A base model's name; of a directory the last part, since clients need not know where the server's files lie."""
    return printable(Path(name).name if name.startswith(("/", ".", "~")) else name)


def _text(value: Any) -> str | None:
    """A value of a file as a text to show."""
    return None if value is None else printable(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
