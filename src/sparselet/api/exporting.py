"""`export` and `convert`: an expert in another format, and an expert of another format as a sparse adapter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sparselet.adapter import AdapterFile
from sparselet.api.opening import base_of, open_experts
from sparselet.api.progress import ProgressCallback, StepCounter
from sparselet.errors import ConfigError
from sparselet.expert import Expert
from sparselet.formats import save_expert
from sparselet.formats.checkpoint.write import export_checkpoint
from sparselet.formats.gguf import export_gguf_checkpoint
from sparselet.formats.lora.write import export_lora
from sparselet.formats.single_entries.write import export_shira, export_super_tuning
from sparselet.io.paths import check_output
from sparselet.merging.engine.plan import ExpertSource
from sparselet.models import MODEL_DTYPES, load_model, load_tokenizer, lossless_dtype, model_directory, skeleton
from sparselet.result_table import ResultTable, ShownAsTable

Format = Literal["shira", "supertuning", "lora", "checkpoint", "gguf"]


@dataclass(frozen=True)
class ExportResult(ShownAsTable):
    """What an export wrote. errors: the relative error of each target, lora only. left_out: targets that were left out."""

    path: Path
    format: str
    targets: int
    entries: int
    errors: Mapping[str, float] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def table(self) -> ResultTable:
        """Facts, and the error of each target, the largest first."""
        rows: list[tuple[object, ...]] = [("targets", self.targets), ("entries", f"{self.entries:,}"), ("path", self.path)]
        if self.left_out:
            rows.append(("left out", ", ".join(self.left_out)))
        rows += [(f"error of {name}", error) for name, error in self.errors_table().rows]
        return ResultTable(f"Exported as {self.format}", (), tuple(rows))

    def errors_table(self) -> ResultTable:
        """The relative error of each target, the largest first."""
        worst_first = sorted(self.errors.items(), key=lambda item: (-item[1], item[0]))
        rows = tuple((name, f"{error:.2e}") for name, error in worst_first)
        return ResultTable("Relative error of each target, worst first", ("target", "error"), rows)


def export(
    expert: ExpertSource,
    to: Format,
    out: str | Path,
    *,
    base: str | None = None,
    rank: int | None = None,
    max_error: float = 0.01,
    dtype: str = "float32",
    without: Sequence[str] = (),
    progress: ProgressCallback | None = None,
) -> ExportResult:
    """Write an expert in a format that others read without sparselet, into the directory `out`.

        sl.export(merged, "lora", "out", rank=64)

    to: shira or supertuning, which lose nothing, or lora, all for stock PEFT; checkpoint, the base model with the expert in its
        weights; gguf, such a checkpoint for llama.cpp's converter.
    base: the base model. checkpoint and gguf need it, and the others if the expert does not record which layers are linear.
    rank: of the LoRA; by default the smallest that is exact, target by target. max_error: the largest relative error of a
        target that is accepted, lora only.
    dtype: of the checkpoint: float32, bfloat16 or float16; the sum of base and change is rounded once.
    without: patterns of target names that are left out. progress: reports targets, lora only.
    Raises ConfigError, ExportError, OutputExists, WriteFailed, and what opening the expert and the base model raises.
    """
    check_output(out)
    opened = open_experts([expert], base, without)[0]
    errors: Mapping[str, float] = {}
    if to in ("checkpoint", "gguf"):
        _export_model(opened, to, out, base, dtype)
    else:
        bare = None if base is None else skeleton(base)
        if to == "lora":
            errors = export_lora(opened, out, rank, max_error, bare, StepCounter(len(opened), progress).step)
        else:
            (export_shira if to == "shira" else export_super_tuning)(opened, out, bare)
    return ExportResult(Path(out), to, len(opened), opened.nnz, errors, tuple(opened.left_out))


def convert(
    expert: ExpertSource, out: str | Path, *, base: str | Path | None = None, progress: ProgressCallback | None = None
) -> AdapterFile:
    """Write an expert of any kind as a sparse adapter into the directory `out`, target by target.

    base: the base model, which full checkpoints need. A LoRA or a checkpoint changes every entry of its targets, which takes
    eight bytes each. Raises UnsupportedExpert, OutputExists, WriteFailed, and what opening the expert raises.
    """
    check_output(out)
    opened = open_experts([expert], base)[0]
    save_expert(opened, out, StepCounter(len(opened), progress).step)
    return AdapterFile(out)


def _export_model(expert: Expert, to: str, out: str | Path, base: str | None, dtype: str) -> None:
    """Write the base model with the expert in its weights."""
    if base is None:
        recorded = base_of([expert])
        raise ConfigError(f"format {to} needs the base model; set `base{f'={recorded}' if recorded else ''}`.")
    if dtype not in MODEL_DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(MODEL_DTYPES)}, got {dtype!r}.")
    model = load_model(base, lossless_dtype(base, dtype))
    files: dict[str, Any] = {"keep_base": False, "dtype": MODEL_DTYPES[dtype], "base": model_directory(base)}
    if to == "gguf":
        export_gguf_checkpoint(model, load_tokenizer(base), expert, out, **files)
    else:
        export_checkpoint(model, None, expert, out, **files)
