"""A study's TOML: what is read, what is refused, where its tasks are."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.plans import SETTINGS
from helpers.tiny import save_task

from sparselet.errors import ConfigError, DensityOutOfRange, SparseletError, TaskError, UnknownMethod, UnknownScore
from sparselet.studies.settings import fingerprint_tasks, read_study, task_sources
from sparselet.tasks.task import load_task

STUDY = Path(__file__).parents[2] / "studies/sparse_adapters.toml"
LEAST = """
[study]
held_in = ["one", "two"]
held_out = ["three"]
sweep_tasks = ["one"]
learning_rate = { sparse = 1e-3, block = 1e-3, lora = 1e-3, full = 1e-4, multitask = 1e-4 }
lora_ranks = [2]
lora_rank = 21
targets = { MLP = ["down_proj"] }
n_experts = [2]
"""


@pytest.fixture
def toml(tmp_path):
    def write(text):
        file = tmp_path / "study.toml"
        file.write_text(text)
        return file

    return write


def test_a_preset_overrides_the_study_key_by_key(toml):
    text = (
        LEAST
        + 'epochs = 3\ntrain_rows = 10\n[preset.less]\nepochs = 1\nlearning_rates = [1, 2.5]\n[preset.more]\nepochs = "x"\n'
    )
    plain, less = read_study(toml(text)), read_study(toml(text), "less")
    assert (plain.epochs, plain.train_rows, plain.preset) == (3.0, 10, "")
    assert (less.epochs, less.train_rows, less.preset) == (1.0, 10, "less")
    assert less.learning_rates == (1.0, 2.5)
    assert all(type(rate) is float for rate in less.learning_rates)
    assert less.targets == {"MLP": ("down_proj",)}


def test_the_parameters_of_merges_are_filled_in(toml):
    settings = read_study(toml(LEAST + "full_merges = { ties = { scale = 0.4 } }\n"))
    assert settings.full_merges["ties"]["scale"] == 0.4
    assert settings.full_merges["ties"]["density"] == 0.2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LEAST + "epoch = 1\n", "unknown key 'epoch'; the keys are held_in,"),
        (LEAST + 'preset = "x"\n', "unknown key 'preset'"),
        (LEAST + "[other]\n", "unknown table 'other'; a study has"),
        (LEAST + "[preset]\nless = 1\n", "preset.less must be a table, got 1"),
        ("preset = 1\n" + LEAST, "must be tables"),
        (LEAST.replace("lora_rank = 21\n", ""), "lora_rank is missing"),
        (LEAST + "epochs = '2'\n", "epochs must be a number, got '2'"),
        (LEAST + "train_rows = 2.5\n", "train_rows must be a whole number, got 2.5"),
        (LEAST + "train_rows = true\n", "train_rows must be a whole number, got True"),
        (LEAST + "chat_template = 1\n", "chat_template must be true or false, got 1"),
        (LEAST + "scores = 'mcs'\n", "scores must be a list, got 'mcs'"),
        (LEAST + "scores = [1]\n", r"scores\[0\] must be text, got 1"),
        (LEAST + "full_merges = 1\n", "full_merges must be a table, got 1"),
        (LEAST.replace("sparse = 1e-3", "sparse = 'x'"), "learning_rate.sparse must be a number, got 'x'"),
        (LEAST + "=", "is not TOML"),
    ],
)
def test_what_is_no_study_is_refused_with_the_file_and_the_key(toml, text, message):
    with pytest.raises(ConfigError, match=message) as refused:
        read_study(toml(text), "less" if "less" in text else "")
    assert "study.toml" in str(refused.value)


def test_a_preset_or_file_that_is_not_there_is_refused(toml, tmp_path):
    with pytest.raises(ConfigError, match="there is no preset 'small'; there are less"):
        read_study(toml(LEAST + "[preset.less]\n"), "small")
    with pytest.raises(ConfigError, match="there is no preset 'small'; there are none"):
        read_study(toml(LEAST), "small")
    with pytest.raises(ConfigError, match=r"cannot read .*absent.toml: No such file"):
        read_study(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"held_in": ("one",)}, ConfigError, "held_in needs at least two tasks to merge experts of, got 1"),
        ({"held_out": ("one",)}, ConfigError, "task one is twice in held_in and held_out"),
        ({"sweep_tasks": ("five",)}, ConfigError, "sweep_tasks names five, which is not a held_in task; use some of one,"),
        ({"epochs": 0.0}, ConfigError, "epochs must be above 0, got 0"),
        ({"train_rows": 0}, ConfigError, "train_rows must be above 0, got 0"),
        ({"threads": 0}, ConfigError, "threads must be above 0"),
        ({"seeds": ()}, ConfigError, "seeds must have at least one value"),
        ({"densities": (0.1, 0.1)}, ConfigError, "densities must have at least one value, and none twice"),
        ({"densities": (0.0, 0.1)}, DensityOutOfRange, "0"),
        ({"scores": ("mcs", "best")}, UnknownScore, "best"),
        ({"lora_ranks": (1, 2, 3, 4, 5)}, ConfigError, "lora_ranks has 5 ranks for 4 densities"),
        ({"dtype": "int8"}, ConfigError, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (
            {"learning_rate": {"sparse": 1.0}},
            ConfigError,
            "learning_rate must have sparse, block, lora, full, multitask, got sparse",
        ),
        ({"n_experts": (2, 5)}, ConfigError, "n_experts must lie between 2 and the 4 held_in tasks"),
        ({"n_experts": (1,)}, ConfigError, "n_experts must lie between 2"),
        ({"full_merges": {"mean": {}}}, UnknownMethod, "mean"),
        ({"full_merges": {"uniform": {"scale": 1}}}, UnknownMethod, "uniform has no parameter 'scale'"),
    ],
)
def test_a_value_that_makes_no_study_is_refused(changes, kind, message):
    with pytest.raises(kind, match=message):
        replace(SETTINGS, **changes)


@pytest.mark.parametrize("preset", ["small", "medium", "full", "tiny"])
def test_the_studys_presets_are_read(preset):
    settings = read_study(STUDY, preset)
    assert settings.density in settings.densities
    assert settings.block_size in settings.block_sizes
    if preset in ("medium", "full"):
        assert (len(settings.held_in), len(settings.held_out)) == (20, 10)
    if preset == "small":
        assert len(settings.held_in) >= 6
        assert len(settings.held_out) >= 3


@pytest.mark.parametrize(
    ("preset", "shapes"),
    [
        ("small", [(576, 576), (192, 576), (192, 576)]),
        ("medium", [(576, 576), (192, 576), (192, 576)]),
        ("full", [(9216, 3072)]),
    ],
)
def test_the_ranks_have_as_many_parameters_as_the_densities(preset, shapes):
    settings = read_study(STUDY, preset)
    entries, sides = sum(m * n for m, n in shapes), sum(m + n for m, n in shapes)
    equal = [round(density * entries / sides) for density in settings.densities]
    for rank, best in zip(settings.lora_ranks, equal, strict=False):
        assert abs(rank - best) <= 1
    assert all(side % size == 0 for shape in shapes for side in shape for size in settings.block_sizes)


def test_tasks_are_found_in_the_directory_or_built_in(tmp_path):
    for name in ("one", "two", "animal_class"):
        save_task(tmp_path / name)
    settings = replace(SETTINGS, held_in=("one", "animal_class"), held_out=("number_words",), sweep_tasks=(), n_experts=(2,))
    sources = task_sources(settings, tmp_path)
    assert sources == {
        "one": str(tmp_path / "one"),
        "animal_class": str(tmp_path / "animal_class"),
        "number_words": "builtin:number_words",
    }
    assert task_sources(replace(settings, tasks_directory=str(tmp_path))) == sources
    with pytest.raises(ConfigError, match=r"task three is not a directory in .*; set `tasks`"):
        task_sources(replace(settings, held_out=("three",)), tmp_path)
    with pytest.raises(ConfigError, match="task one is not a directory in any place"):
        task_sources(settings)


def test_tasks_are_described_by_their_rows_alone(tmp_path):
    settings = replace(SETTINGS, held_in=("one", "two"), held_out=("three",), sweep_tasks=(), n_experts=(2,))
    for name in ("one", "two", "three"):
        save_task(tmp_path / name)
    (tmp_path / "three/train.jsonl").unlink()  # nothing is trained on it
    found = fingerprint_tasks(settings, task_sources(settings, tmp_path))
    assert found["one"]["train"] == load_task(tmp_path / "one", ("train", "validation")).fingerprint()
    assert set(found["three"]) == {"test"}
    (tmp_path / "moved").mkdir()
    for name in ("one", "two", "three"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    assert fingerprint_tasks(settings, task_sources(settings, tmp_path / "moved")) == found
    with open(tmp_path / "moved/one/test.jsonl", "a") as file:
        file.write(json.dumps({"input": "a", "target": "b"}) + "\n")
    changed = fingerprint_tasks(settings, task_sources(settings, tmp_path / "moved"))
    assert changed["one"]["test"] != found["one"]["test"]
    assert changed["one"]["train"] == found["one"]["train"]
    (tmp_path / "moved/two/train.jsonl").unlink()
    with pytest.raises(TaskError, match="no split 'train'"):
        fingerprint_tasks(settings, task_sources(settings, tmp_path / "moved"))
    assert issubclass(TaskError, SparseletError)
