"""`sparselet merge`."""

import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from sparselet.adapter import AdapterFile
from sparselet.cli.opening import open_experts, template_of
from sparselet.cli.terminal import print_json, progress, quiet_libraries, say, table, word
from sparselet.errors import ConfigError
from sparselet.evaluation import EvalSettings
from sparselet.expert import Expert
from sparselet.formats.checkpoint.write import write_checkpoint
from sparselet.io.atomic import atomic_directory, write_text
from sparselet.io.json_files import write_json
from sparselet.io.paths import check_output
from sparselet.merging import (
    METHODS,
    MergeRecipe,
    change_merge,
    is_per_task,
    merge_per_task,
    merge_to,
    merge_with_counts,
    per_expert_methods,
    read_recipe,
    recipe_text,
)
from sparselet.models import MODEL_DTYPES, load_model, load_tokenizer, lossless_dtype, model_directory
from sparselet.tasks.task import load_task
from sparselet.workflows.search import SearchResult, SearchSettings, search

RECIPE_FILE = "recipe.toml"
SEARCH_FILE = "search.json"

Many = Parameter(consume_multiple=True, negative="")
_PER_TASK = "Also write one adapter per expert to this directory: the merge under the expert's mask ({})."


@dataclass(frozen=True)
class ValidationSettings:
    """What a search asks the merged models."""

    validation: Annotated[tuple[str, ...], Many] = ()
    """Tasks whose validation split a search asks: directories, builtin:NAME, or hub data sets."""
    validation_rows: int = 50
    """Validation rows of each task."""
    chat_template: bool | None = None
    """Ask through the tokenizer's chat template; by default as the experts were trained."""
    max_new_tokens: int = 64
    """Longest answer, in tokens."""


def merge_(
    experts: Annotated[list[str] | None, Parameter(negative="")] = None,
    /,
    *,
    out: Path,
    method: Annotated[str | None, Parameter(help=f"How to merge, overlap by default: {', '.join(METHODS)}.")] = None,
    weights: Annotated[list[float] | None, Many] = None,
    set_: Annotated[list[str] | None, Parameter(name="--set", consume_multiple=True, negative="")] = None,
    recipe: Path | None = None,
    model: str | None = None,
    as_: Annotated[Literal["adapter", "checkpoint"], Parameter(name="--as")] = "adapter",
    dtype: str | None = None,
    keep_counts: bool = False,
    per_task: Annotated[Path | None, Parameter(help=_PER_TASK.format(", ".join(per_expert_methods())))] = None,
    add: Annotated[list[str] | None, Many] = None,
    remove: Annotated[list[str] | None, Many] = None,
    searching: Annotated[SearchSettings | None, Parameter(name="*")] = None,
    validation: Annotated[ValidationSettings | None, Parameter(name="*")] = None,
    workers: int | None = None,
    json: bool = False,
) -> None:
    """Merge experts of one base model into one.

    Experts are sparse adapters, PEFT adapters (LoRA, SHiRA, Super-Tuning) and full checkpoints, on the disk or on the hub,
    mixed freely; they may differ in masks, densities, block sizes and targets. `overlap`, the default, divides the sum of
    the changes of an entry by the number of experts that selected it (Eq. 4 of the sparse-adapters paper); docs/methods.md
    describes all methods and their parameters. The recipe is written beside the output and runs again with --recipe.

        sparselet merge expert-a expert-b expert-c --out merged

        sparselet merge expert-a expert-b --method ties --set density=0.2 density_of=nonzeros --out merged

        sparselet merge expert-a lora-b full-c --model packaged:smollm2-135m --out model --as checkpoint

        sparselet merge merged --add expert-d --remove expert-a --out merged-2

        sparselet merge expert-a expert-b --search weights --validation task-a task-b --model MODEL --out merged

    Parameters
    ----------
    experts
        Directories or hub names (org/name, org/name@revision). With --add or --remove: the one merge to change.
    out
        Directory to write to; it must not exist.
    weights
        One factor an expert, 1 each by default; with --add, of the experts added.
    set_
        Parameters of the method, as name=value.
    recipe
        Run this TOML file, which names experts, weights, method and parameters.
    model
        Base model, for full checkpoints among the experts, for --as checkpoint and for --search.
    as_
        Write an adapter, or the base model with the merge in its weights, for any engine.
    dtype
        Dtype of that checkpoint: float32 (the default), bfloat16 or float16.
    keep_counts
        Keep what --add and --remove need (overlap only; twelve bytes an entry more).
    add
        Experts to add to a merge that kept its counts.
    remove
        Experts to take out of it.
    workers
        Threads; the result does not depend on it.
    json
        Print the result as JSON.
    """
    quiet_libraries()
    checkpoint = as_ == "checkpoint"
    given = {"experts": experts, "--method": method, "--weights": weights, "--set": set_, "--keep-counts": keep_counts}
    others = {"--recipe": recipe, "--as checkpoint": checkpoint, "--per-task": per_task, "--search": searching}
    if not checkpoint:
        _refuse_with("an adapter (--as adapter)", {"--dtype": dtype})
    if searching is None and validation is not None:
        raise ConfigError("--validation and what belongs to it go with --search WHAT only.")
    check_output(out)
    if add is not None or remove is not None:
        _refuse_with("--add or --remove", {"--method": method, "--set": set_, **others})
        if not experts or len(experts) != 1:
            raise ConfigError(f"--add and --remove change one merge; name it, got {len(experts or [])} experts.")
        _change(experts[0], add or [], remove or [], weights, out, model, workers, json)
        return
    if recipe is not None:
        _refuse_with("--recipe", given)
        asked = read_recipe(recipe)
        asked = replace(asked, model=model or asked.model)
    else:
        parameters = dict(_assignment(text) for text in set_ or [])
        asked = MergeRecipe(tuple(experts or ()), method or "overlap", tuple(weights or ()), parameters, model, keep_counts)
    if checkpoint:
        _refuse_with("--as checkpoint", {"--keep-counts": asked.keep_counts})
        if dtype is not None and dtype not in MODEL_DTYPES:
            raise ConfigError(f"--dtype must be one of {', '.join(MODEL_DTYPES)}, got {dtype!r}.")
        if asked.model is None:
            raise ConfigError("--as checkpoint needs the base model; give --model.")
    opened = open_experts(asked.experts, asked.model)
    _refuse_inside(out, opened)
    again = False
    if per_task is not None:
        again = _check_per_task(per_task, out, asked.method, opened)
    found = None if searching is None else _searched(asked, opened, searching, validation or ValidationSettings())
    asked = found.recipe if found else asked
    rounded = dtype or "float32"
    loaded = load_model(asked.model, lossless_dtype(asked.model, rounded)) if checkpoint and asked.model else None
    parts = [] if per_task is None else _per_task(asked, opened, per_task, workers, again)
    with atomic_directory(out) as directory:
        if loaded is not None and asked.model:
            with tempfile.TemporaryDirectory(prefix=".", dir=directory) as scratch:
                merged = _merge(asked, opened, Path(scratch) / "adapter", workers)
                how: dict[str, Any] = {"dtype": MODEL_DTYPES[rounded], "base": model_directory(asked.model)}
                write_checkpoint(loaded, None, merged, directory, keep_base=False, **how)
        else:
            merged = _merge(asked, opened, directory, workers)
        write_text(directory / RECIPE_FILE, recipe_text(asked, out))
        if found:
            write_json(directory / SEARCH_FILE, {"trials": [asdict(trial) for trial in found.trials]})
    result = _result(asked, found, opened, merged.nnz, out, parts)
    if json:
        print_json(result)
    else:
        _tell(asked, found, opened, result, "--model" if checkpoint else "--adapter")


def _merge(recipe: MergeRecipe, experts: Sequence[Expert], adapter: Path, workers: int | None) -> AdapterFile:
    """Merge into the directory `adapter`."""
    with progress(_targets(experts), "merging") as advance:

        def told(name: str) -> None:
            advance(1)

        if recipe.keep_counts:
            merge_with_counts(adapter, experts, recipe.weights, workers=workers, progress=told)
        else:
            how = (recipe.method, recipe.weights, recipe.parameters)
            merge_to(adapter, experts, *how, workers=workers, progress=told)
    return AdapterFile(adapter)


def _per_task(recipe: MergeRecipe, experts: Sequence[Expert], directory: Path, workers: int | None, again: bool) -> list[Path]:
    """Write what the merge leaves of each expert. again: they may be there, and must then be the same."""
    with progress(_targets(experts), "masking") as advance:

        def told(name: str) -> None:
            advance(1)

        how = (recipe.method, recipe.weights, recipe.parameters)
        return merge_per_task(directory, experts, *how, workers=workers, progress=told, keep_equal=again)


def _change(
    merged: str,
    add: list[str],
    remove: list[str],
    weights: list[float] | None,
    out: Path,
    model: str | None,
    workers: int | None,
    json: bool,
) -> None:
    """Change a merge that kept its counts, and tell of it."""
    before, *opened = open_experts([merged, *add, *remove], model)
    _refuse_inside(out, [before, *opened])
    with progress(_targets([before, *opened]), "merging") as advance:
        change_merge(
            out,
            merged,
            add=opened[: len(add)],
            remove=opened[len(add) :],
            weights=weights,
            workers=workers,
            progress=lambda _: advance(1),
        )
    after = AdapterFile(out)
    experts = (after.metadata.merge or {})["experts"]
    if json:
        print_json({"output": str(out), "method": "overlap", "entries": after.nnz, "experts": len(experts)})
        return
    rows = [(str(record["task"] or record["digest"]), _plain(record["weight"])) for record in experts]
    table("Merged by overlap", ["expert", "weight"], rows)
    say(f"{after.nnz:,} entries. Written to {out}", f"Next: sparselet eval --task TASK --adapter {word(out)}")


def _searched(recipe: MergeRecipe, experts: Sequence[Expert], how: SearchSettings, what: ValidationSettings) -> SearchResult:
    """Search with a progress bar. Raises ConfigError for what is missing."""
    if recipe.model is None or not what.validation:
        raise ConfigError("--search needs --validation TASK… to score on, and the base model; give both.")
    template = template_of(what.chat_template, experts)
    asked = EvalSettings(what.validation_rows, template, max_new_tokens=what.max_new_tokens, split="validation")
    tasks = [load_task(source, ("validation",)) for source in what.validation]
    loaded, tokenizer = load_model(recipe.model), load_tokenizer(recipe.model)
    with progress(how.trials, "searching") as advance:
        return search(recipe, how, loaded, tokenizer, tasks, asked, experts=experts, progress=advance)


def _targets(experts: Sequence[Expert]) -> int:
    """How many targets a merge of the experts has."""
    return len({name for expert in experts for name in expert})


def _assignment(text: str) -> tuple[str, Any]:
    """`name=value` with the value as in TOML, or as text."""
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise ConfigError(f"--set takes name=value, got {text!r}.")
    try:
        return name, tomllib.loads(f"value = {value}")["value"]
    except ValueError:
        return name, value


def _refuse_with(first: str, others: Mapping[str, object]) -> None:
    """Raise ConfigError if one of the others is given."""
    for name, value in others.items():
        if value:
            raise ConfigError(f"{first} and {name} do not go together.")


def _refuse_inside(output: Path, experts: Sequence[Expert]) -> None:
    """Raise ConfigError if the output would lie in an expert's directory."""
    for expert in experts:
        if expert.path is not None and expert.path.resolve() in output.resolve().parents:
            raise ConfigError(f"{output} would lie in the expert {expert.path}; choose an output outside of it.")


def _check_per_task(directory: Path, out: Path, method: str, experts: Sequence[Expert]) -> bool:
    """Refuse what cannot be written there, before any work is done.

    True where such adapters are there, by a run that was killed before it had written the merge.
    """
    _refuse_inside(directory, experts)
    if method not in per_expert_methods():
        raise ConfigError(f"--per-task goes with method {' or '.join(per_expert_methods())}, not with {method}.")
    here, there = directory.resolve(), out.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ConfigError(f"--per-task {directory} and --out {out} must be apart from each other.")
    again = is_per_task(directory, experts, method)
    if not again:
        check_output(directory)
    return again


def _result(
    recipe: MergeRecipe, found: SearchResult | None, experts: Sequence[Expert], entries: int, out: Path, parts: Sequence[Path]
) -> dict[str, Any]:
    """What was made, for machines."""
    crowding = sum(expert.nnz for expert in experts) / max(1, entries)
    result = {"output": str(out), "method": recipe.method, "entries": entries, "experts_per_entry": crowding}
    if found:
        result["search"] = {"score": found.best.score, "chosen": found.best.chosen}
    if parts:
        result["per_task"] = [str(part) for part in parts]
    return result


def _tell(
    recipe: MergeRecipe, found: SearchResult | None, experts: Sequence[Expert], result: dict[str, Any], option: str
) -> None:
    """What was made, for a person. option: how `sparselet eval` is given the output."""
    rows = [
        (name, expert.metadata.task or "", _plain(weight), f"{expert.nnz:,}")
        for name, expert, weight in zip(recipe.experts, experts, recipe.weights, strict=True)
    ]
    rows.append(("merged", "", "", f"{result['entries']:,}"))
    table(f"Merged by {recipe.method}", ["expert", "task", "weight", "entries"], rows)
    if recipe.parameters:
        say("Parameters: " + ", ".join(f"{name} = {value}" for name, value in recipe.parameters.items()))
    if found:
        chosen = ", ".join(f"{name} = {value:.3g}" for name, value in found.best.chosen.items())
        first = found.trials[0].score
        say(f"Best of {len(found.trials)} trials: {chosen}; Rouge-L {found.best.score:.1f}, as asked {first:.1f}.")
    if "per_task" in result:
        say(f"One adapter an expert: {', '.join(result['per_task'])}")
    say(
        f"A merged entry was selected by {result['experts_per_entry']:.2f} experts on average.",
        f"Written to {result['output']}, with {RECIPE_FILE}",
        f"Next: sparselet eval --task TASK {option} {word(result['output'])}",
    )


def _plain(weight: object) -> str:
    return f"{weight:g}" if isinstance(weight, float) else str(weight)
