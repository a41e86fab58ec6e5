"""`freeze`: entries of other adapters stay bit for bit through training, whatever is trained and however it goes on."""

import pytest
import torch
from helpers.tiny import make_adapter, make_model
from helpers.training_runs import StopAt, bytes_of, killed_run
from transformers import AutoModelForCausalLM, TrainerCallback

from sparselet import SparseAdapter
from sparselet.apply import apply_in_place
from sparselet.errors import ConfigError, UnknownTarget, WrongBase
from sparselet.training import TrainSettings, train
from sparselet.training.run_directory import work_directory

DECAY = {"weight_decay": 0.5, "learning_rate": 5e-2}


def part_of(adapter, fraction, seed=0):
    """A random part of an adapter's entries, as an adapter."""
    generator, deltas = torch.Generator().manual_seed(seed), {}
    for name, delta in adapter.items():
        mask = delta.mask() & (torch.rand(delta.shape, generator=generator) < fraction)
        deltas[name] = delta.restrict(mask)
    return SparseAdapter(deltas, adapter.metadata, adapter.fingerprints)


@pytest.fixture(scope="module")
def cores(tmp_path_factory):
    """An expert and one with tiles, each with a core, by name: (adapter, path, core, path of the core)."""
    root, model, made = tmp_path_factory.mktemp("cores"), make_model(), {}
    for name, block, seed in (("entries", 1, 1), ("tiles", 4, 2)):
        expert = make_adapter(model, block, density=0.5, seed=seed, task=name)
        expert = SparseAdapter({n: 0.1 * d for n, d in expert.items()}, expert.metadata, expert.fingerprints)
        core = part_of(expert, 0.5)
        made[name] = (expert, str(expert.save(root / name)), core, str(core.save(root / f"{name}-core")))
    return made


def bits(tensor):
    return tensor.view(torch.int32)


FRESH = [
    {"when": "static", "score": "random"},
    {"when": "static", "score": "magnitude"},
    {"when": "static", "score": "gm", "block_size": 2, "density": 0.1},
    {"when": "static", "score": "gm", "scope": "global"},
    {"when": "static", "score": "gm", "balance": "row"},
    {"when": "refresh", "score": "gm", "reselect_every": 1, "selection_epochs": 1.0},
    {"when": "paper", "score": "mcs", "reselect_every": 2},
    {"when": "paper", "score": "gd", "initial_mask": "random"},
]


@pytest.mark.parametrize("selection", FRESH, ids=lambda selection: "-".join(map(str, selection.values())))
def test_a_new_mask_leaves_the_frozen_entries_out(settings_of, cores, tmp_path, selection):
    core, path = cores["entries"][2:]
    trained = train(settings_of("sparse", **DECAY, freeze=(path,), **{"density": 0.25, **selection}), tmp_path / "out")
    kept = settings_of("sparse", **DECAY, **{"density": 0.25, **selection})
    assert trained.nnz == train(kept, tmp_path / "kept").nnz
    assert sum(delta.overlap(core[name]) for name, delta in trained.items()) == 0
    assert all(delta.values.any() for delta in trained.values() if delta.nnz)


@pytest.mark.parametrize("kind", ["entries", "tiles"])
def test_a_second_stage_keeps_the_frozen_values_and_trains_the_others(settings_of, cores, tmp_path, kind):
    expert, start, core, path = cores[kind]
    trained = train(settings_of("sparse", init_from=start, freeze=(path,), **DECAY), tmp_path / "out")
    for name, delta in trained.items():
        before, after, frozen = expert[name].to_dense(), delta.to_dense(), core[name].mask()
        assert torch.equal(bits(after[frozen]), bits(before[frozen]))
        free = expert[name].mask() & ~frozen
        assert (after[free] != before[free]).float().mean() > 0.9


@pytest.mark.parametrize("method", ["full", "full-qkv", "multitask"])
@pytest.mark.parametrize("second", [False, True], ids=["base", "second"])
def test_weights_keep_the_frozen_entries_under_weight_decay(settings_of, cores, tmp_path, method, second):
    expert, start, core, path = cores["entries"]
    stage = {"init_from": start} if second else {}
    trained = train(settings_of(method, freeze=(path,), **DECAY, **stage), tmp_path / "out")
    expected = make_model()
    if second:
        apply_in_place(expected, expert)
    found = make_model() if method == "full-qkv" else AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    if method == "full-qkv":
        apply_in_place(found, trained)
        for name in expert:
            frozen, own = core[name].mask(), expert[name].to_dense() if second else torch.zeros(expert[name].shape)
            assert torch.equal(bits(trained[name].to_dense()[frozen]), bits(own[frozen]))
    for name in expert:
        before, after = (model.get_submodule(name).weight.detach() for model in (expected, found))
        frozen = core[name].mask()
        assert torch.equal(bits(after[frozen]), bits(before[frozen]))
        assert (after[~frozen] != before[~frozen]).float().mean() > 0.9


def test_the_other_entries_are_trained_as_with_gradients_struck_out(settings_of, cores, tmp_path):
    core, path = cores["entries"][2:]

    class Strike(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            for name, parameter in model.named_parameters():
                if name.removesuffix(".weight") in core:
                    mask = core[name.removesuffix(".weight")].mask()
                    parameter.register_hook(lambda gradient, mask=mask: gradient * ~mask)

    frozen = train(settings_of("full-qkv", freeze=(path,)), tmp_path / "frozen")
    struck = train(settings_of("full-qkv"), tmp_path / "struck", callbacks=[Strike()])
    for name, delta in frozen.items():
        torch.testing.assert_close(delta.to_dense(), struck[name].to_dense(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["sparse", "full"])
def test_a_resumed_run_keeps_them_too(settings_of, cores, tmp_path, method):
    start, path = cores["entries"][1], cores["entries"][3]
    settings = settings_of(method, init_from=start, freeze=(path,), save_steps=2, **DECAY)
    train(settings, tmp_path / "whole")
    killed_run(settings, tmp_path / "stopped", step=5)
    train(settings, tmp_path / "stopped", resume=True)
    assert bytes_of(tmp_path / "stopped") == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize("selection", [FRESH[0], FRESH[5], FRESH[6]], ids=["static", "refresh", "paper"])
def test_a_resumed_selection_leaves_them_out_too(settings_of, cores, tmp_path, selection):
    core, path = cores["entries"][2:]
    settings = settings_of("sparse", freeze=(path,), density=0.25, save_steps=2, **DECAY, **selection)
    whole = train(settings, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "stopped", callbacks=[StopAt(5)])
    train(settings, tmp_path / "stopped", resume=True)
    assert bytes_of(tmp_path / "stopped") == bytes_of(tmp_path / "whole")
    assert sum(delta.overlap(core[name]) for name, delta in whole.items()) == 0


def test_another_mask_cannot_be_resumed_with(settings_of, cores, tmp_path):
    path = str(cores["entries"][2].save(tmp_path / "core"))
    settings = settings_of("sparse", freeze=(path,), save_steps=1, density=0.1)
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "out", callbacks=[StopAt(3)])
    part_of(cores["entries"][2], 0.5, seed=9).save(path)
    with pytest.raises(ConfigError, match="was started with other adapters at"):
        train(settings, tmp_path / "out", resume=True)


def test_several_masks_are_joined(settings_of, cores, tmp_path):
    first, second = (part_of(cores["entries"][0], 0.3, seed) for seed in (3, 4))
    paths = tuple(str(each.save(tmp_path / str(i))) for i, each in enumerate((first, second)))
    trained = train(settings_of("sparse", init_from=cores["entries"][1], freeze=paths, **DECAY), tmp_path / "out")
    for name, delta in trained.items():
        frozen = first[name].mask() | second[name].mask()
        assert torch.equal(delta.to_dense()[frozen], cores["entries"][0][name].to_dense()[frozen])


def test_the_base_is_as_it_was_after_a_run_that_fails(settings_of, cores, tmp_path, base_dir):
    from sparselet.models import load_model, load_tokenizer

    model = load_model(base_dir)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = settings_of("full-qkv", freeze=(cores["entries"][3],), **DECAY)
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "out", base=(model, load_tokenizer(base_dir)), callbacks=[StopAt(2)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_a_mask_of_another_base_is_refused_before_any_work(settings_of, tmp_path):
    path = str(make_adapter(make_model(seed=5)).save(tmp_path / "other"))
    for method in ("sparse", "full"):
        with pytest.raises(WrongBase, match=f"freeze: {path}: adapter and model: the base weights differ"):
            train(settings_of(method, freeze=(path,)), tmp_path / "out")
    deep = str(make_adapter(make_model(num_hidden_layers=3)).save(tmp_path / "deep"))
    with pytest.raises(UnknownTarget, match="freeze: "):
        train(settings_of("sparse", freeze=(deep,)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not work_directory(tmp_path / "out").exists()


def test_the_flag_takes_several_adapters(cli, refused, cores, base_dir, task_dir, tmp_path):
    (_, start, _, first), second = cores["entries"], cores["tiles"][3]
    flags = ("--model", base_dir, "--epochs", 1, "--no-chat-template", "--init-from", start)
    code, _, err = cli("train", "--task", task_dir, "--out", tmp_path / "out", *flags, "--freeze", first, second)
    assert code == 0, err
    trained = SparseAdapter.load(tmp_path / "out")
    for name, delta in cores["entries"][0].items():
        frozen = delta.mask() & (cores["entries"][2][name].mask() | cores["tiles"][2][name].mask())
        assert torch.equal(trained[name].to_dense()[frozen], delta.to_dense()[frozen])
    wrong = str(make_adapter(make_model(seed=5)).save(tmp_path / "other"))
    assert "--freeze: " in refused("train", "--task", task_dir, "--out", tmp_path / "no", *flags, "--freeze", wrong)


def test_what_it_does_not_go_with_is_refused(settings_of, cores, tmp_path):
    with pytest.raises(ConfigError, match="freeze does not apply to method lora"):
        TrainSettings(task="a", method="lora", freeze=("core",))
    start = cores["entries"][1]
    with pytest.raises(ConfigError, match="freeze: the adapters cover every entry"):
        train(settings_of("sparse", init_from=start, freeze=(start,)), tmp_path / "out")
