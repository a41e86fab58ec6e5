"""`sparselet merge`."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from sparselet.adapter import AdapterFile, SparseAdapter
from sparselet.cli.terminal import print_json, progress, quiet_libraries, say, table
from sparselet.errors import ConfigError
from sparselet.export import export_checkpoint
from sparselet.files import refuse_existing
from sparselet.merging import merge, merge_to
from sparselet.models import load_model, load_tokenizer


def merge_(
    experts: Annotated[list[Path], Parameter(negative="")],
    /,
    *,
    out: Path,
    method: str = "overlap",
    weights: Annotated[list[float] | None, Parameter(consume_multiple=True, negative="")] = None,
    as_: Annotated[Literal["adapter", "checkpoint"], Parameter(name="--as")] = "adapter",
    model: str | None = None,
    dtype: str = "float32",
    json: bool = False,
) -> None:
    """Merge experts of one base model into one.

    Experts may differ in masks, densities, block sizes and targets. `overlap` divides the sum of the changes of an entry
    by the number of experts that selected it (Eq. 4 of the sparse-adapters paper); `uniform` divides by the number of
    experts.

        sparselet merge expert-a expert-b expert-c --out merged
        sparselet merge expert-a expert-b --out model --as checkpoint --model packaged:smollm2-135m

    Parameters
    ----------
    experts
        Adapter directories.
    out
        Directory to write to; it must not exist.
    method
        How to merge: overlap or uniform.
    weights
        One factor an expert, 1 each by default.
    as_
        Write an adapter, or the base model with the merge in its weights, for any engine.
    model
        Base model, for --as checkpoint.
    dtype
        Dtype of that checkpoint.
    json
        Print the result as JSON.
    """
    quiet_libraries()
    refuse_existing(out)
    files = [AdapterFile(path) for path in experts]
    if as_ == "checkpoint":
        if model is None:
            raise ConfigError("--as checkpoint needs the base model; give --model.")
        merged: SparseAdapter | AdapterFile = merge(files, method, weights)
        export_checkpoint(load_model(model, dtype), load_tokenizer(model), merged, out)
    else:
        targets = {name for file in files for name in file}
        with progress(len(targets), "merging") as advance:
            merge_to(out, files, method, weights, progress=lambda _: advance(1))
        merged = AdapterFile(out)
    crowding = sum(file.nnz for file in files) / max(1, merged.nnz)
    if json:
        print_json({"output": str(out), "method": method, "entries": merged.nnz, "experts_per_entry": crowding})
        return
    rows = [(str(path), file.metadata.get("task") or "", f"{file.nnz:,}") for path, file in zip(experts, files, strict=True)]
    table(f"Merged by {method}", ["expert", "task", "entries"], [*rows, ("merged", "", f"{merged.nnz:,}")])
    option = "--model" if as_ == "checkpoint" else "--adapter"
    say(
        f"A merged entry was selected by {crowding:.2f} experts on average.",
        f"Written to {out}",
        f"Next: sparselet eval --task TASK {option} {out}",
    )
