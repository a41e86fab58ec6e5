"""`steered` against models whose answer is known: sign, block, positions, and that nothing of it stays."""

import contextlib

import pytest
import torch
from helpers.tiny import IDS, make_adapter, make_gpt2, make_model, make_t5, make_tokenizer

from sparselet import SteeringVector, steered
from sparselet.apply import apply_temporarily
from sparselet.errors import ArgumentError, ModelError, ShapeMismatch, WrongBase
from sparselet.fingerprint import fingerprint_weight
from sparselet.generation.generate import generate
from sparselet.steering.switch import block_outputs, steered_rows

CONCISE, VERBOSE = [5, 9, 200], [5, 9, 31, 7]
MODELS = pytest.mark.parametrize("make", [make_model, make_gpt2], ids=["llama", "gpt2"])


def vector_of(model, layer, seed=0, scale=1.0, strength=1.0):
    values = scale * torch.randn(16, generator=torch.Generator().manual_seed(seed))
    return SteeringVector(values, layer, strength, None, fingerprint_weight(model.get_input_embeddings().weight))


@torch.no_grad()
def passed(model, tokens):
    return model(input_ids=torch.tensor([tokens]), output_hidden_states=True)


@MODELS
def test_block_l_writes_hidden_states_l_plus_one(make):
    model = make()
    written, output = block_outputs(model, CONCISE), passed(model, CONCISE)
    assert torch.equal(written[0], output.hidden_states[1][0, -1])
    norm = model.model.norm if make is make_model else model.transformer.ln_f
    assert torch.equal(norm(written[1]), output.hidden_states[2][0, -1])  # transformers' last state has passed the norm
    assert not torch.allclose(written[0], output.hidden_states[0][0, -1])


@MODELS
@pytest.mark.parametrize("layer", [0, 1])
def test_adding_concise_minus_verbose_turns_the_verbose_state_into_the_concise_one(make, layer):
    model = make()
    concise, verbose = (block_outputs(model, tokens) for tokens in (CONCISE, VERBOSE))
    fingerprint = fingerprint_weight(model.get_input_embeddings().weight)
    vector = SteeringVector((concise - verbose)[layer], layer, 1.0, None, fingerprint)
    with steered(model, vector):
        output = passed(model, VERBOSE)
    if layer == 0:
        torch.testing.assert_close(output.hidden_states[1][0, -1], concise[0], rtol=1e-5, atol=1e-6)
        assert torch.equal(output.hidden_states[1][0, :-1], passed(model, VERBOSE).hidden_states[1][0, :-1])
    else:  # after the last block the answers are the concise ones
        torch.testing.assert_close(output.logits[0, -1], passed(model, CONCISE).logits[0, -1], rtol=1e-4, atol=1e-5)
    with steered(model, vector, -1.0):
        state = block_outputs(model, VERBOSE)  # read before the vector is added
    torch.testing.assert_close(state[layer], (2 * verbose - concise)[layer], rtol=1e-4, atol=1e-5)


def test_of_identity_blocks_the_vector_is_the_difference_of_the_embeddings():
    model = make_model()
    for block in model.model.layers:
        torch.nn.init.zeros_(block.self_attn.o_proj.weight)
        torch.nn.init.zeros_(block.mlp.down_proj.weight)
    embedding = model.get_input_embeddings().weight.detach()
    assert torch.equal(block_outputs(model, CONCISE), embedding[CONCISE[-1]].expand(2, -1))


@MODELS
def test_after_the_block_the_model_is_as_it_was(make):
    model = make().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in model.modules()]
    plain = model.eval()(input_ids=IDS).logits
    vector = vector_of(model, 1)
    with steered(model, vector):
        assert not torch.equal(model(input_ids=IDS).logits, plain)
    with pytest.raises(KeyboardInterrupt), steered(model, vector):
        raise KeyboardInterrupt
    assert torch.equal(model(input_ids=IDS).logits, plain)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_nested_vectors_add_up():
    model = make_model()
    first, second = vector_of(model, 1, 1), vector_of(model, 1, 2)
    both = SteeringVector(first.values + second.values, 1, 1.0)
    with steered(model, both):
        expected = passed(model, CONCISE).logits
    with steered(model, first):
        with steered(model, second):
            torch.testing.assert_close(passed(model, CONCISE).logits, expected)
        prompts = ["a long common beginning, x", "a long common beginning, and y"]
        inside = generate(model, make_tokenizer(), prompts, max_new_tokens=4)
        assert inside == [generate(model, make_tokenizer(), [prompt], max_new_tokens=4)[0] for prompt in prompts]


@torch.no_grad()
def by_hand(model, vector, prompt, count):
    """Greedy answers without a cache: all positions from the prompt's last on are steered."""
    tokens = list(prompt)
    with steered(model, vector) as steering:
        steering.start = len(prompt) - 1
        for _ in range(count):
            tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
            if tokens[-1] == 1:
                break
    return tokens[len(prompt) :]


@MODELS
def test_answers_are_steered_at_each_token_whatever_batch_and_prefix_they_share(make):
    model, tokenizer = make(), make_tokenizer()
    vector = vector_of(model, 0, scale=3.0)
    prompts = ["one two three", "one two four!", "one two", "x"]
    plain = generate(model, tokenizer, prompts, chat_template=False, max_new_tokens=6)
    with steered(model, vector):
        answers = generate(model, tokenizer, prompts, chat_template=False, max_new_tokens=6)
    assert answers != plain
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = by_hand(model, vector, tokenizer(prompt)["input_ids"], 6)
        assert answer == tokenizer.decode([t for t in expected if t != 1], skip_special_tokens=True).strip()
    assert generate(model, tokenizer, prompts, chat_template=False, max_new_tokens=6) == plain


def test_it_goes_with_experts():
    model = make_model()
    expert, vector = make_adapter(model), vector_of(model, 1)
    with apply_temporarily(model, expert):
        with_expert = block_outputs(model, CONCISE)[1]
        with steered(model, vector):
            found = block_outputs(model, CONCISE)[1]
    torch.testing.assert_close(found, with_expert + vector.values)


def test_a_vector_that_does_not_fit_is_refused_by_name():
    model = make_model()
    values = torch.ones(16)
    for vector, error, message in (
        (SteeringVector(values, 2, 1.0), ArgumentError, "layer must be a block of the model, 0 to 1, got 2"),
        (SteeringVector(torch.ones(8), 0, 1.0), ShapeMismatch, "width 8, the model 16"),
        (vector_of(make_model(seed=4), 0), WrongBase, "steering vector and model"),
    ):
        with pytest.raises(error, match=message), steered(model, vector):
            pass
    with pytest.raises(ModelError, match="needs a decoder"), steered(make_t5(), SteeringVector(values, 0, 1.0)):
        pass
    assert not any(module._forward_hooks for module in make_model().modules())


@MODELS
@torch.no_grad()
def test_rows_of_a_pass_are_steered_each_by_its_own_vector(make):
    model = make()
    vectors = [vector_of(model, 0), None, vector_of(model, 1, seed=1), vector_of(model, 0, seed=2, strength=-2.0)]
    tokens = torch.randint(2, 258, (4, 5), generator=torch.Generator().manual_seed(0))
    with steered_rows(model, [vector and (vector.layer, vector.strength * vector.values) for vector in vectors]):
        together = model(input_ids=tokens).logits
    for row, vector in enumerate(vectors):
        with contextlib.nullcontext() if vector is None else steered(model, vector):
            alone = model(input_ids=tokens[row : row + 1]).logits
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    assert not any(module._forward_hooks for module in model.modules())
