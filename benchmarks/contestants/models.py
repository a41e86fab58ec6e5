"""The models that contestants train, and the tokens they train on."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, PreTrainedModel, PreTrainedTokenizerFast

from sparselet.models import load_model

RANDOM = "random:"
# Names that the query, key and value projections end in; a layer of a model has the first three, or the last.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "qkv_proj")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def config_of(shapes: str) -> Any:
    """tiny: so small that a step takes milliseconds, and tiles of 128 fit. smollm2: SmolLM2-135M. phi3: Phi-3-mini (3.8B)."""
    end = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    if shapes == "phi3":
        return Phi3Config(use_cache=False, **end)
    if shapes == "smollm2":
        sizes = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
        heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    else:
        sizes = {"vocab_size": 258, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(**sizes, **heads, **end)


def make_model(model: str, dtype: str, device: str) -> PreTrainedModel:
    """`random:tiny`, `random:smollm2`, `random:phi3`: random weights, made on the device. Else what `load_model` takes."""
    if not model.startswith(RANDOM):
        return load_model(model, dtype).to(device)  # pyright: ignore[reportArgumentType]
    torch.manual_seed(0)
    with torch.device(device):
        made = AutoModelForCausalLM.from_config(config_of(model.removeprefix(RANDOM)), dtype=DTYPES[dtype])
    return made.eval()


def make_batch(model: PreTrainedModel, rows: int, tokens: int) -> dict[str, Any]:
    """Random tokens with labels everywhere, int64 [rows, tokens], as keyword arguments of the model."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (rows, tokens), generator=generator).to(model.device)
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def targets(model: nn.Module) -> dict[str, Any]:
    """The query, key and value projections by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in PROJECTIONS}


def target_names(model: nn.Module) -> list[str]:
    """What the targets' names end in, as PEFT's configurations take it."""
    return sorted({name.rpartition(".")[2] for name in targets(model)})


def random_entries(shape: tuple[int, int], density: float, generator: torch.Generator) -> Tensor:
    """Flat ids of entries, each taken with probability `density`, ascending, int64 [n], on the generator's device."""
    drawn = torch.rand(shape[0] * shape[1], generator=generator, device=generator.device)
    return (drawn < density).nonzero().squeeze(1)


def equal_rank(model: nn.Module, density: float) -> int:
    """The r for which Σ r(m + n) over the targets is nearest to density · Σ mn."""
    shapes = [tuple(module.weight.shape) for module in targets(model).values()]
    return max(1, round(density * sum(m * n for m, n in shapes) / sum(m + n for m, n in shapes)))


def save_model(model: str, directory: Path) -> None:
    """A random model of these shapes with a tokenizer of one token a byte, as `from_pretrained` reads them."""
    make_model(model, "float32", "cpu").save_pretrained(directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<end>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<end>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>").save_pretrained(directory)


def save_task(directory: Path, train: int, test: int) -> None:
    """A made-up task, whose prompts are of several lengths: numbers to be written backwards."""
    directory.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("validation", test), ("test", test)):
        numbers = [str(7919 * (i + 1) ** (1 + i % 3)) for i in range(count)]
        rows = [json.dumps({"input": f"Backwards, {split}: {n}\nAnswer:", "target": n[::-1]}) for n in numbers]
        (directory / f"{split}.jsonl").write_text("".join(f"{row}\n" for row in rows))
