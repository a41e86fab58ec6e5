"""Core isolation end to end on tiny models: its steps, what stays frozen, stops and reruns, and what it refuses."""

import json

import pytest
import torch
from helpers.tiny import save_task, write_rows
from helpers.training_runs import StopAt, bytes_of

from sparselet import IsolateSettings, SparseAdapter, TrainSettings, core, isolate, merge
from sparselet.errors import ConfigError, DensityOutOfRange, OutputExists

RUN = {"epochs": 1, "batch_size": 4, "learning_rate": 5e-2, "weight_decay": 0.1, "chat_template": False}
NAMES = ("first", "second", "third")
HOW = IsolateSettings(core_density=0.05, threshold=0.9, rounds=2)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    root = tmp_path_factory.mktemp("isolate")
    return [save_task(root / name, train=rows, validation=3, test=2) for name, rows in zip(NAMES, (8, 7, 6), strict=True)]


@pytest.fixture(scope="module")
def done(tmp_path_factory, tasks, base_dir):
    out = tmp_path_factory.mktemp("isolated") / "out"
    return isolate(tasks, out, HOW, model=base_dir, density=0.4, **RUN), out


def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[n].to_dense(), b[n].to_dense()) for n in a)


def load(path):
    return SparseAdapter.load(path)


def test_the_steps_are_those_of_the_method(done):
    isolated, out = done
    assert [step.name for step in isolated.isolation.steps] == [
        "short/first",
        "short/second",
        "short/third",
        "short/first",  # the first stage of one task is its short run
        "stage-2",
        "stage-3",
        "fused",
        "round-1",
        "expert",
    ]
    shorts = [load(out / "short" / name) for name in NAMES]
    for name, short in zip(NAMES, shorts, strict=True):
        assert same(load(out / "cores" / name), core(short, 0.05))
    fused = merge([*shorts, load(out / "stage-3")], "cpi", density=0.05)
    assert same(load(out / "fused"), fused)
    assert isolated.path == out / "expert"
    assert same(isolated.expert, load(out / "expert"))


def test_cores_stay_as_they_were_bit_for_bit(done):
    out = done[1]
    first, second, third = (load(out / "cores" / name) for name in NAMES)
    before, last = load(out / "short/first"), load(out / "stage-2")
    for name, delta in first.items():
        mask = delta.mask()
        assert torch.equal(last[name].to_dense()[mask], before[name].to_dense()[mask])
    fused = load(out / "fused")
    for after in (load(out / "round-1"), load(out / "expert")):
        for name, delta in after.items():
            frozen = first[name].mask() | second[name].mask() | third[name].mask()
            assert torch.equal(delta.to_dense()[frozen], fused[name].to_dense()[frozen])
            assert not torch.equal(delta.to_dense(), fused[name].to_dense())


def test_a_stage_trains_the_masks_so_far_and_its_own(done):
    out = done[1]
    expected = {name: delta.mask() for name, delta in load(out / "short/first").items()}
    for stage, task in ((2, "second"), (3, "third")):
        expected = {name: mask | load(out / "short" / task)[name].mask() for name, mask in expected.items()}
        found = load(out / f"stage-{stage}")
        assert all(torch.equal(found[name].mask(), mask) for name, mask in expected.items())


def test_it_is_shown_as_tables_and_json(done):
    isolated = done[0]
    assert "Cores" in str(isolated)
    assert "stage-2" in str(isolated)
    content = json.loads(json.dumps(isolated.as_json()))
    assert content["stages"] == [["first"], ["second"], ["third"]]
    assert content["pairs"][0]["tasks"] == ["first", "second"]
    assert content["adapter"].endswith("expert")
    assert [step["frozen"] for step in content["steps"][3:6]] == [
        0,
        content["core_entries"]["first"],
        content["core_entries"]["first"] + content["core_entries"]["second"],
    ]


def test_a_rerun_repeats_nothing_and_a_stopped_run_goes_on_to_the_same_bytes(done, tasks, base_dir, tmp_path):
    names = []

    def watch(name):
        names.append(name)
        return [StopAt(1)] if name == "stage-3" and names.count(name) == 1 else []

    arguments = {"model": base_dir, "density": 0.4, "save_steps": 1, **RUN}
    with pytest.raises(KeyboardInterrupt):
        isolate(tasks, tmp_path / "out", HOW, watch=watch, **arguments)
    isolated = isolate(tasks, tmp_path / "out", HOW, watch=watch, **arguments)
    assert names == ["short/first", "short/second", "short/third", "stage-2", "stage-3", "stage-3", "round-1", "expert"]
    assert bytes_of(isolated.path) == bytes_of(done[0].path)
    again = isolate(tasks, tmp_path / "out", HOW, watch=watch, **arguments)
    assert len(names) == 8
    assert again.as_json() == isolated.as_json()


def test_full_experts_and_similar_cores(tasks, base_dir, tmp_path):
    how = IsolateSettings(core_density=0.5, threshold=0.1, rounds=0, rows=2)
    isolated = isolate(tasks[:2], tmp_path / "out", how, model=base_dir, method="full-qkv", **RUN)
    run = isolated.isolation
    assert run.stages == ((0, 1),)
    assert [step.name for step in run.steps] == ["short/first", "short/second", "stage-1", "expert"]
    assert isolated.expert.density == 1
    assert set(run.base) == set(run.steps[-1].scores) == {"first", "second"}
    assert run.forgotten(run.steps[-1]) == pytest.approx(
        sum(run.steps[2].scores[task] - run.steps[3].scores[task] for task in run.tasks) / 2
    )
    assert run.forgotten(run.steps[2]) is None


def test_without_freezing_cores_move(tasks, base_dir, tmp_path):
    how = IsolateSettings(core_density=0.05, threshold=1.0, rounds=1, freeze_cores=False, core="random")
    isolated = isolate(tasks[:2], tmp_path / "out", how, model=base_dir, density=0.4, **RUN)
    first, fused = load(tmp_path / "out/cores/first"), load(tmp_path / "out/fused")
    moved = [
        not torch.equal(isolated.expert[name].to_dense()[delta.mask()], fused[name].to_dense()[delta.mask()])
        for name, delta in first.items()
        if delta.nnz
    ]
    assert all(moved)
    assert {step.frozen for step in isolated.isolation.steps} == {0}


def test_other_settings_rows_or_files_in_the_output_are_refused(tasks, base_dir, tmp_path):
    how = IsolateSettings(core_density=0.05, rounds=0)
    own = save_task(tmp_path / "own", train=4, validation=2, test=1)
    chosen = {"model": base_dir, "density": 0.4, **RUN}
    isolate([tasks[0], own], tmp_path / "out", how, **chosen)
    with pytest.raises(ConfigError, match=r"was started with density = 0\.4, not 0\.3"):
        isolate([tasks[0], own], tmp_path / "out", how, **{**chosen, "density": 0.3})
    with pytest.raises(ConfigError, match=r"was started with core_density = 0\.05, not 0\.1"):
        isolate([tasks[0], own], tmp_path / "out", IsolateSettings(core_density=0.1, rounds=0), **chosen)
    write_rows(tmp_path / "own/train.jsonl", [{"input": "x?", "target": "y"}] * 4)
    with pytest.raises(ConfigError, match="other rows in own"):
        isolate([tasks[0], own], tmp_path / "out", how, **chosen)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").write_text("mine")
    with pytest.raises(OutputExists):
        isolate(tasks, tmp_path / "taken", how, **chosen)


def test_what_cannot_be_isolated_is_refused_before_any_work(tasks, tmp_path):
    for changes, message in (
        ({"method": "lora"}, "method must be sparse or full-qkv"),
        ({"freeze": ("core",)}, "freeze is chosen by the run"),
        ({"init_from": "expert"}, "init_from is chosen by the run"),
    ):
        with pytest.raises(ConfigError, match=message):
            isolate(tasks, tmp_path / "out", **changes)
    with pytest.raises(ConfigError, match="at least two tasks"):
        isolate(tasks[:1], tmp_path / "out")
    with pytest.raises(ConfigError, match=r"core_density must be below density, 0\.05, .* got 0\.05"):
        isolate(tasks, tmp_path / "out", IsolateSettings(core_density=0.05), density=0.05)
    with pytest.raises(ConfigError, match="no setting 'core_density'"):
        isolate(tasks, tmp_path / "out", core_density=0.1)
    with pytest.raises(ConfigError, match="epochs is given beside"):
        isolate(TrainSettings(task=tuple(tasks)), tmp_path / "out", epochs=1)
    assert not (tmp_path / "out").exists()
    for wrong, error in (
        ({"core_density": 2.0}, DensityOutOfRange),
        ({"threshold": 0.0}, ConfigError),
        ({"rounds": -1}, ConfigError),
        ({"round_epochs": 0.0}, ConfigError),
        ({"core": "small"}, ConfigError),
    ):
        with pytest.raises(error, match="density" if "core_density" in wrong else next(iter(wrong))):
            IsolateSettings(**wrong)


def test_the_verb(cli, refused, tasks, base_dir, tmp_path):
    flags = ("--model", base_dir, "--density", 0.4, "--epochs", 1, "--batch-size", 4, "--no-chat-template", "--rows", 1)
    command = ("isolate", "--task", *tasks[:2], "--out", tmp_path / "out", *flags, "--core-density", 0.05)
    code, out, err = cli(*command)
    assert code == 0, err
    assert "measuring base on 1 validation rows" in err
    assert f"Written to {tmp_path / 'out' / 'expert'}" in out
    assert "forgotten" in out
    code, out, err = cli(*command, "--json")
    assert code == 0, err
    assert json.loads(out)["adapter"] == str(tmp_path / "out" / "expert")
    assert "--threshold must be in (0, 1]" in refused(*command, "--threshold", 3)
