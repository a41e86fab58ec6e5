"""Grouping against a brute-force oracle and known clusters; groups as directories that are routed."""

import itertools
import json

import pytest
import torch
from helpers.made_experts import contents, mixed_experts
from helpers.strategies import few, spelt_out
from helpers.tiny import make_adapter, make_model, save_base, write_rows
from hypothesis import given
from hypothesis import strategies as st

import sparselet as sl
from sparselet.errors import ArgumentError, MissingProfile, WrongBase
from sparselet.merging import MergeRecipe, merge
from sparselet.merging.engine.plan import MergePlan
from sparselet.merging.grouping import change_cosines, greedy_groups


def joined_by_hand(similarity, count):
    """Complete linkage, by looking at all partitions that are one join away."""
    groups = [frozenset([i]) for i in range(len(similarity))]
    while len(groups) > count:
        best = max(
            itertools.combinations(groups, 2),
            key=lambda pair: min(similarity[i][j] for i in pair[0] | pair[1] for j in pair[0] | pair[1] if i != j),
        )
        groups = [group for group in groups if group not in best] + [best[0] | best[1]]
    return {tuple(sorted(group)) for group in groups}


@few
@given(st.integers(1, 7), st.integers(0, 999), st.data())
def test_groups_are_joined_by_their_least_similar_members(size, seed, data):
    x = torch.rand(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    similarity, count = x + x.T, data.draw(st.integers(1, size))
    groups = greedy_groups(similarity, count)
    assert {tuple(group) for group in groups} == joined_by_hand(similarity.tolist(), count)
    assert sorted(i for group in groups for i in group) == list(range(size))


def test_clusters_are_found_and_equal_pairs_go_by_order():
    similarity = torch.full((6, 6), 0.1)
    for cluster in ((0, 3, 5), (1, 2)):
        for i, j in itertools.permutations(cluster, 2):
            similarity[i, j] = 0.9
    assert greedy_groups(similarity, 3) == [[0, 3, 5], [1, 2], [4]]
    assert greedy_groups(torch.ones(4, 4), 2) == [[0, 1, 2], [3]]
    for wrong in (0, 5, True, 1.5):
        with pytest.raises(ArgumentError, match=f"groups must be from 1 to 4, the number of experts, got {wrong}"):
            greedy_groups(torch.ones(4, 4), wrong)


def test_the_cosines_are_those_of_the_whole_changes():
    experts = mixed_experts()
    names = sorted({name for one in experts for name in one})
    empty = torch.zeros(6, 12, dtype=torch.float64)
    flat = torch.stack([torch.cat([spelt_out(e[n])[0] if n in e else empty for n in names]).flatten() for e in experts])
    norms = flat.norm(dim=1)
    expected = torch.nan_to_num(flat @ flat.T / torch.outer(norms, norms))
    seen = []
    torch.testing.assert_close(change_cosines(MergePlan(experts, "overlap", None, None), seen.append), expected)
    assert seen == names


@pytest.fixture(scope="module")
def library(tmp_path_factory, base_dir):
    """Three tasks, and an expert of each; those of the first two are alike."""
    directory = tmp_path_factory.mktemp("library")
    for name, text in (("upper", "say {}!"), ("shout", "cry {}!"), ("digits", "{} + 1 =")):
        (directory / name).mkdir()
        for split, first in (("train", 10), ("test", 60)):
            rows = [{"input": text.format(i), "target": str(i + 1)} for i in range(first, first + 12)]
            write_rows(directory / name / f"{split}.jsonl", rows)
        about = {"task": name, "base_model_name_or_path": base_dir, "task_type": "CAUSAL_LM", "chat_template": False}
        adapter = make_adapter(make_model(), seed=2 if name == "digits" else 1, **about)
        if name == "shout":
            adapter = sl.SparseAdapter({n: d * 0.5 for n, d in adapter.items()}, adapter.metadata, adapter.fingerprints)
        adapter.save(directory / f"{name}-expert")
        sl.profile(str(directory / f"{name}-expert"), str(directory / name))
    return directory


NAMES = ("upper", "digits", "shout")


def paths(library):
    return [str(library / f"{name}-expert") for name in NAMES]


@pytest.mark.parametrize("method", ["overlap", "regmean"])
def test_each_group_is_its_own_merge_with_a_profile(library, tmp_path, method):
    grouped = sl.merge_groups(MergeRecipe(tuple(paths(library)), method, (1.0, 2.0, 3.0)), 2, tmp_path / "out", by="change")
    first, second = grouped.merges
    assert first.recipe.experts == (paths(library)[0], paths(library)[2])
    assert first.recipe.weights == (1.0, 3.0)
    assert second.recipe.experts == (paths(library)[1],)
    assert grouped.similarities == (pytest.approx(1.0), pytest.approx(1.0))
    expected = merge(first.recipe.experts, method, [1.0, 3.0])
    assert all(torch.equal(first.adapter[name].values, expected[name].values) for name in expected)
    profile = sl.load(tmp_path / "out" / "group-1").profile
    assert profile.task == "upper+shout"
    assert profile.tokens == sum(sl.load(path).profile.tokens for path in first.recipe.experts)
    (tmp_path / "as deep").mkdir()
    sl.merge_recipe(tmp_path / "out" / "group-1" / "recipe.toml", tmp_path / "as deep" / "again")
    before, again = contents(tmp_path / "out" / "group-1"), contents(tmp_path / "as deep" / "again")
    assert {name: before[name] for name in again} == again


def test_groups_are_routed_and_know_their_tasks(cli, library, tmp_path):
    code, out, err = cli("merge", *paths(library), "--groups", 2, "--by", "change", "--out", tmp_path / "out")
    assert code == 0, err
    assert "least similarity" in out
    groups = [str(tmp_path / "out" / f"group-{i}") for i in (1, 2)]
    assert f"Next: sparselet eval --route {' '.join(groups)} --task TASK" in out
    tasks = [str(library / name) for name in NAMES]
    routed = sl.evaluate_routed(groups, tasks, settings=sl.EvalSettings(rows=3, max_new_tokens=2))
    assert all(task.oracle is not None and task.accuracy is not None for task in routed.tasks)
    assert [route.expert for route in sl.route(["77 + 1 ="], groups)] == [groups[1]]
    code, out, err = cli("merge", *paths(library), "--groups", 1, "--out", tmp_path / "one", "--json")
    (described,) = json.loads(out)["groups"]
    assert described["experts"] == paths(library)


def test_by_prompts_those_that_a_router_confuses_are_together(cli, library, tmp_path):
    code, out, err = cli("merge", *paths(library), "--groups", 2, "--out", tmp_path / "x", "--json")
    assert code == 0, err
    profiles = [sl.load(path).profile.prompts for path in paths(library)]
    scale = torch.stack([p.covariance.full_diagonal() for p in profiles]).mean(0).sqrt()
    means = torch.stack([p.mean.double() for p in profiles]) / scale
    apart = torch.cdist(means, means)
    nearest = min(itertools.combinations(range(3), 2), key=lambda pair: float(apart[pair]))
    first, second = json.loads(out)["groups"]
    assert first["experts"] == [paths(library)[i] for i in nearest]
    assert first["least_similarity"] == pytest.approx(-float(apart[nearest]), rel=1e-4)
    assert second["least_similarity"] == pytest.approx(0.0)
    with pytest.raises(ArgumentError, match="by must be one of prompts, change, got 'name'"):
        sl.merge_groups(paths(library), 2, tmp_path / "y", by="name")


def test_as_many_groups_as_experts_are_the_experts(library, tmp_path):
    grouped = sl.merge_groups(paths(library), 3, tmp_path / "out")
    for merged, path in zip(grouped.merges, paths(library), strict=True):
        source = sl.load(path)
        assert all(torch.equal(merged.adapter[name].values, source[name].values) for name in source)
        assert (tmp_path / "out" / merged.adapter.path.name / "profile.safetensors").is_file()


def test_bad_input_is_refused_before_any_work(cli, refused, library, tmp_path, monkeypatch):
    experts = paths(library)
    monkeypatch.setattr("sparselet.api.grouping.greedy_groups", None)
    for count in (0, 4, -1):
        message = f"--groups must be from 1 to 3, the number of experts, got {count}"
        assert message in refused("merge", *experts, "--groups", count, "--out", tmp_path / "out")
    bare = str(make_adapter(make_model(), task="bare").save(tmp_path / "bare"))
    with pytest.raises(MissingProfile, match=r"groups are routed by profiles, and .*bare has none. Make it"):
        sl.merge_groups([*experts, bare], 2, tmp_path / "out")
    other = save_base(tmp_path / "other", model=make_model(seed=5))
    stranger = make_adapter(make_model(seed=5), base_model_name_or_path=other, chat_template=False).save(tmp_path / "stranger")
    sl.profile(str(stranger), str(library / "digits"))
    with pytest.raises(WrongBase):
        sl.merge_groups([*experts, str(stranger)], 2, tmp_path / "out")
    both = ("--groups", 2, "--auto", "--validation", "t")
    assert "--by goes with --groups" in refused("merge", *experts, "--by", "prompts", "--out", tmp_path / "out")
    assert "--auto and --groups do not go together" in refused("merge", *experts, *both, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
