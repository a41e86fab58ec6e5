"""Prefill by flex_attention against attention under the mask written out; where it does not apply, keys are gathered."""

import shutil

import pytest
import torch
from attention.test_attention import by_mask, padded, tensors
from helpers.tiny import make_model

from sparselet.attention import flex, sparse_attention
from sparselet.attention.flex import attend_blocks
from sparselet.attention.keys import attend

compiles = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")


@pytest.fixture(autouse=True)
def short_prompts(monkeypatch):
    monkeypatch.setattr(flex, "MIN_KEYS", 32)
    monkeypatch.setattr(flex, "_unable", set())
    monkeypatch.setattr("sparselet.attention.switch.COMPILED_ON", ("cpu", "cuda"))


def table_of_blocks(key_heads, keys, block, seed):
    """Random blocks of keys for each block of queries, with its own."""
    count = -(-keys // block)
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(2, key_heads, count, count, generator=generator) < 0.4
    return (kept | torch.eye(count, dtype=torch.bool)).repeat_interleave(block, dim=-1)[..., :keys]


@compiles
def test_whole_blocks_give_attention_under_their_mask_and_the_same_counts():
    for keys, block, heads, key_heads in ((64, 16, 4, 2), (77, 16, 4, 2), (95, 32, 4, 1)):
        query, key, value = tensors(heads=heads, key_heads=key_heads, queries=keys, keys=keys, size=16, seed=keys)
        seen = table_of_blocks(key_heads, keys, block, keys)
        output, used, computed = attend_blocks(query, key, value, seen, block, None, None)
        by_query = seen.repeat_interleave(block, dim=2)[:, :, :keys].repeat_interleave(heads // key_heads, dim=1)
        pairs = by_query & torch.ones(keys, keys, dtype=torch.bool).tril()
        torch.testing.assert_close(output, by_mask(query, key, value, pairs), rtol=1e-5, atol=1e-5)
        assert used == int(pairs.sum()) <= computed
        torch.testing.assert_close(output, attend(query, key, value, seen, block, None, None)[0], rtol=1e-5, atol=1e-5)


@compiles
def test_a_model_attends_the_same_by_the_kernel_and_by_gathering(monkeypatch):
    model = make_model().eval()
    ids = torch.randint(3, 30, (1, 50), generator=torch.Generator().manual_seed(0))
    calls = []
    monkeypatch.setattr("sparselet.attention.switch.attend_blocks", lambda *at: calls.append(attend_blocks(*at)) or calls[-1])
    with torch.no_grad():
        with sparse_attention(model, "block", block=16, top=2) as compiled:
            logits = model(ids).logits
        assert calls
        assert all(calls)
        monkeypatch.setattr(flex, "MIN_KEYS", 999)
        with sparse_attention(model, "block", block=16, top=2) as gathered:
            torch.testing.assert_close(logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert compiled.prefill == gathered.prefill
    assert compiled.prefill.density < 1


def test_it_leaves_what_it_cannot_do_to_the_gather(monkeypatch):
    query, key, value = tensors(queries=48, keys=48)
    seen = table_of_blocks(2, 48, 16, 0)
    parted = seen.clone()
    parted[0, 0, 2, 3] ^= True
    tail = seen.clone()
    tail[0, 0, 2, 40] = False
    assert attend_blocks(query, key, value, parted, 16, None, None) is None
    assert attend_blocks(query, key, value, tail, 16, None, None) is None
    assert attend_blocks(query, key, value, seen, 16, padded(2, 48, 48, [3, 0]), None) is None
    assert attend_blocks(query[:, :, 16:], key, value, seen[:, :, 1:], 16, None, None) is None
    assert attend_blocks(query.clone().requires_grad_(), key, value, seen, 16, None, None) is None
    monkeypatch.setattr(flex, "MIN_KEYS", 49)
    assert attend_blocks(query, key, value, seen, 16, None, None) is None


def test_without_a_compiler_it_says_so_once(monkeypatch, caplog):
    def fails(*args, **kwargs):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(flex, "_compiled", lambda: fails)
    query, key, value = tensors(queries=48, keys=48)
    seen = table_of_blocks(2, 48, 16, 0)
    for _ in range(2):
        assert attend_blocks(query, key, value, seen, 16, None, None) is None
    assert [record.message for record in caplog.records] == [
        "flex_attention does not compile for cpu; keys are gathered instead: no C++ compiler"
    ]
