"""`graft`: which part of an expert's change is enough for a task."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sparselet.api.opening import base_of, chat_template_of, name_of, open_experts, read_checked
from sparselet.api.progress import ProgressCallback, StepCounter
from sparselet.errors import ConfigError
from sparselet.evaluation import EvalSettings
from sparselet.intervals import MeanInterval
from sparselet.merging.engine.plan import ExpertSource
from sparselet.models import load_model, load_tokenizer
from sparselet.report.analysis_page import Picture, Section, write_page
from sparselet.report.diagrams import curves
from sparselet.result_table import ResultTable, ShownAsTables
from sparselet.tasks.task import Task, load_task
from sparselet.workflows.graft import LEARNED, GraftCurve, GraftSettings, graft_curve, measured_rows

PARTS_MEANING = (
    "Parts of the change in the base model's weights, by the share of the changed entries that they keep: the largest, random "
    "ones, random ones times 1/share (so that the expected change is the whole), the smallest, the largest without the very "
    "largest 0.1 %, and all but the largest. The change is concentrated only where the largest beat the rescaled random ones; "
    "where random ones do as well, it is redundant instead. Intervals are 95 % bootstraps over rows."
)


@dataclass(frozen=True)
class Grafted(ShownAsTables):
    """A task's scores with parts of an expert's change."""

    expert: str
    task: str
    curve: GraftCurve

    def tables(self) -> tuple[ResultTable, ...]:
        """Rouge-L by part and fraction, and what the largest entries have over rescaled random ones."""
        curve = self.curve
        fractions = list(dict.fromkeys(point.fraction for point in curve.points))
        cells = {(point.part, point.fraction): _interval(point.score) for point in curve.points}
        parts = list(dict.fromkeys(point.part for point in curve.points))
        rows = [(part.replace("_", " "), *(cells[part, fraction] for fraction in fractions)) for part in parts]
        title = (
            f"{self.expert} on {self.task}: Rouge-L of {curve.rows} rows by the share of its {curve.entries:,} entries; base "
            f"{_interval(curve.base)}, all of it {_interval(curve.whole)}"
        )
        columns = ("part", *(f"{100 * fraction:g} %" for fraction in fractions))
        scores = ResultTable(title, columns, tuple(rows))
        if not curve.advantage:
            return (scores,)
        verdicts = tuple((f"{100 * f:g} %", _interval(a, sign=True), _verdict(a)) for f, a in curve.advantage.items())
        return (scores, ResultTable("The largest over rescaled random entries", ("share", "Rouge-L", ""), verdicts))

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        curve = asdict(self.curve)
        advantage = [{"fraction": fraction, **vars(mean)} for fraction, mean in self.curve.advantage.items()]
        return {"expert": self.expert, "task": self.task, **curve, "advantage": advantage}

    def write_page(self, file: str | Path) -> Path:
        """Write the curves and tables as one HTML page. Raises WriteFailed."""
        series: dict[str, list[tuple[float, ...]]] = {}
        for point in self.curve.points:
            score = point.score
            series.setdefault(point.part.replace("_", " "), []).append(
                (100 * point.fraction, score.mean, score.low, score.high)
            )
        levels = {"base model": self.curve.base.mean, "all of the change": self.curve.whole.mean}
        ticks = sorted({x for points in series.values() for x, *_ in points})
        label = "Rouge-L by the share of the changed entries that is grafted, with 95 % intervals"
        picture = Picture(
            lambda width: curves(
                series, width, x_label="% of the entries", y_label="Rouge-L", log=True, ticks=ticks, levels=levels
            ),
            label,
        )
        first, *others = self.tables()
        sections = [Section("Parts of the change", PARTS_MEANING, [picture], first)]
        sections += [Section("Is it concentrated?", "Paired differences over rows.", [], table) for table in others]
        return write_page(file, "Which part is enough", f"{self.expert}, measured on {self.task}.", sections)


def graft(
    expert: ExpertSource,
    task: str | Path | Task,
    *,
    model: str | None = None,
    settings: GraftSettings | None = None,
    eval_settings: EvalSettings | None = None,
    columns: Mapping[str, str] | None = None,
    dtype: str = "float32",
    progress: ProgressCallback | None = None,
) -> Grafted:
    """Measure how much of an expert's gain each part of its change gives.

        sl.graft("my-expert", "my-task").curve.advantage[0.01]

    expert: of any kind, by path, hub name or object. task: a directory, `builtin:NAME`, a hub data set, or a `Task`.
    model: the base model, by default the one that the expert records. settings: parts, fractions, draws.
    eval_settings: which rows, and how they are answered; by default 100 test rows, as the expert was trained.
    columns: the names of `input` and `target` in rows. progress: reports rows.
    Raises ConfigError (no base model), TaskError, ModelError, and what opening and applying the expert raise.
    """
    settings, eval_settings = settings or GraftSettings(), eval_settings or EvalSettings(rows=100)
    model = model or base_of(open_experts([expert]))
    if model is None:
        raise ConfigError("the expert records no base model; set `model`.")
    opened = read_checked(open_experts([expert], model)[0])
    if eval_settings.chat_template is None:
        eval_settings = replace(eval_settings, chat_template=chat_template_of([opened]))
    splits = tuple(dict.fromkeys((eval_settings.split, *(("train",) if LEARNED in settings.parts else ()))))
    loaded = task if isinstance(task, Task) else load_task(str(task), splits, columns)
    rows = len(loaded.rows(eval_settings.split, eval_settings.rows))
    counter = StepCounter(measured_rows(rows, settings), progress)
    base = load_model(model, dtype)
    curve = graft_curve(base, load_tokenizer(model), opened, loaded, settings, eval_settings, counter.advance)
    return Grafted(Path(name_of(expert)).name, loaded.name, curve)


def _interval(mean: MeanInterval, sign: bool = False) -> str:
    plus = "+" if sign else ""
    return f"{mean.mean:{plus}.1f} ({mean.low:{plus}.1f} to {mean.high:{plus}.1f})"


def _verdict(advantage: MeanInterval) -> str:
    if advantage.low > 0:
        return "concentrated"
    return "the largest are worse" if advantage.high < 0 else "not shown"
