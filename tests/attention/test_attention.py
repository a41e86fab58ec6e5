"""Patterns of attention against dense attention and against a mask written out, in models and by themselves."""

import math

import pytest
import torch
from helpers.tiny import make_model, make_t5, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from sparselet.attention import PATTERNS, parse_pattern, sparse_attention
from sparselet.attention.keys import attend, may_see
from sparselet.attention.patterns import AttentionPattern
from sparselet.errors import ArgumentError, ModelError
from sparselet.generation.generate import generate

WIDE = {
    "window": {"block": 4, "sink": 1, "window": 999},
    "block": {"block": 4, "top": 999},
    "vertical-slash": {"block": 4, "vertical": 999, "slash": 1},
    "quest": {"page": 4, "budget": 999},
    "snapkv": {"budget": 999, "window": 2, "pool": 3},
}
NARROW = {
    "window": {"block": 2, "sink": 1, "window": 3},
    "block": {"block": 4, "top": 2},
    "vertical-slash": {"block": 4, "vertical": 2, "slash": 2},
    "quest": {"page": 4, "budget": 8},
    "snapkv": {"budget": 4, "window": 2, "pool": 3},
}


def tensors(batch=2, heads=4, key_heads=2, queries=13, keys=13, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, queries, size, generator=generator)
    key, value = torch.randn(2, batch, key_heads, keys, size, generator=generator)
    return query, key, value


def padded(batch, queries, keys, padding):
    """A causal mask of rows with so many tokens of padding on the left."""
    causal = torch.arange(keys) <= torch.arange(keys - queries, keys)[:, None]
    real = torch.stack([torch.arange(keys) >= count for count in padding])
    return (causal[None] & real[:, None])[:, None]


def by_mask(query, key, value, pairs):
    """softmax over the pairs of a mask [batch, heads, queries, keys]; rows without any are 0."""
    group = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))
    scores = (query @ key.transpose(2, 3)) / math.sqrt(query.shape[3])
    return scores.masked_fill(~pairs, -math.inf).softmax(-1).nan_to_num() @ value


def table_of(pattern, query, key, mask):
    """The pattern's table, of a prompt where it has one, else of the last query."""
    pattern = PATTERNS[pattern.name].with_parameters(pattern.parameters)
    if pattern.prefill is not None:
        return pattern.bound(pattern.prefill)(query, key, mask), pattern.block, query, mask
    memory = {}
    if pattern.observe is not None:
        pattern.bound(pattern.observe)(query[:, :, :-1], key[:, :, :-1], None if mask is None else mask[:, :, :-1, :-1], memory)
    last = query[:, :, -1:]
    mask = None if mask is None else mask[:, :, -1:]
    return pattern.bound(pattern.decode)(last, key, mask, memory), 1, last, mask


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(PATTERNS)),
    wide=st.booleans(),
    key_heads=st.sampled_from([1, 2, 4]),
    queries=st.integers(2, 21),
    before=st.integers(0, 9),
    padding=st.none() | st.tuples(st.integers(0, 5), st.integers(0, 5)),
    seed=st.integers(0, 99),
)
def test_attention_at_the_kept_keys_is_dense_attention_under_their_mask(name, wide, key_heads, queries, before, padding, seed):
    before = before if PATTERNS[name].prefill is not None else 0
    keys = queries + before
    query, key, value = tensors(key_heads=key_heads, queries=queries, keys=keys, seed=seed)
    mask = None if padding is None else padded(2, queries, keys, [min(count, keys - 2) for count in padding])
    pattern = PATTERNS[name].with_parameters((WIDE if wide else NARROW)[name])
    seen, block, query, mask = table_of(pattern, query, key, mask)
    assert seen.shape == (2, key_heads, -(-query.shape[2] // block), keys)
    output, used, computed = attend(query, key, value, seen, block, mask, None)
    by_query = seen.repeat_interleave(block, dim=2)[:, :, : query.shape[2]].repeat_interleave(4 // key_heads, dim=1)
    pairs = by_query & may_see(query, key, mask)
    torch.testing.assert_close(output, by_mask(query, key, value, pairs), rtol=1e-5, atol=1e-5)
    assert used == int(pairs.sum()) <= computed
    if wide:
        dense = may_see(query, key, mask).expand(2, 4, -1, -1)
        assert torch.equal(pairs, dense)


def test_sink_and_window_are_the_first_and_the_last_tokens():
    query, key, _ = tensors(batch=1, queries=10, keys=10)
    pattern = PATTERNS["window"].with_parameters({"block": 1, "sink": 2, "window": 3})
    seen = pattern.bound(pattern.prefill)(query, key, None)
    pairs = seen[0, 0] & may_see(query, key, None)[0, 0]
    expected = torch.tensor([[(j < 2 or j > i - 3) and j <= i for j in range(10)] for i in range(10)])
    assert torch.equal(pairs, expected)


def test_blocks_pages_columns_and_distances_with_the_highest_scores_are_kept():
    size, keys = 8, 32
    query, key = torch.zeros(1, 1, keys, size), torch.zeros(1, 1, keys, size)
    query[..., 0] = 1.0
    key[:, :, 13, 0] = 50.0  # all queries look for this one
    block = PATTERNS["block"].with_parameters({"block": 4, "top": 3})
    seen = block.bound(block.prefill)(query, key, None)[0, 0]
    assert seen[-1].nonzero().flatten().tolist() == [*range(4), *range(12, 16), *range(28, 32)]  # first, best, own
    quest = PATTERNS["quest"].with_parameters({"page": 4, "budget": 8})
    assert quest.bound(quest.decode)(query[:, :, -1:], key, None, {})[0, 0, 0].nonzero().flatten().tolist() == [
        *range(12, 16),
        *range(28, 32),
    ]
    slash = PATTERNS["vertical-slash"].with_parameters({"block": 1, "vertical": 1, "slash": 1})
    seen = slash.bound(slash.prefill)(query, key, None)[0, 0] & may_see(query, key, None)[0, 0]
    assert seen[-1].nonzero().flatten().tolist() == [13, 31]
    snap = PATTERNS["snapkv"].with_parameters({"budget": 4, "window": 2, "pool": 1})
    memory = {}
    snap.bound(snap.observe)(query, key, None, memory)
    assert {13, 30, 31} <= set(memory["prompt"][0, 0].nonzero().flatten().tolist())


def test_bounds_of_pages_are_kept_from_step_to_step():
    query, key, _ = tensors(queries=1, keys=21)
    pattern = PATTERNS["quest"].with_parameters({"page": 4, "budget": 8})
    memory = {}
    for length in range(9, 22):
        step = pattern.bound(pattern.decode)(query, key[:, :, :length], None, memory)
        assert torch.equal(step, pattern.bound(pattern.decode)(query, key[:, :, :length], None, {}))
        assert memory["bounds"][0].shape[2] == length // 4
    fewer = pattern.bound(pattern.decode)(query[:1], key[:1], None, memory)  # a row has left the batch
    assert torch.equal(fewer, pattern.bound(pattern.decode)(query[:1], key[:1], None, {}))


@pytest.mark.parametrize("name", sorted(PATTERNS))
@pytest.mark.parametrize("left_padded", [False, True])
def test_a_model_at_density_1_is_the_dense_model_and_is_given_back(name, left_padded):
    model = make_model().eval()
    torch.manual_seed(0)
    ids = torch.randint(3, 30, (2, 11))
    mask = torch.ones_like(ids)
    if left_padded:
        mask[0, :4] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    before, implementation = model(**batch).logits, model.config._attn_implementation
    answer = model.generate(**batch, max_new_tokens=6, do_sample=False, pad_token_id=0)
    with sparse_attention(model, name, **WIDE[name]) as attention:
        inside = model(**batch).logits
        torch.testing.assert_close(inside[mask.bool()], before[mask.bool()], rtol=1e-5, atol=1e-5)
        assert torch.equal(model.generate(**batch, max_new_tokens=6, do_sample=False, pad_token_id=0), answer)
    assert attention.prefill.density == 1
    assert attention.decode.density == 1
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_a_narrow_pattern_uses_less_and_says_how_much(name):
    model = make_model().eval()
    torch.manual_seed(0)
    ids = torch.randint(3, 30, (1, 24))
    with sparse_attention(model, PATTERNS[name].with_parameters(NARROW[name])) as attention:
        model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    counts = attention.prefill if PATTERNS[name].prefill else attention.decode
    assert 0 < counts.density < 1
    assert 0 < counts.used <= counts.computed
    assert counts.flops == 4 * model.config.head_dim * counts.computed


def test_the_model_is_given_back_after_an_error():
    model = make_model()
    before = model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), sparse_attention(model, "window"):
        raise ZeroDivisionError
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flash", "must be one of"),
        ("block:size=3", "has no size"),
        ("block:top=0", "at least 1"),
        ("block:top", "expected block:"),
        ("quest:budget=-3", "expected quest:"),
    ],
)
def test_unknown_patterns_and_parameters_are_refused(text, message):
    with pytest.raises(ArgumentError, match=message):
        parse_pattern(text)
    assert isinstance(parse_pattern("block:top=3,block=8"), AttentionPattern)


def test_models_with_other_attention_are_refused():
    window = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    mistral = MistralForCausalLM(MistralConfig(**window, num_key_value_heads=1, sliding_window=4))
    for model in (mistral, make_t5()):
        with pytest.raises(ModelError, match="full attention"), sparse_attention(model, "window"):
            pass
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=32)).eval()
    ids = torch.arange(3, 15)[None]
    dense = gpt2(ids).logits
    with sparse_attention(gpt2, "block", **WIDE["block"]):
        torch.testing.assert_close(gpt2(ids).logits, dense, rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(PATTERNS)), first=st.integers(1, 6), second=st.integers(1, 24), seed=st.integers(0, 99))
def test_a_pattern_keeps_all_keys_of_a_text_as_short_as_it_says(name, first, second, seed):
    small = {
        "window": {"block": 2, "sink": first, "window": second},
        "block": {"block": first, "top": 1 + second // 4},
        "vertical-slash": {"block": 2, "vertical": first, "slash": second},
        "quest": {"page": first, "budget": second},
        "snapkv": {"budget": 2 + second, "window": 2, "pool": 3},
    }
    pattern = PATTERNS[name].with_parameters(small[name])
    length = min(24, pattern.keeps_all(pattern.parameters))
    if length < 2:
        return
    query, key, _ = tensors(queries=length, keys=length, seed=seed)
    seen, block, query, _ = table_of(pattern, query, key, None)
    by_query = seen.repeat_interleave(block, dim=2)[:, :, : query.shape[2]]
    assert bool((by_query | ~may_see(query, key, None)).all())


def test_an_answer_does_not_depend_on_the_prompts_beside_it():
    model, tokenizer = make_model(initializer_range=0.5).eval(), make_tokenizer()
    prompts = ["a b c d e f g h", "x", "one two three four five six seven"]
    options = {"chat_template": False, "max_new_tokens": 8}
    with sparse_attention(model, "block", **NARROW["block"]):
        together = generate(model, tokenizer, prompts, **options)
        assert together == [generate(model, tokenizer, [prompt], **options)[0] for prompt in prompts]
