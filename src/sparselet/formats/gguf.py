"""A merged checkpoint that llama.cpp's converter takes."""

import shutil
from pathlib import Path
from typing import Any

import torch

from sparselet.errors import ExportError, MissingExtra
from sparselet.expert import ExpertOrDeltas
from sparselet.formats.checkpoint.model_files import MODEL_CONFIG, ModelFiles
from sparselet.formats.checkpoint.write import write_checkpoint
from sparselet.formats.linear_targets import refuse_modules
from sparselet.io.atomic import atomic_directory
from sparselet.io.json_files import read_object, write_json
from sparselet.model_config import optional_field

# The converter's table (llama.cpp, conversion/), for the classes of transformers whose tensors it takes one by one.
ARCHITECTURES = {
    "ArceeForCausalLM": "arcee",
    "CohereForCausalLM": "command-r",
    "Cohere2ForCausalLM": "cohere2",
    "Ernie4_5ForCausalLM": "ernie4_5",
    "Exaone4ForCausalLM": "exaone4",
    "FalconForCausalLM": "falcon",
    "GPT2LMHeadModel": "gpt2",
    "GPTBigCodeForCausalLM": "starcoder",
    "GPTNeoXForCausalLM": "gptneox",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Glm4ForCausalLM": "glm4",
    "GraniteForCausalLM": "granite",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "MptForCausalLM": "mpt",
    "OlmoForCausalLM": "olmo",
    "Olmo2ForCausalLM": "olmo2",
    "PhiForCausalLM": "phi2",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "SeedOssForCausalLM": "seed_oss",
    "SmolLM3ForCausalLM": "smollm3",
    "StableLmForCausalLM": "stablelm",
    "Starcoder2ForCausalLM": "starcoder2",
}
SENTENCEPIECE = "tokenizer.model"
NEED_SENTENCEPIECE = ("GemmaForCausalLM", "Gemma2ForCausalLM", "Phi3ForCausalLM")
DTYPES = ("F32", "F16", "BF16")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def export_gguf_checkpoint(
    model: Any,
    tokenizer: Any,
    adapter: ExpertOrDeltas,
    output: str | Path,
    keep_base: bool = True,
    *,
    dtype: torch.dtype | None = None,
    base: str | Path | None = None,
) -> Path:
    """Write W + ΔW as a checkpoint that `convert_hf_to_gguf.py` of llama.cpp turns into a GGUF file.

    Ready for it means, and is checked:
    - config.json names in `architectures` a class that the converter has an architecture for (ARCHITECTURES), and is not
      quantized. Beside transformers 5's `dtype` and `rope_parameters` stand `torch_dtype`, `rope_theta` and `rope_scaling`,
      since a converter with transformers 4 would read defaults instead.
    - model*.safetensors hold float32, float16 or bfloat16 only, under names that gguf's table maps to the architecture's.
    - tokenizer.json and tokenizer_config.json are there, the latter with a class that transformers 4 knows too, and no token
      lies beyond the vocabulary; tokenizer.model is there where the base model has one, and the converter of Gemma 1 and 2
      and of Phi-3 must have it. generation_config.json is there.
    Not checked is whether the converter knows the tokenizer's way to split text, which it recognises by a hash of its own.

    model, tokenizer: a transformers base model and its tokenizer. keep_base, dtype, base: as in `export_checkpoint`.
    Raises ExportError, MissingExtra (gguf), what `apply_temporarily` raises, OutputExists, WriteFailed; nothing is left then.
    """
    expert = refuse_modules(adapter)
    table = _table(model)
    pieces = _check_tokenizer(model, tokenizer)
    with atomic_directory(output) as directory:
        write_checkpoint(model, tokenizer, expert, directory, keep_base=keep_base, dtype=dtype, base=base)
        if pieces is not None:
            shutil.copyfile(pieces, directory / SENTENCEPIECE)
        if not (directory / "generation_config.json").is_file():
            model.generation_config.save_pretrained(directory)
        _spell_out(directory)
        _check_files(directory, table)
    return Path(output)


def _table(model: Any) -> Any:
    """gguf's map from the names of the model's tensors to its own. Raises ExportError, MissingExtra."""
    name = type(model).__name__
    if name not in ARCHITECTURES:
        raise ExportError(f"llama.cpp's converter is not known to take a {name}. It takes {', '.join(sorted(ARCHITECTURES))}.")
    if optional_field(model.config, "quantization_config") is not None:
        raise ExportError("the base model is quantized; load it in float32, bfloat16 or float16.")
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise MissingExtra("exporting for llama.cpp needs gguf: pip install 'sparselet[packaged]'.") from error
    architectures = {text: key for key, text in gguf.MODEL_ARCH_NAMES.items()}
    if ARCHITECTURES[name] not in architectures:
        raise ExportError(f"this version of gguf does not know the architecture {ARCHITECTURES[name]}; upgrade it.")
    return gguf.get_tensor_name_map(architectures[ARCHITECTURES[name]], model.config.num_hidden_layers)


def _check_tokenizer(model: Any, tokenizer: Any) -> Path | None:
    """The SentencePiece model of the tokenizer, if it has one. Raises ExportError."""
    highest = max(tokenizer.get_vocab().values())
    if highest >= model.config.vocab_size:
        raise ExportError(f"the tokenizer has a token {highest}, but the model's vocabulary ends at {model.config.vocab_size}.")
    if not tokenizer.is_fast:
        raise ExportError(f"a {type(tokenizer).__name__} writes no tokenizer.json; load the tokenizer as a fast one.")
    places = (optional_field(tokenizer, "vocab_file"), Path(tokenizer.name_or_path or ".") / SENTENCEPIECE)
    files = [Path(place) for place in places if place and Path(place).name == SENTENCEPIECE and Path(place).is_file()]
    if not files and type(model).__name__ in NEED_SENTENCEPIECE:
        raise ExportError(
            f"llama.cpp's converter reads the vocabulary of a {type(model).__name__} from {SENTENCEPIECE} only, which the "
            f"tokenizer was loaded without; put it beside the base model's tokenizer.json."
        )
    return files[0] if files else None


def _spell_out(directory: Path) -> None:
    """Add to the configurations what transformers 4 looks for."""
    config = read_object(directory / MODEL_CONFIG)
    rope = config.get("rope_parameters")
    older: dict[str, Any] = {"torch_dtype": config.get("dtype")}
    if isinstance(rope, dict):
        older |= {field: rope[field] for field in ("rope_theta", "partial_rotary_factor") if field in rope}
        if rope.get("rope_type", "default") != "default":
            older["rope_scaling"] = rope
    write_json(directory / MODEL_CONFIG, {**older, **config})
    if (directory / TOKENIZER_FILES[1]).is_file():
        tokenizer = read_object(directory / TOKENIZER_FILES[1])
        if tokenizer.get("tokenizer_class") == "TokenizersBackend":  # transformers 5's name for the same class
            write_json(directory / TOKENIZER_FILES[1], {**tokenizer, "tokenizer_class": "PreTrainedTokenizerFast"})


def _check_files(directory: Path, table: Any) -> None:
    for file in TOKENIZER_FILES:
        if not (directory / file).is_file():
            raise ExportError(f"the tokenizer wrote no {file}, which llama.cpp's converter reads.")
    files = ModelFiles(directory)
    for name, dtype in files.dtypes.items():
        if dtype not in DTYPES:
            raise ExportError(f"{name} is {dtype}; llama.cpp's converter takes {', '.join(DTYPES)}.")
        if table.get_name(name, try_suffixes=(".weight", ".bias")) is None:
            raise ExportError(f"gguf has no name for the tensor {name} of this model.")
