"""Noise in the place of other experts' changes: where it stands, how large it is, and that nothing of it stays."""

import pytest
import torch
from helpers.tiny import make_model
from peft import get_peft_model
from transformers import AutoTokenizer, TrainerCallback

from sparselet import SparseletConfig
from sparselet.errors import ConfigError
from sparselet.training import TrainSettings, train
from sparselet.training.merge_noise import MergeNoise
from sparselet.tuner import sparselet_layers


class State:
    global_step = 3


def noisy(others, density=0.2, scale=0.5):
    model = get_peft_model(make_model(), SparseletConfig(density=density))
    for layer in sparselet_layers(model).values():
        layer.sparse_values["default"].data.fill_(scale)
    before = {name: layer.base_weight.detach().clone() for name, layer in sparselet_layers(model).items()}
    noise = MergeNoise(others, seed=1)
    noise.on_step_begin(None, State(), None, model=model)
    changes = {name: layer.base_weight.detach() - before[name] for name, layer in sparselet_layers(model).items()}
    return model, before, noise, changes


def test_noise_stands_outside_of_the_mask_and_is_taken_back_to_the_bit():
    model, before, noise, changes = noisy(others=4)
    for name, layer in sparselet_layers(model).items():
        mask = layer.delta("default").mask()
        assert changes[name].any()
        assert not changes[name][mask].any()
    noise.on_step_end(None, State(), None)
    assert all(torch.equal(layer.base_weight, before[name]) for name, layer in sparselet_layers(model).items())


def test_it_has_the_sparsity_and_the_size_of_other_experts():
    _, _, _, changes = noisy(others=1)
    entries = torch.cat([change.reshape(-1) for change in changes.values()])
    outside = 0.8 * len(entries)
    assert (entries != 0).sum() / outside == pytest.approx(0.2, abs=0.03)
    assert entries[entries != 0].abs().mean() == pytest.approx(0.5, rel=0.2)  # the mean of |Laplace(0, b)| is b


def test_draws_follow_the_step():
    first, again = noisy(4)[3], noisy(4)[3]
    assert all(torch.equal(first[name], again[name]) for name in first)


class Watch(TrainerCallback):
    """The base weights at the end of each step, and an error in one of them."""

    def __init__(self, stop=None):
        self.stop, self.weights = stop, []

    def on_step_begin(self, args, state, control, **kwargs):
        layers = sparselet_layers(kwargs["model"])
        self.weights.append({name: layer.base_weight.detach().clone() for name, layer in layers.items()})
        if state.global_step == self.stop:
            raise KeyboardInterrupt


def test_a_run_with_noise_trains_and_a_stop_in_a_step_leaves_the_base_as_it_was(settings_of, tmp_path):
    settings = settings_of("sparse", when="static", score="random", merge_noise=3)
    base = make_model()
    plain = train(settings_of("sparse", when="static", score="random"), tmp_path / "plain")
    assert not torch.equal(train(settings, tmp_path / "noisy")[name := next(iter(plain))].values, plain[name].values)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    watch = Watch(stop=2)
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "stopped", base=(base, tokenizer), callbacks=[watch])
    assert any(not torch.equal(weight, before[f"{name}.weight"]) for name, weight in watch.weights[-1].items())
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_noise_needs_a_mask_that_is_fixed():
    with pytest.raises(ConfigError, match="static"):
        TrainSettings(task="a", when="paper", score="mcs", merge_noise=2)
