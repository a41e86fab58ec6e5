"""Tiny random stand-ins for the hub's models in PEFT's tests, each in a directory that is called like its repository."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
COMMON = {"vocab_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
BERT = {**COMMON, "hidden_size": 32, "intermediate_size": 64, "initializer_range": 0.2, "max_position_embeddings": 130}
LLAMA = {**BERT, **SPECIAL, "num_key_value_heads": 2}
GPT = {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.2, **SPECIAL}
OPT = {**COMMON, "hidden_size": 32, "ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.2, **SPECIAL}
BART = {
    "vocab_size": 128,
    "d_model": 32,
    "max_position_embeddings": 128,
    "init_std": 0.2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
    **{
        f"{side}_{size}": n
        for side in ("encoder", "decoder")
        for size, n in {"layers": 2, "attention_heads": 4, "ffn_dim": 64}.items()
    },
    **SPECIAL,
}
T5 = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}

# Class and sizes by the name on the hub.
MODELS = {
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", LLAMA),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", LLAMA),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", LLAMA),
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", OPT),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", GPT),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", {**GPT, "rotary_dim": 4}),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", {**LLAMA, "head_dim": 8}),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": ("T5ForConditionalGeneration", T5),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", BART),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", BERT),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", {**BERT, "pad_token_id": 0}),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", BERT),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", BERT),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", BERT),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        {**BERT, "pad_token_id": 0},
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": ("LlamaForSequenceClassification", LLAMA),
}


def save_models(hub: Path) -> None:
    """Write every model with a tokenizer of 128 words under `hub`."""
    torch.manual_seed(0)
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(124))]
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, **tokens)
    for name, (model_class, sizes) in MODELS.items():
        cls = getattr(transformers, model_class)
        cls(cls.config_class(**sizes)).eval().save_pretrained(hub / name)
        tokenizer.save_pretrained(hub / name)
