"""`isolate`: core isolation over several tasks, from short runs to one expert."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from sparselet.adapter import SparseAdapter
from sparselet.errors import ConfigError
from sparselet.result_table import ResultTable, ShownAsTables
from sparselet.training import TrainSettings
from sparselet.workflows.isolate import IsolateSettings, Isolation, Isolator


@dataclass(frozen=True)
class Isolated(ShownAsTables):
    """A run of core isolation. path: the expert."""

    isolation: Isolation

    @property
    def path(self) -> Path:
        """The directory of the expert, the result of the last step."""
        return self.isolation.steps[-1].path

    @property
    def expert(self) -> SparseAdapter:
        """The expert, in memory."""
        return SparseAdapter.load(self.path)

    def tables(self) -> tuple[ResultTable, ...]:
        """The tasks with their stages and cores, and the steps with losses and scores."""
        run = self.isolation
        stage_of = {i: number for number, stage in enumerate(run.stages, 1) for i in stage}
        tasks = tuple((task, stage_of[i], f"{run.core_entries[i]:,}", *self._nearest(i)) for i, task in enumerate(run.tasks))
        columns = ("task", "stage", "core entries", "most like", "Jaccard (by chance)")
        measured = tuple(run.base)
        rows = [("base model", "", "", "", *(run.base[task] for task in measured), *([""] if measured else []))]
        for step in run.steps:
            scores = [step.scores.get(task, "") for task in measured]
            forgotten = run.forgotten(step)
            forgetting = ["" if forgotten is None else f"{forgotten:.1f}"] if measured else []
            loss = "" if step.loss is None else f"{step.loss:.4f}"
            rows.append((step.name, "+".join(step.tasks), f"{step.frozen:,}", loss, *scores, *forgetting))
        header = ("step", "tasks", "frozen entries", "validation loss", *measured, *(["forgotten"] if measured else []))
        title = "Steps; Rouge-L of validation rows" if measured else "Steps"
        return ResultTable("Cores", columns, tasks), ResultTable(title, header, tuple(rows if measured else rows[1:]))

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        run = self.isolation
        pairs = [{"tasks": [run.tasks[i] for i in pair], "jaccard": j, "chance": c} for pair, (j, c) in run.pairs.items()]
        steps = [{**asdict(step), "path": str(step.path), "forgotten": run.forgotten(step)} for step in run.steps]
        stages = [[run.tasks[i] for i in stage] for stage in run.stages]
        cores = dict(zip(run.tasks, run.core_entries, strict=True))
        return {
            "adapter": str(self.path),
            "core_entries": cores,
            "stages": stages,
            "pairs": pairs,
            "base": dict(run.base),
            "steps": steps,
        }

    def _nearest(self, task: int) -> tuple[str, str]:
        run = self.isolation
        pair, (jaccard, chance) = max(
            ((pair, numbers) for pair, numbers in run.pairs.items() if task in pair), key=lambda each: each[1][0]
        )
        (nearest,) = set(pair) - {task}
        return run.tasks[nearest], f"{jaccard:.3f} ({chance:.3f})"


def isolate(
    task: Sequence[str] | TrainSettings,
    out: str | Path,
    isolation: IsolateSettings | None = None,
    *,
    base: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None,
    watch: Callable[[str], Sequence[TrainerCallback]] = lambda name: (),
    **settings: Any,
) -> Isolated:
    """Train one expert on several tasks by core isolation (docs/core-isolation.md).

        sl.isolate(["task-a", "task-b"], "out", sl.IsolateSettings(rounds=2), model="org/model", epochs=1).expert

    Short runs of each task give their cores; tasks with similar cores become one stage; stages are trained one after another
    with the cores of earlier ones frozen; `cpi` fuses; mixed rounds train all tasks with all cores frozen. The same call
    continues a run that was stopped.

    task: two tasks or more, as for `train`; or all settings as one `TrainSettings`. out: a directory, with every step in it;
        the result is `out/expert`. isolation: cores, stages and rounds. settings: fields of `TrainSettings`, of which `epochs`
        is that of the short runs and `method` is sparse or full-qkv.
    base: the base model and tokenizer, if they are loaded. watch: the callbacks of a training run, by its name.
    Raises OutputExists, ConfigError, also for another run in `out`, and what `train`, `merge` and `evaluate` raise.
    """
    if isinstance(task, TrainSettings):
        if settings:
            raise ConfigError(f"{min(settings)} is given beside TrainSettings; set it there.")
        chosen = task
    else:
        unknown = sorted(settings.keys() - TrainSettings.__dataclass_fields__.keys())
        if unknown:
            raise ConfigError(f"isolate has no setting {unknown[0]!r}; IsolateSettings and TrainSettings list all.")
        chosen = TrainSettings(**{**settings, "task": (task,) if isinstance(task, str) else tuple(task)})
    return Isolated(Isolator(chosen, isolation or IsolateSettings(), Path(out), watch, base).run())
