"""The default learning rate, the search for one, and what a run records of it."""

import json
import math
import sys

import pytest
from helpers.tiny import make_model

from sparselet.errors import ConfigError, TrainingDiverged
from sparselet.training import TrainSettings, train
from sparselet.training.learning_rate import TRIES, WIDTH, default_learning_rate, search_learning_rate
from sparselet.training.run_directory import RUN_FILE, work_directory


def test_the_default_falls_with_the_width_and_is_highest_for_sparse_experts():
    config = make_model().config
    rates = {method: default_learning_rate(method, config) for method in ("sparse", "lora", "full", "full-qkv")}
    assert rates["sparse"] > rates["lora"] > rates["full"] == rates["full-qkv"]
    config.hidden_size = WIDTH
    narrow = default_learning_rate("sparse", config)
    config.hidden_size = 4 * WIDTH
    assert default_learning_rate("sparse", config) == pytest.approx(narrow / 4)


@pytest.mark.parametrize("best", [1e-4, 1e-3, 8e-3])
def test_a_search_walks_to_the_lowest_loss(best):
    rate, losses = search_learning_rate(1e-3, lambda rate: (math.log(rate / best)) ** 2)
    assert abs(math.log2(rate / best)) <= 0.5
    assert len(losses) <= TRIES
    assert losses[rate] == min(losses.values())


def test_a_search_goes_down_from_rates_that_diverge():
    def loss(rate):
        if rate > 3e-4:
            raise TrainingDiverged("too high")
        return 1 - rate

    rate, losses = search_learning_rate(1e-3, loss)
    assert rate <= 3e-4
    assert math.inf in losses.values()

    def diverge(rate):
        raise TrainingDiverged("always")

    with pytest.raises(TrainingDiverged, match="look at the rows"):
        search_learning_rate(1e-3, diverge)


@pytest.mark.parametrize("method", ["sparse"])
def test_a_run_records_its_rate_and_a_search_is_repeatable(settings_of, tmp_path, method, monkeypatch):
    monkeypatch.setattr(sys.modules[train.__module__], "SHORT_STEPS", 4)  # the package has the function under the module's name
    monkeypatch.setattr("sparselet.training.learning_rate.TRIES", 3)

    def rate(name, **changes):
        train(settings_of(method, epochs=1, **changes), tmp_path / name)
        assert not work_directory(tmp_path / name).exists()
        return json.loads((tmp_path / name / RUN_FILE).read_text())["learning_rate"]

    config = make_model().config
    assert rate("rule", learning_rate=None) == {"peak": default_learning_rate(method, config)}
    assert rate("given", learning_rate=3e-3) == {"peak": 3e-3}
    first, second = rate("auto", learning_rate="auto"), rate("again", learning_rate="auto")
    assert first["losses"] == second["losses"]
    assert first["peak"] == second["peak"]
    assert first["losses"][f"{first['peak']:.3g}"] == min(first["losses"].values())
    assert first["seconds"] > 0


@pytest.mark.parametrize("rate", [0, -1.0, "high", True, math.nan])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises(ConfigError, match="learning_rate"):
        TrainSettings(task="a", learning_rate=rate)
