"""Second moments and prompt states against forward hooks that keep every input, and dense float64 algebra."""

import logging

import pytest
import torch
from helpers.strategies import few
from helpers.tiny import make_gpt2, make_model, make_t5
from hypothesis import given
from hypothesis import strategies as st

from sparselet.errors import ArgumentError, TaskError
from sparselet.profiles.collect import collect_moments, describe_prompts, profiled_targets, prompt_states, sample_rows
from sparselet.profiles.profile import low_rank_plus_diagonal


def rows_of(*lengths, **more):
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(2, 250, (1, length), generator=generator), **more} for length in lengths]


def seen(model, names, rows):
    """XᵀX/n of each target, of inputs kept by hooks of the test's own."""
    inputs = {name: [] for name in names}

    def keep(name):
        return lambda module, given, _: inputs[name].append(given[0].reshape(-1, given[0].shape[-1]).double())

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    with torch.no_grad():
        for row in rows:
            model(**row)
    for handle in handles:
        handle.remove()
    return {name: (x := torch.cat(kept)).T @ x / len(x) for name, kept in inputs.items()}


@pytest.mark.parametrize("make", [make_model, make_gpt2, make_t5])
def test_the_moments_are_those_of_every_input(make):
    model = make()
    names = profiled_targets(model, names_of(model))
    more = {"decoder_input_ids": torch.tensor([[0, 7, 9]])} if make is make_t5 else {}
    moments, inputs = collect_moments(model, names, rows_of(5, 9, 13, **more), rank=None)
    expected = seen(model, names, rows_of(5, 9, 13, **more))
    assert sorted(inputs) == sorted(names)
    for name, matrix in expected.items():
        torch.testing.assert_close(moments[inputs[name]].to_dense(), matrix, rtol=1e-5, atol=1e-6)


def names_of(model):
    return [name for name, _ in model.named_modules()]


def test_query_key_and_value_share_their_input_and_nothing_else_does():
    model = make_model()
    _, inputs = collect_moments(model, profiled_targets(model, names_of(model)), rows_of(6, 8))
    layer = "model.layers.0."
    attention, mlp = layer + "self_attn.", layer + "mlp."
    assert {inputs[attention + name] for name in ("q_proj", "k_proj", "v_proj")} == {attention + "q_proj"}
    assert {inputs[mlp + name] for name in ("gate_proj", "up_proj")} == {mlp + "gate_proj"}
    assert len(set(inputs.values())) == 2 * 4 + 1


def test_an_output_layer_that_shares_the_embedding_is_left_out():
    assert "lm_head" in profiled_targets(make_model(), names_of(make_model()))
    tied = make_model(tie_word_embeddings=True)
    assert "lm_head" not in profiled_targets(tied, names_of(tied))


def test_the_model_is_left_in_its_mode_and_without_hooks():
    model = make_model().train()
    collect_moments(model, ["lm_head"], rows_of(4))
    prompt_states(model, [[3, 4, 5]])
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_few_tokens_are_said_and_none_are_refused(caplog):
    model = make_model()
    with caplog.at_level(logging.WARNING):
        collect_moments(model, ["lm_head"], rows_of(4))
    assert "has 4 tokens for inputs of width 16" in caplog.text
    with pytest.raises(TaskError, match="needs rows"):
        collect_moments(model, ["lm_head"], [])
    with pytest.raises(ArgumentError, match="changes no linear layer"):
        collect_moments(model, [], rows_of(4))
    with pytest.raises(TaskError, match="at least one prompt"):
        prompt_states(model, [])


def test_prompt_states_are_those_of_the_last_token():
    model, prompts = make_model(), [[5, 9, 200], [31, 7, 8, 9, 10]]
    with torch.no_grad():
        expected = [model(torch.tensor([p]), output_hidden_states=True).hidden_states[-1][0, -1] for p in prompts]
    states = prompt_states(model, prompts)
    torch.testing.assert_close(states, torch.stack(expected))
    described = describe_prompts(states)
    torch.testing.assert_close(described.mean, states.mean(0))
    torch.testing.assert_close(
        described.covariance.to_dense(), torch.cov(states.T.double(), correction=0), rtol=1e-4, atol=1e-6
    )


def test_the_states_of_an_encoder_decoder_are_its_encoders():
    model = make_t5()
    with torch.no_grad():
        expected = model.encoder(torch.tensor([[5, 9, 200]])).last_hidden_state[0, -1]
    torch.testing.assert_close(prompt_states(model, [[5, 9, 200]])[0], expected)


@few
@given(width=st.integers(2, 12), tokens=st.integers(1, 20), rank=st.sampled_from([1, 2, 5, None]), seed=st.integers(0, 99))
def test_low_rank_plus_diagonal_keeps_the_diagonal_and_the_largest_part(width, tokens, rank, seed):
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matrix = x.T @ x / tokens
    moment = low_rank_plus_diagonal(matrix, rank)
    torch.testing.assert_close(moment.full_diagonal(), matrix.diagonal(), rtol=1e-5, atol=1e-6)
    assert (moment.diagonal >= 0).all()
    kept = width if rank is None else min(rank, width)
    values, vectors = torch.linalg.eigh(matrix)
    best = vectors[:, -kept:] @ values[-kept:].diag() @ vectors[:, -kept:].T
    off = ~torch.eye(width, dtype=torch.bool)
    torch.testing.assert_close(moment.to_dense()[off], best[off], rtol=1e-4, atol=1e-5)
    assert torch.linalg.eigvalsh(moment.to_dense()).min() > -1e-6


def test_wide_moments_are_decomposed_as_narrow_ones(monkeypatch):
    x = torch.randn(50, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.logspace(1, -2, 200)
    exact = low_rank_plus_diagonal(x.T @ x, 8)
    monkeypatch.setattr("sparselet.profiles.profile._EXACT", 100)
    torch.testing.assert_close(low_rank_plus_diagonal(x.T @ x, 8).to_dense(), exact.to_dense(), rtol=1e-3, atol=1e-3)
    with pytest.raises(ArgumentError, match="rank must be at least 1"):
        low_rank_plus_diagonal(x.T @ x, 0)


def test_rows_are_sampled_without_repeats_and_alike():
    assert sorted(sample_rows(20)) == list(range(20))
    assert sample_rows(20, 5) == sample_rows(20)[:5]
    assert sample_rows(20) != list(range(20))
