"""A run of core isolation or of what it is compared with, measured on all its tasks."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparselet.adapter import SparseAdapter
from sparselet.errors import ConfigError
from sparselet.evaluation import EvalSettings, evaluate
from sparselet.expert import Expert
from sparselet.merging import merge
from sparselet.tasks.task import Task, write_task
from sparselet.training import TrainSettings, train
from sparselet.workflows.isolate import IsolateSettings, Isolator

PASSES = 3  # over the rows of each task, in every arm: a short run, a stage and a mixed round, or as many epochs
# Arms that isolate: what differs in IsolateSettings, and the training method.
ISOLATED: dict[str, tuple[dict[str, Any], str]] = {
    "isolated": ({}, "sparse"),
    "isolated, all entries": ({}, "full-qkv"),
    "random cores": ({"core": "random"}, "sparse"),
    "nothing frozen": ({"freeze_cores": False}, "sparse"),
    "no groups": ({"threshold": 1.0}, "sparse"),
}
MERGED_BY = {"Eq. 4": "overlap", "RegMean": "regmean"}


def isolation_run(
    base: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    tasks: Sequence[Task],
    *,
    arm: str,
    train_settings: Mapping[str, Any],
    epochs: float,
    rows: int,
    validation_rows: int,
    max_new_tokens: int,
    progress: Callable[[float], None],
) -> dict[str, float]:
    """rougeL: of test rows, the mean over the tasks. forgotten: how much Rouge-L of validation rows tasks have lost since their
    own stage, on average; 0 in arms without stages.

    arm: one of ISOLATED; mixed, all tasks together; sequential, one task after another in the same entries; or one of
    MERGED_BY, an expert each. Each sees a task's rows at most `PASSES` · epochs times. train_settings: of `TrainSettings`.
    """

    def scores(expert: Expert, split: str, count: int) -> list[float]:
        how = EvalSettings(count, False, max_new_tokens=max_new_tokens, split=split)
        return [result.scores["rougeL"] for result in evaluate(*base, tasks, expert, how)]

    with tempfile.TemporaryDirectory() as directory:
        places = tuple(str(write_task(task, Path(directory, "tasks"))) for task in tasks)
        whole = TrainSettings(**train_settings, task=places, epochs=PASSES * epochs, chat_template=False)

        def trained(settings: TrainSettings, name: str) -> SparseAdapter:
            progress(len(list(Path(directory).iterdir())) / (PASSES * len(tasks)))
            return cast(SparseAdapter, train(settings, Path(directory, name), base=base))

        forgotten = 0.0
        if arm in ISOLATED:
            changes, method = ISOLATED[arm]
            how = IsolateSettings(rounds=1, round_epochs=epochs, rows=validation_rows, **changes)
            short = replace(whole, method=method, epochs=epochs, profile=False)
            run = Isolator(short, how, Path(directory, "out"), lambda name: (), base).run()
            forgotten = run.forgotten(run.steps[-1]) or 0.0
            expert = SparseAdapter.load(run.steps[-1].path)
        elif arm == "mixed":
            expert = trained(replace(whole, profile=False), "mixed")
        elif arm == "sequential":
            expert, own = trained(replace(whole, task=places[0], profile=False), "0"), []
            entries = {name: value for name, value in train_settings.items() if name != "density"}  # those of the first
            plain = TrainSettings(**entries, task=places[0], epochs=whole.epochs, chat_template=False, profile=False)
            for i, place in enumerate(places[1:], 1):
                own.append(scores(expert, "validation", validation_rows)[i - 1])
                expert = trained(replace(plain, task=place, init_from=str(Path(directory, str(i - 1)))), str(i))
            last = scores(expert, "validation", validation_rows)
            forgotten = sum(before - after for before, after in zip(own, last, strict=False)) / max(1, len(own))
        elif arm in MERGED_BY:
            expert = merge([trained(replace(whole, task=p), str(i)) for i, p in enumerate(places)], MERGED_BY[arm])
        else:
            raise ConfigError(
                f"there is no arm {arm!r}; there are {', '.join([*ISOLATED, 'mixed', 'sequential', *MERGED_BY])}."
            )
        reached = scores(expert, "test", rows)
    progress(1.0)
    return {"rougeL": sum(reached) / len(reached), "forgotten": forgotten}
