"""Small files that claim much: refused by name before the memory is asked for, or done in that of their entries."""

import json
import resource
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch

from sparselet import SparseAdapter, SparseDelta
from sparselet.delta import block_for
from sparselet.errors import AbsurdShape, BlockSizeError, NotEnoughMemory
from sparselet.formats import open_expert, save_expert
from sparselet.formats.lora.write import export_lora
from sparselet.formats.single_entries.write import export_shira, export_super_tuning
from sparselet.io import memory

NAME = "base_model.model.layer"


def peak():
    """MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def lora(path, rows, columns):
    path.mkdir()
    tensors = {f"{NAME}.lora_A.weight": torch.ones(1, columns), f"{NAME}.lora_B.weight": torch.ones(rows, 1)}
    safetensors.torch.save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1}))
    return path


def thin(shape):
    return SparseAdapter({"layer": SparseDelta(shape, torch.tensor([1, 5, shape[0] * shape[1] - 1]), torch.ones(3))})


@pytest.mark.parametrize("shape", [(260_000, 260_000), (2**16, 2**16), (4, 2**21), (2**21, 4)])
def test_a_small_lora_of_a_huge_product_is_refused_when_it_is_opened(tmp_path, shape):
    before = peak()
    with pytest.raises(AbsurdShape, match=r"adapter_model\.safetensors: layer: every entry of a target of .* would be written"):
        open_expert(lora(tmp_path / "lora", *shape))
    assert peak() - before < 100


def test_a_lora_that_is_too_large_for_this_machine_is_refused_before_it_is_multiplied(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 2**30)
    expert = open_expert(lora(tmp_path / "lora", 2**15, 2**15))
    with pytest.raises(NotEnoughMemory, match=r"layer takes 12\.0 GiB of memory, but there are 1\.0 GiB"):
        save_expert(expert, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shape", [(2**14, 2**17), (2**19, 2**19), (2**26, 28)])
@pytest.mark.parametrize("export", [export_lora, export_shira, export_super_tuning])
def test_exports_of_a_few_entries_take_little_memory_or_are_refused(tmp_path, export, shape):
    before = peak()
    if shape == (2**14, 2**17) and export is export_lora:
        export(thin(shape), tmp_path / "out")
        change = open_expert(tmp_path / "out")
        assert change.shapes == {"layer": shape}
    else:
        with pytest.raises(AbsurdShape if shape != (2**14, 2**17) else Exception, match="more"):
            export(thin(shape), tmp_path / "out")
        assert not (tmp_path / "out").exists()
    assert peak() - before < 200


@pytest.mark.parametrize("shape", [(2**15, 2**15)])
def test_shira_of_a_few_entries_takes_the_memory_of_what_is_written(tmp_path, shape):
    before = peak()
    export_shira(thin(shape), tmp_path / "out")
    assert torch.equal(open_expert(tmp_path / "out")["layer"].indices, thin(shape)["layer"].indices)
    assert peak() - before < 100


def test_a_dense_tensor_beyond_memory_is_refused():
    for spell_out in (SparseDelta.to_dense, SparseDelta.mask):
        with pytest.raises(NotEnoughMemory, match=r"a dense tensor of \[524288, 524288\] takes"):
            spell_out(thin((2**19, 2**19))["layer"])


def test_block_sizes_that_fit_are_found_at_once():
    begun = time.process_time()
    with pytest.raises(BlockSizeError, match=r"Sizes that fit: 1, 2, 4, .*67108864, row, column\."):
        block_for(3, (2**26, 2**26))
    assert time.process_time() - begun < 1


def test_a_limit_of_the_process_counts():
    code = """
import resource
from sparselet.io.memory import available
with open("/proc/self/statm") as file:
    now = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 2**28,) * 2)
assert 0 < available() <= 2**28, available()
"""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
