"""Greedy decoding against transformers' own `generate`, token by token."""

import pytest
import torch
from helpers.tiny import make_gpt2, make_model, make_t5
from transformers import MistralConfig, MistralForCausalLM

from sparselet.generation import decode as module
from sparselet.generation.decode import can_decode, decode, encode_prefix
from sparselet.generation.prefix import shared_prefix

PAD, NEW = 0, 12


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request):
    return make_model(initializer_range=0.5) if request.param == "llama" else make_gpt2()


def prompts(count=12, shared=5, longest=9):
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    beginning = torch.randint(2, 258, (shared,), generator=generator).tolist()
    return [beginning + torch.randint(2, 258, (length,), generator=generator).tolist() for length in lengths]


@torch.inference_mode()
def expected(model, prompt, ends, new=NEW):
    ids = torch.tensor([prompt])
    found = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=new,
        eos_token_id=sorted(ends) or None,
        pad_token_id=PAD,
    )
    return found[0, len(prompt) :].tolist()


def frequent(model, count):
    """Tokens that the model says within its first few, so that rows end at different times."""
    said = [token for prompt in prompts() for token in expected(model, prompt, set(), 6)[1:]]
    return set(sorted(set(said), key=said.count)[-count:])


@pytest.mark.parametrize("leave", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("with_prefix", [False, True])
@pytest.mark.parametrize("ends", [0, 1, 3])
def test_tokens_are_those_of_generate(monkeypatch, model, ends, with_prefix, leave):
    monkeypatch.setattr(module, "COMPACT_BELOW", leave)
    rows, ending = prompts(), frequent(model, ends)
    prefix = encode_prefix(model, shared_prefix(rows)) if with_prefix else None
    found = decode(model, prefix, PAD, ending, NEW, rows)
    assert found == [expected(model, row, ending) for row in rows]
    if ends:
        assert len({len(answer) for answer in found}) > 2
        assert all(answer[-1] in ending for answer in found if len(answer) < NEW)


def test_a_row_that_ended_is_computed_no_more(monkeypatch, model):
    rows, ending = prompts(), frequent(model, 3)
    sizes = []
    handle = model.register_forward_pre_hook(lambda m, a, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True)
    found = decode(model, None, PAD, ending, NEW, rows)
    handle.remove()
    assert len(sizes) == max(map(len, found))
    assert sizes[0] == len(rows)
    for step, size in enumerate(sizes[1:], 1):
        left = sum(len(answer) > step for answer in found)
        assert left <= size <= max(left / module.COMPACT_BELOW + 1, 1)


def test_the_prefix_is_computed_once_and_stays_as_it_was(model):
    rows = prompts()
    shared = shared_prefix(rows)
    assert len(shared) == 5
    prefix = encode_prefix(model, shared)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in prefix.layers]
    sizes = []
    handle = model.register_forward_pre_hook(lambda m, a, kwargs: sizes.append(kwargs["input_ids"].shape), with_kwargs=True)
    first, second = (decode(model, prefix, PAD, set(), 4, part) for part in (rows[:6], rows[6:]))
    handle.remove()
    assert first + second == [expected(model, row, set(), 4) for row in rows]
    assert sizes[0] == (6, max(map(len, rows[:6])) - 5)
    for layer, (keys, values) in zip(prefix.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


@pytest.mark.parametrize(
    ("rows", "shared"),
    [
        ([[1, 2, 3]], [1, 2]),
        ([[1, 2, 3], [1, 2, 3]], [1, 2]),
        ([[1, 2, 3], [1, 2]], [1]),
        ([[1, 2, 3], [1, 2, 4], [1, 5]], [1]),
        ([[1], [1, 2]], []),
        ([[], [1, 2]], []),
        ([[4, 1], [3, 1]], []),
    ],
)
def test_the_shared_prefix_leaves_every_prompt_a_token(rows, shared):
    assert shared_prefix(rows) == shared
    assert shared_prefix(rows[::-1]) == shared


def test_nothing_shared_needs_no_cache(model):
    assert encode_prefix(model, []) is None


def test_what_generate_alone_can_do_is_left_to_it():
    assert can_decode(make_model())
    assert can_decode(make_gpt2())
    assert not can_decode(make_t5())
    sliding = MistralConfig(
        vocab_size=258, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, sliding_window=4
    )
    assert not can_decode(MistralForCausalLM(sliding))
    for name, value in (("repetition_penalty", 1.3), ("no_repeat_ngram_size", 2), ("suppress_tokens", [3]), ("num_beams", 2)):
        model = make_model()
        setattr(model.generation_config, name, value)
        assert not can_decode(model), name
    model = make_model()
    model.generation_config.update(temperature=0.2, top_p=0.9, do_sample=True)
    assert can_decode(model)
