"""The protocol of the hosts: PEFT's and transformers' ways of adding, loading, saving and merging an adapter."""

import json
import pickle
import shutil

import pytest
import torch
from helpers.paper import paper_config
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments, pipeline

import sparselet
from sparselet import MaskSchedule, SparseAdapter, SparseletConfig, SparseletModel
from sparselet.errors import BadContainer, NonFiniteValue, SelectionError, SparseletError, UnknownTensor
from sparselet.tuner import SparseletLayer, sparselet_layers, to_adapter

RANDOM = {"initial_mask": "random", "reselect_every": 0, "density": 0.5, "target_modules": ["q_proj", "v_proj"]}
FOREIGN = "base_model.model.model.embed_tokens.weight"


@pytest.fixture
def batch(make_batches):
    return make_batches(1)[0]


@pytest.fixture
def saved(make_llama, wrap, batch, tmp_path):
    """The directory of an adapter with its base model beside it, and what the adapted model answers."""
    make_llama().save_pretrained(tmp_path / "base")
    model = wrap(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), task_type="CAUSAL_LM").eval()
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", answer(model, batch)


@torch.no_grad()
def answer(model, batch):
    return model.eval()(input_ids=batch["input_ids"]).logits


def assert_untouched(model, base, batch):
    assert not any(isinstance(module, SparseletLayer) for module in model.modules())
    assert torch.equal(answer(model, batch), answer(base, batch))


# The method's name and the tuner's attributes


def test_the_method_is_called_by_a_string_with_a_value():
    config = pickle.loads(pickle.dumps(paper_config()))
    assert config.peft_type == "SPARSELET" == config.peft_type.value
    assert {config.peft_type: 1}["SPARSELET"] == 1
    assert json.loads(json.dumps(config.to_dict()))["peft_type"] == "SPARSELET"
    assert f"{config.peft_type}" == "SPARSELET"


def test_the_tuner_has_no_public_attribute_that_other_tuners_lack():
    assert not {name for name in set(dir(SparseletModel)) - set(dir(BaseTuner)) if not name.startswith("_")} - {
        "prefix",
        "tuner_layer_cls",
        "target_module_mapping",
    }


def test_attributes_of_the_base_model_are_handed_on():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(4, 4)
            self.layers, self.refresh, self.config_of = 1, 2, 3

    model = get_peft_model(Model(), paper_config(target_modules=["q"]))
    assert (model.layers, model.base_model.refresh, model.config_of) == (1, 2, 3)


# Doors


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_every_door_of_peft_loads_the_same(saved, make_llama, batch, low_cpu_mem_usage):
    directory, wanted = saved
    low = {"low_cpu_mem_usage": low_cpu_mem_usage}
    first = PeftModel.from_pretrained(make_llama(), directory, **low)
    second = PeftModel.from_pretrained(make_llama(), directory)
    second.load_adapter(directory, "second", **low)
    second.set_adapter("second")
    injected = make_llama()
    inject_adapter_in_model(PeftConfig.from_pretrained(directory), injected, **low)
    set_peft_model_state_dict(injected, load_file(directory / "adapter_model.safetensors"), **low)
    auto = AutoPeftModelForCausalLM.from_pretrained(directory, **low)
    for model in (first, second, injected, auto):
        assert torch.equal(answer(model, batch), wanted)


def test_an_adapter_without_values_is_refused_in_a_pass(make_llama, batch):
    model = get_peft_model(make_llama(), paper_config(**RANDOM), low_cpu_mem_usage=True)
    with pytest.raises(SelectionError, match="low_cpu_mem_usage"):
        answer(model, batch)


def test_transformers_own_loading_is_refused_in_words_and_changes_nothing(saved, make_llama, batch):
    directory, _ = saved
    model, base = make_llama(), make_llama()
    for load in (
        lambda: model.load_adapter(str(directory)),
        lambda: AutoModelForCausalLM.from_pretrained(directory),
        lambda: LlamaForCausalLM.from_pretrained(directory),
        lambda: pipeline("text-generation", model=str(directory)),
    ):
        with pytest.raises(SelectionError, match=r"PeftModel\.from_pretrained"):
            load()
    assert torch.equal(answer(model, batch), answer(base, batch))
    model.delete_adapter("default")
    assert torch.equal(
        model.state_dict()["model.layers.0.self_attn.q_proj.base_layer.weight"], base.model.layers[0].self_attn.q_proj.weight
    )


def test_swapping_in_place_and_mixing_methods_are_refused(saved, make_llama):
    directory, _ = saved
    with pytest.raises(ValueError, match="SPARSELET"):
        hotswap_adapter(PeftModel.from_pretrained(make_llama(), directory), directory, "default")
    with pytest.raises(ValueError, match="SPARSELET"):
        get_peft_model(make_llama(), paper_config(**RANDOM), mixed=True)


@pytest.mark.parametrize("initial_mask", ["dense", "gradient"])
@pytest.mark.parametrize("by", ["add_adapter", "inject"])
def test_an_adapter_put_in_without_peft_model_is_selected_trained_and_saved(make_llama, batch, tmp_path, initial_mask, by):
    def adapted():
        model = make_llama()
        config = paper_config(density=0.2, initial_mask=initial_mask, seed=3)
        if by == "add_adapter":
            model.add_adapter(config)
            return model
        return inject_adapter_in_model(config, model)

    def train(model):
        rows = [{"input_ids": ids, "labels": ids} for ids in batch["input_ids"]]
        args = TrainingArguments(
            tmp_path / "run", max_steps=4, report_to=[], use_cpu=True, disable_tqdm=True, learning_rate=0.05, seed=1
        )
        Trainer(model, args, train_dataset=rows, callbacks=[MaskSchedule()]).train()
        return model

    model, reference = (
        train(adapted()),
        train(get_peft_model(make_llama(), paper_config(density=0.2, initial_mask=initial_mask, seed=3))),
    )
    adapter, wanted = to_adapter(model), to_adapter(reference)
    assert list(adapter) == list(wanted)
    for name, delta in wanted.items():
        assert torch.equal(adapter[name].indices, delta.indices)
        assert torch.equal(adapter[name].values, delta.values)
    if by == "add_adapter":
        model.save_pretrained(tmp_path / "saved")
        assert torch.equal(SparseAdapter.load(tmp_path / "saved")[name].values, delta.values)
        assert torch.equal(answer(PeftModel.from_pretrained(make_llama(), tmp_path / "saved"), batch), answer(model, batch))


def test_compiled_blocks_leave_no_trace_in_the_names(saved, make_llama, batch, tmp_path):
    directory, wanted = saved
    base = make_llama()
    base.model.layers[0] = torch.compile(base.model.layers[0], backend="eager")
    model = PeftModel.from_pretrained(base, directory)
    assert torch.equal(answer(model, batch), wanted)
    model.save_pretrained(tmp_path / "again")
    assert list(SparseAdapter.load(tmp_path / "again")) == list(SparseAdapter.load(directory))


# What is read


def _fields(**fields):
    def change(directory):
        file = directory / "adapter_config.json"
        content = {**json.loads(file.read_text()), **fields}
        file.write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))

    return change


def _tensors(change):
    def rewrite(directory):
        file = directory / "adapter_model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})

    return rewrite


CASES = {
    "as it was": lambda directory: None,
    "later version": _fields(format_version=2),
    "version as text": _fields(format_version="1"),
    "no version": _fields(format_version="absent"),
    "no targets": _fields(targets="absent"),
    "no record": _fields(format_version="absent", targets="absent"),
    "targets are a list": _fields(targets=["model.layers.0.self_attn.q_proj"]),
    "target with path parts": _fields(targets={"../q_proj": {"shape": [4, 4], "fingerprint": None}}),
    "another task": _fields(task_type="TRANSLATION"),
    "names are a number": _fields(target_modules=5),
    "modules are text": _fields(modules_to_save="lm_head"),
    "base is a number": _fields(base_model_name_or_path=1),
    "mode is text": _fields(inference_mode="no"),
    "endless pattern": _fields(target_modules="(.+)+x", exclude_modules="(.+)+y"),
    "density of a merge": _fields(density=7),
    "cut off": lambda directory: (directory / "adapter_model.safetensors").write_bytes(
        (directory / "adapter_model.safetensors").read_bytes()[:-3]
    ),
    "no weights": lambda directory: (directory / "adapter_model.safetensors").unlink(),
    "foreign tensor": _tensors(lambda t: {**t, FOREIGN: torch.zeros(64, 32)}),
    "foreign part": _tensors(lambda t: {**t, next(iter(t)) + "_of": torch.zeros(2)}),
    "not finite": _tensors(lambda t: {name: v * torch.inf if "values" in name else v for name, v in t.items()}),
    "half precision": _tensors(lambda t: {name: v.half() if "values" in name else v for name, v in t.items()}),
    "long indices": _tensors(lambda t: {name: v.long() if "indices" in name else v for name, v in t.items()}),
}


@pytest.mark.parametrize("case", CASES)
def test_peft_refuses_what_load_refuses_by_the_same_error(saved, make_llama, batch, case):
    directory, _ = saved
    CASES[case](directory)
    base, refused = make_llama(), None
    try:
        SparseAdapter.load(directory)
    except SparseletError as error:
        refused = error
    if refused is None:
        PeftModel.from_pretrained(base, directory).save_pretrained(directory)
        return
    with pytest.raises(type(refused)):
        PeftModel.from_pretrained(base, directory)
    assert_untouched(base, make_llama(), batch)


def test_a_refused_second_adapter_is_taken_out_again(saved, make_llama, batch, tmp_path):
    directory, wanted = saved
    shutil.copytree(directory, tmp_path / "bad")
    CASES["not finite"](tmp_path / "bad")
    model = PeftModel.from_pretrained(make_llama(), directory)
    with pytest.raises(NonFiniteValue):
        model.load_adapter(tmp_path / "bad", "second")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(answer(model, batch), wanted)


def test_nothing_but_the_adapter_is_loaded_from_a_pickle_or_a_state_dict(saved, make_llama, batch):
    directory, wanted = saved
    weights = directory / "adapter_model.safetensors"
    tensors = load_file(weights)
    weights.unlink()
    torch.save(tensors, directory / "adapter_model.bin")  # as PEFT writes with safe_serialization=False
    model = PeftModel.from_pretrained(make_llama(), directory)
    assert torch.equal(answer(model, batch), wanted)
    torch.save({**tensors, FOREIGN: torch.zeros(64, 32)}, directory / "adapter_model.bin")
    base = make_llama()
    with pytest.raises(UnknownTensor, match="embed_tokens"):
        PeftModel.from_pretrained(base, directory)
    assert_untouched(base, make_llama(), batch)
    with pytest.raises(UnknownTensor, match="embed_tokens"):
        set_peft_model_state_dict(model, {**tensors, FOREIGN: torch.zeros(64, 32)})
    assert torch.equal(answer(model, batch), wanted)


def test_an_adapter_in_the_cache_of_the_hub_library_is_read_and_checked(saved, make_llama, batch, tmp_path):
    """Whose files are links into another directory."""
    directory, wanted = saved
    repository = tmp_path / "cache" / "models--org--expert"
    snapshot = repository / "snapshots" / ("a" * 40)
    for place in (snapshot, repository / "blobs", repository / "refs"):
        place.mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    for file in list(directory.iterdir()):
        file.rename(repository / "blobs" / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    for place in ("org/expert", snapshot):
        model = PeftModel.from_pretrained(make_llama(), place, cache_dir=tmp_path / "cache")
        assert torch.equal(answer(model, batch), wanted)
    weights = repository / "blobs" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    for place in ("org/expert", snapshot):
        with pytest.raises(BadContainer):
            PeftModel.from_pretrained(make_llama(), place, cache_dir=tmp_path / "cache")


def test_a_configuration_saved_by_itself_is_read_again(tmp_path):
    paper_config(density=0.3).save_pretrained(tmp_path)
    assert SparseletConfig.from_pretrained(tmp_path).density == 0.3
    assert PeftConfig.from_pretrained(tmp_path).density == 0.3


def test_embeddings_that_peft_saves_are_named_and_loaded(make_llama, wrap, batch, tmp_path):
    def resized():
        torch.manual_seed(4)
        model = make_llama()
        model.resize_token_embeddings(70)
        return model

    model = wrap(resized())
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["lm_head", "model.embed_tokens"]
    assert "model.embed_tokens.weight" in SparseAdapter.load(tmp_path).modules
    assert torch.equal(answer(PeftModel.from_pretrained(resized(), tmp_path), batch), answer(model, batch))


# Merging


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 60000.0])
def test_a_safe_merge_that_is_refused_changes_nothing(make_llama, wrap, batch, value):
    """In half precision, where a sum beyond 65504 is infinite; PEFT says a ValueError of these words."""
    base = make_llama(torch.float16)
    with torch.no_grad():
        base.model.layers[1].self_attn.v_proj.weight.fill_(60000.0)
    model = wrap(base)
    last = model.get_base_model().model.layers[1].self_attn.v_proj
    with torch.no_grad():
        last.sparse_values["default"][0] = value
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
            merge(safe_merge=True)
        after = model.state_dict()
        assert all(torch.equal(tensor.nan_to_num(), after[name].nan_to_num()) for name, tensor in before.items())
        assert len(sparselet_layers(model)) == 6
    with torch.no_grad():
        last.sparse_values["default"][0] = 1.0
    assert not any(isinstance(module, SparseletLayer) for module in model.merge_and_unload(safe_merge=True).modules())


def test_masks_are_selected_and_frozen_by_the_layers_alone(make_llama, batch):
    model = inject_adapter_in_model(paper_config(density=0.2), make_llama())
    assert sparselet.reselect(model, [batch]).targets == 6
    sparselet.freeze_masks(model)
    assert to_adapter(model).density == pytest.approx(0.2, abs=0.01)
