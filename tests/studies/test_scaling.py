"""Small models that recall: what is asked follows from the facts, and costs are equal where they are said to be."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparselet.studies.sparse_regions.scaling_runs import MOST_HOPS, SMALLEST_LAYERS, draw_recall, scaling_run
from sparselet.tuner.mask_state import seeded


@settings(max_examples=30, deadline=None)
@given(facts=st.integers(1, 20), more=st.integers(0, 20), questions=st.integers(1, 9), seed=st.integers(0, 99))
def test_answers_follow_from_the_facts(facts, more, questions, seed):
    recall = draw_recall(3, facts, questions, facts + more, seeded(seed))
    for text in range(3):
        leads = dict(zip(recall.names[text].tolist(), recall.next_names[text].tolist(), strict=True))
        assert len(leads) == len(set(leads.values())) == facts
        chains = zip(recall.starts[text].tolist(), recall.hops[text].tolist(), recall.answers[text].tolist(), strict=True)
        for name, hops, answer in chains:
            for _ in range(hops):
                name = leads[name]
            assert name == answer
            assert 1 <= hops <= MOST_HOPS


def test_pages_cost_as_much_as_the_smallest_model_with_all_keys():
    sizes = {"steps": 2, "facts": 512, "names": 600}
    smallest, larger = (scaling_run(seed=0, layers=layers, **sizes) for layers in (SMALLEST_LAYERS, 2 * SMALLEST_LAYERS))
    assert larger["all flops"] == pytest.approx(2 * smallest["all flops"])
    assert 0.85 * smallest["all flops"] < larger["pages flops"] < 1.03 * smallest["all flops"]
    assert smallest["pages flops"] == pytest.approx(smallest["all flops"], rel=0.04)
    assert scaling_run(seed=0, layers=SMALLEST_LAYERS, **sizes) == smallest


def test_one_layer_learns_one_hop_and_no_more():
    numbers = scaling_run(seed=0, layers=1, steps=400, facts=96, names=96)
    assert numbers["all 1 hops"] > 90
    assert numbers["all 2 hops"] < 15
