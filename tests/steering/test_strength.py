"""The KL bound: by closed form, and on a model against torch's own divergence."""

import math

import pytest
import torch
from helpers.tiny import make_model
from hypothesis import given
from hypothesis import strategies as st

from sparselet import SteeringVector, steered
from sparselet.errors import ConfigError
from sparselet.steering.strength import POSITIONS, Divergence, calibrate

ROWS = [([5, 9, 200, 31, 7, 50, 60], 2), ([8, 8, 3], 0), (list(range(10, 40)), 5)]


@given(st.floats(1e-6, 1e6), st.floats(1e-4, 5.0), st.floats(1e-3, 1e3))
def test_of_a_quadratic_divergence_all_is_known_after_few_measurements(curvature, bound, begin):
    measured = []

    def kl(strength):
        measured.append(strength)
        return 0.5 * curvature * strength**2

    found = calibrate(kl, bound, begin=begin)
    assert len(measured) <= 6
    assert found.kl == pytest.approx(bound, rel=0.01)
    assert found.strength == pytest.approx(math.sqrt(2 * bound / curvature), rel=0.01)
    assert found.curvature == pytest.approx(curvature)
    assert found.closed == pytest.approx(math.sqrt(bound / curvature))


@pytest.mark.parametrize("bound", [0.01, 0.1, 0.4])
@pytest.mark.parametrize("layer", [0, 1])
def test_on_a_model_the_divergence_is_the_bound(bound, layer):
    model = make_model()
    vector = SteeringVector(torch.randn(16, generator=torch.Generator().manual_seed(3)), layer, 1.0)
    found = calibrate(Divergence(model, vector, ROWS), bound)
    divergences = []
    for tokens, start in ROWS:
        tokens = torch.tensor([tokens[: start + POSITIONS]])
        with torch.no_grad():
            before = model(input_ids=tokens).logits[0, start:].log_softmax(-1)
            with steered(model, vector, found.strength) as steering:
                steering.start = start
                after = model(input_ids=tokens).logits[0, start:].log_softmax(-1)
        divergences.append(torch.nn.functional.kl_div(after, before, reduction="none", log_target=True).sum(-1))
    assert float(torch.cat(divergences).mean()) == pytest.approx(bound, rel=0.1)
    small = Divergence(model, vector, ROWS)(found.closed / 100)
    assert small == pytest.approx(0.5 * (found.closed / 100) ** 2 * found.curvature, rel=0.25)


@pytest.mark.parametrize(
    "kl", [lambda x: min(3.0, x), lambda x: x**4, lambda x: math.exp(x) - 1 - x, lambda x: math.inf if x > 0.2 else x**2]
)
def test_a_divergence_that_is_not_quadratic_is_met_too(kl):
    assert calibrate(kl, 0.03).kl == pytest.approx(0.03, rel=0.01)


def test_a_vector_without_effect_and_a_bound_out_of_reach_are_refused():
    with pytest.raises(ConfigError, match="does not move the model's answers"):
        calibrate(lambda strength: 0.0, 0.1)
    with pytest.raises(ConfigError, match="kl must be what the vector can reach"):
        calibrate(lambda strength: min(0.05, strength**2), 0.1)
