"""`train` from rows to a directory, and a run that was killed goes on as if it had not been."""

import json
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.tiny import make_model, save_base, save_task, write_rows
from transformers import Trainer, TrainerCallback

from sparselet import SparseAdapter
from sparselet.delta import block_for
from sparselet.errors import (
    BlockSizeError,
    ConfigError,
    DensityOutOfRange,
    ModelError,
    OutputExists,
    TaskError,
    UnknownScore,
    WriteFailed,
)
from sparselet.fingerprint import fingerprint_weight
from sparselet.models import load_model, load_tokenizer
from sparselet.training import TrainSettings, train
from sparselet.training.run_directory import COMPLETE, RUN_FILE, work_directory

FILES = ("adapter_model.safetensors", "adapter_config.json", "profile.safetensors")


@pytest.fixture(scope="module")
def settings(base_dir, task_dir):
    """Six steps an epoch, two epochs."""
    return TrainSettings(model=base_dir, task=task_dir, epochs=2, batch_size=2, learning_rate=1e-2, when="paper", score="gm")


class Record(TrainerCallback):
    """What a run looked like from inside."""

    def __init__(self):
        self.steps = []
        self.losses = []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.losses.append(metrics["eval_loss"])


class StopAt(TrainerCallback):
    """Raises at the end of an optimizer step, as Ctrl-C would."""

    def __init__(self, step, error=KeyboardInterrupt):
        self.step, self.error = step, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise self.error


def bytes_of(directory):
    return {name: (Path(directory) / name).read_bytes() for name in FILES}


def test_a_trained_expert_is_an_adapter_directory_with_a_record_of_the_run(settings, tmp_path, base_dir):
    record = Record()
    adapter = train(settings, tmp_path / "expert", callbacks=[record])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["expert"]
    assert sorted(p.name for p in (tmp_path / "expert").iterdir()) == sorted([*FILES, RUN_FILE])
    loaded = SparseAdapter.load(tmp_path / "expert")
    assert list(loaded) == list(adapter)
    assert all(torch.equal(loaded[name].values, adapter[name].values) for name in loaded)
    assert len(loaded) == 6
    for delta in loaded.values():
        assert delta.nnz == round(0.1 * delta.size)
        assert delta.values.abs().sum() > 0
    assert loaded.metadata.task == "backwards"
    assert loaded.metadata.base_model_name_or_path == base_dir
    assert loaded.metadata.metrics["steps"] == 12
    assert loaded.metadata.metrics["validation_loss"] == pytest.approx(min(record.losses))
    assert record.steps == list(range(1, 13))
    run = json.loads((tmp_path / "expert" / RUN_FILE).read_text())
    assert run["settings"]["learning_rate"] == 1e-2
    assert run["settings"]["seed"] == 0
    assert set(run["versions"]) == {"sparselet", "torch", "peft", "transformers"}
    assert run["resumed"] is False
    assert run["seconds"] > 0
    assert any("eval_loss" in row for row in run["history"])


def test_training_lowers_the_validation_loss(settings, tmp_path):
    record = Record()
    train(replace(settings, density=0.5, epochs=6), tmp_path / "expert", callbacks=[record])
    assert record.losses[-1] < record.losses[0]


def test_equal_seeds_give_equal_bytes_and_others_do_not(settings, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(name))  # whatever the global generator was at
        torch.rand(seed + ord(name))
        train(replace(settings, seed=seed), tmp_path / name)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    assert bytes_of(tmp_path / "a")[FILES[0]] != bytes_of(tmp_path / "c")[FILES[0]]


@pytest.mark.parametrize(
    "changes",
    [
        *({"block_size": size} for size in (4, "row", "column")),
        {"initial_mask": "gradient"},
        {"initial_mask": "random"},
        {"scope": "global", "layer_drop": True},
    ],
    ids=lambda changes: next(iter(changes)) + "-" + str(next(iter(changes.values()))),
)
def test_every_kind_of_mask_trains_to_a_whole_adapter(settings, tmp_path, changes):
    adapter = train(replace(settings, epochs=1, density=0.25, **changes), tmp_path / "expert")
    assert adapter.density == pytest.approx(0.25, rel=0.05)
    block_size = changes.get("block_size", 1)
    assert all(delta.block == block_for(block_size, delta.shape) for delta in adapter.values() if delta.nnz)
    assert adapter.metadata.block_size == block_size
    assert sum(float(d.values.abs().sum()) for d in adapter.values()) > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_base_of_16_bits_trains_float32_values(settings, tmp_path, dtype):
    adapter = train(replace(settings, epochs=1, dtype=dtype), tmp_path / "expert")
    assert {d.values.dtype for d in adapter.values()} == {torch.float32}
    assert {f["dtype"] for f in adapter.fingerprints.values()} == {dtype}


def test_targets_and_layers_can_be_chosen(settings, tmp_path):
    adapter = train(
        replace(settings, epochs=1, target_modules=("q_proj", "up_proj"), exclude_modules=("up_proj",), layers=(1,)),
        tmp_path / "expert",
    )
    assert list(adapter) == ["model.layers.1.self_attn.q_proj"]


# Best epoch, early stopping


class Scripted(TrainerCallback):
    """Gives the epochs the validation losses of a script, and keeps the adapter's values of each."""

    def __init__(self, losses):
        self.script, self.values = list(losses), []

    def on_evaluate(self, args, state, control, metrics, model, **kwargs):
        metrics["eval_loss"] = self.script[len(self.values)]
        self.values.append({n: p.detach().clone() for n, p in model.named_parameters() if "sparse_values" in n})


def test_the_epoch_with_the_best_validation_loss_is_kept(settings, tmp_path):
    script = Scripted([3.0, 1.0, 2.0])
    adapter = train(replace(settings, epochs=3), tmp_path / "expert", callbacks=[script])
    assert adapter.metadata.metrics == {"validation_loss": 1.0, "best_step": 12, "steps": 18}
    for name, delta in adapter.items():
        (best,) = [values for key, values in script.values[1].items() if f".{name}." in key]
        (last,) = [values for key, values in script.values[2].items() if f".{name}." in key]
        assert torch.equal(delta.values, best)
        assert not torch.equal(delta.values, last)


def test_training_stops_after_epochs_without_a_better_loss(settings, tmp_path):
    script = Scripted([2.0, 1.0, 1.5, 1.5, 0.5, 0.5])
    adapter = train(replace(settings, epochs=6, patience=2), tmp_path / "expert", callbacks=[script])
    assert len(script.values) == 4
    assert adapter.metadata.metrics == {"validation_loss": 1.0, "best_step": 12, "steps": 24}


# Killed and resumed


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            kill_self()


def die_removing(path, **kwargs):
    """In place of `shutil.rmtree`: the removal of a directory gets as far as one file."""
    (Path(path) / "optimizer.pt").unlink()
    kill_self()


def run_and_die(settings, output, step, inside, resume):
    """Train in this process until it kills itself: at the end of a step, or while a checkpoint is written or removed."""
    torch.set_num_threads(1)
    if inside == "removing":
        shutil.rmtree = die_removing
    elif inside is not None:
        method, times = inside
        whole, calls = getattr(Trainer, method), []

        def die(trainer, *args, **kwargs):
            if trainer.state.global_step == step:
                calls.append(1)
                if len(calls) == times:
                    kill_self()
            return whole(trainer, *args, **kwargs)

        setattr(Trainer, method, die)
    train(settings, output, resume=resume, callbacks=[] if inside else [KillAt(step)])


@pytest.fixture(scope="module")
def killed():
    """Runs `run_and_die` in a fresh process, which costs no imports, and checks that it died."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sparselet.training", __name__])

    def run(settings, output, step, inside=None, resume=False):
        process = context.Process(target=run_and_die, args=(settings, output, step, inside, resume))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL

    return run


@pytest.fixture(scope="module")
def undisturbed(settings, tmp_path_factory):
    """The bytes of a run with these changes of the settings that nothing disturbed."""
    done = {}

    def run(**changes):
        key = repr(sorted(changes.items()))
        if key not in done:
            output = tmp_path_factory.mktemp("undisturbed") / "expert"
            train(replace(settings, **changes), output)
            done[key] = bytes_of(output)
        return done[key]

    return run


PHASE = {"selection_epochs": 1.5, "reselect_every": 2}  # nine steps, selections after 2, 4, 6 and 8


@pytest.mark.parametrize(
    ("changes", "step"),
    [
        ({"save_steps": 1}, 3),
        ({"save_steps": 2}, 5),
        ({"save_steps": 2}, 8),
        ({"save_steps": 2}, 11),
        ({"save_steps": 0}, 9),
        ({"save_steps": 1, "score": "mcs_neg", "block_size": 4}, 4),
        ({"save_steps": 1, "initial_mask": "gradient"}, 3),
        ({"save_steps": 1, "initial_mask": "random", "score": "gd"}, 5),
        ({"save_steps": 1, "gradient_accumulation": 2}, 3),
        ({"save_steps": 1, "scope": "global", "offload": True, "score_batches": 2}, 5),
    ],
    ids=lambda v: "-".join(f"{key}_{value}" for key, value in v.items()) if isinstance(v, dict) else None,
)
def test_a_run_killed_at_a_step_goes_on_byte_for_byte(settings, killed, undisturbed, tmp_path, changes, step):
    changes = {**PHASE, **changes}
    expected = undisturbed(**changes)
    output = tmp_path / "killed"
    killed(replace(settings, **changes), output, step)
    assert not output.exists()
    assert any(work_directory(output).glob(f"checkpoint-*/{COMPLETE}"))
    record = Record()
    train(replace(settings, **changes), output, resume=True, callbacks=[record])
    saved = (step - 1) // changes["save_steps"] * changes["save_steps"] if changes["save_steps"] else 6
    assert record.steps == list(range(saved + 1, 13))
    assert bytes_of(output) == expected
    assert json.loads((output / RUN_FILE).read_text())["resumed"] is True
    assert not work_directory(output).exists()


MIDDLE = ["save_model", "_save_rng_state", "_save_optimizer_and_scheduler"]


@pytest.mark.parametrize("inside", MIDDLE)
@pytest.mark.parametrize("step", [4, 10], ids=["selecting", "frozen"])
def test_a_run_killed_while_it_saves_goes_on_from_the_checkpoint_before(settings, killed, undisturbed, tmp_path, inside, step):
    changes = {**PHASE, "save_steps": 2}
    expected = undisturbed(**changes)
    output = tmp_path / "killed"
    killed(replace(settings, **changes), output, step, (inside, 1))
    assert not (work_directory(output) / f"checkpoint-{step}" / COMPLETE).exists()
    record = Record()
    train(replace(settings, **changes), output, resume=True, callbacks=[record])
    assert record.steps[0] == step - 1
    assert bytes_of(output) == expected


@pytest.mark.parametrize("inside", [("_determine_best_metric", 1), ("_save_optimizer_and_scheduler", 1)])
def test_a_run_killed_after_the_last_step_of_an_epoch_evaluates_it(settings, killed, undisturbed, tmp_path, inside):
    changes = {**PHASE, "save_steps": 2}
    expected = undisturbed(**changes)
    output = tmp_path / "killed"
    killed(replace(settings, **changes), output, 6, inside)
    assert not (work_directory(output) / "checkpoint-6" / COMPLETE).exists()
    record = Record()
    train(replace(settings, **changes), output, resume=True, callbacks=[record])
    assert record.steps[0] == 5
    assert bytes_of(output) == expected


def test_a_run_killed_while_it_removes_an_old_checkpoint_goes_on(settings, killed, undisturbed, tmp_path):
    changes = {**PHASE, "save_steps": 2}
    expected = undisturbed(**changes)
    output = tmp_path / "killed"
    killed(replace(settings, **changes), output, None, "removing")
    left = {path.name: (path / COMPLETE).is_file() for path in work_directory(output).glob("checkpoint-*")}
    assert left == {"checkpoint-2": False, "checkpoint-4": True, "checkpoint-6": True}
    record = Record()
    train(replace(settings, **changes), output, resume=True, callbacks=[record])
    assert record.steps[0] == 7
    assert bytes_of(output) == expected


def test_a_checkpoint_is_marked_once_the_disk_has_its_files(settings, tmp_path, monkeypatch):
    held, fsync = set(), os.fsync

    def listening(descriptor):
        held.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            looked.append(len(list(checkpoint.iterdir())))
            assert {path.stat().st_ino for path in (checkpoint, *checkpoint.rglob("*"))} <= held
            assert (checkpoint / COMPLETE).stat().st_mtime_ns >= max(p.stat().st_mtime_ns for p in checkpoint.iterdir())

    looked = []
    monkeypatch.setattr(os, "fsync", listening)
    train(replace(settings, epochs=1, save_steps=3), tmp_path / "expert", callbacks=[Look()])
    assert len(looked) >= 2
    assert min(looked) > 5


@pytest.mark.filterwarnings("error:`.*gradient_checkpointing.*` is deprecated:FutureWarning")
def test_training_draws_no_warning_of_a_former_name(settings, tmp_path):
    train(replace(settings, epochs=0.2, gradient_checkpointing=True), tmp_path / "expert")


def test_the_last_two_checkpoints_and_the_best_are_kept(settings, tmp_path):
    kept = []

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            kept.append(sorted(int(p.parent.name.rpartition("-")[2]) for p in Path(args.output_dir).glob(f"*/{COMPLETE}")))

    train(replace(settings, epochs=3, save_steps=2), tmp_path / "expert", callbacks=[Scripted([2.0, 1.0, 3.0]), Look()])
    assert kept == [[2], [2, 4], [4, 6], [6, 8], [6, 8, 10], [10, 12], [12, 14], [12, 14, 16], [12, 16, 18]]


def test_a_run_killed_twice_goes_on(settings, killed, undisturbed, tmp_path):
    changes = {**PHASE, "save_steps": 1}
    expected = undisturbed(**changes)
    output = tmp_path / "killed"
    killed(replace(settings, **changes), output, 3)
    killed(replace(settings, **changes), output, 9, resume=True)
    train(replace(settings, **changes), output, resume=True)
    assert bytes_of(output) == expected


def test_a_run_killed_before_its_first_checkpoint_starts_again(settings, killed, undisturbed, tmp_path):
    expected = undisturbed()
    killed(settings, tmp_path / "killed", 2)
    assert [p.name for p in work_directory(tmp_path / "killed").iterdir()] == [RUN_FILE]
    train(settings, tmp_path / "killed", resume=True)
    assert bytes_of(tmp_path / "killed") == expected


def test_an_interrupted_run_goes_on_byte_for_byte_in_another_working_directory(settings, undisturbed, tmp_path, monkeypatch):
    expected = undisturbed(epochs=3)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    # The first epoch is the best one, so that its checkpoint must be found again.
    with pytest.raises(KeyboardInterrupt):
        train(replace(settings, epochs=3), Path("expert"), callbacks=[StopAt(8)])
    assert not Path("expert").exists()
    monkeypatch.chdir(tmp_path / "elsewhere")
    train(replace(settings, epochs=3), Path("../expert"), resume=True)
    assert bytes_of(tmp_path / "expert") == expected


def test_the_best_epoch_is_found_again_after_a_resume_in_another_working_directory(settings, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    first, second = Scripted([1.0]), Scripted([2.0, 3.0])
    with pytest.raises(KeyboardInterrupt):
        train(replace(settings, epochs=3), Path("expert"), callbacks=[first, StopAt(8)])
    monkeypatch.chdir(tmp_path / "elsewhere")
    adapter = train(replace(settings, epochs=3), Path("../expert"), resume=True, callbacks=[second])
    assert adapter.metadata.metrics["best_step"] == 6
    for name, delta in adapter.items():
        (best,) = [values for key, values in first.values[0].items() if f".{name}." in key]
        assert torch.equal(delta.values, best)


def test_early_stopping_counts_on_after_a_resume(settings, tmp_path):
    changed = replace(settings, epochs=6, patience=2)
    with pytest.raises(KeyboardInterrupt):
        train(changed, tmp_path / "expert", callbacks=[Scripted([1.0, 2.0]), StopAt(13)])
    script = Scripted([2.0, 0.5, 0.5])
    adapter = train(changed, tmp_path / "expert", resume=True, callbacks=[script])
    assert len(script.values) == 1
    assert adapter.metadata.metrics == {"validation_loss": 1.0, "best_step": 6, "steps": 18}


# What is refused


@pytest.fixture
def unfinished(settings, tmp_path):
    """A run stopped in its second epoch."""
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "expert", callbacks=[StopAt(8)])
    return tmp_path / "expert"


def test_an_unfinished_run_is_not_overwritten(settings, unfinished):
    before = sorted(work_directory(unfinished).rglob("*"))
    with pytest.raises(OutputExists, match=r"holds an unfinished run\. Set `resume=True`"):
        train(settings, unfinished)
    assert sorted(work_directory(unfinished).rglob("*")) == before


@pytest.mark.parametrize(
    ("key", "value"),
    [("learning_rate", 0.5), ("seed", 3), ("density", 0.2), ("layers", (1,)), ("train_rows", 5), ("epochs", 3.0)],
)
def test_a_run_is_not_resumed_with_other_settings(settings, unfinished, key, value):
    with pytest.raises(ConfigError, match=rf"was started with {key} = .*, not "):
        train(replace(settings, **{key: value}), unfinished, resume=True)
    assert any(work_directory(unfinished).glob(f"checkpoint-*/{COMPLETE}"))
    train(settings, unfinished, resume=True)


def test_a_run_is_not_resumed_on_other_rows(settings, tmp_path):
    task = Path(save_task(tmp_path / "task"))
    changed = replace(settings, task=str(task))
    with pytest.raises(KeyboardInterrupt):
        train(changed, tmp_path / "expert", callbacks=[StopAt(8)])
    write_rows(task / "train.jsonl", [{"input": "other?", "target": "rows"}] * 12)
    with pytest.raises(ConfigError, match="rows"):
        train(changed, tmp_path / "expert", resume=True)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "\udcff"], ids=["empty", "cut", "list", "bytes"])
def test_a_run_whose_record_is_damaged_is_not_resumed(settings, unfinished, content):
    (work_directory(unfinished) / RUN_FILE).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=r"run\.json cannot be read"):
        train(settings, unfinished, resume=True)


def test_resuming_nothing_starts_from_the_beginning_and_says_so(settings, tmp_path, caplog):
    train(replace(settings, epochs=1), tmp_path / "expert", resume=True)
    assert "nothing to resume" in caplog.text
    assert json.loads((tmp_path / "expert" / RUN_FILE).read_text())["resumed"] is False


def test_an_output_that_exists_is_not_overwritten(settings, tmp_path):
    train(replace(settings, epochs=1), tmp_path / "expert")
    before = bytes_of(tmp_path / "expert")
    for resume in (False, True):
        with pytest.raises(OutputExists, match="exists already"):
            train(settings, tmp_path / "expert", resume=resume)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputExists):
        train(settings, tmp_path / "file")
    assert bytes_of(tmp_path / "expert") == before
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["expert", "file"]


def test_a_missing_validation_split_is_named_before_anything_is_written(settings, tmp_path):
    task = Path(save_task(tmp_path / "task"))
    (task / "validation.jsonl").unlink()
    with pytest.raises(TaskError, match=r"no split 'validation'.*found test\.jsonl, train\.jsonl"):
        train(replace(settings, task=str(task)), tmp_path / "expert")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["task"]


def test_a_test_split_is_not_needed_to_train(settings, tmp_path):
    task = Path(save_task(tmp_path / "task"))
    (task / "test.jsonl").unlink()
    train(replace(settings, epochs=1, task=str(task)), tmp_path / "expert")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "./nothing-here"}, ModelError, "does not exist"),
        ({"block_size": 3}, BlockSizeError, "3"),
        ({"layers": (7,)}, ValueError, ""),
        ({"target_modules": ("nothing",)}, ValueError, "nothing"),
        ({"dtype": "int8"}, ConfigError, "dtype must be one of"),
        ({"seed": -1}, ConfigError, "seed must be an integer of at least 0"),
        ({"seed": True}, ConfigError, "seed must be a whole number"),
        ({"epochs": float("inf")}, ConfigError, "epochs must be a finite number"),
        ({"batch_size": 2**40}, ConfigError, "batch_size must be a finite number below"),
        ({"layers": (float("nan"),)}, ConfigError, "layers must be a whole number"),
        ({"scope": "everything"}, ConfigError, "scope must be one of"),
        ({"initial_mask": "none"}, ConfigError, "initial_mask must be one of"),
        ({"reselect_every": -1}, ConfigError, "reselect_every"),
        ({"initial_mask": "random", "score": "mcs", "reselect_every": 5}, ConfigError, "cannot move the mask"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_what_the_model_refuses_leaves_nothing_behind(settings, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        train(replace(settings, **changes), tmp_path / "expert")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"density": 0.0}, DensityOutOfRange),
        ({"density": 2.0}, DensityOutOfRange),
        ({"density": float("nan")}, DensityOutOfRange),
        ({"score": "best"}, UnknownScore),
        ({"task": ""}, ConfigError),
        ({"block_size": 0}, BlockSizeError),
        ({"batch_size": 0}, ConfigError),
        ({"batch_size": 6, "gradient_accumulation": 4}, ConfigError),
        ({"gradient_accumulation": 0}, ConfigError),
        ({"warmup": 1.0}, ConfigError),
        ({"warmup": -0.1}, ConfigError),
        ({"learning_rate": 0.0}, ConfigError),
        ({"learning_rate": float("nan")}, ConfigError),
        ({"epochs": 0.0}, ConfigError),
        ({"train_rows": 0}, ConfigError),
        ({"validation_rows": 0}, ConfigError),
        ({"max_input_length": 0}, ConfigError),
        ({"save_steps": -1}, ConfigError),
        ({"patience": -1}, ConfigError),
        ({"selection_epochs": -1.0}, ConfigError),
    ],
    ids=lambda v: "-".join(f"{key}_{value}" for key, value in v.items()) if isinstance(v, dict) else None,
)
def test_settings_out_of_range_are_refused_at_once(changes, error):
    key = list(changes)[-1]
    with pytest.raises(error, match=key if error is ConfigError and key != "gradient_accumulation" else None):
        TrainSettings(**{"task": "builtin:table_order", **changes})


def test_an_adapter_that_could_not_be_written_is_written_by_resuming(settings, undisturbed, tmp_path, monkeypatch):
    expected = undisturbed()

    def fail(adapter, path, dtype=None):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(SparseAdapter, "save", fail)
        with pytest.raises(WriteFailed, match=r"expert: No space left on device"):
            train(settings, tmp_path / "expert")
    assert [p.name for p in tmp_path.iterdir()] == ["expert.partial"]
    record = Record()
    train(settings, tmp_path / "expert", resume=True, callbacks=[record])
    assert not record.steps
    assert bytes_of(tmp_path / "expert") == expected


# The base model


def assert_base(model, reference):
    found = dict(model.named_parameters())
    assert set(found) == {name for name, _ in reference.named_parameters()}
    for name, parameter in reference.named_parameters():
        assert torch.equal(found[name].view(torch.int32), parameter.view(torch.int32)), name


def test_a_base_model_that_was_handed_in_is_given_back_bit_for_bit(settings, tmp_path, base_dir):
    model, tokenizer = load_model(base_dir), load_tokenizer(base_dir)
    reference = make_model()
    assert_base(model, reference)
    first = train(replace(settings, epochs=1), tmp_path / "one", base=(model, tokenizer))
    assert_base(model, reference)
    assert not model.training
    second = train(replace(settings, epochs=1), tmp_path / "two", base=(model, tokenizer))
    assert_base(model, reference)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    train(replace(settings, epochs=1), tmp_path / "three")
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "three")
    assert first.fingerprints == second.fingerprints
    assert first.fingerprints["model.layers.0.self_attn.q_proj"] == fingerprint_weight(
        model.model.layers[0].self_attn.q_proj.weight
    )


@pytest.mark.parametrize("step", [2, 8], ids=["selecting", "frozen"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_base_model_is_given_back_after_an_error_too(settings, tmp_path, base_dir, step, error):
    model, tokenizer = load_model(base_dir), load_tokenizer(base_dir)
    with pytest.raises(error):
        train(settings, tmp_path / "expert", base=(model, tokenizer), callbacks=[StopAt(step, error)])
    assert_base(model, make_model())
    assert not model.training
    shutil.rmtree(work_directory(tmp_path / "expert"), ignore_errors=True)
    train(replace(settings, epochs=1), tmp_path / "expert", base=(model, tokenizer))
    assert_base(model, make_model())


def test_a_base_model_handed_in_computes_as_before(settings, tmp_path, base_dir):
    model, tokenizer = load_model(base_dir), load_tokenizer(base_dir)
    ids = torch.tensor([tokenizer("ant?")["input_ids"]])
    before, use_cache = model(input_ids=ids).logits, model.config.use_cache
    train(replace(settings, epochs=1, gradient_checkpointing=True), tmp_path / "expert", base=(model, tokenizer))
    assert torch.equal(model(input_ids=ids).logits, before)
    assert model.config.use_cache == use_cache
    assert not model.is_activation_checkpointing
    assert not any(m._forward_hooks for m in model.modules())


def test_an_encoder_decoder_trains(settings, tmp_path):
    from helpers.tiny import make_t5

    base = save_base(tmp_path / "t5", model=make_t5())
    adapter = train(replace(settings, model=base, epochs=1), tmp_path / "expert")
    assert adapter.metadata.task_type == "SEQ_2_SEQ_LM"
    assert all(name.rpartition(".")[2] in ("q", "k", "v") for name in adapter)


def test_gradient_checkpointing_gives_the_same_adapter_up_to_rounding(settings, tmp_path):
    plain = train(replace(settings, epochs=1), tmp_path / "plain")
    saving = train(replace(settings, epochs=1, gradient_checkpointing=True), tmp_path / "saving")
    for name in plain:
        assert torch.equal(plain[name].indices, saving[name].indices)
        torch.testing.assert_close(plain[name].values, saving[name].values)
