"""`sparselet import`."""

from pathlib import Path

from sparselet.api.exporting import convert
from sparselet.cli.terminal import facts, print_json, progress, quiet_libraries, say, word


def import_(expert: str, /, *, out: Path, model: str | None = None, json: bool = False) -> None:
    """Turn an expert of another kind into a sparse adapter.

    Reads PEFT's LoRA, SHiRA and Super-Tuning adapters and full checkpoints, target by target. A LoRA or checkpoint changes
    every entry of its targets, so the adapter takes eight bytes for each.

        sparselet import my-lora --out my-expert
        sparselet import tuned-model --model packaged:smollm2-135m --out my-expert

    Parameters
    ----------
    expert
        Directory or hub name (org/name, org/name@revision) of the adapter or checkpoint.
    out
        Directory to write to; it must not exist.
    model
        Base model. A checkpoint's change is relative to it; SHiRA and Super-Tuning adapters take their shapes from it.
    json
        Print the result as JSON.
    """
    quiet_libraries()
    with progress("importing") as callback:
        adapter = convert(expert, out, base=model, progress=callback)
    base, density = adapter.metadata.base_model_name_or_path, adapter.metadata.density
    if json:
        content = {"output": str(out), "base_model": base, "targets": len(adapter), "entries": adapter.nnz}
        print_json({**content, "density": density})
        return
    facts(
        f"{expert} as a sparse adapter",
        [
            ("base model", base or "not recorded"),
            ("targets", len(adapter)),
            ("entries", f"{adapter.nnz:,}"),
            ("density", f"{density:.4g}"),
        ],
    )
    say(f"Written to {out}", f"Next: sparselet merge {word(out)} OTHER --out merged")
