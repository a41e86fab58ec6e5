"""One adapter an expert: what `MergeMethod.per_expert` gives, written target by target."""

import inspect

import pytest
import torch
from helpers.made_experts import OTHER, Q, V, contents, expert, names_in, saved
from helpers.strategies import assert_is, spelt_out

from sparselet import SparseAdapter, SparseDelta
from sparselet.errors import ArgumentError, NonFiniteValue, OutputExists
from sparselet.merging import METHODS, merge_per_expert, per_expert_methods
from sparselet.merging.methods import complete_parameters
from sparselet.merging.methods.emr import emr_rescalers


def experts():
    return [expert(1), expert(11, 3, (Q, OTHER)), expert(21, names=(V, OTHER))]


WEIGHTS = [1.0, {"*": 0.5, "*.q": 2.0}, 1.0]


def parts(name):
    weights = [1.0, 2.0 if name.endswith(".q") else 0.5, 1.0]
    return [one.get(name, SparseDelta.empty((6, 12))) for one in experts()], weights


@pytest.mark.parametrize("method", per_expert_methods())
def test_each_expert_gets_what_the_method_leaves_of_it(tmp_path, method):
    paths = merge_per_expert(tmp_path / "out", saved(tmp_path, experts()), method, WEIGHTS)
    assert [path.name for path in paths] == ["task 1", "task 11", "task 21"]
    takes = inspect.signature(METHODS[method].per_expert).parameters
    own = {name: value for name, value in complete_parameters(method, {}).items() if name in takes}
    if method == "emr":
        own["stats"] = emr_rescalers(lambda: (parts(name) for name in (Q, V, OTHER)), own)
    for i, path in enumerate(paths):
        found = SparseAdapter.load(path)
        assert sorted(found) == [Q, V, OTHER]
        for name, delta in found.items():
            assert_is(delta, *spelt_out(METHODS[method].per_expert(*parts(name), **own)[i]))
        assert found.metadata.task == path.name
        assert found.metadata.merge["method"] == method
        assert len(found.metadata.merge["experts"]) == 3


@pytest.mark.parametrize("workers", [2, None])
def test_any_number_of_workers_gives_the_same_bytes(tmp_path, workers):
    torch.set_num_threads(3)
    written = []
    merge_per_expert(tmp_path / "one", experts(), "emr", WEIGHTS, workers=1)
    merge_per_expert(tmp_path / "more", experts(), "emr", WEIGHTS, workers=workers, progress=written.append)
    assert written == [Q, V, OTHER]
    assert contents(tmp_path / "one") == contents(tmp_path / "more")
    assert torch.get_num_threads() == 3
    torch.set_num_threads(1)


def test_experts_of_one_task_or_none_are_told_apart(tmp_path):
    twins = [expert(1, task="a/b"), expert(2, task="a/b"), expert(3, task=None), expert(4, task="..")]
    paths = merge_per_expert(tmp_path / "out", twins, "emr")
    assert names_in(tmp_path / "out") == sorted(path.name for path in paths)
    assert [path.name for path in paths] == ["a-b", "a-b-2", "expert-3", "expert-4"]
    names = ["a", "a-3", "a"]
    paths = merge_per_expert(tmp_path / "more", [expert(i, task=name) for i, name in enumerate(names)], "emr")
    assert [path.name for path in paths] == ["a", "a-3", "a-3-3"]
    (named,) = merge_per_expert(tmp_path / "named", saved(tmp_path, [expert(3, task=None)]), "emr")
    assert named.name == "expert0"


def test_a_method_that_leaves_nothing_of_single_experts_is_refused(tmp_path):
    for method in METHODS:
        if method not in per_expert_methods():
            with pytest.raises(
                ArgumentError, match=f"{method} merges into one adapter only; emr, consensus give one per expert"
            ):
                merge_per_expert(tmp_path / "out", experts(), method)
    assert not names_in(tmp_path)


def test_what_goes_wrong_leaves_nothing(tmp_path):
    huge = {Q: SparseDelta((1, 1), torch.tensor([0]), torch.tensor([3e38]))}
    with pytest.raises(NonFiniteValue, match=Q):
        merge_per_expert(tmp_path / "out", [huge, huge], "emr", [4.0, 4.0])
    with pytest.raises(ArgumentError, match=f"{Q}: 3 experts need as many mask_lambda"):
        merge_per_expert(tmp_path / "out", experts(), "consensus", None, {"mask_lambda": [0.4, 0.5]})
    assert not names_in(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(OutputExists):
        merge_per_expert(tmp_path / "out", experts(), "emr")
