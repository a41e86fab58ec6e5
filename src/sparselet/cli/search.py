"""`sparselet search`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from sparselet.api.searching import VALIDATION, search
from sparselet.cli.merge import describe_merge, show_merge
from sparselet.cli.merging import Many, MergeFlags, ValidationFlags
from sparselet.cli.terminal import print_json, progress, quiet_libraries
from sparselet.io.paths import check_output
from sparselet.workflows.search import SearchSettings


def search_(
    experts: Annotated[list[str] | None, Parameter(negative="")] = None,
    /,
    *,
    validation: Annotated[list[str], Many],
    out: Path,
    settings: Annotated[SearchSettings | None, Parameter(name="*")] = None,
    flags: Annotated[MergeFlags | None, Parameter(name="*")] = None,
    answers: Annotated[ValidationFlags | None, Parameter(name="*")] = None,
    workers: int | None = None,
    json: bool = False,
) -> None:
    """Choose weights or a parameter of a merge by the merged model's score on validation rows, and write the best merge.

    The first trial is the merge that the flags describe, so the result is never worse on these rows. Scores are mean Rouge-L.
    Measure the result on test rows afterwards: its validation score is too high. Beside the merge stand its recipe and
    search.json with all trials.

        sparselet search expert-a expert-b --validation task-a task-b --model packaged:smollm2-135m --out merged
        sparselet search expert-a expert-b --choose density --method ties --validation task-a --model MODEL --out merged

    Parameters
    ----------
    experts
        Directories or hub names (org/name, org/name@revision).
    validation
        Tasks whose validation split is used: directories, builtin:NAME, or hub data sets.
    out
        Directory to write the best merge to; it must not exist.
    workers
        Threads of the merge; the result does not depend on it.
    json
        Print the result as JSON.
    """
    quiet_libraries()
    check_output(out)
    recipe = (flags or MergeFlags()).read(experts)
    eval_settings = (answers or ValidationFlags()).settings(VALIDATION)
    with progress("searching") as callback:
        report = search(recipe, validation, settings, eval_settings=eval_settings, out=out, workers=workers, progress=callback)
    best, trials = report.search.best, report.search.trials
    assert report.merge is not None
    if json:
        print_json({**describe_merge(report.merge), "search": {"score": best.score, "chosen": best.chosen}})
        return
    chosen = ", ".join(f"{name} = {value:.3g}" for name, value in best.chosen.items())
    first = f"first trial {trials[0].score:.1f}"
    show_merge(report.merge, f"Best of {len(trials)} trials: {chosen}; Rouge-L {best.score:.1f}, {first}.")
