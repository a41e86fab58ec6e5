"""What a unit's result.json and cost.json hold."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparselet.studies.engine.unit import Kind

EVAL_COUNTS = ("rows", "scores")  # keys of an evaluation's result that are no metric


@dataclass(frozen=True)
class MergeUnitResult:
    """parameters: entries. active_layers: layers that have any."""

    parameters: int
    active_layers: int

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {**vars(self)}

    def measures(self) -> dict[str, float]:
        """The numbers that a table's cell can show, by name."""
        return {"parameters": self.parameters, "active_layers": self.active_layers}


@dataclass(frozen=True)
class TrainUnitResult(MergeUnitResult):
    """parameters: trained numbers: entries, LoRA's A and B, or all of the model's."""

    validation_loss: float | None
    steps: int

    def measures(self) -> dict[str, float]:
        """The numbers that a table's cell can show, by name."""
        loss = {} if self.validation_loss is None else {"validation_loss": self.validation_loss}
        return {**super().measures(), **loss}


@dataclass(frozen=True)
class EvalUnitResult:
    """metrics: × 100, by name. row_scores: Rouge-L × 100 of each row, to 4 decimals."""

    metrics: Mapping[str, float]
    rows: int
    row_scores: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {**self.metrics, "rows": self.rows, "scores": list(self.row_scores)}

    def measures(self) -> dict[str, float]:
        """The numbers that a table's cell can show, by name."""
        return dict(self.metrics)


@dataclass(frozen=True)
class AnalysisUnitResult:
    """numbers: by name."""

    numbers: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return dict(self.numbers)

    def measures(self) -> dict[str, float]:
        """The numbers that a table's cell can show, by name."""
        return dict(self.numbers)


UnitResult = TrainUnitResult | MergeUnitResult | EvalUnitResult | AnalysisUnitResult


@dataclass(frozen=True)
class UnitCost:
    """Wall and CPU time, peak of resident memory, name of the machine, and bytes of the files that were written."""

    seconds: float
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    host: str = ""
    bytes: int = 0


def result_from_json(kind: Kind, content: Mapping[str, Any]) -> UnitResult:
    """The result of a unit of this kind. Raises KeyError, TypeError for content of another."""
    if kind == "evaluate":
        metrics = {name: float(value) for name, value in content.items() if name not in EVAL_COUNTS}
        return EvalUnitResult(metrics, content["rows"], tuple(content["scores"]))
    if kind == "analyse":
        return AnalysisUnitResult({name: float(value) for name, value in content.items()})
    return (TrainUnitResult if kind == "train" else MergeUnitResult)(**content)
