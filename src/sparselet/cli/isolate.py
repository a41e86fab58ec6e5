"""`sparselet isolate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from transformers import TrainerCallback

from sparselet.api.isolating import isolate
from sparselet.cli.terminal import TrainingProgress, note, print_json, quiet_libraries, say, show, word
from sparselet.training import TrainSettings
from sparselet.workflows.isolate import ISOLATE_FILE, IsolateSettings


def isolate_(
    *,
    out: Path,
    settings: Annotated[TrainSettings | None, Parameter(name="*", consume_multiple=True)] = None,
    isolation: Annotated[IsolateSettings | None, Parameter(name="*")] = None,
    json: bool = False,
) -> None:
    """Train one expert on several tasks, whose cores are kept apart: the entries that each task changes most.

    A short run of each task gives its core; tasks with similar cores are trained together as one stage; stages follow one
    another with the cores of earlier ones frozen; the results are merged by cpi, and trained on all tasks with all cores
    frozen. The flags of train hold for all runs, --epochs for the short ones. The same command continues a stopped run.

        sparselet isolate --task task-a task-b task-c --epochs 1 --rows 50 --out isolated

    Parameters
    ----------
    out
        Directory of all steps; the expert is in OUT/expert.
    json
        Print the result as JSON.
    """
    quiet_libraries()
    settings = settings or TrainSettings()
    bars = _Bars()
    try:
        isolated = isolate(settings, out, isolation, watch=(lambda name: ()) if json else bars)
    except KeyboardInterrupt:
        bars.stop()
        if (out / ISOLATE_FILE).exists():
            note(f"Finished steps are kept in {out}; the same command continues.")
        raise
    finally:
        bars.stop()
    if json:
        print_json(isolated.as_json())
        return
    for table in isolated.tables():
        show(table)
    say(f"Written to {isolated.path}, with every step beside it")
    say(f"Next: sparselet eval --task {' '.join(map(word, settings.tasks))} --adapter {word(isolated.path)}")


class _Bars:
    """A progress bar for each training run, one after another."""

    def __init__(self) -> None:
        self.bar: TrainingProgress | None = None

    def __call__(self, name: str) -> Sequence[TrainerCallback]:
        self.stop()
        self.bar = TrainingProgress(name)
        return [self.bar]

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
