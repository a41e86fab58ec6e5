"""`probe` against one forward pass a row."""

import pytest
import torch
from helpers.tiny import make_model

from sparselet.activations.probe import ProbeRow, probe
from sparselet.errors import ArgumentError


@pytest.fixture(scope="module")
def model():
    return make_model().eval()


@pytest.fixture(scope="module")
def rows(model):
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    lengths = [(5, 2), (9, 1), (3, 0), (12, 4), (9, 3), (1, 0)]
    return [ProbeRow(tuple(torch.randint(vocabulary, (n,), generator=generator).tolist()), scored) for n, scored in lengths]


def test_states_and_losses_are_those_of_each_row_alone(model, rows):
    result = probe(model, rows, [0, 1, -1])
    assert result.layers == (0, 1, model.config.num_hidden_layers)
    for i, row in enumerate(rows):
        ids = torch.tensor([row.tokens])
        with torch.no_grad():
            output = model(input_ids=ids, output_hidden_states=True)
        last = len(row.tokens) - row.scored - 1
        for layer, states in zip(result.layers, result.states, strict=True):
            torch.testing.assert_close(states[i, 0], output.hidden_states[layer][0, last], atol=1e-5, rtol=1e-4)
        if row.scored:
            logits = output.logits[0, last:-1]
            expected = torch.nn.functional.cross_entropy(logits.double(), ids[0, last + 1 :])
            assert result.losses[i] == pytest.approx(float(expected), rel=1e-5)
        else:
            assert result.losses[i].isnan()


def test_positions_are_of_the_prompt_and_the_nearest_where_it_is_short(model, rows):
    result = probe(model, rows, [1], positions=[0, -2, 100])
    for i, row in enumerate(rows):
        with torch.no_grad():
            states = model(input_ids=torch.tensor([row.tokens]), output_hidden_states=True).hidden_states[1][0]
        last = len(row.tokens) - row.scored - 1
        torch.testing.assert_close(result.states[0, i], states[[0, max(0, last - 1), last]], atol=1e-5, rtol=1e-4)


def test_rows_are_reported_and_the_model_keeps_its_mode(model, rows):
    done = []
    model.train()
    probe(model, rows, [-1], progress=done.append)
    assert model.training
    model.eval()
    assert sum(done) == len(rows)


def test_what_cannot_be_probed_is_refused_by_name(model, rows):
    with pytest.raises(ArgumentError, match="there is no layer 9; the model has hidden states 0 to 2"):
        probe(model, rows, [9])
    with pytest.raises(ArgumentError, match="row 2 has 1 tokens; expected more than the 1 scored ones"):
        probe(model, [rows[0], ProbeRow((3,), 1)], [0])
