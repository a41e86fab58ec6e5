"""The tuner as a PEFT method: wrapping, saving, loading, and what is refused."""

import copy
import json
import subprocess
import sys
import warnings
from dataclasses import fields
from typing import get_type_hints

import pytest
import torch
import transformers
from helpers.paper import paper_config
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import sparselet
from sparselet import SparseAdapter, SparseletConfig
from sparselet.adapter import PREFIX, UnfinishedAdapterWarning
from sparselet.errors import (
    ArgumentError,
    BadShape,
    BlockSizeError,
    ConfigError,
    DensityOutOfRange,
    DuplicateIndex,
    FormatError,
    IndexOutOfBounds,
    MissingTensor,
    NonFiniteValue,
    NoTargets,
    ShapeMismatch,
    SparseletError,
    UnknownScore,
    UnknownTarget,
    UnknownTensor,
    UnsortedIndices,
    WrongBase,
)
from sparselet.selection_settings import SelectionSettings, When
from sparselet.tuner import UnselectedMaskWarning, sparselet_layers, to_adapter

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER, ["k_proj", "q_proj", "v_proj"], 6),
    "mistral": ("MistralForCausalLM", "MistralConfig", DECODER, ["k_proj", "q_proj", "v_proj"], 6),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", DECODER, ["k_proj", "q_proj", "v_proj"], 6),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**DECODER, "head_dim": 8}, ["k_proj", "q_proj", "v_proj"], 6),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", DECODER, ["qkv_proj"], 2),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32},
        ["k_proj", "q_proj", "v_proj"],
        6,
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**SMALL, "intermediate_size": 48}, ["query_key_value"], 2),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2, ["c_attn"], 2),
    "bert": (
        "BertForSequenceClassification",
        "BertConfig",
        {**SMALL, "intermediate_size": 48, "num_labels": 3},
        ["key", "query", "value"],
        6,
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5, ["k", "q", "v"], 18),
}


def make_model(kind):
    model_class, config_class, sizes, _, _ = ARCHITECTURES[kind]
    torch.manual_seed(0)
    return getattr(transformers, model_class)(getattr(transformers, config_class)(**sizes)).eval()


def make_batch(kind):
    ids = torch.randint(1, 64, (4, 10), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": torch.tensor([0, 1, 2, 0]) if kind == "bert" else ids}


@torch.no_grad()  # torch multiplies in another order where a weight needs a gradient
def logits(model, batch):
    return model(**batch).logits


def layers(model):
    return sparselet_layers(model)


def finish(model, batch, steps=2):
    """A short training run with one selection in its middle."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        for _ in range(steps):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        if (
            model.peft_config["default"].initial_mask == "dense"
            and next(iter(layers(model).values())).sparse_mask["default"].dense
        ):
            sparselet.reselect(model, [batch], optimizer)
            sparselet.freeze_masks(model)
    return model


@pytest.fixture
def batch(make_batches):
    return make_batches(1)[0]


@pytest.fixture
def saved(make_llama, wrap, tmp_path):
    """A base model and the directory of an adapter for it."""
    base = make_llama()
    wrap(base).save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter"


def rewrite(directory, change):
    """Let `change` edit the adapter's tensors, keyed by target and suffix."""
    file = directory / "adapter_model.safetensors"
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(file).items()}
    change(tensors)
    save_file({PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def rewrite_config(directory, change):
    file = directory / "adapter_config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


# Architectures


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("block_size", [1, 4, "row", "column"], ids=["element", "tiles", "rows", "columns"])
def test_architecture_is_trained_saved_and_loaded(kind, block_size, tmp_path):
    *_, expected, count = ARCHITECTURES[kind]
    base, batch = make_model(kind), make_batch(kind)
    heads = {"modules_to_save": ["classifier"]} if kind == "bert" else {}
    model = get_peft_model(copy.deepcopy(base), paper_config(score="mcs", block_size=block_size, **heads))
    assert model.peft_config["default"].target_modules == expected
    assert len(layers(model)) == count
    original = logits(base, batch)
    assert torch.equal(logits(model, batch), original)
    finish(model, batch)
    trained = logits(model.eval(), batch)
    assert not torch.equal(trained, original)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(logits(loaded, batch), trained)
    assert torch.equal(logits(loaded.merge_and_unload(), batch), trained)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), original)


def test_classifier_head_is_saved_with_the_adapter(tmp_path):
    base, batch = make_model("bert"), make_batch("bert")
    model = finish(get_peft_model(copy.deepcopy(base), paper_config(modules_to_save=["classifier"])), batch)
    model.save_pretrained(tmp_path)
    file = SparseAdapter.load(tmp_path)
    assert set(file.modules) == {"classifier.weight", "classifier.bias"}
    assert torch.equal(file.modules["classifier.weight"], model.base_model.model.classifier.weight)
    assert not torch.equal(file.modules["classifier.weight"], base.classifier.weight)
    assert_same_adapter(file, to_adapter(model))


def test_model_without_projections_lists_its_linear_layers():
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4))
    with pytest.raises(NoTargets, match=r"0 \[8, 4\] ×1, 1 \[4, 8\] ×1"):
        get_peft_model(model, paper_config())


def test_unmatched_target_modules_list_the_linear_layers(make_llama):
    with pytest.raises(NoTargets, match=r"q_proj \[32, 32\] ×2"):
        get_peft_model(make_llama(), paper_config(target_modules=["query"]))


def test_target_that_is_not_linear_is_refused(make_llama):
    with pytest.raises(ArgumentError, match="LlamaMLP"):
        get_peft_model(make_llama(), paper_config(target_modules=["mlp"]))


def test_embedding_tied_to_a_target_is_not_changed(make_llama, batch):
    base = make_llama(tie_word_embeddings=True)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    model = get_peft_model(copy.deepcopy(base), paper_config())
    finish(model, batch)
    assert torch.equal(model.base_model.model.model.embed_tokens.weight, base.model.embed_tokens.weight)


# Configuration


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"density": 0}, DensityOutOfRange),
        ({"density": 10}, DensityOutOfRange),
        ({"block_size": 0}, BlockSizeError),
        ({"block_size": 2.0}, BlockSizeError),
        ({"block_size": "rows"}, BlockSizeError),
        ({"block_size": "row", "balance": "row"}, ConfigError),
        ({"block_size": 2**40}, ConfigError),
        ({"score": "nothing"}, UnknownScore),
        ({"scope": "layer"}, ConfigError),
        ({"initial_mask": "sparse"}, ConfigError),
        ({"score_batches": 0}, ConfigError),
        ({"reselect_every": -1}, ConfigError),
        ({"selection_epochs": -0.5}, ConfigError),
    ],
)
def test_wrong_configuration_is_refused(changes, error):
    with pytest.raises(error):
        paper_config(**changes)


def test_the_configuration_has_every_selection_setting_with_its_type_and_default():
    own = {field.name: (get_type_hints(SparseletConfig)[field.name], field.default) for field in fields(SparseletConfig)}
    assert own["when"] == (When | None, None)  # resolved: a saved adapter that does not name it is of the paper's schedule
    assert SparseletConfig().when == SelectionSettings.when
    for field in (field for field in fields(SelectionSettings) if field.name != "when"):
        assert own[field.name] == (get_type_hints(SelectionSettings)[field.name], field.default)


def test_block_size_that_does_not_divide_names_the_target_and_the_sizes_that_fit(make_llama):
    with pytest.raises(BlockSizeError, match=r"model\.layers\.0\.self_attn\.k_proj \[16, 32\].*1, 2, 4, 8, 16, row, column\.$"):
        get_peft_model(make_llama(), paper_config(block_size=32))


@pytest.mark.parametrize("chosen", [1, [1]])
def test_layers_to_transform(make_llama, chosen):
    model = get_peft_model(make_llama(num_hidden_layers=3), paper_config(layers_to_transform=chosen))
    assert len(layers(model)) == 3
    assert all(".1." in name for name in layers(model))


def test_exclude_modules_and_regular_expressions(make_llama):
    model = get_peft_model(make_llama(), paper_config(exclude_modules=["v_proj"]))
    assert sorted({name.split(".")[-1] for name in layers(model)}) == ["k_proj", "q_proj"]
    model = get_peft_model(make_llama(), paper_config(target_modules=r".*\.1\..*(q|o)_proj"))
    assert sorted(layers(model)) == ["model.layers.1.self_attn.o_proj", "model.layers.1.self_attn.q_proj"]


def test_trainable_parameters_are_the_kept_entries(make_llama, wrap, batch, capsys):
    model = get_peft_model(make_llama(), paper_config(density=0.1))
    total = sum(layer.get_base_layer().weight.numel() for layer in layers(model).values())
    assert model.get_nb_trainable_parameters()[0] == total
    sparselet.reselect(model, [batch])
    kept = sum(round(0.1 * layer.get_base_layer().weight.numel()) for layer in layers(model).values())
    assert model.get_nb_trainable_parameters()[0] == kept
    model.print_trainable_parameters()
    assert f"trainable params: {kept}" in capsys.readouterr().out
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 6
    assert all(name.endswith(".sparse_values.default") for name in trainable)


# Saving and loading


def assert_same_adapter(first, second):
    assert list(first) == list(second)
    for name in first:
        assert torch.equal(first[name].indices, second[name].indices)
        assert torch.equal(first[name].values, second[name].values)
        assert first[name].block == second[name].block
    assert first.fingerprints == second.fingerprints
    assert first.modules.keys() == second.modules.keys()
    assert all(torch.equal(tensor, second.modules[name]) for name, tensor in first.modules.items())


@pytest.mark.parametrize("block_size", [1, 4, "row", "column"])
def test_saved_adapter_equals_to_adapter(make_llama, batch, tmp_path, block_size):
    config = paper_config(density=0.2, block_size=block_size, score="cs", seed=3, task="echo", metrics={"loss": 1.5})
    model = finish(get_peft_model(make_llama(), config), batch)
    model.save_pretrained(tmp_path / "peft")
    loaded, made = SparseAdapter.load(tmp_path / "peft"), to_adapter(model)
    assert_same_adapter(loaded, made)
    for key in ("density", "block_size", "score", "seed", "task", "metrics", "versions", "target_modules", "scope"):
        assert loaded.metadata.to_json()[key] == made.metadata.to_json()[key], key
    assert loaded.metadata.task == "echo"
    assert loaded.density == pytest.approx(0.2, abs=0.02)  # of 32 rows, whole ones


def test_file_holds_indices_and_values_as_documented(saved):
    _, directory = saved
    tensors = load_file(directory / "adapter_model.safetensors")
    assert len(tensors) == 12
    for name, tensor in tensors.items():
        assert name.startswith(PREFIX)
        if name.endswith(".sparse_indices"):
            assert tensor.dtype == torch.int32
            assert (tensor.diff() > 0).all()
        else:
            assert name.endswith(".sparse_values")
            assert tensor.dtype == torch.float32
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["peft_type"] == "SPARSELET"
    assert config["targets"]["model.layers.0.self_attn.k_proj"]["shape"] == [16, 32]


def test_adapter_written_without_peft_loads_through_it(make_llama, wrap, batch, tmp_path):
    base = make_llama()
    model = wrap(base, block_size=4)
    to_adapter(model).save(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path), batch), logits(model, batch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_stored_in_16_bits_load_as_float32(make_llama, wrap, tmp_path, dtype):
    base = make_llama()
    model = wrap(base)
    to_adapter(model).save(tmp_path, dtype=dtype)
    loaded = layers(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path))
    for name, layer in layers(model).items():
        expected = layer.sparse_values["default"].detach().to(dtype).float()
        assert loaded[name].sparse_values["default"].dtype == torch.float32
        assert torch.equal(loaded[name].sparse_values["default"], expected)


@pytest.mark.parametrize("block_size", [1, 4, "row", "column"])
def test_low_cpu_memory_loading(make_llama, wrap, batch, tmp_path, block_size):
    base = make_llama()
    model = wrap(base, block_size=block_size)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    assert not any(p.is_meta for p in loaded.parameters())


def test_loading_for_training_goes_on(make_llama, wrap, batch, tmp_path):
    base = make_llama()
    wrap(base).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    before = model(**batch).loss
    finish(model, batch)
    assert model(**batch).loss < before


def test_second_adapter_is_loaded_beside_the_first(make_llama, wrap, batch, tmp_path):
    base = make_llama()
    models = {name: wrap(base, seed=i, block_size=size) for i, (name, size) in enumerate({"a": "row", "b": 4}.items())}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a", adapter_name="a")
    loaded.load_adapter(tmp_path / "b", adapter_name="b")
    for name in ("a", "b", "a"):
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded, batch), logits(models[name], batch))
    loaded.base_model.set_adapter(["a", "b"])
    assert not torch.equal(logits(loaded, batch), logits(models["a"], batch))
    loaded.save_pretrained(tmp_path / "both")
    for name, model in models.items():
        assert_same_adapter(SparseAdapter.load(tmp_path / "both" / name), to_adapter(model))


def test_merged_adapter_loads_through_peft(make_llama, wrap, batch, tmp_path):
    base = make_llama()
    for i in range(2):
        wrap(base, seed=i).save_pretrained(tmp_path / str(i))
    sparselet.merge([tmp_path / "0", tmp_path / "1"]).save(tmp_path / "merged")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "merged")
    merged = SparseAdapter.load(tmp_path / "merged")
    assert all(
        torch.equal(layer.delta("default").to_dense(), merged[name].to_dense()) for name, layer in layers(loaded).items()
    )
    assert torch.isfinite(logits(loaded, batch)).all()


FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import AutoPeftModelForCausalLM, PeftModel
import sparselet.tuner
base, adapter, out = sys.argv[1:]
ids = torch.arange(12)[None]
first = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
second = AutoPeftModelForCausalLM.from_pretrained(adapter)
with torch.no_grad():
    torch.save([model(input_ids=ids).logits for model in (first, second)], out)
"""


def test_fresh_process_computes_equal_logits(make_llama, batch, tmp_path):
    make_llama().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = finish(get_peft_model(base, paper_config(score="mcs")), batch).eval()
    model.save_pretrained(tmp_path / "adapter")
    arguments = [str(tmp_path / name) for name in ("base", "adapter", "logits.pt")]
    subprocess.run([sys.executable, "-W", "ignore", "-c", FRESH, *arguments], check=True, timeout=120)
    expected = logits(model, {"input_ids": torch.arange(12)[None]})
    assert all(torch.equal(found, expected) for found in torch.load(tmp_path / "logits.pt"))


def test_auto_class_finds_the_base_model(make_llama, batch, tmp_path):
    make_llama().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = finish(get_peft_model(base, paper_config()), batch).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded, batch), logits(model, batch))


def test_adapter_fits_the_base_model_in_another_precision(make_llama, wrap, tmp_path):
    base = make_llama()
    wrap(base).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base).to(torch.bfloat16), tmp_path)
    for layer in layers(loaded).values():
        assert layer.sparse_values["default"].dtype == torch.float32


# The selection phase in files


def test_saving_before_a_selection_warns(make_llama, tmp_path):
    model = get_peft_model(make_llama(), paper_config())
    with pytest.warns(UnselectedMaskWarning, match="6 of 6 targets"):
        model.save_pretrained(tmp_path)
    with pytest.warns(UnfinishedAdapterWarning, match="still being selected"):
        SparseAdapter.load(tmp_path)


def test_saving_a_finished_adapter_warns_of_nothing(make_llama, batch, tmp_path):
    model = finish(get_peft_model(make_llama(), paper_config()), batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path)
        SparseAdapter.load(tmp_path)


@pytest.mark.parametrize("block_size", [1, 4, "row", "column"])
@pytest.mark.parametrize(
    ("config", "selections"),
    [({"score": "mcs"}, 0), ({"score": "mcs"}, 2), ({"score": "gm", "initial_mask": "gradient"}, 2)],
    ids=["before-the-first", "dense-start", "gradient-start"],
)
@pytest.mark.filterwarnings(
    "ignore::sparselet.tuner.UnselectedMaskWarning", "ignore::sparselet.adapter.UnfinishedAdapterWarning"
)
def test_saving_in_the_selection_phase_and_loading_goes_on_exactly(
    make_llama, make_batches, tmp_path, config, selections, block_size
):
    base, batches = make_llama(), make_batches(12)

    def go_on(model, optimizer, batches):
        for i, batch in enumerate(batches):
            if i % 3 == 0:
                sparselet.reselect(model, [batch], optimizer)
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()

    def adamw(model):
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    model = get_peft_model(copy.deepcopy(base), paper_config(density=0.1, block_size=block_size, **config))
    optimizer = adamw(model)
    if selections:
        go_on(model, optimizer, batches[:6])
    else:
        model(**batches[0]).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert torch.equal(logits(loaded.eval(), batches[0]), logits(model.eval(), batches[0]))
    resumed = adamw(loaded)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for other, own in ((loaded, resumed), (model, optimizer)):
        go_on(other, own, batches[6:])
        sparselet.freeze_masks(other)
    assert_same_adapter(to_adapter(loaded), to_adapter(model))


# What is refused


def test_wrong_base_model_is_refused(saved, make_llama):
    _, directory = saved
    with pytest.raises(WrongBase, match="6 of 6 targets"):
        PeftModel.from_pretrained(make_llama(seed=1), directory)


def test_wrong_base_model_is_refused_for_a_second_adapter(saved, make_llama, wrap):
    _, directory = saved
    model = wrap(make_llama(seed=1))
    with pytest.raises(WrongBase):
        model.load_adapter(directory, adapter_name="other")


def test_adapter_for_other_shapes_is_refused(saved, make_llama):
    _, directory = saved
    with pytest.raises(ShapeMismatch, match=r"k_proj: the adapter has shape \[16, 32\], the model has \[32, 32\]"):
        PeftModel.from_pretrained(make_llama(num_key_value_heads=4), directory)


def test_adapter_for_layers_that_the_model_lacks_is_refused(saved, make_llama):
    _, directory = saved
    with pytest.raises(UnknownTarget, match=r"model\.layers\.1\.self_attn"):
        PeftModel.from_pretrained(make_llama(num_hidden_layers=1), directory)
    with pytest.raises(UnknownTarget):
        PeftModel.from_pretrained(make_model("gpt2"), directory)


TARGET = "model.layers.0.self_attn.k_proj"
VALUES, INDICES = f"{TARGET}.sparse_values", f"{TARGET}.sparse_indices"


def _set(name, change):
    def apply(tensors):
        tensors[name] = change(tensors[name])

    return apply


def _put(index, value):
    def change(tensor):
        tensor[index] = value
        return tensor

    return change


def _mid_phase(progress, pending=None):
    added = {f"{TARGET}.sparse_progress": torch.tensor(progress)}
    if pending is not None:
        added[f"{TARGET}.sparse_pending"] = pending
    return lambda tensors: tensors.update(added)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (_set(INDICES, lambda t: t.flip(0)), UnsortedIndices),
        (_set(INDICES, lambda t: t[[0, *range(len(t) - 1)]]), DuplicateIndex),
        (_set(INDICES, _put(-1, 16 * 32)), IndexOutOfBounds),
        (_set(INDICES, _put(0, -1)), IndexOutOfBounds),
        (_set(INDICES, lambda t: t.float()), FormatError),
        (_set(INDICES, lambda t: t[:-1]), FormatError),
        (_set(INDICES, lambda t: t[None]), FormatError),
        (_set(VALUES, _put(3, float("nan"))), NonFiniteValue),
        (_set(VALUES, _put(3, float("inf"))), NonFiniteValue),
        (_set(VALUES, lambda t: t.int()), FormatError),
        (_set(VALUES, lambda t: t[:-1]), FormatError),
        (_set(VALUES, lambda t: t[:, None]), FormatError),
        (_set(VALUES, lambda t: t[:, None, None]), FormatError),
        (_set(VALUES, lambda t: t[:, None, None].expand(-1, 3, 3)), SparseletError),
        (_set(VALUES, lambda t: t[:, None, None].expand(-1, 4, 2)), FormatError),
        (lambda t: t.pop(VALUES), MissingTensor),
        (lambda t: t.pop(INDICES), MissingTensor),
        (lambda t: (t.pop(INDICES), t.pop(VALUES)), MissingTensor),
        (lambda t: t.update({"lm_head.sparse_values": t[VALUES] + 0, "lm_head.sparse_indices": t[INDICES] + 0}), UnknownTensor),
        (_mid_phase([1]), BadShape),
        (_mid_phase([0, 1]), BadShape),  # all entries trained, says the file, and holds a tenth of them
        (_mid_phase([1, 0], torch.ones(3)), BadShape),
        (_mid_phase([1, 0], torch.ones(16, 32).int()), BadShape),
        (_mid_phase([1, 0], torch.full((16, 32), float("nan"))), NonFiniteValue),
        (_mid_phase([-1, 0]), BadShape),
        (_mid_phase([1, 2]), BadShape),
    ],
)
def test_hostile_tensors_are_refused_by_name(saved, change, error):
    base, directory = saved
    rewrite(directory, change)
    with pytest.raises(error) as raised:
        PeftModel.from_pretrained(base, directory)
    assert "k_proj" in str(raised.value) or "lm_head" in str(raised.value)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda c: c["targets"].update({"model.layers.9.self_attn.k_proj": {"shape": [16, 32]}}), MissingTensor),
        (lambda c: c["targets"][TARGET].update({"shape": [32, 16]}), ShapeMismatch),
        (lambda c: c["targets"].update({"model.embed_tokens": {"shape": [64, 32]}}), SparseletError),
        (lambda c: c["targets"].pop(TARGET), SparseletError),
    ],
)
def test_hostile_configuration_is_refused(saved, change, error):
    base, directory = saved
    rewrite_config(directory, change)
    with pytest.raises(error):
        PeftModel.from_pretrained(base, directory)


def test_wrong_block_size_in_the_configuration_does_no_harm(saved, batch):
    base, directory = saved
    expected = logits(PeftModel.from_pretrained(copy.deepcopy(base), directory), batch)
    rewrite_config(directory, lambda config: config.update(block_size=7))
    assert torch.equal(logits(PeftModel.from_pretrained(base, directory), batch), expected)


def test_failed_load_leaves_the_base_model_as_it_was(saved, make_llama):
    base, directory = saved
    rewrite(directory, _set("model.layers.1.self_attn.v_proj.sparse_values", _put(0, float("nan"))))
    expected = copy.deepcopy(base)
    with pytest.raises(NonFiniteValue):
        PeftModel.from_pretrained(base, directory)
    found = {name.replace(".base_layer", ""): p for name, p in base.named_parameters() if "sparse_" not in name}
    changed = [name for name, p in expected.named_parameters() if not torch.equal(found[name], p)]
    assert not changed


def test_adapter_names_are_refused(make_llama, wrap, batch):
    model = wrap(make_llama())
    with pytest.raises(ArgumentError, match="set_adapter"):
        model(**batch, adapter_names=["default"] * 4)
    assert torch.isfinite(model(**batch).loss)


def test_saving_values_that_are_not_finite_is_refused(make_llama, wrap, tmp_path):
    model = wrap(make_llama())
    with torch.no_grad():
        layers(model)[TARGET].sparse_values["default"][0] = float("nan")
    with pytest.raises(NonFiniteValue, match="k_proj"):
        model.save_pretrained(tmp_path)


def test_unknown_adapter_name_is_refused(make_llama, wrap):
    with pytest.raises(ArgumentError, match="there are default"):
        to_adapter(wrap(make_llama()), "other")


def test_layers_that_share_a_weight_are_refused():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(ArgumentError, match="share one weight"):
        get_peft_model(model, paper_config(target_modules=["0", "1"]))


def test_model_without_adapter_is_refused(make_llama, batch):
    with pytest.raises(ArgumentError, match="get_peft_model"):
        sparselet.reselect(make_llama(), [batch])


# In use


def test_generation_and_gradient_accumulation_with_a_wrapped_model(make_llama, wrap):
    base = make_llama()
    model = wrap(base)
    generated = model.generate(input_ids=torch.arange(1, 5)[None], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape == (1, 8)


def test_inference_mode_sees_the_adapter(saved, batch):
    base, directory = saved
    with torch.inference_mode():
        model = PeftModel.from_pretrained(copy.deepcopy(base), directory)
        inside = model(**batch).logits
    outside = logits(PeftModel.from_pretrained(copy.deepcopy(base), directory), batch)
    assert torch.equal(inside, outside)


def test_adapters_on_different_targets_are_switched(make_llama, batch):
    base = make_llama()
    model = get_peft_model(copy.deepcopy(base), paper_config(target_modules=["q_proj"]), adapter_name="query")
    fill(model, "query")
    model.add_adapter("value", paper_config(target_modules=["v_proj"]))
    fill(model, "value")
    results = {}
    for names in (["query"], ["value"], ["query", "value"]):
        model.base_model.set_adapter(names)
        results[tuple(names)] = logits(model, batch)
        for target, layer in layers(model).items():
            touched = not torch.equal(layer.effective_weight(), base.get_submodule(target).weight)
            assert touched == any(f"{name[0]}_proj" in target for name in names)
    assert to_adapter(model, "query").keys() & to_adapter(model, "value").keys() == set()
    model.delete_adapter("value")
    model.set_adapter("query")
    assert torch.equal(logits(model, batch), results["query",])


def fill(model, name):
    for layer in layers(model).values():
        if name in layer.sparse_values:
            layer.set_mask(name, torch.arange(0, 300, 3), torch.randn(100))


def test_base_modules_with_the_methods_prefix_in_their_names_are_left_alone(tmp_path):
    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block_sparse_moe = torch.nn.ModuleDict({"q": torch.nn.Linear(8, 8), "sparse_router": torch.nn.Linear(8, 8)})

        def forward(self, x):
            return self.block_sparse_moe["sparse_router"](self.block_sparse_moe["q"](x))

    base, x = Experts().requires_grad_(False), torch.randn(3, 8)
    model = get_peft_model(copy.deepcopy(base), paper_config(target_modules=["q"], density=0.25))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "base_model.model.block_sparse_moe.q.sparse_values.default"
    ]
    layers(model)["block_sparse_moe.q"].set_mask("default", torch.arange(16), torch.ones(16))
    sparselet.reselect(model, [x], loss=lambda model, x: model(x).sum())
    sparselet.freeze_masks(model)
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        f"{PREFIX}block_sparse_moe.q.sparse_{part}" for part in ("values", "indices")
    }
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), model(x))
    twin = copy.deepcopy(model)
    twin.delete_adapter("default")
    assert torch.equal(twin.base_model.model(x), base(x))
    assert torch.equal(model.unload()(x), base(x))


def test_a_refused_target_leaves_the_model_unwrapped(make_llama):
    base = make_llama()
    before = {name: type(module) for name, module in base.named_modules()}
    # 8 divides the query projection, 32×32, but not the hidden size 12 of the last named layer.
    base.model.layers[1].self_attn.v_proj = torch.nn.Linear(32, 12, bias=False)
    with pytest.raises(BlockSizeError, match=r"layers\.1\.self_attn\.v_proj"):
        get_peft_model(base, paper_config(block_size=8))
    assert {name: type(module) for name, module in base.named_modules()} == before
