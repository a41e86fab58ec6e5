"""Models of a few thousand weights with a byte-level tokenizer, and tasks of a few rows, as directories."""

import json
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from sparselet import SparseAdapter, SparseDelta
from sparselet.delta import BlockSize, block_for
from sparselet.fingerprint import fingerprint_weight
from sparselet.kernels import values_shape

PAD, END = "<pad>", "<end>"
IDS = torch.tensor([[5, 9, 200, 31, 7]])
TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
WORDS = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibex", "jay", "kite", "lark", "mole", "newt", "owl", "pike")


def make_tokenizer(template: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte, so that every text comes back as it was."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([PAD, END, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD, END])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END)
    if template:
        fast.chat_template = TEMPLATE
    return fast


def make_model(dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = LlamaConfig(vocab_size=258, **{**sizes, "num_key_value_heads": 1, "initializer_range": 0.2, **special, **changes})
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # as `from_pretrained` does, which leaves buffers in float32
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def make_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=258, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval()


def make_t5(seed: int = 0) -> T5ForConditionalGeneration:
    torch.manual_seed(seed)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    special = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=258, **sizes, **special)).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    """The model's answer to one fixed row."""
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def save_base(directory: Path, template: bool = False, model: torch.nn.Module | None = None, **changes) -> str:
    """A base model with its tokenizer, as `load_model` and `load_tokenizer` read it."""
    (model or make_model(**changes)).save_pretrained(directory)
    make_tokenizer(template).save_pretrained(directory)
    return str(directory)


def write_rows(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def save_task(directory: Path, train: int = 12, validation: int = 4, test: int = 5) -> str:
    """Words to be spelled backwards, of several lengths."""
    directory.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("validation", validation), ("test", test)):
        words = [f"{split[0]}{word}" * (1 + i % 2) for i, word in enumerate((WORDS * (1 + count // len(WORDS)))[:count])]
        write_rows(directory / f"{split}.jsonl", [{"input": f"{word}?", "target": word[::-1]} for word in words])
    return str(directory)


def make_adapter(
    model: torch.nn.Module,
    block_size: BlockSize = 1,
    density: float = 0.25,
    seed: int = 1,
    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj"),
    **metadata,
) -> SparseAdapter:
    """Random changes of the model's query, key and value projections, or others, large enough to change its answers."""
    generator = torch.Generator().manual_seed(seed)
    deltas, fingerprints = {}, {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] not in projections:
            continue
        rows, columns = module.weight.shape
        block = block_for(block_size, (rows, columns))
        blocks = rows * columns // math.prod(block)
        chosen = torch.randperm(blocks, generator=generator)[: round(density * blocks)].sort().values
        values = torch.randn(values_shape(len(chosen), block), generator=generator)
        deltas[name] = SparseDelta((rows, columns), chosen.to(torch.int32), values)
        fingerprints[name] = fingerprint_weight(module.weight)
    return SparseAdapter(deltas, metadata, fingerprints)
