"""`sparselet train`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from sparselet.cli.terminal import TrainingProgress, err, facts, print_json, quiet_libraries, say
from sparselet.training import TrainSettings, train
from sparselet.training.recipe import work_directory


def train_(
    *,
    out: Path,
    settings: Annotated[TrainSettings | None, Parameter(name="*")] = None,
    resume: bool = False,
    json: bool = False,
) -> None:
    """Train a sparse expert: a few percent of a model's attention weights, chosen by how much they matter to the task.

    The base model stays as it is; the expert is a directory with `adapter_config.json` and `adapter_model.safetensors`,
    which PEFT loads and `sparselet merge` merges. A run that was stopped leaves OUT.partial behind and goes on with
    --resume.

        sparselet train --task my-task --out my-expert --learning-rate 1e-3

    Parameters
    ----------
    out
        Directory to write the expert to; it must not exist.
    resume
        Go on with a run that was stopped, with the same settings.
    json
        Print the result as JSON.
    """
    quiet_libraries()
    settings = settings or TrainSettings()
    bar = TrainingProgress(settings.task.rpartition("/")[2])
    try:
        adapter = train(settings, out, resume=resume, callbacks=[] if json else [bar])
    except KeyboardInterrupt:
        bar.stop()
        if work_directory(out).exists():
            kept = f"Checkpoints are kept in {work_directory(out)}; run the same command with --resume to go on."
            err.print(kept, highlight=False, markup=False, soft_wrap=True)
        raise
    finally:
        bar.stop()
    metrics = adapter.metadata["metrics"]
    if json:
        print_json({"adapter": str(out), "entries": adapter.nnz, "density": adapter.density, **metrics})
        return
    rows = [
        ("task", adapter.metadata["task"]),
        ("targets", len(adapter)),
        ("entries", f"{adapter.nnz:,} ({100 * adapter.density:.3g} % of the targets)"),
        ("validation loss", f"{metrics['validation_loss']:.4f} at step {metrics['best_step']} of {metrics['steps']}"),
    ]
    facts("Expert", rows)
    say(
        f"Written to {out}",
        f"Next: sparselet eval --task {settings.task} --model {settings.model} --adapter {out}",
        f"      sparselet merge {out} OTHER-EXPERT --out merged",
    )
