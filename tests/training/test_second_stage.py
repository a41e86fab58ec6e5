"""`init_from`: what a second stage starts from, what it trains, and what it writes, for every method."""

import json
import warnings

import pytest
import torch
from helpers.tiny import make_adapter, make_model, save_base
from helpers.training_runs import Look, StopAt, bytes_of, killed_run, logits
from peft import PeftModel
from transformers import AutoModelForCausalLM, TrainerCallback

from sparselet import SparseAdapter, SparseDelta, SparseletConfig, merge
from sparselet.apply import apply_temporarily
from sparselet.errors import ConfigError, MissingFile, ShapeMismatch, UnknownTarget, WrongBase
from sparselet.models import load_model, load_tokenizer
from sparselet.training import TrainSettings, train
from sparselet.training.run_directory import work_directory

KINDS = ("expert", "tiles", "merged")
TINY = 1e-9  # a learning rate that changes nothing one could see


def gentle(adapter):
    """The adapter with changes a tenth as large, so that the model stays one that can be trained."""
    return SparseAdapter({n: 0.1 * d for n, d in adapter.items()}, adapter.metadata, adapter.fingerprints)


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """Adapters of the tiny model: an expert, one with tiles, and a merged one whose masks differ by target."""
    root, model = tmp_path_factory.mktemp("starts"), make_model()
    told = {"score": "gm", "task_type": "CAUSAL_LM", "data_fingerprint": "0123456789abcdef", "chat_template": True}
    expert = gentle(make_adapter(model, task="first", density=0.25, **told))
    expert.metadata = expert.metadata.with_fields({"seed": 7})
    tiles = gentle(make_adapter(model, block_size=4, seed=2, task="second"))
    merged = merge([expert, tiles, gentle(make_adapter(model, seed=3, density=0.6))])
    deltas = dict(merged)
    deltas["model.layers.0.self_attn.k_proj"] = SparseDelta.empty((8, 16))  # a target that was dropped
    del deltas["model.layers.1.self_attn.v_proj"]
    deltas["model.layers.1.mlp.up_proj"] = 0.1 * SparseDelta.from_dense(torch.eye(24, 16))
    found = {"expert": expert, "tiles": tiles, "merged": SparseAdapter(deltas, merged.metadata, merged.fingerprints)}
    return {name: (adapter, str(adapter.save(root / name))) for name, adapter in found.items()}


def same_masks(first, second):
    return set(first) == set(second) and all(
        torch.equal(first[n].indices, second[n].indices) and first[n].block == second[n].block for n in first
    )


# Sparse: the entries of the first stage


@pytest.mark.parametrize("kind", KINDS)
def test_a_sparse_second_stage_starts_from_the_values_and_keeps_the_masks(settings_of, starts, tmp_path, base_dir, kind):
    start, path = starts[kind]
    look, model = Look(), make_model()
    trained = train(settings_of("sparse", init_from=path), tmp_path / "out", callbacks=[look])
    with apply_temporarily(model, start):
        assert torch.equal(look.first_logits, logits(model))
    assert same_masks(trained, start)
    assert all(not torch.equal(trained[n].values, start[n].values) for n in start if start[n].nnz)
    assert look.losses[1] < look.losses[0]
    loaded = SparseAdapter.load(tmp_path / "out")
    with apply_temporarily(model, loaded):
        assert torch.equal(logits(model), look.logits)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        through_peft = PeftModel.from_pretrained(load_model(base_dir), tmp_path / "out")
    assert torch.equal(logits(through_peft), look.logits)


@pytest.mark.parametrize("kind", KINDS)
def test_with_next_to_no_learning_rate_a_second_stage_changes_nothing(settings_of, starts, tmp_path, kind):
    start, path = starts[kind]
    look, plain = Look(), Look()
    trained = train(settings_of("sparse", init_from=path, learning_rate=TINY), tmp_path / "out", callbacks=[look])
    for name, delta in trained.items():
        torch.testing.assert_close(delta.values, start[name].values, rtol=0, atol=1e-7)
    # The first validation loss is that of the adapter it started from.
    base = make_model()
    with apply_temporarily(base, start):
        base.save_pretrained(tmp_path / "merged")
    load_tokenizer(settings_of("sparse").model).save_pretrained(tmp_path / "merged")
    wanted = settings_of("full", model=str(tmp_path / "merged"), learning_rate=TINY)
    train(wanted, tmp_path / "plain", callbacks=[plain])
    assert look.losses == pytest.approx(plain.losses, abs=1e-5)


def test_a_second_stage_trains_as_torch_does_on_the_masked_entries(settings_of, starts, tmp_path, base_dir):
    """Against a full-qkv second stage whose gradients outside the masks are struck out."""
    start, path = starts["expert"]
    masks = {f"{name}.weight": delta.mask() for name, delta in start.items()}

    class Strike(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            for name, parameter in model.named_parameters():
                if name in masks:
                    parameter.register_hook(lambda gradient, mask=masks[name]: gradient * mask)

    few = train(settings_of("sparse", init_from=path), tmp_path / "few")
    struck = train(settings_of("full-qkv", init_from=path), tmp_path / "struck", callbacks=[Strike()])
    for name, delta in few.items():
        torch.testing.assert_close(delta.to_dense(), struck[name].to_dense(), rtol=1e-3, atol=1e-6)


def test_what_is_recorded_of_a_second_stage(settings_of, starts, tmp_path, task_dir, other_task, base_dir):
    expert = train(settings_of("sparse", init_from=starts["expert"][1], seed=3, epochs=1), tmp_path / "one").metadata
    assert expert.training == {
        "method": "sparse",
        "init_from": {"task": "first", "data_fingerprint": "0123456789abcdef"},
    }
    assert (expert.task, expert.score, expert.seed) == ("backwards", "gm", 7)  # the masks are the first stage's
    assert expert.data_fingerprint != "0123456789abcdef"
    assert expert.base_model_name_or_path == base_dir
    start, path = starts["merged"]
    wanted = settings_of("sparse", init_from=path, task=(task_dir, other_task), epochs=1)
    train(wanted, tmp_path / "two")
    merged = SparseAdapter.load(tmp_path / "two")
    assert merged.metadata.training == {"method": "sparse", "init_from": {"merge": start.metadata.merge}}
    assert "merge" not in merged.metadata.to_json()
    assert "score" not in merged.metadata.to_json()
    assert merged.metadata.task == "backwards+shorter"
    assert merged.metadata.task_type == "CAUSAL_LM"
    assert merged.metadata.density == pytest.approx(start.density)
    assert SparseletConfig.from_pretrained(str(tmp_path / "two")).training == merged.metadata.training
    run = json.loads((tmp_path / "two" / "run.json").read_text())
    assert run["settings"]["init_from"] == path
    again = train(settings_of("sparse", init_from=str(tmp_path / "two"), epochs=1), tmp_path / "three")
    assert again.metadata.training["init_from"]["training"] == merged.metadata.training


# The other methods: W + ΔW first


@pytest.mark.parametrize(("method", "kind"), [("full", "expert"), ("full", "tiles"), ("multitask", "merged")])
def test_a_full_second_stage_trains_the_merged_model(settings_of, starts, tmp_path, method, kind):
    start, path = starts[kind]
    look, model = Look(), make_model()
    train(settings_of(method, init_from=path, learning_rate=TINY), tmp_path / "out", callbacks=[look])
    found = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    with apply_temporarily(model, start):
        assert torch.equal(look.first_logits, logits(model))
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name], parameter, rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_qkv_second_stage_is_an_adapter_of_the_base_it_all_began_with(settings_of, starts, tmp_path, kind):
    start, path = starts[kind]
    look, model = Look(), make_model()
    trained = train(settings_of("full-qkv", init_from=path), tmp_path / "out", callbacks=[look])
    with apply_temporarily(model, start):
        assert torch.equal(look.first_logits, logits(model))
    qkv = {name for name, _ in model.named_modules() if name.endswith(("q_proj", "k_proj", "v_proj"))}
    assert set(trained) == qkv | set(start)
    assert all(trained[name].density == 1 for name in qkv)
    for name in set(start) - qkv:  # not trained, so as it was
        assert torch.equal(trained[name].indices, start[name].indices)
        assert torch.equal(trained[name].values, start[name].values)
    with apply_temporarily(model, trained):
        torch.testing.assert_close(logits(model), look.logits)
    still = train(settings_of("full-qkv", init_from=path, learning_rate=TINY), tmp_path / "still")
    for name, delta in start.items():
        torch.testing.assert_close(still[name].to_dense(), delta.to_dense(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["full", "full-qkv"])
def test_over_a_bfloat16_base_the_start_is_not_rounded(settings_of, tmp_path, base_dir, method):
    base = load_model(base_dir, "bfloat16")
    start = gentle(make_adapter(base))
    path = str(start.save(tmp_path / "start"))
    wanted = settings_of(method, init_from=path, dtype="bfloat16", learning_rate=TINY, epochs=1)
    done = train(wanted, tmp_path / "out")
    for name, delta in start.items():
        before = base.get_submodule(name).weight.detach().float()
        if method == "full":
            change = load_model(str(tmp_path / "out")).get_submodule(name).weight.detach() - before
        else:
            change = done[name].to_dense()
        torch.testing.assert_close(change, delta.to_dense(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["sparse", "full", "full-qkv"])
def test_the_base_model_is_given_back_without_the_start(settings_of, starts, tmp_path, base_dir, method):
    model, tokenizer, reference = load_model(base_dir), load_tokenizer(base_dir), make_model()
    wanted = settings_of(method, init_from=starts["merged"][1], epochs=1)
    train(wanted, tmp_path / "out", base=(model, tokenizer))
    with pytest.raises(KeyboardInterrupt):
        train(wanted, tmp_path / "stopped", base=(model, tokenizer), callbacks=[StopAt(2)])
    for name, parameter in reference.named_parameters():
        assert torch.equal(dict(model.named_parameters())[name], parameter), name


# Killed and resumed


@pytest.mark.parametrize("method", ["sparse", "full-qkv"])
def test_a_second_stage_that_was_killed_goes_on_byte_for_byte(settings_of, starts, tmp_path, method):
    wanted = settings_of(method, init_from=starts["merged"][1], save_steps=2)
    train(wanted, tmp_path / "whole")
    killed_run(wanted, tmp_path / "killed", 9)
    look = Look()
    train(wanted, tmp_path / "killed", resume=True, callbacks=[look])
    assert look.steps[0] == 9
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole")


def test_a_second_stage_is_not_resumed_from_another_adapter(settings_of, starts, tmp_path):
    path = starts["expert"][0].save(tmp_path / "start")
    wanted = settings_of("sparse", init_from=str(path), save_steps=1)
    with pytest.raises(KeyboardInterrupt):
        train(wanted, tmp_path / "out", callbacks=[StopAt(3)])
    starts["tiles"][0].save(path)
    with pytest.raises(ConfigError, match=r"was started with another adapter at .*start\. Remove it to start again"):
        train(wanted, tmp_path / "out", resume=True)
    with pytest.raises(ConfigError, match="was started with init_from = "):
        train(settings_of("sparse", init_from=starts["tiles"][1], save_steps=1), tmp_path / "out", resume=True)
    assert any(work_directory(tmp_path / "out").glob("checkpoint-*"))


# What is refused


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("lora", {}, r"init_from does not go with method lora.*--to checkpoint.*`model`"),
        ("sparse", {"density": 0.2}, "density does not go with init_from: targets and masks are those of there"),
        ("sparse", {"score": "gm"}, "score does not go with init_from"),
        ("sparse", {"balance": "row"}, "balance does not go with init_from"),
        ("sparse", {"layers": (1,)}, "layers does not go with init_from"),
        ("full", {"density": 0.2}, "density does not apply to method full"),
    ],
)
def test_settings_that_contradict_a_start_are_refused_by_name(method, changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainSettings(task="a", method=method, init_from="there", **changes)


def unfinished(adapter, path):
    from safetensors.torch import load_file, save_file

    adapter.save(path)
    tensors = load_file(path / "adapter_model.safetensors")
    tensors |= {f"base_model.model.{n}.sparse_progress": torch.tensor([1, 0]) for n in adapter}
    tensors |= {f"base_model.model.{n}.sparse_pending": torch.empty(0) for n in adapter}
    save_file(tensors, path / "adapter_model.safetensors")


def with_modules(adapter, path):
    head = {"lm_head.weight": torch.zeros(258, 16)}
    SparseAdapter(adapter, adapter.metadata.with_fields({"modules_to_save": ["lm_head"]}), adapter.fingerprints, head).save(
        path
    )


def without_entries(adapter, path):
    SparseAdapter({n: SparseDelta.empty(d.shape) for n, d in adapter.items()}).save(path)


def of_another_base(adapter, path):
    make_adapter(make_model(seed=5)).save(path)


def of_another_shape(adapter, path):
    SparseAdapter({n: SparseDelta.empty((3, 3)) + SparseDelta.from_dense(torch.eye(3)) for n in adapter}).save(path)


def of_a_deeper_model(adapter, path):
    make_adapter(make_model(num_hidden_layers=3)).save(path)


@pytest.mark.parametrize("method", ["sparse", "full"])
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda adapter, path: None, MissingFile, "is not a directory"),
        (unfinished, ConfigError, "init_from: .* while its mask was still being selected"),
        (with_modules, ConfigError, "init_from: .*modules_to_save"),
        (without_entries, ConfigError, "init_from: .* has no entries"),
        (of_another_base, WrongBase, "base weights differ"),
        (of_another_shape, ShapeMismatch, r"\[3, 3\], the model"),
        (of_a_deeper_model, UnknownTarget, r"no target model\.layers\.2"),
    ],
    ids=lambda v: getattr(v, "__name__", None) if callable(v) and not isinstance(v, type) else "",
)
@pytest.mark.filterwarnings("ignore:.*still being selected")
def test_a_start_that_does_not_fit_is_refused_and_leaves_nothing_behind(
    settings_of, starts, tmp_path, base_dir, method, make, error, message
):
    make(starts["expert"][0], tmp_path / "start")
    before, model = sorted(p.name for p in tmp_path.iterdir()), load_model(base_dir)
    wanted = settings_of(method, init_from=str(tmp_path / "start"))
    with pytest.raises(error, match=message):
        train(wanted, tmp_path / "out", base=(model, load_tokenizer(base_dir)))
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert torch.equal(logits(model), logits(make_model()))


def test_a_checkpoint_is_not_a_start(settings_of, tmp_path):
    with pytest.raises(MissingFile, match=r"adapter_config\.json is missing"):
        train(settings_of("sparse", init_from=save_base(tmp_path / "base")), tmp_path / "out")
