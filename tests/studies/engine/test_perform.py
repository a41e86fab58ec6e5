"""One job: what a training, a merge and an evaluation give, against the library called directly."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from helpers.tiny import save_base, save_task
from helpers.units import TASKS, InThisProcess, make_merge, make_score, make_train
from transformers import TrainerCallback

from sparselet import SparseAdapter, merge
from sparselet.adapter import AdapterFile
from sparselet.evaluation import EvalSettings, evaluate
from sparselet.formats import open_expert
from sparselet.models import load_model, load_tokenizer, model_fingerprint
from sparselet.studies.engine.jobs import make_jobs
from sparselet.studies.engine.perform import Performer
from sparselet.studies.engine.run import gather, run_study
from sparselet.studies.engine.store import Store
from sparselet.studies.engine.unit import closure
from sparselet.tasks.task import load_task
from sparselet.training import TrainSettings, train
from sparselet.training.run_directory import work_directory


def by_label(units, start):
    return next(unit for unit in closure(units).values() if unit.label.startswith(start))


def expert_of(store, units, start):
    return store.expert(by_label(units, start).key)


def done(store, places, unit):
    """What is told of a unit, once it is done or failed."""
    told = []
    for job in make_jobs([unit]):
        Performer(store, places).perform(job, told.append)
    return told


def score_of(places, adapter, task):
    asked = EvalSettings(max_new_tokens=6)
    model, tokenizer = load_model(places.model), load_tokenizer(places.model)
    (result,) = evaluate(model, tokenizer, [load_task(places.tasks[task])], adapter, asked)
    return result


def assert_scored(store, unit, result):
    found = store.result(unit.key)
    assert found["rougeL"] == result.scores["rougeL"]
    assert found["exact_match"] == result.scores["exact_match"]
    assert found["rows"] == len(found["scores"]) == result.rows
    assert sum(found["scores"]) / len(found["scores"]) == pytest.approx(result.scores["rougeL"], abs=1e-3)
    lines = (store.path / "units" / unit.key / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["answer"] for line in lines] == [answer for _, answer in result.predictions]


def test_training_is_that_of_the_library(undisturbed, units, places, tmp_path):
    shared = {"epochs": 2.0, "learning_rate": 1e-2, "batch_size": 2, "model": places.model}
    adapter = train(TrainSettings(task=places.tasks["backwards"], density=0.25, **shared), tmp_path / "straight")
    unit = by_label(units, "backwards: {'density'")
    there = undisturbed.expert(unit.key)
    assert (there / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "straight" / "adapter_model.safetensors"
    ).read_bytes()
    metrics = adapter.metadata.metrics
    assert undisturbed.result(unit.key) == {
        "parameters": adapter.nnz,
        "active_layers": 2,
        "validation_loss": metrics["validation_loss"],
        "steps": metrics["steps"],
    }


def test_trained_numbers_are_counted_by_method(undisturbed, units, places):
    found = {
        start: undisturbed.result(by_label(units, f"backwards: {{'{start}").key)
        for start in ("method': 'lora", "method': 'full")
    }
    model = load_model(places.model)
    assert found["method': 'full"]["parameters"] == sum(p.numel() for p in model.parameters())
    # q is 16×16, k and v are 8×16, of rank 2, in two layers.
    assert found["method': 'lora"]["parameters"] == 2 * 2 * (32 + 24 + 24)
    assert [one["active_layers"] for one in found.values()] == [2, 2]


def test_layers_without_an_entry_are_not_active(places, tmp_path):
    unit = make_train(places, ("backwards",), density=0.25, layers=[1], epochs=1.0)
    store = Store(tmp_path)
    assert done(store, places, unit)[-1].what == "done"
    assert store.result(unit.key)["active_layers"] == 1


def test_a_merge_is_made_in_memory_for_an_evaluation(undisturbed, units, places):
    experts = [expert_of(undisturbed, units, start) for start in ("backwards: {'method': 'full", "second: {'method': 'full")]
    merged = merge([open_expert(path, places.model) for path in experts], "uniform")
    unit = by_label(units, "third of uniform")
    assert_scored(undisturbed, unit, score_of(places, merged, "third"))
    assert not (undisturbed.path / "units" / unit.inputs[0].key).exists()


def test_a_second_stage_starts_from_the_merge(undisturbed, units, places, tmp_path):
    experts = [expert_of(undisturbed, units, start) for start in ("backwards: {'density", "second: {'density")]
    merge(experts, "overlap").save(tmp_path / "start")
    unit = by_label(units, "backwards+second")
    shared = {"learning_rate": 1e-2, "batch_size": 2, "model": places.model, "epochs": 1.0}
    tasks = tuple(places.tasks[task] for task in TASKS[:2])
    straight = train(TrainSettings(task=tasks, init_from=str(tmp_path / "start"), **shared), tmp_path / "straight")
    found = SparseAdapter.load(undisturbed.expert(unit.key))
    assert found.keys() == straight.keys()
    assert all(torch.equal(found[name].values, straight[name].values) for name in found)
    start = AdapterFile(tmp_path / "start")
    assert undisturbed.result(unit.inputs[0].key) == {"parameters": start.nnz, "active_layers": 2}
    assert_scored(undisturbed, by_label(units, "third of backwards+second"), score_of(places, straight, "third"))


def test_the_base_model_and_single_experts(undisturbed, units, places):
    assert_scored(undisturbed, by_label(units, "third of None"), score_of(places, None, "third"))
    for start in ("backwards: {'density", "backwards: {'method': 'lora", "backwards: {'method': 'full"):
        expert = open_expert(expert_of(undisturbed, units, start), places.model)
        assert_scored(undisturbed, by_label(units, f"backwards of {start}"), score_of(places, expert, "backwards"))


def test_with_an_experts_own_mask_only_its_entries_are_left(undisturbed, units, places):
    experts = [SparseAdapter.load(expert_of(undisturbed, units, start)) for start in ("backwards: {'density", "second: {'d")]
    merged = merge(experts, "overlap")
    own = {name: delta.to_dense() * experts[1][name].mask() for name, delta in merged.items()}
    model, tokenizer = load_model(places.model), load_tokenizer(places.model)
    for name, change in own.items():
        model.get_submodule(name).weight.data += change
    (result,) = evaluate(model, tokenizer, [load_task(places.tasks["second"])], None, EvalSettings(max_new_tokens=6))
    (unit,) = [unit for unit in units if unit.settings["mask"]]
    assert_scored(undisturbed, unit, result)


def test_the_base_model_is_loaded_once_and_comes_back(undisturbed, units, places, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr("sparselet.studies.engine.perform.load_model", lambda *a: loaded.append(load_model(*a)) or loaded[-1])
    performer, store = Performer(Store(tmp_path), places), Store(tmp_path)
    before = {name: p.clone() for name, p in load_model(places.model).named_parameters()}
    expert = make_train(places, ("third",), method="full", epochs=1.0)
    for unit in (expert, make_score(places, expert, "third"), make_score(places, None, "third")):
        for job in make_jobs([unit]):
            performer.perform(job, lambda report: None)
    assert len(loaded) == 1
    assert all(torch.equal(p, before[name]) for name, p in loaded[0].named_parameters())
    base = by_label(units, "third of None")
    assert store.result(base.key) == undisturbed.result(base.key)


def test_what_it_took_is_kept_apart_from_the_result(undisturbed, units):
    for unit in closure(units).values():
        if (result := undisturbed.result(unit.key)) is None:
            continue
        cost = undisturbed.cost(unit.key)
        assert set(cost) == {"seconds", "cpu_seconds", "peak_bytes", "bytes", "host"}
        assert not set(cost) & set(result)
        assert cost["seconds"] > 0
        assert cost["peak_bytes"] > 10**8
        assert (cost["bytes"] > 0) == (unit.kind != "evaluate")


# What fails


def test_changed_rows_are_refused_and_change_the_key(places, tmp_path):
    tasks = {name: shutil.copytree(place, tmp_path / name) for name, place in places.tasks.items()}
    there = replace(places, tasks={name: str(place) for name, place in tasks.items()})
    unit, score = make_train(there, ("backwards",)), make_score(there, None, "backwards")
    assert (unit.key, score.key) == (make_train(places, ("backwards",)).key, make_score(places, None, "backwards").key)
    save_task(tmp_path / "backwards", 7, 2, 4)
    assert make_train(there, ("backwards",)).key != unit.key
    assert make_score(there, None, "backwards").key != score.key
    for one, splits in ((unit, "train and validation"), (score, "test")):
        report = done(Store(tmp_path / "out"), there, one)[-1]
        assert report.what == "failed"
        assert f"the rows of {splits} have fingerprint" in report.error
        assert "the study was planned with" in report.error


def test_another_base_model_is_refused(places, tmp_path):
    other = replace(places, model=save_base(tmp_path / "base", seed=1))
    report = done(Store(tmp_path / "out"), other, make_score(places, None, "third"))[-1]
    assert report.what == "failed"
    assert f"its files have fingerprint {model_fingerprint(other.model)}, the study was planned with" in report.error


def test_a_task_without_a_place(places, tmp_path):
    here = replace(places, tasks={})
    report = done(Store(tmp_path), here, make_score(places, None, "third"))[-1]
    assert report.error == "task third has no place here; there are none."


def test_an_unknown_setting(places, tmp_path):
    report = done(Store(tmp_path), places, make_train(places, ("third",), dencity=0.1))[-1]
    assert "train has no setting 'dencity'; it has batch_size" in report.error


def test_one_evaluation_fails_and_the_others_of_its_subject_are_made(places, tmp_path):
    scores = [make_score(places, None, task) for task in TASKS]
    here = replace(places, tasks={name: place for name, place in places.tasks.items() if name != "second"})
    (job,) = make_jobs(scores)
    told, store = [], Store(tmp_path)
    Performer(store, here).perform(job, told.append)
    assert {r.key: r.what for r in told if r.what in ("done", "failed")} == {
        unit.key: "failed" if unit.settings["task"] == "second" else "done" for unit in scores
    }
    assert set(store.results(unit.key for unit in scores)) == {scores[0].key, scores[2].key}


# What was interrupted


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture
def interrupted(places, tmp_path):
    """A store, and a training in it that was stopped in its second epoch."""
    unit, store = make_train(places, ("backwards",), density=0.25, block_size=1), Store(tmp_path / "out")
    performer = Performer(store, places)
    output = store.directory(unit) / "expert"
    with pytest.raises(KeyboardInterrupt):
        train(performer._train_settings(unit), output, callbacks=[StopAt(5)])
    assert list(work_directory(output).glob("checkpoint-3/complete"))
    return store, unit


def same_as(undisturbed, store, unit):
    weights = "expert/adapter_model.safetensors"
    here, there = (one.path / "units" / unit.key for one in (store, undisturbed))
    return (here / weights).read_bytes() == (there / weights).read_bytes() and store.result(unit.key) == undisturbed.result(
        unit.key
    )


def test_a_training_goes_on_from_its_checkpoint(interrupted, undisturbed, places):
    store, unit = interrupted
    told = done(store, places, unit)
    assert told[-1].what == "done"
    assert min(report.fraction for report in told if report.what == "progress") > 0.5
    assert same_as(undisturbed, store, unit)


@pytest.mark.parametrize("damage", ["checkpoint", "settings"])
def test_a_training_that_cannot_be_gone_on_with_starts_anew(interrupted, undisturbed, places, damage):
    store, unit = interrupted
    work = work_directory(store.path / "units" / unit.key / "expert")
    if damage == "checkpoint":
        (work / "checkpoint-3" / "adapter_model.safetensors").write_bytes(b"no")
    else:
        (work / "run.json").write_text("{}")
    told = done(store, places, unit)
    assert told[-1].what == "done"
    assert min(report.fraction for report in told if report.what == "progress") < 0.5
    assert same_as(undisturbed, store, unit)


def test_a_training_whose_result_was_not_written_is_not_done_again(undisturbed, units, places, tmp_path):
    unit, store = by_label(units, "backwards: {'density"), Store(tmp_path)
    shutil.copytree(undisturbed.expert(unit.key), store.directory(unit) / "expert")
    assert [report.what for report in done(store, places, unit)] == ["started", "done"]
    assert store.result(unit.key) == undisturbed.result(unit.key)


def test_on_another_file_system_inputs_are_fetched_and_results_the_same(undisturbed, units, places, tmp_path):
    wanted = [unit for unit in units if unit.inputs and unit.inputs[0].label == "overlap" and unit.settings["mask"]]
    first = Store(f"file://{tmp_path}/out")
    experts = [unit for unit in closure(wanted).values() if unit.kind == "train"]
    assert not run_study(experts, first, InThisProcess(first, places)).failed
    second = Store(f"file://{tmp_path}/out")  # with nothing at hand
    assert not run_study(wanted, second, InThisProcess(second, places)).failed
    assert gather(wanted, Store(f"file://{tmp_path}/out")) == gather(wanted, undisturbed)
    assert make_merge(experts).key in closure(wanted)
