"""Rows in a batch against the same rows alone through transformers' forward and `generate`, for models of many kinds."""

import pytest
import torch
from helpers.tiny import make_tokenizer
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from sparselet.errors import ModelError
from sparselet.generation.generate import generate
from sparselet.generation.padding import padding_side, supports_prefix_cache
from sparselet.generation.prefix import batch_loss
from sparselet.generation.prompts import prompt_format
from sparselet.models import decoder_start, position_limit
from sparselet.tasks.task import Row
from sparselet.training.collate import collator, encode

SIZES = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "initializer_range": 0.5,
}
N = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "init_std": 0.5,
    "decoder_start_token_id": 1,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
CAUSAL = {
    "gpt2": ("left", N),
    "gpt_neo": ("left", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4}),
    "mpt": ("left", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "bloom": ("left", {"n_layer": 2, "n_head": 4}),
    "falcon": ("left", {"alibi": True}),
    "opt": ("left", {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64, "init_std": 0.5}),
    "gemma3_text": ("left", {"head_dim": 8, "num_key_value_heads": 2, "sliding_window": 4}),
    "mixtral": ("left", {"num_local_experts": 4, "num_key_value_heads": 2, "output_router_logits": True}),
    "mamba": ("left", {"state_size": 4}),
    "rwkv": ("right", {"attention_hidden_size": 32, "context_length": 64}),
    "openai-gpt": ("left", N),
    "ctrl": ("left", {**N, "dff": 48}),
}
SEQ2SEQ = {
    "t5": T5,
    "bart": {**BART, "forced_bos_token_id": 5},
    "mbart": {**BART, "decoder_start_token_id": 9},
    "m2m_100": {**BART, "forced_bos_token_id": 7},
    "switch_transformers": {**T5, "num_experts": 2},
    "umt5": T5,
}
ROWS = [Row("ant", "tna"), Row("a longer prompt, of a lark?", "kral"), Row("x", "as long a target as that"), Row("bee", "eeb")]


def made(kind, changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **changes})
    return (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config).eval()


def alone(model, row):
    """The sum of the losses of one row's target tokens."""
    target = torch.tensor(row["target"])
    if model.config.is_encoder_decoder:
        begun = torch.tensor([[decoder_start(model), *row["target"][:-1]]])
        logits = model(input_ids=torch.tensor([row["prompt"]]), decoder_input_ids=begun).logits[0]
    else:
        logits = model(input_ids=torch.tensor([row["prompt"] + row["target"]])).logits[0, len(row["prompt"]) - 1 : -1]
    return cross_entropy(logits, target, reduction="sum")


def assert_rows_do_not_depend_on_each_other(model):
    tokenizer = make_tokenizer()
    form = prompt_format(model, tokenizer, False)
    rows = encode(ROWS, form, 2048, "rows")
    batch = collator(model, form, share=True)(rows)
    expected = sum(alone(model, row) for row in rows) / sum(len(row["target"]) for row in rows)
    loss = batch_loss(model, batch)
    torch.testing.assert_close(loss, expected)
    parameters = dict(model.named_parameters())
    wanted, found = (torch.autograd.grad(value, list(parameters.values()), allow_unused=True) for value in (expected, loss))
    for name, gradient, other in zip(parameters, found, wanted, strict=True):
        assert (gradient is None) == (other is None), name
        if gradient is not None:
            torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-5, msg=name)
    model.eval()
    prompts = [row.input for row in ROWS]
    answers = []
    for row in rows:
        ids = torch.tensor([row["prompt"]])
        mask = torch.ones_like(ids)
        end = sorted(form.ends)
        settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": end, "pad_token_id": 0}
        found = model.generate(input_ids=ids, attention_mask=mask, **settings)
        new = found[0, 1 if model.config.is_encoder_decoder else ids.shape[1] :].tolist()
        new = new[: new.index(1)] if 1 in new else new
        answers.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    assert len(set(answers)) > 1
    assert generate(model, tokenizer, prompts, chat_template=False, max_new_tokens=6) == answers


@pytest.mark.parametrize("kind", CAUSAL)
def test_losses_and_answers_of_a_causal_model_are_those_of_rows_alone(kind):
    side, changes = CAUSAL[kind]
    model = made(kind, changes)
    assert padding_side(model) == side
    assert not model.training
    model.train(kind == "rwkv")  # has no gradients otherwise
    assert_rows_do_not_depend_on_each_other(model)


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_losses_and_answers_of_an_encoder_decoder_are_those_of_rows_alone(kind):
    model = made(kind, SEQ2SEQ[kind])
    if kind == "switch_transformers":
        with pytest.raises(ModelError, match="drops tokens"):
            collator(model, prompt_format(model, make_tokenizer(), False))
        return
    assert padding_side(model) == "right"
    assert_rows_do_not_depend_on_each_other(model)


@pytest.mark.parametrize(
    ("kind", "changes"), [("bert", {}), ("xlnet", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48})]
)
def test_a_model_that_sees_what_it_is_to_predict_is_refused(kind, changes):
    with pytest.raises(ModelError, match=rf"\({kind}\) sees the tokens"):
        padding_side(made(kind, changes))


def test_a_model_that_counts_positions_in_its_own_way_is_refused():
    with pytest.raises(ModelError, match=r"\(roberta\) counts positions otherwise"):
        padding_side(made("roberta", {"is_decoder": True, "max_position_embeddings": 66}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_with_its_padding_in_its_logits_is_refused(dtype, monkeypatch):
    assert padding_side(made("bart", BART).to(dtype)) == "right"
    model = made("bart", BART).to(dtype)
    encoder = model.model.encoder
    whole = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda *args, attention_mask=None, **kwargs: whole(*args, **kwargs))
    assert padding_side(model) is None
    with pytest.raises(ModelError, match="sees the padding"):
        collator(model, prompt_format(model, make_tokenizer(), False))


def test_a_model_is_tried_once(monkeypatch):
    model = made("gpt2", CAUSAL["gpt2"][1])
    side = padding_side(model)
    monkeypatch.setattr(model, "forward", None)
    assert padding_side(model) == side


def test_the_side_of_a_model_that_holds_nan_is_not_kept():
    model = made("rwkv", CAUSAL["rwkv"][1])
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.data.fill_(torch.nan)
    assert padding_side(model) == "left"
    for name, p in model.named_parameters():
        p.data.copy_(weights[name])
    assert padding_side(model) == "right"


@pytest.mark.parametrize(("kind", "can"), [("gpt2", True), ("mixtral", True), ("bloom", False), ("gemma3_text", False)])
def test_rows_go_on_from_a_cache_where_that_changes_nothing(kind, can):
    assert supports_prefix_cache(made(kind, CAUSAL[kind][1])) == can


@pytest.mark.parametrize(
    ("kind", "changes", "prompt", "answer"),
    [
        ("gpt2", N, 64, 64),
        ("mpt", CAUSAL["mpt"][1], 64, 64),
        ("roberta", {"is_decoder": True, "max_position_embeddings": 66}, 65, 65),
        ("bart", BART, 64, 64),
        (
            "led",
            {**BART, "attention_window": 4, "max_encoder_position_embeddings": 48, "max_decoder_position_embeddings": 32},
            48,
            32,
        ),
        ("t5", {**T5, "n_positions": 8}, None, None),
        ("bloom", CAUSAL["bloom"][1], None, None),
        ("llama", {"max_position_embeddings": 40}, 40, 40),
        (
            "phi3",
            {
                "max_position_embeddings": 64,
                "original_max_position_embeddings": 32,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                    "original_max_position_embeddings": 32,
                },
            },
            32,
            32,
        ),
    ],
)
@torch.no_grad()
def test_the_limit_of_positions_is_what_the_model_takes(kind, changes, prompt, answer):
    model = made(kind, changes)
    assert position_limit(model) == answer
    assert position_limit(model, encoder=model.config.is_encoder_decoder) == prompt
    ids = torch.full((1, prompt or 80), 7)
    model(input_ids=ids, **({"decoder_input_ids": ids[:, :answer]} if model.config.is_encoder_decoder else {}))
