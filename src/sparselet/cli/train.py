"""`sparselet train`."""

import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from sparselet.adapter import CONFIG_FILE, SparseAdapter
from sparselet.api.training import train
from sparselet.cli.terminal import TrainingProgress, facts, note, print_json, quiet_libraries, say, table, word
from sparselet.training import Trained, TrainSettings
from sparselet.training.methods import FAST_SLOW
from sparselet.training.processes import first_to_fail, is_first, leave_processes
from sparselet.training.run_directory import work_directory
from sparselet.workflows.fast_slow_settings import FastSlowSettings

INTERRUPTED = 130


def train_(
    *,
    out: Path,
    settings: Annotated[TrainSettings | None, Parameter(name="*", consume_multiple=True)] = None,
    fast_slow: Annotated[FastSlowSettings | None, Parameter(name="*", consume_multiple=True)] = None,
    resume: bool = False,
    json: bool = False,
) -> None:
    """Train a sparse expert: a few percent of a model's attention weights, and nothing else.

    The base model stays as it is; the expert is a directory with `adapter_config.json` and `adapter_model.safetensors`,
    which PEFT loads and `sparselet merge` merges. A stopped run leaves OUT.partial and continues with --resume.
    --recipe paper trains as the paper does. For comparison, --method trains baselines in the same way: LoRA, full
    fine-tuning, one model on many tasks.

    To train over several devices, start a process for each with torchrun or `accelerate launch`: of N processes each takes
    an N-th of every batch, and the expert is that of one process up to rounding.

        sparselet train --task my-task --out my-expert
        sparselet train --task task-a task-b --init-from merged --out merged-and-trained
        sparselet train --task task-a task-b --method multitask --out one-model
        torchrun --nproc-per-node 4 -m sparselet.cli train --task my-task --out my-expert
        sparselet train --task my-task --method fast-slow --reward exact_match --out my-expert

    Parameters
    ----------
    out
        Directory to write the expert to; it must not exist.
    resume
        Continue a stopped run, with the same settings.
    json
        Print the result as JSON.
    """
    quiet_libraries(is_reporting=is_first())
    settings = settings or TrainSettings()
    bar = TrainingProgress("+".join(task.rpartition("/")[2] for task in settings.tasks))
    try:
        watching = [] if json or not is_first() else [bar]
        trained = train(settings, out=out, resume=resume, callbacks=watching, fast_slow=fast_slow)
    except BaseException as error:
        bar.stop()
        if not first_to_fail():  # another process of the run says why
            sys.exit(INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1)
        if isinstance(error, KeyboardInterrupt) and work_directory(out).exists():
            note(f"Checkpoints are kept in {work_directory(out)}; the same command with --resume continues.")
        raise
    finally:
        bar.stop()
    leave_processes()
    if not is_first():
        return
    if json:
        print_json(_as_json(trained, out))
    elif settings.method == FAST_SLOW:
        _show_fast_slow(trained, settings, out)
    else:
        _show(trained, settings, out)


def _as_json(trained: SparseAdapter | Trained, out: Path) -> dict[str, Any]:
    if isinstance(trained, SparseAdapter):
        return {"adapter": str(out), "entries": trained.nnz, "density": trained.density, **(trained.metadata.metrics or {})}
    kind = "adapter" if (out / CONFIG_FILE).exists() else "checkpoint"
    return {kind: str(out), "method": trained.method, **trained.metrics}


def _show(trained: SparseAdapter | Trained, settings: TrainSettings, out: Path) -> None:
    tasks = " ".join(settings.tasks)
    # A sparse adapter records the use of the chat template; the others do not.
    bare = "" if settings.chat_template or isinstance(trained, SparseAdapter) else " --no-chat-template"
    rows: list[tuple[str, object]] = [("task", tasks), ("method", settings.method)]
    words, model = " ".join(map(word, settings.tasks)), word(settings.model)
    measure = f"sparselet eval --task {words} --model {model} --adapter {word(out)}{bare}"
    merge = f"sparselet merge {word(out)} OTHER-EXPERT --out merged"
    if isinstance(trained, SparseAdapter):
        title, metrics = "Expert", trained.metadata.metrics or {}
        rows = [
            ("task", trained.metadata.task),
            *rows[1:],
            ("targets", len(trained)),
            ("entries", f"{trained.nnz:,} ({100 * trained.density:.3g} % of the targets)"),
        ]
    else:
        title, metrics = "Baseline", trained.metrics
        if not (out / CONFIG_FILE).exists():
            measure = f"sparselet eval --task {words} --model {word(out)}{bare}"
            merge = f"{merge} --model {model}"
    rows.append(("validation loss", f"{metrics['validation_loss']:.4f} at step {metrics['best_step']} of {metrics['steps']}"))
    facts(title, rows)
    say(f"Written to {out}", f"Next: {measure}", f"      {merge}")


def _show_fast_slow(trained: SparseAdapter | Trained, settings: TrainSettings, out: Path) -> None:
    assert isinstance(trained, SparseAdapter)
    figures = trained.metadata.metrics or {}
    rows = [(who, *(f"{figures[f'reward_{who}_{which}']:.3f}" for which in ("seed", "evolved"))) for who in ("base", "tuned")]
    table(f"Mean reward of {figures['rows']} validation rows", ["weights", "first prompt", "final prompt"], rows)
    entries = f"{trained.nnz:,} ({100 * trained.density:.3g} % of the targets)"
    facts("Expert", [("task", trained.metadata.task), ("entries", entries), ("steps", figures["steps"])])
    measure = f"sparselet eval --task {word(settings.tasks[0])} --model {word(settings.model)} --adapter {word(out)}"
    say("Its prompt:", trained.metadata.prompt or "", f"Written to {out}", f"Next: {measure}")
