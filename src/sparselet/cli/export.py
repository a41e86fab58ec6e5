"""`sparselet export`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from sparselet.api.exporting import FORMATS, export
from sparselet.cli.terminal import print_json, progress, quiet_libraries, say, show, word


def refuse_other_formats(_: object, name: str) -> None:
    """Raise ValueError for a name that is not in FORMATS."""
    if name not in FORMATS:
        raise ValueError(f"expected one of {', '.join(FORMATS)}, got {name!r}")


def export_(
    adapter: str,
    /,
    *,
    to: Annotated[str, Parameter(help=f"Format: {', '.join(FORMATS)}.", validator=refuse_other_formats)],
    out: Path,
    model: str | None = None,
    rank: int | None = None,
    max_error: float = 0.01,
    dtype: str = "float32",
    without_: Annotated[list[str] | None, Parameter(name="--without", consume_multiple=True, negative="")] = None,
    steer: Path | None = None,
    json: bool = False,
) -> None:
    """Write an adapter in a format that others read without sparselet.

    shira and supertuning are adapters of stock PEFT and lose nothing. lora is one too, cut at --rank: each target's relative
    error is shown, and none may be above --max-error. checkpoint is the base model with the adapter in its weights, for any
    engine; gguf is such a checkpoint that llama.cpp's converter takes; vllm-patch is new values for a running engine, with the
    patch that undoes them. `sparselet merge` first merges several experts.

        sparselet export my-expert --to supertuning --out for-peft
        sparselet export my-expert --to lora --rank 64 --max-error 0.2 --out as-lora
        sparselet export merged --to checkpoint --model packaged:smollm2-135m --out model
        sparselet export merged --to gguf --model packaged:smollm2-135m --dtype bfloat16 --out for-llama-cpp

    Parameters
    ----------
    adapter
        A sparse adapter or any other expert: directory or hub name.
    out
        Directory to write to; it must not exist.
    model
        Base model. Needed for checkpoint, gguf and vllm-patch, and if the adapter does not record which layers are linear.
    rank
        Rank of the LoRA; by default the smallest that is exact, target by target.
    max_error
        Largest relative error of a target that is accepted, lora only.
    dtype
        Dtype of the checkpoint or patch: float32, bfloat16 or float16.
    without_
        Leave out the targets that match these patterns (*.lm_head); their names are shown.
    steer
        A steering vector that the checkpoint is to hold in a bias, where its architecture has one.
    json
        Print the result as JSON.
    """
    quiet_libraries()
    without = without_ or ()
    with progress("factorising") as callback:
        result = export(
            adapter,
            to,
            out,
            base=model,
            rank=rank,
            max_error=max_error,
            dtype=dtype,
            without=without,
            steer=steer,
            progress=callback,
        )
    if json:
        content = {**asdict(result), "output": str(result.path)}
        del content["path"]
        print_json({name: value for name, value in content.items() if value not in ({}, ())})
        return
    if result.errors:
        show(result.errors_table())
    if result.left_out:
        say(f"Left out: {', '.join(result.left_out)}")
    say(
        f"{result.targets} targets, {result.entries:,} entries",
        f"Written to {out}",
        f"Next: {FORMATS[to].next_step.format(path=str(out), word=word(out))}",
    )
