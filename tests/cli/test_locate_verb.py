"""`sparselet locate` and `sl.locate`: tables, JSON, page, and what is refused."""

import json
import shutil

import pytest
import torch
from helpers.tiny import make_adapter, make_model, save_base

import sparselet as sl
from sparselet.apply import apply_temporarily
from sparselet.errors import UnknownTarget, WrongBase

pytestmark = pytest.mark.usefixtures("loud_again")


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A full checkpoint of the base model."""
    model = make_model()
    with apply_temporarily(model, make_adapter(model, seed=7)):
        return save_base(tmp_path_factory.mktemp("full") / "full", model=model)


def test_an_expert_is_located_beside_its_nulls(cli, experts, base_dir, tmp_path):
    page = tmp_path / "where.html"
    code, out, err = cli("locate", *experts, "--out", page)
    assert code == 0, err
    for text in ("50 % of ‖Δ‖²", "if entries were Gaussian", "one, in bfloat16", "of heads", "one, two", f"written to {page}"):
        assert text in out
    assert f"Next: sparselet graft {experts[0]} --task TASK" in out
    html = page.read_text()
    assert html.count('class="wide"') == html.count('class="narrow"') == 3
    assert "Marchenko" not in html
    assert cli("locate", *experts, "--out", page)[0] == 1  # it exists


def test_the_json_has_what_the_library_returns(cli, experts):
    code, out, _ = cli("locate", experts[0], "--against", experts[1], "--json", "--density", "0.1")
    content, located = json.loads(out), sl.locate(experts[0], [experts[1]], density=0.1)
    assert code == 0
    (expert,), (pair,) = content["experts"], content["pairs"]
    assert expert["whole"]["gini"] == located.locations[0].whole.gini
    assert expert["unchanged_bf16"]["zero"] == located.locations[0].unchanged_bf16.zero
    assert pair["largest"]["jaccard"] == located.pairs[0].largest.jaccard
    assert pair["largest"]["chance"] == pytest.approx(0.1 / 1.9, rel=0.05)


def test_experts_are_named_by_as_few_parts_of_their_paths_as_tell_them_apart(experts, tmp_path):
    for place in ("a", "b"):
        shutil.copytree(experts[0], tmp_path / "runs" / place / "expert")
    located = sl.locate([str(tmp_path / "runs" / place / "expert") for place in ("a", "b")], structure=False)
    assert [location.expert for location in located.locations] == ["a/expert", "b/expert"]


def test_heads_are_those_of_the_attention_layers(experts, base_dir):
    structures = {s.name.rpartition(".")[2]: s.lines for s in sl.locate(experts[0]).locations[0].structures}
    expert = sl.load(experts[0])
    for projection, count in (("q_proj", 2), ("k_proj", 1), ("v_proj", 1)):
        assert len(structures[projection].head_shares) == count
    energy = expert["model.layers.1.self_attn.q_proj"].to_dense().square().view(2, -1).sum(1)
    assert structures["q_proj"].head_shares == pytest.approx((energy / energy.sum()).tolist())


def test_a_full_checkpoint_is_located_against_its_base(full, base_dir):
    located = sl.locate([full], base=base_dir)
    dense = torch.cat([delta.to_dense().flatten() for delta in sl.load(full, base=base_dir).values()])
    assert located.locations[0].unchanged.zero == pytest.approx(float((dense == 0).double().mean()))
    assert "entries" in str(located)
    assert located._repr_html_().startswith("<table>")


def test_experts_without_a_base_at_hand_are_located_without_it():
    model = make_model()
    located = sl.locate(make_adapter(model, base_model_name_or_path="org/elsewhere"), structure=False)
    assert located.locations[0].unchanged_bf16 is None
    assert located.locations[0].structures == ()
    assert len(located.tables()) == 2


def test_an_expert_in_memory_that_is_not_of_the_base_is_refused(base_dir):
    adapter = make_adapter(make_model())
    strange = sl.SparseAdapter({"elsewhere": next(iter(adapter.values()))})
    with pytest.raises(UnknownTarget, match="the model has no target elsewhere"):
        sl.locate(strange, base=base_dir)
    wide = make_adapter(make_model(hidden_size=32))
    with pytest.raises(WrongBase, match="expected a weight of shape"):
        sl.locate(wide, base=base_dir)


def test_what_cannot_be_located_is_refused(refused, tmp_path, experts):
    assert "is not a directory" in refused("locate", tmp_path / "nothing")
    assert "density" in refused("locate", *experts, "--density", "2")
    refused("locate", code=2)
