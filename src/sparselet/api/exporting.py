"""`export` and `convert`: an expert in another format, and an expert of another format as a sparse adapter."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from transformers import PreTrainedModel

from sparselet.adapter import AdapterFile, SparseAdapter
from sparselet.api.opening import base_of, open_experts
from sparselet.api.progress import ProgressCallback, StepCounter
from sparselet.errors import ConfigError
from sparselet.expert import Expert
from sparselet.formats import BaseModel, save_expert
from sparselet.formats.checkpoint.write import export_checkpoint
from sparselet.formats.gguf import export_gguf_checkpoint
from sparselet.formats.lora.write import export_lora
from sparselet.formats.single_entries.write import export_shira, export_super_tuning
from sparselet.formats.weight_patch import export_weight_patch
from sparselet.io.paths import check_output
from sparselet.merging.engine.plan import ExpertSource
from sparselet.models import MODEL_DTYPES, load_model, load_tokenizer, local_path, lossless_dtype, model_directory, skeleton
from sparselet.result_table import ResultTable, ShownAsTable
from sparselet.steering import SteeringVector
from sparselet.steering.bias import with_steering
from sparselet.steering.vector import is_steering

logger = logging.getLogger("sparselet")

PATCH_LINE = "vLLM's load_checkpoint_weight_patches with sparselet.formats.weight_patch.read_patch({path!r})"
PEFT_LINE = "peft.PeftModel.from_pretrained(base_model, {path!r})"


@dataclass(frozen=True)
class ExportSettings:
    """Choices of an export, as `export` describes them."""

    base: str | None = None
    rank: int | None = None
    max_error: float = 0.01
    dtype: str = "float32"
    steer: SteeringVector | None = None


@dataclass(frozen=True)
class ExportFormat:
    """A format that experts are written in.

    write: `(expert, out, settings, progress) -> errors`, the relative error of each target, empty for an exact format.
    next_step: the line that uses the output; `{path}` is its directory, `{word}` the same quoted for a shell.
    """

    write: Callable[[Expert, str | Path, ExportSettings, ProgressCallback | None], Mapping[str, float]]
    next_step: str


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
    to: str,
    out: str | Path,
    *,
    base: str | None = None,
    rank: int | None = None,
    max_error: float = 0.01,
    dtype: str = "float32",
    without: Sequence[str] = (),
    steer: SteeringVector | str | Path | None = None,
    progress: ProgressCallback | None = None,
) -> ExportResult:
    """Write an expert in a format that others read without sparselet, into the directory `out`.

        sl.export(merged, "lora", "out", rank=64)

    to: a name in `FORMATS`: shira or supertuning, which lose nothing, or lora, all for stock PEFT; checkpoint, the base model
        with the expert in its weights; gguf, such a checkpoint for llama.cpp's converter; vllm-patch, new values of the
        base's tensors for a running engine, and the reverse patch.
    base: the base model. checkpoint, gguf and vllm-patch need it, and the others if the expert does not record which layers
        are linear.
    rank: of the LoRA; by default the smallest that is exact, target by target. max_error: the largest relative error of a
        target that is accepted, lora only.
    dtype: of the checkpoint or patch: float32, bfloat16 or float16; the sum of base and change is rounded once.
    without: patterns of target names that are left out. progress: reports targets, lora only.
    steer: a steering vector that a checkpoint is to hold in a bias (`steering.bias`); refused where it has none. A vector may
        stand in the place of the expert too.
    Raises ConfigError, ExportError, OutputExists, WriteFailed, and what opening the expert and the base model raises.
    """
    if to not in FORMATS:
        raise ConfigError(f"to must be one of {', '.join(FORMATS)}, got {to!r}.")
    if steer is None and is_steering(expert):
        steer, expert = cast(str, expert), SparseAdapter({})
    vector = SteeringVector.load(steer) if isinstance(steer, str | Path) else steer
    if vector is not None and to != "checkpoint":
        raise ConfigError(f"steer goes with format checkpoint, whose biases can hold a vector; format {to} has none.")
    check_output(out)
    opened = open_experts([expert], base, without)[0]
    if opened.metadata.prompt is not None:
        logger.warning("format %s holds no prompt; put this one around inputs yourself: %r", to, opened.metadata.prompt)
    errors = FORMATS[to].write(opened, out, ExportSettings(base, rank, max_error, dtype, vector), progress)
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


def _write_shira(
    expert: Expert, out: str | Path, settings: ExportSettings, progress: ProgressCallback | None
) -> Mapping[str, float]:
    export_shira(expert, out, _layers_of(settings.base))
    return {}


def _write_super_tuning(
    expert: Expert, out: str | Path, settings: ExportSettings, progress: ProgressCallback | None
) -> Mapping[str, float]:
    export_super_tuning(expert, out, _layers_of(settings.base))
    return {}


def _write_lora(
    expert: Expert, out: str | Path, settings: ExportSettings, progress: ProgressCallback | None
) -> Mapping[str, float]:
    counter = StepCounter(len(expert), progress)
    return export_lora(expert, out, settings.rank, settings.max_error, _layers_of(settings.base), counter.step)


def _write_checkpoint(
    expert: Expert, out: str | Path, settings: ExportSettings, progress: ProgressCallback | None
) -> Mapping[str, float]:
    base, model = _load_base(expert, settings, "checkpoint")
    dtype = MODEL_DTYPES[settings.dtype]
    if settings.steer is not None:
        expert = with_steering(model, expert, settings.steer)
    export_checkpoint(model, None, expert, out, keep_base=False, dtype=dtype, base=model_directory(base))
    return {}


def _write_gguf(
    expert: Expert, out: str | Path, settings: ExportSettings, progress: ProgressCallback | None
) -> Mapping[str, float]:
    base, model = _load_base(expert, settings, "gguf")
    tokenizer, dtype = load_tokenizer(base), MODEL_DTYPES[settings.dtype]
    export_gguf_checkpoint(model, tokenizer, expert, out, keep_base=False, dtype=dtype, base=model_directory(base))
    return {}


def _layers_of(base: str | None) -> PreTrainedModel | None:
    """The base model without its weights, from which formats of PEFT read which layers are linear."""
    return None if base is None else skeleton(base)


def _write_patch(
    expert: Expert, out: str | Path, settings: ExportSettings, progress: ProgressCallback | None
) -> Mapping[str, float]:
    base = _required_base(expert, settings, "vllm-patch")
    export_weight_patch(expert, out, BaseModel(local_path(base)), MODEL_DTYPES[settings.dtype])
    return {}


def _load_base(expert: Expert, settings: ExportSettings, to: str) -> tuple[str, PreTrainedModel]:
    """The name of the base model, and the model. Raises ConfigError, ModelError."""
    base = _required_base(expert, settings, to)
    return base, load_model(base, lossless_dtype(base, settings.dtype))


def _required_base(expert: Expert, settings: ExportSettings, to: str) -> str:
    """The name of the base model. Raises ConfigError without one, and for another dtype than the base can be written in."""
    if settings.base is None:
        recorded = base_of([expert])
        raise ConfigError(f"format {to} needs the base model; set `base{f'={recorded}' if recorded else ''}`.")
    if settings.dtype not in MODEL_DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(MODEL_DTYPES)}, got {settings.dtype!r}.")
    return settings.base


FORMATS: dict[str, ExportFormat] = {
    "shira": ExportFormat(_write_shira, PEFT_LINE),
    "supertuning": ExportFormat(_write_super_tuning, PEFT_LINE),
    "lora": ExportFormat(_write_lora, PEFT_LINE),
    "checkpoint": ExportFormat(_write_checkpoint, "sparselet eval --task TASK --model {word}"),
    "gguf": ExportFormat(_write_gguf, "python llama.cpp/convert_hf_to_gguf.py {word}"),
    "vllm-patch": ExportFormat(_write_patch, PATCH_LINE),
}
