"""`sparselet import`."""

from pathlib import Path

from sparselet.adapter import AdapterFile
from sparselet.cli.opening import open_experts
from sparselet.cli.terminal import facts, print_json, progress, quiet_libraries, say, word
from sparselet.formats import save_expert
from sparselet.io.paths import check_output


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
        Base model: a checkpoint is taken against it; it has the shapes that SHiRA and Super-Tuning adapters lack.
    json
        Print the result as JSON.
    """
    quiet_libraries()
    check_output(out)
    opened = open_experts([expert], model)[0]
    with progress(len(opened), "importing") as advance:
        save_expert(opened, out, lambda _: advance(1))
    written = AdapterFile(out)
    base = written.metadata.base_model_name_or_path
    if json:
        result = {"output": str(out), "base_model": base, "targets": len(written)}
        print_json({**result, "entries": written.nnz, "density": written.metadata.density})
        return
    facts(
        f"{expert} as a sparse adapter",
        [
            ("base model", base or "not known"),
            ("targets", len(written)),
            ("entries", f"{written.nnz:,}"),
            ("density", f"{written.metadata.density:.4g}"),
        ],
    )
    say(f"Written to {out}", f"Next: sparselet merge {word(out)} OTHER --out merged")
