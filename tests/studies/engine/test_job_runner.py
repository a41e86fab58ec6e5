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
from sparselet.errors import ConfigError
from sparselet.evaluation import EvalSettings, evaluate
from sparselet.formats import open_expert
from sparselet.models import load_model, load_tokenizer, model_fingerprint
from sparselet.studies.engine.job_runner import JobRunner
from sparselet.studies.engine.jobs import make_jobs
from sparselet.studies.engine.run import read_measures, run_study
from sparselet.studies.engine.store import Store
from sparselet.studies.engine.unit import closure, units_from_json, units_to_json
from sparselet.studies.engine.unit_results import MergeUnitResult, TrainUnitResult
from sparselet.tasks.task import load_task
from sparselet.training import TrainSettings, train
from sparselet.training.run_directory import work_directory

JOB_RUNNER = "sparselet.studies.engine.job_runner"


def by_label(units, start):
    return next(unit for unit in closure(units).values() if unit.label.startswith(start))


def expert_of(store, units, start):
    return store.expert(by_label(units, start).key)


def done(store, sources, unit):
    """What is told of a unit, once it is done or failed."""
    told = []
    for job in make_jobs([unit]):
        JobRunner(store, sources).run(job, told.append)
    return told


def score_of(sources, adapter, task):
    asked = EvalSettings(max_new_tokens=6)
    model, tokenizer = load_model(sources.model), load_tokenizer(sources.model)
    (result,) = evaluate(model, tokenizer, [load_task(sources.tasks[task])], adapter, asked)
    return result


def assert_scored(store, unit, result):
    found = store.result(unit)
    assert found.metrics["rougeL"] == result.scores["rougeL"]
    assert found.metrics["exact_match"] == result.scores["exact_match"]
    assert found.rows == len(found.row_scores) == result.rows
    assert sum(found.row_scores) / len(found.row_scores) == pytest.approx(result.scores["rougeL"], abs=1e-3)
    lines = (store.path / "units" / unit.key / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["answer"] for line in lines] == [answer for _, answer in result.predictions]


def test_training_is_that_of_the_library(undisturbed, units, sources, tmp_path):
    shared = {"epochs": 2.0, "learning_rate": 1e-2, "batch_size": 2, "model": sources.model}
    adapter = train(TrainSettings(task=sources.tasks["backwards"], density=0.25, **shared), tmp_path / "straight")
    unit = by_label(units, "backwards: {'density'")
    there = undisturbed.expert(unit.key)
    assert (there / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "straight" / "adapter_model.safetensors"
    ).read_bytes()
    metrics = adapter.metadata.metrics
    assert undisturbed.result(unit) == TrainUnitResult(adapter.nnz, 2, metrics["validation_loss"], metrics["steps"])


def test_trained_numbers_are_counted_by_method(undisturbed, units, sources):
    found = {
        start: undisturbed.result(by_label(units, f"backwards: {{'{start}")) for start in ("method': 'lora", "method': 'full")
    }
    model = load_model(sources.model)
    assert found["method': 'full"].parameters == sum(p.numel() for p in model.parameters())
    # q is 16×16, k and v are 8×16, of rank 2, in two layers.
    assert found["method': 'lora"].parameters == 2 * 2 * (32 + 24 + 24)
    assert [one.active_layers for one in found.values()] == [2, 2]


def test_layers_without_an_entry_are_not_active(sources, tmp_path):
    unit = make_train(sources, ("backwards",), density=0.25, layers=[1], epochs=1.0)
    store = Store(tmp_path)
    assert done(store, sources, unit)[-1].state == "done"
    assert store.result(unit).active_layers == 1


def test_a_merge_is_made_in_memory_for_an_evaluation(undisturbed, units, sources):
    experts = [expert_of(undisturbed, units, start) for start in ("backwards: {'method': 'full", "second: {'method': 'full")]
    merged = merge([open_expert(path, sources.model) for path in experts], "uniform")
    unit = by_label(units, "third of uniform")
    assert_scored(undisturbed, unit, score_of(sources, merged, "third"))
    assert not (undisturbed.path / "units" / unit.inputs[0].key).exists()


def test_a_second_stage_starts_from_the_merge(undisturbed, units, sources, tmp_path):
    experts = [expert_of(undisturbed, units, start) for start in ("backwards: {'density", "second: {'density")]
    merge(experts, "overlap").save(tmp_path / "start")
    unit = by_label(units, "backwards+second")
    shared = {"learning_rate": 1e-2, "batch_size": 2, "model": sources.model, "epochs": 1.0}
    tasks = tuple(sources.tasks[task] for task in TASKS[:2])
    straight = train(TrainSettings(task=tasks, init_from=str(tmp_path / "start"), **shared), tmp_path / "straight")
    found = SparseAdapter.load(undisturbed.expert(unit.key))
    assert found.keys() == straight.keys()
    assert all(torch.equal(found[name].values, straight[name].values) for name in found)
    start = AdapterFile(tmp_path / "start")
    assert undisturbed.result(unit.inputs[0]) == MergeUnitResult(start.nnz, 2)
    assert_scored(undisturbed, by_label(units, "third of backwards+second"), score_of(sources, straight, "third"))


def test_the_base_model_and_single_experts(undisturbed, units, sources):
    assert_scored(undisturbed, by_label(units, "third of None"), score_of(sources, None, "third"))
    for start in ("backwards: {'density", "backwards: {'method': 'lora", "backwards: {'method': 'full"):
        expert = open_expert(expert_of(undisturbed, units, start), sources.model)
        assert_scored(undisturbed, by_label(units, f"backwards of {start}"), score_of(sources, expert, "backwards"))


def test_with_an_experts_own_mask_only_its_entries_are_left(undisturbed, units, sources):
    experts = [SparseAdapter.load(expert_of(undisturbed, units, start)) for start in ("backwards: {'density", "second: {'d")]
    merged = merge(experts, "overlap")
    own = {name: delta.to_dense() * experts[1][name].mask() for name, delta in merged.items()}
    model, tokenizer = load_model(sources.model), load_tokenizer(sources.model)
    for name, change in own.items():
        model.get_submodule(name).weight.data += change
    (result,) = evaluate(model, tokenizer, [load_task(sources.tasks["second"])], None, EvalSettings(max_new_tokens=6))
    (unit,) = [unit for unit in units if unit.kind == "evaluate" and unit.mask]
    assert_scored(undisturbed, unit, result)


def test_the_base_model_is_loaded_once_and_comes_back(undisturbed, units, sources, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(JOB_RUNNER + ".load_model", lambda *a: loaded.append(load_model(*a)) or loaded[-1])
    runner, store = JobRunner(Store(tmp_path), sources), Store(tmp_path)
    before = {name: p.clone() for name, p in load_model(sources.model).named_parameters()}
    expert = make_train(sources, ("third",), method="full", epochs=1.0)
    for unit in (expert, make_score(sources, expert, "third"), make_score(sources, None, "third")):
        for job in make_jobs([unit]):
            runner.run(job, lambda report: None)
    assert len(loaded) == 1
    assert all(torch.equal(p, before[name]) for name, p in loaded[0].named_parameters())
    base = by_label(units, "third of None")
    assert store.result(base) == undisturbed.result(base)


def test_what_it_took_is_kept_apart_from_the_result(undisturbed, units):
    for unit in closure(units).values():
        if (result := undisturbed.result(unit)) is None:
            continue
        cost = undisturbed.cost(unit.key)
        assert not set(vars(cost)) & set(result.to_json())
        assert cost.seconds > 0
        assert cost.cpu_seconds > 0
        assert cost.host
        assert cost.peak_bytes > 10**8
        assert (cost.bytes > 0) == (unit.kind != "evaluate")


# What fails


def test_changed_rows_are_refused_and_change_the_key(sources, tmp_path):
    tasks = {name: shutil.copytree(place, tmp_path / name) for name, place in sources.tasks.items()}
    there = replace(sources, tasks={name: str(place) for name, place in tasks.items()})
    unit, score = make_train(there, ("backwards",)), make_score(there, None, "backwards")
    assert (unit.key, score.key) == (make_train(sources, ("backwards",)).key, make_score(sources, None, "backwards").key)
    save_task(tmp_path / "backwards", 7, 2, 4)
    assert make_train(there, ("backwards",)).key != unit.key
    assert make_score(there, None, "backwards").key != score.key
    for one, splits in ((unit, "train and validation"), (score, "test")):
        report = done(Store(tmp_path / "out"), there, one)[-1]
        assert report.state == "failed"
        assert f"the rows of {splits} have fingerprint" in report.error
        assert "the study was planned with" in report.error


def test_another_base_model_is_refused(sources, tmp_path):
    other = replace(sources, model=save_base(tmp_path / "base", seed=1))
    report = done(Store(tmp_path / "out"), other, make_score(sources, None, "third"))[-1]
    assert report.state == "failed"
    assert f"its files have fingerprint {model_fingerprint(other.model)}, the study was planned with" in report.error


def test_a_task_without_a_place(sources, tmp_path):
    here = replace(sources, tasks={})
    report = done(Store(tmp_path), here, make_score(sources, None, "third"))[-1]
    assert report.error == "task third has no source; there are none."


def test_an_unknown_setting(sources):
    (content,) = units_to_json([make_train(sources, ("third",))])
    content["settings"]["train"]["dencity"] = 0.1
    with pytest.raises(ConfigError, match="train has no setting 'dencity'; it has balance, batch_size"):
        units_from_json([content])


def test_one_evaluation_fails_and_the_others_of_its_subject_are_made(sources, tmp_path):
    scores = [make_score(sources, None, task) for task in TASKS]
    here = replace(sources, tasks={name: place for name, place in sources.tasks.items() if name != "second"})
    (job,) = make_jobs(scores)
    told, store = [], Store(tmp_path)
    JobRunner(store, here).run(job, told.append)
    assert {r.key: r.state for r in told if r.state in ("done", "failed")} == {
        unit.key: "failed" if unit.task == "second" else "done" for unit in scores
    }
    assert set(store.results(scores)) == {scores[0].key, scores[2].key}


# What was interrupted


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture
def interrupted(sources, tmp_path):
    """A store, and a training in it that was stopped in its second epoch."""
    unit, store = make_train(sources, ("backwards",), density=0.25, block_size=1), Store(tmp_path / "out")
    runner = JobRunner(store, sources)
    output = store.directory(unit) / "expert"
    with pytest.raises(KeyboardInterrupt):
        train(runner.train_settings(unit), output, callbacks=[StopAt(5)])
    assert list(work_directory(output).glob("checkpoint-3/complete"))
    return store, unit


def same_as(undisturbed, store, unit):
    weights = "expert/adapter_model.safetensors"
    here, there = (one.path / "units" / unit.key for one in (store, undisturbed))
    return (here / weights).read_bytes() == (there / weights).read_bytes() and store.result(unit) == undisturbed.result(unit)


def test_a_training_goes_on_from_its_checkpoint(interrupted, undisturbed, sources):
    store, unit = interrupted
    told = done(store, sources, unit)
    assert told[-1].state == "done"
    assert min(report.fraction for report in told if report.state == "progress") > 0.5
    assert same_as(undisturbed, store, unit)


@pytest.mark.parametrize("damage", ["checkpoint", "settings"])
def test_a_training_that_cannot_be_gone_on_with_starts_anew(interrupted, undisturbed, sources, damage):
    store, unit = interrupted
    work = work_directory(store.path / "units" / unit.key / "expert")
    if damage == "checkpoint":
        (work / "checkpoint-3" / "adapter_model.safetensors").write_bytes(b"no")
    else:
        (work / "run.json").write_text("{}")
    told = done(store, sources, unit)
    assert told[-1].state == "done"
    assert min(report.fraction for report in told if report.state == "progress") < 0.5
    assert same_as(undisturbed, store, unit)


def test_a_training_whose_result_was_not_written_is_not_done_again(undisturbed, units, sources, tmp_path):
    unit, store = by_label(units, "backwards: {'density"), Store(tmp_path)
    shutil.copytree(undisturbed.expert(unit.key), store.directory(unit) / "expert")
    assert [report.state for report in done(store, sources, unit)] == ["started", "done"]
    assert store.result(unit) == undisturbed.result(unit)


def test_on_another_file_system_inputs_are_fetched_and_results_the_same(undisturbed, units, sources, tmp_path):
    wanted = [unit for unit in units if unit.inputs and unit.inputs[0].label == "overlap" and unit.mask]
    first = Store(f"file://{tmp_path}/out")
    experts = [unit for unit in closure(wanted).values() if unit.kind == "train"]
    assert not run_study(experts, first, InThisProcess(first, sources)).failed
    second = Store(f"file://{tmp_path}/out")  # with nothing at hand
    assert not run_study(wanted, second, InThisProcess(second, sources)).failed
    assert read_measures(wanted, Store(f"file://{tmp_path}/out")) == read_measures(wanted, undisturbed)
    assert make_merge(experts).key in closure(wanted)
