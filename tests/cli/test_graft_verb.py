"""`sparselet graft`, `sl.graft` and the workflow: parts of a change against evaluations of the same parts written by hand."""

import json

import numpy as np
import pytest
import torch

import sparselet as sl
from sparselet.adapter import SparseAdapter
from sparselet.errors import ConfigError, DensityOutOfRange
from sparselet.evaluation.metrics import rouge_l_of_each
from sparselet.workflows.graft import grafted

pytestmark = pytest.mark.usefixtures("loud_again")

SHORT = sl.EvalSettings(rows=3, max_new_tokens=4)
FEW = sl.GraftSettings((0.1, 0.5), ("top", "random_rescaled", "complement"), draws=2)


@pytest.fixture(scope="module")
def result(experts, task_dir):
    return sl.graft(experts[0], task_dir, settings=FEW, eval_settings=SHORT)


def test_each_point_is_the_evaluation_of_that_part(result, experts, task_dir):
    expert = sl.load(experts[0])
    kept = {}
    for name, delta in expert.items():
        largest = delta.values.abs().argsort(descending=True)[: round(0.5 * delta.nnz)].sort().values
        kept[name] = sl.SparseDelta(delta.shape, delta.indices[largest], delta.values[largest])
    top = SparseAdapter(kept, expert.metadata, expert.fingerprints)
    (expected,) = sl.evaluate(top, task_dir, settings=SHORT).results.values()
    point = next(p for p in result.curve.points if (p.part, p.fraction) == ("top", 0.5))
    assert point.kept == top.nnz
    assert point.score.mean == pytest.approx(expected[0].scores["rougeL"])
    assert point.score.low <= point.score.mean <= point.score.high


def test_base_whole_and_advantage_are_measured_on_the_same_rows(result, experts, task_dir):
    evaluation = sl.evaluate(experts[0], task_dir, include_base=True, settings=SHORT)
    base, whole = (results[0].scores["rougeL"] for results in evaluation.results.values())
    curve = result.curve
    assert (curve.base.mean, curve.whole.mean) == (pytest.approx(base), pytest.approx(whole))
    by_part = {(p.part, p.fraction): p for p in curve.points}
    difference = by_part["top", 0.1].score.mean - by_part["random_rescaled", 0.1].score.mean
    assert curve.advantage[0.1].mean == pytest.approx(difference)
    assert by_part["top", 0.1].gain.mean == pytest.approx(by_part["top", 0.1].score.mean - base)


def test_random_parts_are_the_mean_of_their_draws(result, experts, task_dir):
    expert, scores = sl.load(experts[0]), []
    for seed in (0, 1):
        part = grafted(expert, "random_rescaled", 0.5, seed)
        (results,) = sl.evaluate(part, task_dir, settings=SHORT).results.values()
        answers, targets = zip(*((answer, row.target) for row, answer in results[0].predictions), strict=True)
        scores.append(100 * np.mean(rouge_l_of_each(answers, targets)))
    point = next(p for p in result.curve.points if (p.part, p.fraction) == ("random_rescaled", 0.5))
    assert point.score.mean == pytest.approx(np.mean(scores))
    assert not torch.equal(grafted(expert, "random", 0.5, 0)[next(iter(expert))].indices, part[next(iter(expert))].indices)


def test_the_verb_shows_a_table_a_page_and_json(cli, experts, task_dir, tmp_path):
    page = tmp_path / "curve.html"
    common = ("graft", experts[0], "--task", task_dir, "--rows", "2", "--max-new-tokens", "3", "--fraction", "0.1", "0.5")
    code, out, err = cli(*common, "--out", page)
    assert code == 0, err
    for text in ("one on backwards", "top without largest", "The largest over rescaled random", f"written to {page}", "Next: "):
        assert text in out
    assert page.read_text().count('class="wide"') == 1
    code, out, _ = cli(*common, "--part", "top", "random_rescaled", "--json")
    content = json.loads(out)
    assert code == 0
    assert [(p["part"], p["fraction"]) for p in content["points"]] == [
        (part, fraction) for fraction in (0.1, 0.5) for part in ("top", "random_rescaled")
    ]
    assert [a["fraction"] for a in content["advantage"]] == [0.1, 0.5]


def test_what_cannot_be_grafted_is_refused(refused, experts, task_dir, tmp_path):
    with pytest.raises(ConfigError, match="parts must be some of top, random"):
        sl.GraftSettings(parts=("best",))
    with pytest.raises(DensityOutOfRange):
        sl.GraftSettings(fractions=(1.5,))
    with pytest.raises(ConfigError, match="records no base model; set `model`"):
        sl.graft(SparseAdapter(dict(sl.load(experts[0]))), task_dir)
    assert "is not a directory" in refused("graft", tmp_path / "nothing", "--task", task_dir)
    assert "'best'" in refused("graft", experts[0], "--task", task_dir, "--part", "best")
