"""A merged checkpoint is a plain one: transformers loads it where sparselet cannot be imported."""

import json
import subprocess
import sys

import pytest
import torch
from helpers.tiny import make_adapter, make_model, make_tokenizer, save_base
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparselet import SparseAdapter, SparseDelta
from sparselet.apply import apply_temporarily
from sparselet.errors import NonFiniteValue, OutputExists, UnsafePath, WriteFailed, WrongBase
from sparselet.formats.checkpoint.write import export_checkpoint
from sparselet.models import lossless_dtype

IDS = [[5, 9, 200, 31, 7]]
FIRST = "model.layers.0.self_attn.q_proj"

ELSEWHERE = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "sparselet":
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
for directory, ids, answers in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    with torch.inference_mode():
        torch.save((str(model.dtype), tokenizer("ant?")["input_ids"], model(input_ids=torch.tensor(ids)).logits), answers)
assert "sparselet" not in sys.modules
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_the_checkpoint_holds_exactly_the_weights_with_the_adapter_applied(tmp_path, dtype):
    model, tokenizer = make_model(dtype), make_tokenizer(template=True)
    adapter = make_adapter(model, 4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert export_checkpoint(model, tokenizer, adapter, tmp_path / "merged") == tmp_path / "merged"
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    with apply_temporarily(model, adapter), torch.inference_mode():
        assert all(torch.equal(p, loaded.get_parameter(name)) for name, p in model.named_parameters())
        assert torch.equal(loaded(input_ids=torch.tensor(IDS)).logits, model(input_ids=torch.tensor(IDS)).logits)
    assert any(not torch.equal(loaded.get_parameter(name), p) for name, p in before.items())
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == tokenizer.chat_template
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]


def test_checkpoints_load_where_sparselet_is_not_installed(tmp_path):
    tokenizer, jobs, expected = make_tokenizer(), [], []
    for dtype, shards in ((torch.float32, "5GB"), (torch.bfloat16, "8KB")):
        model = make_model(dtype)
        adapter = make_adapter(model)
        name = str(dtype).rpartition(".")[2]
        export_checkpoint(model, tokenizer, adapter, tmp_path / name, max_shard_size=shards)
        jobs.append((str(tmp_path / name), IDS, str(tmp_path / f"{name}.pt")))
        with apply_temporarily(model, adapter), torch.inference_mode():
            expected.append((str(dtype), tokenizer("ant?")["input_ids"], model(input_ids=torch.tensor(IDS)).logits))
    subprocess.run([sys.executable, "-c", ELSEWHERE, json.dumps(jobs)], check=True, timeout=120, capture_output=True)
    for (_, _, answers), (dtype, ids, logits) in zip(jobs, expected, strict=True):
        found = torch.load(answers, weights_only=True)
        assert found[:2] == (dtype, ids)
        assert torch.equal(found[2], logits)


def test_a_large_checkpoint_comes_in_shards_with_an_index(tmp_path):
    model = make_model()
    export_checkpoint(model, make_tokenizer(), make_adapter(model), tmp_path / "whole")
    export_checkpoint(model, make_tokenizer(), make_adapter(model), tmp_path / "shards", max_shard_size="10KB")
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    together = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert together.keys() == whole.keys()
    assert all(torch.equal(together[name], whole[name]) for name in whole)


def test_the_checkpoint_says_nothing_of_the_directory_it_came_from(tmp_path):
    model = make_model()
    model.config._name_or_path = str(tmp_path / "secret")
    export_checkpoint(model, make_tokenizer(), make_adapter(model), tmp_path / "merged")
    assert "secret" not in (tmp_path / "merged" / "config.json").read_text()


# What is refused, and leaves nothing


def test_an_adapter_of_another_base_writes_nothing(tmp_path):
    with pytest.raises(WrongBase):
        export_checkpoint(make_model(seed=4), make_tokenizer(), make_adapter(make_model()), tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_an_output_that_exists_is_left_alone(tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine").write_text("mine")
    with pytest.raises(OutputExists):
        export_checkpoint(make_model(), make_tokenizer(), {}, tmp_path / "merged")
    assert [p.name for p in (tmp_path / "merged").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(28, "No space left on device"), WriteFailed),
        (SafetensorError("something else"), SafetensorError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=["disk", "safetensors", "interrupt"],
)
def test_a_failure_while_writing_leaves_nothing_and_the_base_as_it_was(tmp_path, monkeypatch, error, raised):
    model = make_model()
    adapter = make_adapter(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokenizer = make_tokenizer()

    def fail(directory):
        raise error

    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    with pytest.raises(raised):
        export_checkpoint(model, tokenizer, adapter, tmp_path / "merged")
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# Rounding


def test_the_sum_is_rounded_once_to_the_dtype_asked_for(tmp_path):
    model, adapter = make_model(), make_adapter(make_model(), density=0.5)
    with apply_temporarily(model, adapter):
        exact = {name: p.detach().clone() for name, p in model.named_parameters()}
    export_checkpoint(model, None, adapter, tmp_path / "x", dtype=torch.bfloat16)
    assert all(p.dtype is torch.float32 for p in model.parameters())
    found = load_file(tmp_path / "x" / "model.safetensors")
    assert all(torch.equal(found[name], exact[name].bfloat16()) for name in exact)
    twice = make_model(torch.bfloat16)
    with apply_temporarily(twice, SparseAdapter(dict(adapter))):  # what a base rounded before the sum would give
        assert any(not torch.equal(found[name], p) for name, p in twice.named_parameters())


def test_a_base_that_is_rounded_already_is_not_widened(tmp_path):
    save_base(tmp_path / "half", model=make_model(torch.bfloat16))
    save_base(tmp_path / "whole", model=make_model())
    assert lossless_dtype(str(tmp_path / "half"), "bfloat16") == "bfloat16"
    assert {lossless_dtype(str(tmp_path / "half"), dtype) for dtype in ("float16", "float32")} == {"float32"}
    assert lossless_dtype(str(tmp_path / "whole"), "bfloat16") == "float32"


@pytest.mark.parametrize("of", ["adapter", "base"])
def test_a_value_beyond_the_dtype_is_named(tmp_path, of):
    model, adapter = make_model(), make_adapter(make_model())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    name = FIRST if of == "adapter" else "model.norm"
    if of == "adapter":
        adapter = SparseAdapter({FIRST: SparseDelta((16, 16), torch.tensor([3]), torch.tensor([7e4]))})
    else:
        with torch.no_grad():
            model.model.norm.weight[2] = before["model.norm.weight"][2] = 7e4
    with pytest.raises(NonFiniteValue, match=rf"{name}.*: 1 of .* beyond float16, which ends at 65504"):
        export_checkpoint(model, None, adapter, tmp_path / "x", dtype=torch.float16)
    assert not (tmp_path / "x").exists()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    if of == "adapter":
        half = make_model(torch.float16)
        with pytest.raises(NonFiniteValue, match="beyond float16"), apply_temporarily(half, adapter):
            pytest.fail("the block was entered")
        assert all(torch.equal(p, before[name].half()) for name, p in half.named_parameters())


# The base model's own files


def test_the_base_models_files_are_copied_as_they_are(tmp_path):
    base = tmp_path / "base"
    save_base(base)
    files = {
        "tokenizer.model": b"pieces",
        "chat_template.jinja": b"{{ x }}",
        "LICENSE": b"mine",
        "1_Pooling/config.json": b"{}",
    }
    unwanted = {"pytorch_model.bin": b"", ".hidden": b"", "onnx/model.onnx": b"", "model-00001-of-00002.safetensors": b""}
    settings = b'{"temperature": 0.5, "do_sample": false}'  # which transformers refuses to save
    for name, content in {**files, **unwanted, "generation_config.json": settings}.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(content)
    before = (base / "tokenizer_config.json").read_bytes(), (base / "tokenizer.json").read_bytes()
    model = make_model()
    export_checkpoint(model, None, make_adapter(model), tmp_path / "out", base=base)
    out = tmp_path / "out"
    assert ((out / "tokenizer_config.json").read_bytes(), (out / "tokenizer.json").read_bytes()) == before
    assert {name: (out / name).read_bytes() for name in files if "/" not in name} == {
        n: c for n, c in files.items() if "/" not in n
    }
    assert (out / "generation_config.json").read_bytes() == settings
    assert not any((out / name).exists() for name in unwanted)
    (base / "secret").symlink_to("/etc/hostname")
    with pytest.raises(UnsafePath, match="secret is a symbolic link"):
        export_checkpoint(model, None, make_adapter(model), tmp_path / "other", base=base)
    assert not (tmp_path / "other").exists()


def test_links_into_the_hubs_cache_are_followed(tmp_path):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    save_base(snapshot)
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir()
    (snapshot / "tokenizer.json").rename(blobs / "123")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/123")
    model = make_model()
    export_checkpoint(model, None, make_adapter(model), tmp_path / "out", base=snapshot)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (blobs / "123").read_bytes()
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()
