"""`sparselet demo`: train, merge and compare three experts."""

import json as json_library
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sparselet.adapter import SparseAdapter
from sparselet.api.merging import merge
from sparselet.api.progress import StepCounter
from sparselet.api.training import train
from sparselet.cli.terminal import TrainingProgress, note, print_json, progress, quiet_libraries, say, status, table, word
from sparselet.errors import OutputExists
from sparselet.evaluation import EvalSettings, evaluate
from sparselet.io.json_files import write_json
from sparselet.io.temporaries import remove_left
from sparselet.models import PACKAGED, load_model, load_tokenizer, packaged_model
from sparselet.report.pictures import draw_demo
from sparselet.report.summary import layer_table
from sparselet.tasks.task import BUILTIN_PREFIX, load_task
from sparselet.training import TrainSettings
from sparselet.training.run_directory import work_directory
from sparselet.tuner.model import versions

TASKS = ("number_words", "animal_class", "table_order")
# Little data, so few rows a step; bare prompts, which are a third as long as those of the chat template.
SETTINGS = TrainSettings(task="builtin:", epochs=2, batch_size=8, chat_template=False)
ANSWER_TOKENS = 24  # the longest target has 14
RECORD_FILE = "demo.json"


def demo_(*, out: Path = Path("sparselet-demo"), json: bool = False) -> None:
    """Train one sparse expert on each of three built-in tasks, merge them, and compare base, experts and merged model.

    Takes a few minutes on two cores with SmolLM2-135M-Instruct from the packaged copy. Experts that exist already
    are not trained again. Writes the adapters, results.json and picture.png.

    Parameters
    ----------
    out
        Directory to write to.
    json
        Print the results as JSON.
    """
    quiet_libraries()
    started = time.time()
    _prepare(out)
    with status("Base model: SmolLM2-135M-Instruct (its first use converts the packaged copy, half a minute)"):
        packaged_model()
        model, tokenizer = load_model(PACKAGED), load_tokenizer(PACKAGED)
    experts = {task: _expert(out, task, (model, tokenizer)) for task in TASKS}
    merged = _merged(out)
    tasks = [load_task(BUILTIN_PREFIX + task, ("test",)) for task in TASKS]
    scores: dict[str, dict[str, float]] = {}
    models: dict[str, SparseAdapter | None] = {"base": None, **experts, "merged": merged}
    eval_settings = EvalSettings(chat_template=SETTINGS.chat_template, max_new_tokens=ANSWER_TOKENS)
    with progress("answering") as callback:
        counter = StepCounter(len(models) * sum(len(task.rows("test")) for task in tasks), callback)
        for name, adapter in models.items():
            evaluated = evaluate(model, tokenizer, tasks, adapter, eval_settings, counter.advance)
            scores[name] = {result.task: result.scores["rougeL"] for result in evaluated}
    results = _results(scores)
    results |= {"seconds": time.time() - started, "settings": asdict(SETTINGS), "versions": versions()}
    write_json(out / "results.json", results)
    own = {task: scores[task][task] for task in TASKS}
    draw_demo(
        {"base": scores["base"], "own expert": own, "merged": scores["merged"]},
        {task: layer_table(adapter) for task, adapter in experts.items()},
        out / "picture.png",
    )
    if json:
        print_json(results)
    else:
        _show(out, scores, results)


def _prepare(out: Path) -> None:
    """Create the directory, or check that it holds an earlier demo with the same settings. Raises OutputExists."""
    record = {"settings": asdict(SETTINGS), "tasks": list(TASKS)}
    if out.exists() and not out.is_dir():
        raise OutputExists(f"{out} is a file. Choose another output.")
    remove_left(out / RECORD_FILE)
    if out.is_dir() and any(out.iterdir()):
        try:
            same = json_library.loads((out / RECORD_FILE).read_text()) == json_library.loads(json_library.dumps(record))
        except (OSError, ValueError):
            same = False
        if not same:
            raise OutputExists(f"{out} exists and is not a demo with these settings. Choose another output, or remove it.")
    write_json(out / RECORD_FILE, record)


def _expert(out: Path, task: str, base: tuple[Any, Any]) -> SparseAdapter:
    path = out / "experts" / task
    if path.is_dir() and not work_directory(path).exists():
        note(f"{task}: trained already, loaded from {path}")
        return SparseAdapter.load(path)
    bar, is_stopped = TrainingProgress(task), work_directory(path).exists()
    try:
        settings = replace(SETTINGS, task=BUILTIN_PREFIX + task)
        expert = train(settings, out=path, resume=is_stopped, base=base, callbacks=[bar])
    finally:
        bar.stop()
    assert isinstance(expert, SparseAdapter)
    return expert


def _merged(out: Path) -> SparseAdapter:
    path = out / "merged"
    if not path.is_dir():
        merge([out / "experts" / task for task in TASKS], out=path)
    return SparseAdapter.load(path)


def _results(scores: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The scores, and the fraction of each expert's gain over the base that the merged model keeps, with its mean."""
    base, merged = scores["base"], scores["merged"]
    kept = {task: (merged[task] - base[task]) / (scores[task][task] - base[task]) for task in TASKS}
    return {
        "base": base,
        "experts": {task: scores[task] for task in TASKS},
        "merged": merged,
        "retention": sum(kept.values()) / len(kept),
        "retention_by_task": kept,
    }


def _show(out: Path, scores: dict[str, dict[str, float]], results: dict[str, Any]) -> None:
    names = {task: f"expert {task}" for task in TASKS}
    table(
        "Rouge-L on 60 test rows a task",
        ["", *TASKS, "mean"],
        [[names.get(name, name), *(row[t] for t in TASKS), sum(row.values()) / len(row)] for name, row in scores.items()],
    )
    say(
        f"The merged model keeps {100 * results['retention']:.0f} % of what the experts gained "
        f"({', '.join(f'{task} {100 * kept:.0f} %' for task, kept in results['retention_by_task'].items())}).",
        f"It took {results['seconds']:.0f} s. Written to {out}: experts/, merged/, results.json, picture.png",
        "Next:",
        f"  sparselet inspect {word(out)}/experts/{TASKS[0]}",
        f"  sparselet merge {word(out)}/experts/* --method uniform --out uniform",
        f"  sparselet export {word(out)}/merged --to checkpoint --model {PACKAGED} --out my-model",
        "  sparselet train --task YOUR-TASK --out my-expert",
        f"  sparselet serve --model {PACKAGED} --experts {word(out)}/experts",
    )
