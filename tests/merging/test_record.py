"""What a merged adapter says of its merge, and the digests by which experts are known again."""

import hashlib
import json
import struct

import pytest
import torch
from helpers.made_experts import OTHER, Q, V, expert, saved
from helpers.strategies import few, random_delta
from hypothesis import given
from hypothesis import strategies as st

from sparselet import SparseAdapter, SparseDelta, merge
from sparselet.adapter import AdapterFile
from sparselet.merging import merge_to
from sparselet.merging.record import SAMPLED_ENTRIES, delta_digest, expert_digest


def records(adapter):
    return adapter.metadata.merge["experts"]


def test_a_digest_depends_on_nothing_but_content(tmp_path):
    one = expert(1, base=torch.zeros(6, 12), task="a")
    (path,) = saved(tmp_path, [one])
    renamed = SparseAdapter(dict(one), {"task": "b"})
    copies = [AdapterFile(path), SparseAdapter.load(path), renamed, dict(one), {V: one[V], Q: one[Q]}]
    assert {expert_digest(copy) for copy in copies} == {expert_digest(one)}
    assert len(expert_digest(one)) == 16


def test_a_digest_is_of_the_values_whatever_their_dtype(tmp_path):
    one = expert(1)  # multiples of 1/4, which bfloat16 holds
    (low,) = saved(tmp_path, [one], torch.bfloat16)
    assert expert_digest(AdapterFile(low)) == expert_digest(one)
    thirds = SparseAdapter({name: delta.scale(1 / 3) for name, delta in one.items()})
    rounded = SparseAdapter({name: delta.to(torch.bfloat16) for name, delta in thirds.items()})
    assert expert_digest(thirds) != expert_digest(rounded)


def test_the_digest_is_what_the_format_says():
    tiles, many = random_delta((6, 12), 3, 0.9, 4), SparseDelta((32, 32), torch.arange(200), torch.arange(200.0))
    parts = b""
    for name, delta, side, step in (("a.q", tiles, 3, 1), ("b.v", many, 1, 3)):
        n = len(delta.indices)
        text = f"({delta.shape[0]}, {delta.shape[1]}) {side} {n} ".encode()
        places = range(0, n, step)
        indices = b"".join(struct.pack("<q", delta.indices[i]) for i in places)
        values = b"".join(struct.pack("<d", value) for i in places for value in delta.values[i].reshape(-1).tolist())
        parts += name.encode() + hashlib.sha256(text + indices + values).digest()
    assert expert_digest({"b.v": many, "a.q": tiles}) == hashlib.sha256(parts).hexdigest()[:16]


def test_a_target_without_entries_is_none():
    one = expert(1)
    assert expert_digest(SparseAdapter({**one, OTHER: SparseDelta.empty((6, 12))})) == expert_digest(one)
    assert expert_digest(SparseAdapter({})) == expert_digest(expert(5, density=0.0))


@few
@given(
    st.sampled_from([1, 3, "row", "column"]),
    st.integers(0, 20),
    st.sampled_from(["value", "index", "shape", "block", "count", "name"]),
)
def test_a_digest_changes_with_every_kind_of_content(side, seed, what):
    delta = random_delta((6, 12), side, 0.5, seed)
    if not delta.nnz:
        return
    values, indices = delta.values.clone(), delta.indices.clone()
    if what == "value":
        values.view(-1)[seed % values.numel()] += 1
        other = SparseDelta(delta.shape, indices, values)
    elif what == "index":
        free = sorted(set(range(delta.blocks)) - set(indices.tolist()))
        indices = torch.tensor(sorted([*indices.tolist()[1:], free[seed % len(free)]]))
        other = SparseDelta(delta.shape, indices, values)
    elif what == "shape":
        other = SparseDelta((12, 6) if values.ndim == 1 or side == 3 else (12, 12), indices, values)
    elif what == "block":
        other = delta.expand() if side != 1 else random_delta((6, 12), 3, 0.5, seed)
    elif what == "count":
        other = SparseDelta(delta.shape, indices[:-1], values[:-1])
    else:
        assert expert_digest({Q: delta}) != expert_digest({V: delta})
        return
    assert delta_digest(other) != delta_digest(delta)


def test_of_a_large_delta_evenly_spread_entries_are_looked_at():
    count = 10 * SAMPLED_ENTRIES
    values = torch.arange(float(count))
    delta = SparseDelta((32, 32), torch.arange(count), values)
    changed = []
    for place in range(count):
        other = values.clone()
        other[place] = -1.0
        if delta_digest(SparseDelta((32, 32), torch.arange(count), other)) != delta_digest(delta):
            changed.append(place)
    assert changed == list(range(0, count, 10))


def test_a_delta_that_is_being_trained_has_a_digest():
    delta = random_delta((6, 12))
    trained = SparseDelta(delta.shape, delta.indices, delta.values.clone().requires_grad_())
    assert delta_digest(trained) == delta_digest(delta)


def test_a_merge_records_method_parameters_and_experts(tmp_path):
    about = {"data_fingerprint": "0123456789abcdef", "task_type": "CAUSAL_LM", "chat_template": False}
    experts = [expert(1, **about), expert(2, task_type="CAUSAL_LM")]
    merged = merge(experts, "ties", [1, {"*.v": 0.5}], {"density": 0.5})
    assert merged.metadata.merge["method"] == "ties"
    assert merged.metadata.merge["parameters"]["density"] == 0.5
    assert merged.metadata.merge["parameters"]["trim"] == "global"  # those left out are there too
    first, second = records(merged)
    assert first == {
        "task": "task 1",
        "data_fingerprint": "0123456789abcdef",
        "base": "base",
        "task_type": "CAUSAL_LM",
        "chat_template": False,
        "digest": expert_digest(experts[0]),
        "weight": 1.0,
    }
    assert (second["digest"], second["weight"]) == (expert_digest(experts[1]), {"*.v": 0.5})
    assert merged.metadata.task_type == "CAUSAL_LM"
    assert merged.metadata.chat_template is False  # what the second does not tell does not matter
    path = merge_to(tmp_path / "out", experts, "ties", [1, {"*.v": 0.5}], {"density": 0.5})
    assert SparseAdapter.load(path).metadata.merge == json.loads(json.dumps(merged.metadata.merge))


def test_what_the_experts_do_not_agree_on_is_left_open():
    experts = [
        expert(1, chat_template=True, base_model_name_or_path="b"),
        expert(2, chat_template=False),
        {Q: random_delta((6, 12))},
    ]
    metadata = merge(experts).metadata
    assert metadata.chat_template is None
    assert metadata.task_type is None
    assert metadata.base_model_name_or_path == "b"
    assert merge([{Q: random_delta((6, 12))}]).metadata.base_model_name_or_path is None


def test_a_merge_has_the_prompt_that_all_experts_have():
    one, same, other = (expert(i, prompt=text) for i, text in ((1, "Q: {input}"), (2, "Q: {input}"), (3, "{input}\nA:")))
    assert merge([one, same]).metadata.prompt == "Q: {input}"
    assert [record["prompt"] for record in records(merge([one, other]))] == ["Q: {input}", "{input}\nA:"]
    for experts in ([one, other], [one, expert(4)]):
        merged = merge(experts)
        assert merged.metadata.prompt is None
        assert "prompt" not in merged.metadata.to_json()


def test_of_an_expert_that_was_merged_the_record_says_of_what(tmp_path):
    inner = merge([expert(1), expert(2)], "uniform", [1, 3])
    path = inner.save(tmp_path / "inner")
    for merged in (inner, path):
        outer = merge([merged, expert(3)])
        first, second = records(outer)
        assert first["merge"] == json.loads(json.dumps(inner.metadata.merge))
        assert first["digest"] == expert_digest(inner)
        assert "merge" not in second


@pytest.mark.parametrize("workers", [1, 3])
def test_digests_are_the_same_from_any_number_of_workers(workers):
    experts = [expert(seed, names=tuple(f"layers.{i}.q" for i in range(6))) for seed in (1, 20)]
    merged = merge(experts, workers=workers)
    assert [record["digest"] for record in records(merged)] == [expert_digest(one) for one in experts]
