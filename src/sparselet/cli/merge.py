"""`sparselet merge`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from sparselet.api.grouping import GroupedMerge, merge_groups
from sparselet.api.merging import RECIPE_FILE, MergeResult, merge_recipe
from sparselet.api.searching import FEW_ROWS, AutoReport, TuneReport, auto_merge
from sparselet.api.searching import tune as tune_merge
from sparselet.cli.merging import Many, MergeFlags, ValidationFlags
from sparselet.cli.terminal import print_json, progress, quiet_libraries, say, show, word
from sparselet.errors import ConfigError
from sparselet.io.paths import check_output
from sparselet.workflows.auto_merge import AutoSettings
from sparselet.workflows.tune import TuneSettings

# Headings of the help.
_AUTO, _TUNE, _GROUPS, _ROWS = "Choose the method", "Tune weights", "Groups", "Validation rows, for --auto and --tune"


def merge_(
    experts: Annotated[list[str] | None, Parameter(negative="")] = None,
    /,
    *,
    out: Path,
    flags: Annotated[MergeFlags | None, Parameter(name="*")] = None,
    keep_counts: bool = False,
    auto: Annotated[bool, Parameter(negative="", group=_AUTO)] = False,
    tune: Annotated[bool, Parameter(negative="", group=_TUNE)] = False,
    groups: Annotated[int | None, Parameter(group=_GROUPS)] = None,
    by: Annotated[Literal["prompts", "change"] | None, Parameter(group=_GROUPS)] = None,
    validation: Annotated[list[str] | None, Many, Parameter(group=_ROWS)] = None,
    auto_settings: Annotated[AutoSettings | None, Parameter(name="*", group=_AUTO)] = None,
    tune_settings: Annotated[TuneSettings | None, Parameter(name="*", group=_TUNE)] = None,
    answers: Annotated[ValidationFlags | None, Parameter(name="*", group=_ROWS)] = None,
    workers: int | None = None,
    json: bool = False,
) -> None:
    """Merge experts of one base model into one adapter.

    Experts are sparse adapters, PEFT adapters (LoRA, SHiRA, Super-Tuning) and full checkpoints, on the disk or on the hub,
    mixed freely; they may differ in masks, densities, block sizes and targets. Where all have profiles, as `train` writes
    them, `regmean` finds the change whose outputs are closest to each expert's on its own inputs. Else `tsv` puts the largest
    singular vectors of their changes side by side, at right angles. `overlap` (Eq. 4 of the sparse-adapters paper) takes a
    hundredth of the time of these. docs/methods.md describes all methods. The recipe is written beside the output and runs
    again with --recipe.

    With --auto the methods that suit the experts are tried, the merge that the flags describe first, and the best on a few
    validation rows is written, with all trials in auto.json. Its validation score is too high: measure it on test rows.

    With --tune a weight for each expert and layer is found by gradient steps on the targets of validation rows.

    With --groups G each of G adapters merges experts that are alike, and `eval --route` chooses among them by prompt.

    Related verbs: `update` adds experts to a merge or removes them, `search` chooses weights or parameters by score, `split`
    writes what a merge leaves of each expert, `export --to checkpoint` writes the base model with the merge in its weights.

        sparselet merge expert-a expert-b expert-c --out merged

        sparselet merge expert-a expert-b --method ties --set density=0.2 density_of=nonzeros --out merged

        sparselet merge expert-a lora-b full-c --model packaged:smollm2-135m --out merged

        sparselet merge expert-a lora-b --auto --validation task-a task-b --out merged

        sparselet merge expert-a expert-b expert-c --groups 2 --out library

    Parameters
    ----------
    experts
        Directories or hub names (org/name, org/name@revision).
    out
        Directory to write to; it must not exist.
    keep_counts
        Keep what `sparselet update` needs (overlap only; twelve bytes an entry more).
    auto
        Try the methods that suit the experts and keep the best on validation rows.
    tune
        Tune a weight for each expert and layer on validation rows; methods that are linear in their weights.
    groups
        Keep this many merged adapters; every expert needs a profile.
    by
        What makes experts alike, with --groups: their prompts as a router sees them (the default), or their changes.
    validation
        Tasks whose validation split --auto and --tune use: directories, builtin:NAME, or hub data sets.
    workers
        Threads; the result does not depend on it.
    json
        Print the result as JSON.
    """
    quiet_libraries()
    check_output(out)
    flags = flags or MergeFlags()
    recipe = flags.read(experts, keep_counts)
    _refuse_together(
        {"--auto": auto, "--tune": tune, "--groups": groups is not None},
        {
            "--trials, --seconds and --score": auto_settings,
            "--steps, --rate, --penalty and --task-rows": tune_settings,
            "--by": by,
        },
        {"--validation": validation, "--validation-rows and how rows are answered": answers},
    )
    shared: dict[str, Any] = {"out": out, "workers": workers}
    if not tune:  # which needs a method that is linear in its weights
        recipe = flags.with_default_method(recipe)
    if groups is not None:
        with progress("merging") as callback:
            grouped = merge_groups(recipe, groups, by=by or "prompts", **shared, progress=callback)
        _show_groups(grouped, out, json)
    elif auto or tune:
        shared["eval_settings"] = (answers or ValidationFlags()).settings(FEW_ROWS)
        with progress("trying merges" if auto else "tuning") as callback:
            if auto:
                report = auto_merge(recipe, validation or (), auto_settings, **shared, progress=callback)
            else:
                report = tune_merge(recipe, validation or (), tune_settings, **shared, progress=callback)
        _show_report(report, json)
    else:
        with progress("merging") as callback:
            merged = merge_recipe(recipe, **shared, progress=callback)
        if json:
            print_json(describe_merge(merged))
        else:
            show_merge(merged)


def _refuse_together(modes: Mapping[str, bool], of_modes: Mapping[str, object], of_validation: Mapping[str, object]) -> None:
    """Raise ConfigError for two of --auto, --tune and --groups, and for flags of one that is not there."""
    chosen = [flag for flag, is_set in modes.items() if is_set]
    if len(chosen) > 1:
        raise ConfigError(f"{' and '.join(chosen)} do not go together.")
    owners = dict(zip(of_modes, modes, strict=True)) | dict.fromkeys(of_validation, "--auto or --tune")
    for flags, value in {**of_modes, **of_validation}.items():
        if value and not any(flag in owners[flags] for flag in chosen):
            raise ConfigError(f"{flags} goes with {owners[flags]}.")


def _show_report(report: AutoReport | TuneReport, json: bool) -> None:
    """Print what was tried or tuned, and the merge that was written."""
    assert report.merge is not None
    if isinstance(report, TuneReport):
        fell = report.result.after != report.result.before
        described = {"tune": report.result.as_json()}
        line = "Weights by layer: see the recipe." if fell else "The loss did not fall, so the weights stay as they were."
    else:
        best, trials = report.result.best, report.result.trials
        number = trials.index(best) + 1
        described = {"auto": {"best": number, **report.result.as_json()}}
        line = f"Best of {len(trials)} trials: number {number}, by {best.recipe.method}."
    if json:
        print_json({**describe_merge(report.merge), **described})
        return
    show(report.table())
    show_merge(report.merge, line)


def _show_groups(grouped: GroupedMerge, out: Path, json: bool) -> None:
    """Print the groups, and how they are measured."""
    if json:
        merges = zip(grouped.merges, grouped.similarities, strict=True)
        described = [{**describe_merge(m), "experts": list(m.recipe.experts), "least_similarity": s} for m, s in merges]
        print_json({"output": str(out), "groups": described})
        return
    show(grouped.table())
    paths = " ".join(word(merge.adapter.path) for merge in grouped.merges)
    flag = "--route" if len(grouped.merges) > 1 else "--adapter"
    say(f"Written to {out}, each with {RECIPE_FILE} and its profile", f"Next: sparselet eval {flag} {paths} --task TASK")


def describe_merge(merged: MergeResult) -> dict[str, Any]:
    """A merge as JSON values."""
    return {
        "output": str(merged.adapter.path),
        "method": merged.recipe.method,
        "entries": merged.adapter.nnz,
        "experts_per_entry": merged.experts_per_entry,
    }


def show_merge(merged: MergeResult, *lines: str) -> None:
    """Print a merge. lines: printed after its parameters."""
    out = merged.adapter.path
    show(merged.table())
    if merged.recipe.parameters:
        say("Parameters: " + ", ".join(f"{name} = {value}" for name, value in merged.recipe.parameters.items()))
    if merged.recipe.layer_scaling is not None:
        say("Layers scaled by alpha = {:g}, beta = {:g}".format(*merged.recipe.layer_scaling))
    say(
        *lines,
        f"The experts have {merged.experts_per_entry:.2f} entries for each one of the merge.",
        f"Written to {out}, with {RECIPE_FILE}",
        f"Next: sparselet eval --task TASK --adapter {word(out)}",
    )
