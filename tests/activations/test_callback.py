"""`ProbeCallback` in a training run: when it probes, and that its numbers are those of `probe`."""

import json

import pytest

import sparselet as sl
from sparselet.activations.probe import probe
from sparselet.activations.statistics import outlier_channels, sparsity, without_channels
from sparselet.errors import ArgumentError
from sparselet.models import load_model, load_tokenizer
from sparselet.tasks.rows import Row


def test_a_run_records_its_sets_before_along_and_after(base_dir, task_dir, tmp_path):
    model, tokenizer = load_model(base_dir), load_tokenizer(base_dir)
    sets = {
        "familiar": sl.probe_rows(model, tokenizer, [Row("tant?", "tnat"), Row("tbee?", "eebt")]),
        "unfamiliar": sl.probe_rows(model, tokenizer, [Row("12+3", "15")]),
    }
    rows = [*sets["familiar"], *sets["unfamiliar"]]
    before = probe(model, rows, [-1])
    callback = sl.ProbeCallback(sets, steps=2, file=tmp_path / "probes.json")
    sl.train(
        task_dir, model=base_dir, epochs=1, batch_size=4, density=0.25, score="gm", chat_template=False, learning_rate=0.05,
        callbacks=[callback],
    )  # fmt: skip
    assert [point["step"] for point in callback.history] == [0, 2, 3]
    first, last = callback.history[0], callback.history[-1]
    states = before.states[0, :, 0]
    (layer,) = first["familiar"]["layers"].values()
    assert layer["raw"] == pytest.approx(sparsity(states[:2]).means(), rel=1e-4)
    rest = without_channels(states[2:], outlier_channels(states))
    (layer,) = first["unfamiliar"]["layers"].values()
    assert layer["without_outliers"] == pytest.approx(sparsity(rest).means(), rel=1e-4)
    assert first["familiar"]["loss"] == pytest.approx(float(before.losses[:2].mean()), rel=1e-4)
    assert last["familiar"]["loss"] != pytest.approx(first["familiar"]["loss"], rel=1e-3)
    assert json.loads((tmp_path / "probes.json").read_text())["probes"] == callback.history


def test_sets_without_rows_are_refused():
    for sets, steps in (({}, 1), ({"familiar": []}, 1), ({"familiar": [1]}, 0)):
        with pytest.raises(ArgumentError, match="named sets of at least one row"):
            sl.ProbeCallback(sets, steps=steps)
