"""What is exported for PEFT loads where sparselet cannot be imported, and answers as our own applied model does."""

import json
import math
import subprocess
import sys

import pytest
import torch
from helpers.exported import FIRST, SECOND, config_of, rows_only
from helpers.strategies import few
from helpers.tiny import IDS, logits, make_adapter, make_gpt2, make_model
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from sparselet import SparseAdapter, SparseDelta
from sparselet.adapter import AdapterFile
from sparselet.apply import apply_temporarily
from sparselet.delta import block_for
from sparselet.errors import BadConfig, ExportError, NonFiniteValue, OutputExists, UnknownTarget, WrongBase
from sparselet.formats import open_expert
from sparselet.formats.lora.write import export_lora
from sparselet.formats.single_entries.read import NOTE
from sparselet.formats.single_entries.write import export_shira, export_super_tuning, kept_entries, padded, smallest_fit

ELSEWHERE = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "sparselet":
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import peft, torch
from transformers import AutoModelForCausalLM
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

torch.set_num_threads(1)
assert "SPARSELET" not in PEFT_TYPE_TO_CONFIG_MAPPING
for base, adapter, ids, answers in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    model = peft.PeftModel.from_pretrained(model, adapter).eval()
    with torch.inference_mode():
        torch.save(model(input_ids=torch.tensor(ids)).logits, answers)
assert "sparselet" not in sys.modules
"""


KINDS = ("shira", "super", "lora")
LINES = [f"{kind} {size}" for kind in KINDS for size in ("row", "column")]


def with_applied(model, adapter):
    with apply_temporarily(model, adapter):
        return logits(model)


def gpt2_adapter(model):
    modules = dict(model.named_modules())
    names = ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_proj"]
    torch.manual_seed(4)
    return SparseAdapter({n: SparseDelta.from_dense(torch.randn(modules[n].weight.shape) * 0.2) for n in names})


def gpt2_lines(model, block_size):
    """Output rows or input columns of layers whose weights lie as [in, out]."""
    generator, deltas = torch.Generator().manual_seed(5), {}
    for name, kept in (("transformer.h.0.attn.c_attn", 5), ("transformer.h.1.mlp.c_proj", 3)):
        rows, columns = shape = tuple(model.get_submodule(name).weight.shape)
        block = block_for(block_size, shape, transposed=True)
        chosen = torch.randperm(rows * columns // math.prod(block), generator=generator)[:kept].sort().values
        deltas[name] = SparseDelta(shape, chosen, torch.randn((kept, *block), generator=generator) * 0.2)
    return SparseAdapter(deltas)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Logits of stock PEFT and of ours for each export, by name; one process for all."""
    home = tmp_path_factory.mktemp("exports")
    model, gpt2 = make_model(), make_gpt2()
    half = make_model(torch.bfloat16)
    for name, one in (("base", model), ("gpt2", gpt2), ("half", half)):
        one.save_pretrained(home / name)
    about = {"base_model_name_or_path": str(home / "base"), "task_type": "CAUSAL_LM"}
    entries, tiles = make_adapter(model, 1, **about), make_adapter(model, 4, 0.3, **about)
    export_shira(entries, home / "shira entries")
    export_shira(tiles, home / "shira tiles")
    export_shira(rows_only(model), home / "shira rows")
    export_super_tuning(entries, home / "super entries")
    export_super_tuning(tiles, home / "super tiles")
    export_super_tuning(make_adapter(model, 1, 1.0), home / "super dense")
    export_shira(make_adapter(half, 1), home / "shira half")
    export_super_tuning(make_adapter(half, 1), home / "super half")
    export_lora(entries, home / "lora entries")
    export_lora(tiles, home / "lora tiles")
    export_lora(rows_only(model), home / "lora rows")
    export_lora(rows_only(model), home / "lora cut", rank=2, max_error=1)
    export_lora(gpt2_adapter(gpt2), home / "lora gpt2", base=gpt2)
    for size in ("row", "column"):
        export_shira(make_adapter(model, size), home / f"shira {size}")
        export_super_tuning(make_adapter(model, size), home / f"super {size}")
        export_lora(make_adapter(model, size), home / f"lora {size}")
        export_lora(gpt2_lines(gpt2, size), home / f"lora gpt2 {size}", base=gpt2)
    jobs, ours = [], {}
    for name, base, one, adapter in (
        ("shira entries", "base", model, entries),
        ("shira tiles", "base", model, tiles),
        ("shira rows", "base", model, rows_only(model)),
        ("super entries", "base", model, entries),
        ("super tiles", "base", model, tiles),
        ("super dense", "base", model, make_adapter(model, 1, 1.0)),
        ("shira half", "half", half, make_adapter(half, 1)),
        ("super half", "half", half, make_adapter(half, 1)),
        ("lora entries", "base", model, entries),
        ("lora tiles", "base", model, tiles),
        ("lora rows", "base", model, rows_only(model)),
        ("lora cut", "base", model, open_expert(home / "lora cut")),
        ("lora gpt2", "gpt2", gpt2, gpt2_adapter(gpt2)),
        *((f"{kind} {size}", "base", model, make_adapter(model, size)) for kind in KINDS for size in ("row", "column")),
        *((f"lora gpt2 {size}", "gpt2", gpt2, gpt2_lines(gpt2, size)) for size in ("row", "column")),
    ):
        jobs.append((str(home / base), str(home / name), IDS.tolist(), str(home / f"{name}.pt")))
        ours[name] = with_applied(one, adapter), logits(one)
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, json.dumps(jobs)], timeout=180, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return home, {name: (torch.load(home / f"{name}.pt", weights_only=True), *ours[name]) for name in ours}


@pytest.mark.parametrize(
    "name", ["shira entries", "shira tiles", "shira rows", "super entries", "super tiles", "super dense", *LINES[:4]]
)
def test_single_entries_give_stock_peft_our_logits_to_the_last_bit(elsewhere, name):
    theirs, ours, base = elsewhere[1][name]
    assert torch.equal(theirs, ours)
    assert not torch.allclose(theirs, base, atol=1e-3)


@pytest.mark.parametrize("name", ["lora entries", "lora tiles", "lora rows", "lora cut", "lora gpt2"])
def test_an_exact_lora_gives_stock_peft_our_logits(elsewhere, name):
    theirs, ours, base = elsewhere[1][name]
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(theirs, base, atol=1e-3)


@pytest.mark.parametrize("name", [*LINES[4:], "lora gpt2 row", "lora gpt2 column"])
def test_whole_rows_and_columns_are_a_lora_of_their_number(elsewhere, name):
    home, runs = elsewhere
    theirs, ours, base = runs[name]
    assert (theirs - ours).abs().max() <= 1e-6 * ours.abs().max()
    assert not torch.allclose(theirs, base, atol=1e-3)
    transposed = "gpt2" in name
    adapter = gpt2_lines(make_gpt2(), name.split()[2]) if transposed else make_adapter(make_model(), name.split()[1])
    stored = load_file(home / name / "adapter_model.safetensors")
    for target, delta in adapter.items():
        a, b = (stored[f"base_model.model.{target}.lora_{side}.weight"] for side in "AB")
        assert torch.equal((b @ a).t() if transposed else b @ a, delta.to_dense())
        assert b.shape[1] == len(delta.indices)


@pytest.mark.parametrize("block_size", ["row", "column"])
def test_rows_of_a_lower_rank_keep_one_rank_each(tmp_path, block_size):
    values = torch.outer(torch.linspace(1, 2, 4), torch.randn(16)).view(4, *block_for(block_size, (16, 16)))
    delta = SparseDelta((16, 16), torch.tensor([1, 4, 5, 15]), values)
    assert export_lora({FIRST: delta}, tmp_path / "lora") == {FIRST: 0.0}
    assert config_of(tmp_path / "lora")["r"] == 4
    assert torch.equal(open_expert(tmp_path / "lora")[FIRST].to_dense(), delta.to_dense())


@pytest.mark.parametrize("name", ["shira half", "super half"])
def test_in_bfloat16_peft_rounds_once_more(elsewhere, name):
    """PEFT casts the values to the weight's dtype before it adds them; a block in the last place of the weights is 2⁻⁸."""
    theirs, ours, base = elsewhere[1][name]
    assert theirs.dtype == torch.bfloat16
    assert (theirs - ours).float().norm() < 0.03 * (ours - base).float().norm()


def test_nothing_but_a_peft_adapter_is_written(elsewhere):
    home = elsewhere[0]
    for name in ("shira entries", "super tiles", "lora rows"):
        assert {p.name for p in (home / name).iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    for name in ("shira entries", "super entries", "lora entries"):
        config = json.loads((home / name / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(home / "base")
        assert config["task_type"] == "CAUSAL_LM"


# There and back


@pytest.mark.parametrize("name", ["shira entries", "super entries", "shira tiles", "super tiles", "shira rows", *LINES[:4]])
def test_sparselet_reads_back_the_same_deltas_without_the_base_model(elsewhere, name):
    home, model = elsewhere[0], make_model()
    kind = name.split()[1]
    expected = {"entries": make_adapter(model), "tiles": make_adapter(model, 4, 0.3), "rows": rows_only(model)}
    expected = expected[kind] if kind in expected else make_adapter(model, kind)
    for base in (None, home / "base"):
        expert = open_expert(home / name, base)
        assert set(expert) == {target for target, delta in expected.items() if delta.nnz}
        for target in expert:
            delta = expected[target].expand()
            assert torch.equal(expert[target].indices, delta.indices)
            assert torch.equal(expert[target].values, delta.values)
        assert expert.nnz == sum(delta.nnz for delta in expert.values()) == expected.nnz
        assert expert.fingerprints == {target: expected.fingerprints[target] for target in expert}
    make_model(hidden_size=32).save_pretrained(home / "wide")
    with pytest.raises(WrongBase, match=r"_proj: expected a weight of shape \[.*wide has shape"):
        open_expert(home / name, home / "wide")


def test_after_more_training_in_peft_the_zeros_count_as_well(tmp_path):
    base = make_model()
    base.save_pretrained(tmp_path / "base")
    export_super_tuning(rows_only(base), tmp_path / "adapter")
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "supertuning_values" in name:
                assert parameter.requires_grad
                parameter += 1
    model.save_pretrained(tmp_path / "again")
    expert = open_expert(tmp_path / "again", tmp_path / "base")
    assert expert[SECOND].nnz == 24 > rows_only(base)[SECOND].nnz == 16
    found = model.get_submodule(f"base_model.model.{SECOND}").get_delta_weight("default")
    assert torch.equal(expert[SECOND].to_dense(), found)


def test_values_where_zeros_were_are_not_lost(tmp_path):
    """A tool may change the values and keep the header."""
    export_shira(rows_only(make_model()), tmp_path)
    file, name = tmp_path / "adapter_model.safetensors", f"base_model.model.{FIRST}.shira_weight"
    tensors = load_file(file)
    tensors[name][-1] = 5
    with safe_open(file, "pt") as old:
        save_file(tensors, file, old.metadata())
    delta = open_expert(tmp_path)[FIRST]
    assert delta.nnz == len(tensors[name]) > rows_only(make_model())[FIRST].nnz
    assert delta.values.max() == 5


@pytest.mark.parametrize(
    "note",
    ["[", "[]", '{"a": 1}', '{"%s": {"shape": [16], "nnz": 1, "fingerprint": null}}', '{"%s": {"shape": [16, 16], "nnz": -1}}'],
)
def test_a_damaged_note_is_refused(tmp_path, note):
    export_shira(make_adapter(make_model()), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(file), file, {NOTE: note.replace("%s", FIRST)})
    with pytest.raises(BadConfig, match=f"{NOTE} in the header is damaged"):
        open_expert(tmp_path / "adapter")


# How many entries


def test_shira_takes_the_smallest_r_that_fits_all(tmp_path):
    model = make_model()
    for nnz, r in ((1, 1), (32, 1), (33, 2), (128, 4)):
        indices = torch.arange(nnz, dtype=torch.int32)
        adapter = {FIRST: SparseDelta((16, 16), indices, torch.ones(nnz)), SECOND: SparseDelta.from_dense(torch.eye(8, 16))}
        export_shira(adapter, tmp_path / f"{nnz}")
        assert config_of(tmp_path / f"{nnz}")["r"] == r
        stored = load_file(tmp_path / f"{nnz}" / "adapter_model.safetensors")
        assert stored[f"base_model.model.{SECOND}.shira_weight"].shape == (24 * r,)
        PeftModel.from_pretrained(make_model(), tmp_path / f"{nnz}")
    adapter = dict(make_adapter(model, 1, 0.7))
    with pytest.raises(ExportError, match=r"q_proj \[16, 16\] has 179 entries and needs r = 6, with which .*k_proj \[8, 16\]"):
        export_shira(adapter, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


@given(
    st.lists(st.integers(1, 2**31 - 1).flatmap(lambda size: st.tuples(st.just(size), st.integers(1, size))), min_size=1),
)
@few
def test_super_tuning_takes_the_largest_sparsity_that_fits_all(targets):
    sparsity = smallest_fit(targets)
    assert 0 <= sparsity < 1
    assert all(nnz <= kept_entries(size, sparsity) <= size for size, nnz in targets)
    assert any(kept_entries(size, sparsity) == nnz for size, nnz in targets)


@given(st.data())
@few
def test_padding_is_zero_at_positions_of_its_own(data):
    chosen = torch.tensor(data.draw(st.lists(st.booleans(), min_size=12, max_size=12)))
    delta = SparseDelta.from_dense(torch.arange(1.0, 13).reshape(3, 4), chosen.reshape(3, 4))
    count = data.draw(st.integers(delta.nnz, 12))
    indices, values = padded(delta, count)
    assert len(set(indices.tolist())) == len(indices) == len(values) == count
    assert torch.equal(indices[: delta.nnz], delta.indices)
    assert torch.equal(values[: delta.nnz], delta.values)
    assert not values[delta.nnz :].any()


# LoRA


def test_ranks_that_differ_are_in_the_patterns(elsewhere):
    config = config_of(elsewhere[0] / "lora rows")
    assert config["r"] == config["lora_alpha"] == 3
    assert config["rank_pattern"] == config["alpha_pattern"] == {r"^model\.layers\.1\.self_attn\.k_proj": 2}
    assert sorted(config["target_modules"]) == [FIRST, SECOND]
    assert LoraConfig.from_pretrained(elsewhere[0] / "lora rows").rank_pattern == config["rank_pattern"]


def test_a_conv1d_is_written_across_and_read_back(elsewhere, tmp_path):
    gpt2 = make_gpt2()
    adapter = gpt2_adapter(gpt2)
    expert = open_expert(elsewhere[0] / "lora gpt2")
    for name in adapter:
        assert torch.equal(expert[name].to_dense(), adapter[name].to_dense())
    with torch.device("meta"):
        skeleton = GPT2LMHeadModel(gpt2.config)
    export_lora(adapter, tmp_path / "lora", base=skeleton)
    assert config_of(tmp_path / "lora")["fan_in_fan_out"] is True
    both = {**adapter, "lm_head": SparseDelta.from_dense(torch.eye(258, 16))}  # PEFT tells how each lies
    export_lora(both, tmp_path / "both", base=skeleton)
    gpt2.config.tie_word_embeddings = False
    gpt2.lm_head.weight = torch.nn.Parameter(gpt2.lm_head.weight.detach().clone())
    with apply_temporarily(gpt2, both):
        expected = logits(gpt2)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(gpt2, tmp_path / "both")), expected)
    for export in (export_shira, export_super_tuning):
        with pytest.raises(ExportError, match=r"c_attn is a Conv1D; .* Export to LoRA"):
            export(adapter, tmp_path / "no", base=skeleton)


# What is refused, and leaves nothing

every_export = pytest.mark.parametrize("export", [export_shira, export_super_tuning, export_lora])


@every_export
def test_what_cannot_be_written_is_refused_by_name(tmp_path, export):
    model, one = make_model(), torch.ones(1)
    q = make_adapter(model)[FIRST]
    broken = SparseDelta((16, 16), torch.tensor([3], dtype=torch.int32), one * float("nan"))
    norm = SparseDelta((1, 16), torch.tensor([3], dtype=torch.int32), one)
    embedding = SparseDelta((258, 16), torch.tensor([3], dtype=torch.int32), one)
    for adapter, base, error, match in (
        ({}, None, ExportError, "changes nothing"),
        ({FIRST: SparseDelta.empty((16, 16))}, None, ExportError, "changes nothing"),
        ({FIRST: broken}, None, NonFiniteValue, FIRST),
        ({"model.norm": norm}, None, ExportError, r"does not say whether model\.norm \[1, 16\] is a linear layer"),
        ({"model.norm": norm}, model, ExportError, r"model\.norm is a LlamaRMSNorm"),
        ({"model.embed_tokens": embedding}, None, ExportError, "does not say whether model.embed_tokens"),
        ({"model.embed_tokens": embedding}, model, ExportError, "is a Embedding"),
        ({"transformer.h.0.attn.c_proj": q}, None, ExportError, "set `base`"),
        ({"model.layers.7.q_proj": q}, model, UnknownTarget, r"no target model\.layers\.7\.q_proj"),
        (SparseAdapter({FIRST: q}, {"modules_to_save": ["score"]}), None, ExportError, "trained score in full"),
        (SparseAdapter({FIRST: q}, modules={"score.weight": one}), None, ExportError, r"trained score\.weight in full"),
    ):
        with pytest.raises(error, match=match):
            export(adapter, tmp_path / "out", base=base)
    assert not list(tmp_path.iterdir())


@every_export
def test_an_output_that_exists_is_left_alone(tmp_path, export):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(OutputExists):
        export(make_adapter(make_model()), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@every_export
def test_an_adapter_is_exported_from_its_file_as_from_memory(tmp_path, export):
    adapter = make_adapter(make_model(), 4)
    adapter.save(tmp_path / "adapter")
    export(adapter, tmp_path / "memory")
    export(AdapterFile(tmp_path / "adapter"), tmp_path / "file")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "memory" / name).read_bytes() == (tmp_path / "file" / name).read_bytes()


@every_export
def test_other_adapters_stay_beside_it_in_peft(tmp_path, export):
    """Names are whole, so that a target whose name is another's end is not touched."""
    adapter = {FIRST: make_adapter(make_model())[FIRST]}
    export(adapter, tmp_path / "out")
    model = PeftModel.from_pretrained(make_model(), tmp_path / "out")
    changed = [name for name, module in model.base_model.model.named_modules() if hasattr(module, "base_layer")]
    assert changed == [FIRST]
    torch.testing.assert_close(logits(model), with_applied(make_model(), adapter), rtol=1e-4, atol=1e-4)
    get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"]))
