"""`sparselet study`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from sparselet.api.studying import (
    COST_FILE,
    FIGURES_DIRECTORY,
    REPORT_FILE,
    RESULTS_FILE,
    ExecutorSettings,
    study,
)
from sparselet.cli.study_view import live, show_failures, show_plan, show_results, show_state
from sparselet.cli.terminal import note, print_json, quiet_libraries, say, word
from sparselet.cli.terminal import status as show_status
from sparselet.errors import ConfigError, StudyIncomplete


def study_(
    file: Path,
    *,
    out: str,
    preset: str = "",
    tasks: Path | None = None,
    settings: Annotated[ExecutorSettings | None, Parameter(name="*")] = None,
    dry_run: bool = False,
    status: bool = False,
    json: bool = False,
) -> None:
    """Run a study: train, merge and evaluate all that its tables need, and write results.json and report.html.

    A study consists of units of work, whose results are kept in OUT. The same command again computes only the missing units,
    after an interruption too, and ends with the same results. Failed units are reported; the others are computed.

        sparselet study studies/sparse_adapters.toml --preset small --tasks TASKS --out my-study --dry-run
        sparselet study studies/sparse_adapters.toml --preset small --tasks TASKS --out my-study
        sparselet study studies/sparse_adapters.toml --preset full --out s3://bucket/study --executor ray

    Parameters
    ----------
    file
        The study as TOML.
    out
        Directory to write to, or a URL of fsspec, such as s3://bucket/study.
    preset
        One of the file's presets, which override its settings.
    tasks
        Directory that holds each task as a directory of its name.
    dry_run
        Only print the plan: units, their estimated time and disk, and those that are done.
    status
        Only print which units are done, failed, and why, and missing.
    json
        Print the result as JSON.
    """
    quiet_libraries()
    if dry_run and status:
        raise ConfigError("--dry-run and --status do not go together.")
    settings = settings or ExecutorSettings()
    with show_status("Reading the study, its tasks and its model"):
        run = study(file, preset, tasks=tasks, out=out, threads=settings.threads)
    if status:
        state = run.status()
        print_json(state) if json else show_state(state)
        return
    if dry_run:
        plan = run.plan(settings)
        print_json(plan) if json else show_plan(plan)
        return
    try:
        with live(json) as watch:
            result = run.run(settings, watch)
    except BaseException:
        note(f"Finished units are kept in {out}; the same command continues.")
        raise
    state = {**result.state, "results": f"{out}/{RESULTS_FILE}", "report": f"{out}/{REPORT_FILE}"}
    if json:
        print_json(state)
    else:
        show_results(result)
        show_failures(state)
        say(
            f"Written to {out}: {RESULTS_FILE}, {COST_FILE}, {REPORT_FILE} with its {FIGURES_DIRECTORY}",
            f"Next: open {word(out)}/{REPORT_FILE} in a browser.",
        )
    if state["failed"]:
        raise StudyIncomplete(
            f"{len(state['failed'])} units failed and {len(state['blocked'])} wait for them; the others are done. The same "
            "command tries them again."
        )
