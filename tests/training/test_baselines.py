"""The paper's baselines: what each trains and writes, against torch's AdamW and stock libraries."""

import json
import math
import warnings

import pytest
import torch
from helpers.tiny import make_model, make_t5, save_base
from helpers.training_runs import Look, logits
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, TrainerCallback, set_seed

from sparselet import SparseAdapter, SparseletConfig, merge
from sparselet.apply import apply_temporarily
from sparselet.errors import ArgumentError, ConfigError, NonFiniteScore, NoTargets, TrainingDiverged, UnsupportedExpert
from sparselet.fingerprint import fingerprint_weight
from sparselet.formats import open_expert
from sparselet.generation.prompts import prompt_format
from sparselet.models import load_model, load_tokenizer
from sparselet.tasks.task import load_task
from sparselet.training import Trained, TrainSettings, train
from sparselet.training.collate import collator, encode
from sparselet.training.methods import find_targets
from sparselet.training.run_directory import RUN_FILE
from sparselet.training.sampling import LengthGroupedSampler

BASELINES = ("lora", "full", "full-qkv", "multitask")
QKV = ("q_proj", "k_proj", "v_proj")


# What is trained, against a loop over torch's own AdamW


def spelt_out(settings, model, trained):
    """Train by hand: linear warm-up and decay, gradients clipped at norm 1, AdamW, the batches of the sampler."""
    base, rows = load_model(settings.model), []
    form = prompt_format(base, load_tokenizer(settings.model), settings.chat_template)
    for source in settings.tasks:
        task = load_task(source, ("train",)).rows("train")
        rows.append(encode(task, form, settings.max_input_length, source))
    flat, collate = [row for own in rows for row in own], collator(base, form)
    lengths = [len(row["prompt"] + row["target"]) for row in flat]
    sampler = LengthGroupedSampler(lengths, settings.batch_size, settings.seed, [len(own) for own in rows])
    total = math.ceil(len(flat) / settings.batch_size) * int(settings.epochs)
    rising = math.ceil(settings.warmup * total)
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0)
    step = 0
    for epoch in range(int(settings.epochs)):
        sampler.set_epoch(epoch)
        order = list(sampler)
        for first in range(0, len(order), settings.batch_size):
            batch = collate([flat[row] for row in order[first : first + settings.batch_size]])
            labels, kept = batch.pop("labels"), batch["logits_to_keep"]
            found = model.train()(**batch).logits
            assert found.shape[1] == kept == labels.shape[1]
            cross_entropy(found[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            share = step / rising if step < rising else (total - step) / (total - rising)
            optimizer.param_groups[0]["lr"] = settings.learning_rate * share
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    return step


@pytest.mark.parametrize("method", BASELINES)
def test_a_method_trains_as_a_loop_written_out_by_hand(settings_of, tmp_path, base_dir, method):
    settings, look = settings_of(method), Look()
    train(settings, tmp_path / "out", callbacks=[look])
    assert look.losses[1] < look.losses[0]  # so that the last epoch is the one kept
    model = load_model(base_dir)
    if method == "lora":
        set_seed(settings.seed)
        model = get_peft_model(model, LoraConfig(r=2, lora_alpha=2, target_modules=list(QKV), task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        qkv = any(part in name for part in QKV)
        parameter.requires_grad_({"lora": "lora_" in name, "full-qkv": qkv}.get(method, True))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    steps = spelt_out(settings, model, [p for p in model.parameters() if p.requires_grad])
    assert steps == len(look.steps) == (18 if method == "multitask" else 12)
    assert set(look.weights) == set(before)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(look.weights[name], parameter.detach(), rtol=1e-4, atol=1e-6, msg=name)
        assert torch.equal(look.weights[name], before[name]) is not parameter.requires_grad, name


# What is written


def test_a_lora_is_a_directory_that_stock_peft_loads(settings_of, tmp_path, base_dir):
    look = Look()
    done = train(settings_of("lora"), tmp_path / "out", callbacks=[look])
    files = sorted(path.name for path in done.path.iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors", "profile.safetensors", RUN_FILE]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir), done.path)
    assert torch.equal(logits(loaded), look.logits)
    assert not torch.allclose(look.logits, logits(make_model()), atol=1e-3)
    config = loaded.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (2, 2, 0.0)
    assert config.base_model_name_or_path == base_dir
    assert config.target_modules == set(QKV)


def test_lora_follows_its_settings(settings_of, tmp_path):
    train(settings_of("lora", lora_rank=3, lora_alpha=1.5, layers=(1,), epochs=1), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["layers_to_transform"]) == (3, 1.5, [1])
    train(settings_of("lora", target_modules=("o_proj",), epochs=1), tmp_path / "o")
    assert json.loads((tmp_path / "o" / "adapter_config.json").read_text())["target_modules"] == ["o_proj"]


@pytest.mark.parametrize("method", ["shira", "super-tuning"])
def test_single_entries_of_peft_are_as_many_as_asked_and_open_as_experts(settings_of, tmp_path, base_dir, method):
    size = {"lora_rank": 2} if method == "shira" else {"density": 0.25}
    train(settings_of(method, **size), tmp_path / "out")
    expert = open_expert(tmp_path / "out", base_dir)
    assert set(expert) == set(find_targets(make_model(), SparseletConfig()))
    for name in expert:
        rows, columns = expert[name].shape
        assert expert[name].nnz == (2 * (rows + columns) if method == "shira" else rows * columns // 4), name
        assert expert[name].values.any()
    model = PeftModel.from_pretrained(make_model(), tmp_path / "out")  # stock PEFT
    assert any("shira" in name or "supertuning" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(("preset", "layers"), [("qkv", 3), ("attention", 4), ("mlp", 3), ("all", 7)])
def test_a_preset_and_a_number_of_entries_make_experts_of_one_size(settings_of, tmp_path, preset, layers):
    trained = train(
        settings_of("sparse", target_modules=(preset,), entries="0.3k", epochs=1, when="static", score="random"),
        tmp_path / "out",
    )
    assert len(trained) == 2 * layers
    assert trained.nnz == pytest.approx(300, abs=len(trained))  # rounded in each target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"entries": "many"}, "entries"),
        ({"entries": 0}, "entries must be above 0"),
        ({"entries": "1.5"}, "entries"),
        ({"entries": 100, "density": 0.2}, "set one of them"),
        ({"entries": "1k", "method": "full"}, "entries does not apply"),
    ],
)
def test_wrong_numbers_of_entries_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainSettings(task="a", **changes)


def test_more_entries_than_the_targets_have_are_refused(settings_of, tmp_path):
    with pytest.raises(ConfigError, match="at most the"):
        train(settings_of("sparse", entries="1M"), tmp_path / "out")


@pytest.mark.parametrize("tied", [False, True])
def test_a_fully_trained_model_is_a_checkpoint_that_stock_transformers_loads(settings_of, tmp_path, tied):
    base = save_base(tmp_path / "base", tie_word_embeddings=tied)
    look = Look()
    done = train(settings_of("full", model=base), tmp_path / "out", callbacks=[look])
    assert isinstance(done, Trained)
    assert done.method == "full"
    loaded = AutoModelForCausalLM.from_pretrained(done.path)
    assert torch.equal(logits(loaded), look.logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert not torch.equal(loaded.lm_head.weight, AutoModelForCausalLM.from_pretrained(base).lm_head.weight)
    assert loaded.config.to_diff_dict() == load_model(base).config.to_diff_dict()
    assert load_tokenizer(str(done.path))("ant")["input_ids"] == load_tokenizer(base)("ant")["input_ids"]
    run = json.loads((done.path / RUN_FILE).read_text())
    assert run["metrics"] == done.metrics == {"validation_loss": min(look.losses), "best_step": 12, "steps": 12}
    assert (run["task"], run["settings"]["method"]) == ("backwards", "full")


def test_trained_qkv_weights_are_an_expert_of_density_1(settings_of, tmp_path, base_dir):
    look = Look()
    adapter = train(settings_of("full-qkv"), tmp_path / "out", callbacks=[look])
    loaded = SparseAdapter.load(tmp_path / "out")
    model = load_model(base_dir)
    assert set(loaded) == {name for name, _ in model.named_modules() if name.endswith(QKV)}
    for name, delta in loaded.items():
        weight = model.get_submodule(name).weight.detach()
        assert delta.density == 1
        assert torch.equal(delta.to_dense(), look.weights[f"{name}.weight"] - weight)
        assert torch.equal(delta.values, adapter[name].values)
        assert loaded.fingerprints[name] == fingerprint_weight(weight)
    with apply_temporarily(model, loaded):
        torch.testing.assert_close(logits(model), look.logits)
    expected = {"task": "backwards", "base_model_name_or_path": base_dir, "density": 1.0, "training": {"method": "full-qkv"}}
    assert loaded.metadata.to_json().items() >= expected.items()
    assert loaded.metadata.metrics["validation_loss"] == min(look.losses)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        through_peft = PeftModel.from_pretrained(load_model(base_dir), tmp_path / "out")
    torch.testing.assert_close(logits(through_peft), look.logits)


def test_trained_qkv_weights_merge_with_a_sparse_expert(settings_of, tmp_path):
    dense = train(settings_of("full-qkv", epochs=1), tmp_path / "dense")
    few = train(settings_of("sparse", epochs=1, score="gm", seed=1), tmp_path / "few")
    merged = merge([tmp_path / "dense", tmp_path / "few"], "overlap")
    for name, delta in merged.items():
        expected = (dense[name].to_dense() + few[name].to_dense()) / (1 + few[name].mask().float())
        torch.testing.assert_close(delta.to_dense(), expected)


@pytest.mark.parametrize("method", BASELINES)
def test_an_encoder_decoder_trains(settings_of, tmp_path, method):
    base = save_base(tmp_path / "t5", model=make_t5())
    train(settings_of(method, model=base, epochs=1), tmp_path / "out")
    name = "adapter_config.json" if method in ("lora", "full-qkv") else "config.json"
    config = json.loads((tmp_path / "out" / name).read_text())
    assert config.get("task_type", "SEQ_2_SEQ_LM") == "SEQ_2_SEQ_LM"


@pytest.mark.parametrize("method", ["lora", "full-qkv"])
def test_a_transposed_fused_projection_trains(settings_of, tmp_path, method):
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "n_positions": 128, "n_embd": 16, "n_layer": 1, "n_head": 2, "eos_token_id": 1}
    base = save_base(tmp_path / "gpt2", model=GPT2LMHeadModel(GPT2Config(**sizes)))
    look = Look()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fan_in_fan_out")
        train(settings_of(method, model=base, epochs=1), tmp_path / "out", callbacks=[look])
    plain = AutoModelForCausalLM.from_pretrained(base)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(plain, tmp_path / "out")), look.logits)


def test_targets_are_chosen_by_the_rules_of_the_sparse_method(settings_of, tmp_path):
    chosen = {"target_modules": ("q_proj", "up_proj"), "exclude_modules": ("0.self_attn.q_proj",), "epochs": 1}
    dense = train(settings_of("full-qkv", **chosen), tmp_path / "dense")
    assert set(dense) == set(train(settings_of("sparse", **chosen), tmp_path / "few"))
    assert len(dense) == 3
    layer = train(settings_of("full-qkv", layers=(1,), epochs=1), tmp_path / "layer")
    assert set(layer) == {f"model.layers.1.self_attn.{part}" for part in QKV}
    everywhere = find_targets(make_model(), SparseletConfig())
    assert set(everywhere) == {f"model.layers.{i}.self_attn.{p}" for i in (0, 1) for p in QKV}


# 16 bits


@pytest.mark.parametrize("method", ["full", "full-qkv"])
def test_over_a_bfloat16_base_the_trained_weights_are_float32_and_products_bfloat16(settings_of, tmp_path, base_dir, method):
    look, products = Look(), set()

    class Listen(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            for module in model.modules():
                if isinstance(module, torch.nn.Linear):
                    module.register_forward_hook(lambda m, _, output: products.add(output.dtype) if m.training else None)

    wanted = settings_of(method, dtype="bfloat16", learning_rate=1e-5, epochs=1)
    done = train(wanted, tmp_path / "out", callbacks=[look, Listen()])
    assert products == {torch.bfloat16}
    base = load_model(base_dir, "bfloat16")
    for name, parameter in base.named_parameters():
        trained = method == "full" or name.split(".")[-2] in QKV
        assert look.weights[name].dtype == (torch.float32 if trained else torch.bfloat16)
        if trained:  # steps that bfloat16 could not hold
            assert 0 < (look.weights[name] - parameter.float()).abs().max() < 1e-4
    if method == "full":
        loaded = AutoModelForCausalLM.from_pretrained(done.path)
        assert loaded.dtype == torch.float32
        assert all(torch.equal(p, look.weights[name]) for name, p in loaded.named_parameters())
        assert done.path == tmp_path / "out"
    else:
        assert {f["dtype"] for f in done.fingerprints.values()} == {"bfloat16"}
        assert all(0 < d.values.abs().max() < 1e-4 for d in done.values())


def test_lora_is_float32_over_a_bfloat16_base(settings_of, tmp_path):
    look = Look()
    train(settings_of("lora", dtype="bfloat16", epochs=1), tmp_path / "out", callbacks=[look])
    assert {p.dtype for name, p in look.weights.items() if "lora_" in name} == {torch.float32}


# What is refused


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("lora", {"density": 0.3}, "density does not apply to method lora; it is a setting of sparse"),
        ("full", {"score": "gm"}, "score does not apply to method full"),
        ("full-qkv", {"block_size": 4}, "block_size does not apply to method full-qkv"),
        ("multitask", {"task": ("a", "b"), "offload": True}, "offload does not apply to method multitask"),
        ("lora", {"scope": "global"}, "scope does not apply"),
        ("lora", {"layer_drop": True}, "layer_drop does not apply"),
        ("full", {"balance": "row"}, "balance does not apply"),
        ("full", {"reselect_every": 0}, "reselect_every does not apply"),
        ("full", {"selection_epochs": 2.0}, "selection_epochs does not apply"),
        ("full", {"score_batches": 2}, "score_batches does not apply"),
        (
            "full",
            {"layers": (1,)},
            "layers does not apply to method full; it is a setting of sparse, lora, shira, super-tuning, full-qkv",
        ),
        ("full", {"target_modules": ("q",)}, "target_modules does not apply"),
        ("multitask", {"task": ("a", "b"), "exclude_modules": ("q",)}, "exclude_modules does not apply"),
        ("sparse", {"lora_rank": 8}, "lora_rank does not apply to method sparse; it is a setting of lora"),
        ("full-qkv", {"lora_alpha": 8.0}, "lora_alpha does not apply"),
        ("lora", {"lora_rank": 0}, "lora_rank must be at least 1"),
        ("lora", {"lora_alpha": 0.0}, "lora_alpha must be above 0"),
        ("multitask", {}, "method multitask needs several tasks"),
        ("multitask", {"task": ("a",)}, "method multitask needs several tasks"),
        ("full", {"dtype": "float16"}, "dtype float16 does not go with method full"),
        ("full-qkv", {"dtype": "float16"}, "dtype float16 does not go with method full-qkv"),
        (
            "dense",
            {},
            "method must be one of sparse, lora, shira, super-tuning, full, full-qkv, fast-slow, multitask, got 'dense'",
        ),
        ("sparse", {"task": ()}, "task is missing"),
        ("sparse", {"task": ("a", "")}, "task is missing"),
    ],
    ids=lambda v: str(v) if not isinstance(v, dict) else "-".join(v) or "plain",
)
def test_settings_that_a_method_does_not_know_are_refused_by_name(method, changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainSettings(**{"task": "a", "method": method, **changes})


def test_one_task_is_the_same_in_all_spellings():
    assert TrainSettings(task=("a",)) == TrainSettings(task="a") == TrainSettings(task=["a"])
    assert TrainSettings(task=("a",)).task == "a"
    assert TrainSettings(task="a").tasks == ("a",)
    assert TrainSettings(task=["a", "b"]).task == TrainSettings(task=["a", "b"]).tasks == ("a", "b")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target_modules": ("nothing",)}, NoTargets, "no layer is chosen.*q_proj"),
        ({"layers": (7,)}, NoTargets, r"layers \[7\]"),
        ({"target_modules": ("self_attn",)}, ArgumentError, "self_attn is a LlamaAttention"),
    ],
)
@pytest.mark.parametrize("method", ["lora", "full-qkv"])
def test_targets_that_cannot_be_trained_are_refused_and_leave_the_model_alone(
    settings_of, tmp_path, base_dir, method, changes, error, message
):
    model = load_model(base_dir)
    with pytest.raises(error, match=message):
        train(settings_of(method, **changes), tmp_path / "out", base=(model, load_tokenizer(base_dir)))
    assert not list(tmp_path.iterdir())
    assert torch.equal(logits(model), logits(make_model()))
    assert all(p.requires_grad for p in model.parameters())


def test_two_targets_that_share_one_weight_are_refused(settings_of, tmp_path, base_dir):
    model = load_model(base_dir)
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight
    with pytest.raises(UnsupportedExpert, match=r"layers\.0\.self_attn\.q_proj shares its weight with model\.layers\.1\."):
        train(settings_of("full-qkv"), tmp_path / "out", base=(model, load_tokenizer(base_dir)))


def test_a_float16_base_that_was_handed_in_is_refused(settings_of, tmp_path, base_dir):
    model = load_model(base_dir, "float16")
    with pytest.raises(ConfigError, match="the base model is in float16"):
        train(settings_of("full"), tmp_path / "out", base=(model, load_tokenizer(base_dir)))
    assert {p.dtype for p in model.parameters()} == {torch.float16}


@pytest.mark.parametrize("method", ["full", "full-qkv", "lora", "sparse"])
def test_training_that_runs_away_writes_nothing(settings_of, tmp_path, base_dir, method):
    with pytest.raises((TrainingDiverged, NonFiniteScore), match=r"(?s)(nan|NaN|inf).*[lL]ower (the )?learning rate"):
        train(settings_of(method, learning_rate=4e9, weight_decay=4e9), tmp_path / "out")
    assert not (tmp_path / "out").exists()
