"""`sparselet export`."""

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from sparselet.cli.opening import open_experts
from sparselet.cli.terminal import print_json, progress, quiet_libraries, say, table, word
from sparselet.errors import ConfigError
from sparselet.expert import Expert
from sparselet.formats.checkpoint.write import export_checkpoint
from sparselet.formats.gguf import export_gguf_checkpoint
from sparselet.formats.lora.write import export_lora
from sparselet.formats.single_entries.write import export_shira, export_super_tuning
from sparselet.io.paths import check_output
from sparselet.models import MODEL_DTYPES, load_model, load_tokenizer, lossless_dtype, model_directory, skeleton

Format = Literal["shira", "supertuning", "lora", "checkpoint", "gguf"]
NEXT = {
    "shira": "peft.PeftModel.from_pretrained(base_model, {out!r})",
    "supertuning": "peft.PeftModel.from_pretrained(base_model, {out!r})",
    "lora": "peft.PeftModel.from_pretrained(base_model, {out!r})",
    "checkpoint": "sparselet eval --task TASK --model {word}",
    "gguf": "python llama.cpp/convert_hf_to_gguf.py {word}",
}


def export_(
    adapter: str,
    /,
    *,
    to: Format,
    out: Path,
    model: str | None = None,
    rank: int | None = None,
    max_error: float = 0.01,
    dtype: str = "float32",
    without_: Annotated[list[str] | None, Parameter(name="--without", consume_multiple=True, negative="")] = None,
    json: bool = False,
) -> None:
    """Write an adapter in a format that others read without sparselet.

    shira and supertuning are adapters of stock PEFT and lose nothing. lora is one too, cut at --rank: each target's relative
    error is shown, and none may be above --max-error. checkpoint is the base model with the adapter in its weights, for any
    engine; gguf is such a checkpoint that llama.cpp's converter takes.

        sparselet export my-expert --to supertuning --out for-peft
        sparselet export my-expert --to lora --rank 64 --max-error 0.2 --out as-lora
        sparselet export merged --to gguf --model packaged:smollm2-135m --dtype bfloat16 --out for-llama-cpp

    Parameters
    ----------
    adapter
        A sparse adapter or any other expert: directory or hub name.
    to
        Format: shira, supertuning, lora, checkpoint or gguf.
    out
        Directory to write to; it must not exist.
    model
        Base model. Needed for checkpoint and gguf, and where the adapter does not tell which layers are linear.
    rank
        Rank of the LoRA; by default the smallest that is exact, target by target.
    max_error
        Largest relative error of a target that is accepted, lora only.
    dtype
        Dtype of the checkpoint: float32, bfloat16 or float16.
    without_
        Leave out the targets that match these patterns (*.lm_head); what was left out is shown.
    json
        Print the result as JSON.
    """
    quiet_libraries()
    check_output(out)
    expert = open_experts([adapter], model, without_ or ())[0]
    left_out = list(expert.left_out)
    result: dict[str, Any] = {"output": str(out), "format": to, "entries": expert.nnz, "targets": len(expert)}
    if left_out:
        result["left_out"] = left_out
    if to in ("checkpoint", "gguf"):
        _export_model(expert, to, out, model, dtype)
    else:
        bare = None if model is None else skeleton(model)
        if to == "lora":
            with progress(len(expert), "factorising") as advance:
                errors = export_lora(expert, out, rank, max_error, bare, lambda _: advance(1))
            result["errors"] = errors
        else:
            (export_shira if to == "shira" else export_super_tuning)(expert, out, bare)
    if json:
        print_json(result)
        return
    if "errors" in result:
        worst = sorted(result["errors"].items(), key=lambda item: (-item[1], item[0]))
        table("Relative error of each target, worst first", ["target", "error"], [(n, f"{e:.2e}") for n, e in worst])
    if left_out:
        say(f"Left out: {', '.join(left_out)}")
    say(
        f"{len(expert)} targets, {expert.nnz:,} entries",
        f"Written to {out}",
        f"Next: {NEXT[to].format(out=str(out), word=word(out))}",
    )


def _export_model(expert: Expert, to: str, out: Path, model: str | None, dtype: str) -> None:
    if model is None:
        known = expert.metadata.base_model_name_or_path
        raise ConfigError(f"--to {to} needs the base model; give --model{f' {known}' if known else ''}.")
    if dtype not in MODEL_DTYPES:
        raise ConfigError(f"--dtype must be one of {', '.join(MODEL_DTYPES)}, got {dtype!r}.")
    # The model is ours alone, so nothing of its weights is kept.
    how: dict[str, Any] = {"keep_base": False, "dtype": MODEL_DTYPES[dtype], "base": model_directory(model)}
    loaded = load_model(model, lossless_dtype(model, dtype))
    if to == "gguf":
        export_gguf_checkpoint(loaded, load_tokenizer(model), expert, out, **how)
    else:
        export_checkpoint(loaded, None, expert, out, **how)
