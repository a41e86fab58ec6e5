"""`summarize`: what is planted in states is in the summary, with and without the channel that was made an outlier."""

import numpy as np
import pytest
import torch

from sparselet.activations.probe import Probe
from sparselet.activations.statistics import sparsity
from sparselet.activations.summary import CORRELATED, ProbeGroup, summarize


def test_groups_pairs_outliers_and_losses():
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(1, 40, 2, 100, generator=generator)
    states[..., 7] = 50.0
    by_vector = sparsity(states[0].flatten(0, 1)).gini.view(40, 2).mean(1)
    losses = torch.tensor(np.argsort(np.argsort(by_vector.numpy())), dtype=torch.float64)  # rises with the sparsity
    groups = [ProbeGroup("a", 20), ProbeGroup("b", 20, "a")]
    raw, rest = summarize(Probe((3,), states, losses), groups)
    assert (raw.layer, raw.removed, rest.removed) == (3, (), (7,))
    assert raw.by_row["gini"] == pytest.approx(by_vector.numpy())
    assert raw.groups[1].difference["gini"].mean == pytest.approx(float((by_vector[20:] - by_vector[:20]).mean()))
    assert raw.groups[0].means["channel"].mean > 0.9
    assert rest.groups[0].means["channel"].mean < 0.2
    assert rest.groups[0].means["hoyer"].mean == pytest.approx(rest.null["hoyer"], abs=0.02)
    assert raw.pooled["gini"].rho == pytest.approx(1.0)
    assert raw.within["gini"].rho == pytest.approx(1.0)
    assert tuple(raw.pooled) == CORRELATED


def test_rows_without_a_loss_have_no_correlation():
    states = torch.randn(1, 4, 1, 20, generator=torch.Generator().manual_seed(1))
    summary = summarize(Probe((0,), states, torch.full((4,), torch.nan, dtype=torch.float64)), [ProbeGroup("a", 4)])
    assert all(layer.pooled == layer.within == {} for layer in summary)
