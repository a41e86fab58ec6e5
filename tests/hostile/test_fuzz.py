"""Damaged files and wrong settings through the command line: each ends in an error of ours, one line of it, or works."""

import random
import re
import shutil
from pathlib import Path

import pytest
from helpers.mutations import WRONG, damage, damage_header
from helpers.tiny import make_model, save_base, save_task
from peft import LoraConfig, get_peft_model

from sparselet.formats import open_expert
from sparselet.formats.single_entries.write import export_shira, export_super_tuning
from sparselet.merging import merge_with_counts

MODEL = ["--model", "base"]
EVAL = ["eval", "--task", "task", *MODEL, "--max-new-tokens", "1", "--rows", "2"]
TRAIN = ["train", "--task", "task", *MODEL, "--epochs", "1", "--batch-size", "4", "--score", "gm", "--out", "O"]
# What is damaged, and the verbs that read it.
LINES = {
    "one": [
        ["inspect", "one"],
        ["merge", "one", "two", "--out", "O"],
        ["export", "one", "--to", "supertuning", "--out", "O"],
        ["export", "one", "--to", "lora", "--rank", "1", "--max-error", "2", "--out", "O"],
        ["push", "one", "x/y", "--dry-run"],
        [*EVAL, "--adapter", "one"],
    ],
    "lora": [["import", "lora", "--out", "O"], ["merge", "lora", "one", "--out", "O"], ["push", "lora", "x/y", "--dry-run"]],
    "shira": [["import", "shira", "--out", "O"]],
    "supertuning": [["import", "supertuning", "--out", "O"], ["merge", "supertuning", "one", "--out", "O", *MODEL]],
    "counted": [
        ["update", "counted", "--remove", "one", "--out", "O"],
        ["inspect", "counted"],
        ["push", "counted", "x/y", "--dry-run"],
    ],
    "base": [
        EVAL,
        ["import", "tuned", *MODEL, "--out", "O"],
        ["import", "lora", *MODEL, "--out", "O"],
        ["export", "one", "--to", "checkpoint", *MODEL, "--out", "O"],
    ],
    "tuned": [["import", "tuned", *MODEL, "--out", "O"]],
    "task": [EVAL, TRAIN],
    "recipe.toml": [["merge", "--recipe", "recipe.toml", "--out", "O"]],
}
ROUNDS = 14  # of each of LINES; a round damages one file and runs one verb

pytestmark = pytest.mark.usefixtures("loud_again")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, experts):
    """A directory with one of each kind of input."""
    home = tmp_path_factory.mktemp("whole")
    save_base(home / "base", template=True)
    model = make_model()
    for name, expert in zip(("one", "two"), experts, strict=True):
        shutil.copytree(expert, home / name)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], rank_pattern={"layers.1.self_attn.q_proj": 3}))
    wrapped.save_pretrained(home / "lora", save_embedding_layers=False)
    export_shira(open_expert(home / "one"), home / "shira")
    export_super_tuning(open_expert(home / "one"), home / "supertuning")
    merge_with_counts(home / "counted", [home / "one"])
    save_base(home / "tuned", seed=0)
    save_task(home / "task", train=4, validation=2, test=2)
    (home / "recipe.toml").write_text('method = "ties"\n[parameters]\ndensity = 0.5\n[[experts]]\npath = "one"\nweight = 0.5\n')
    return home


@pytest.fixture
def ends_well(cli, monkeypatch, tmp_path):
    """Run a command line and look at how it ends."""

    def call(*line):
        code, out, err = cli(*line)
        said = f"{line}: {code}\n{out}{err}"
        assert code in (0, 1, 2), said
        assert not re.search(r"unexpected [A-Z]\w*:|Traceback|y/N", out + err), said
        assert all(character.isprintable() or character in "\n\r\u3000\xa0" for character in out + err), ascii(said)
        assert [line.startswith("error: ") for line in err.splitlines()].count(True) == (code != 0), said
        assert not [path.name for path in Path().iterdir() if path.name.startswith(".O") or (code and path.name == "O")], said
        shutil.rmtree("O", ignore_errors=True)
        shutil.rmtree("O.partial", ignore_errors=True)

    return call


@pytest.mark.parametrize("part", LINES)
def test_damaged_files_end_in_an_error_of_ours(whole, ends_well, tmp_path, monkeypatch, part):
    shutil.copytree(whole, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    files = sorted(path for path in (Path(part).iterdir() if Path(part).is_dir() else [Path(part)]) if path.suffix != ".jinja")
    for seed in range(ROUNDS):
        draw = random.Random(f"{part} {seed}")
        file = draw.choice(files)
        raw = file.read_bytes()
        by_header = file.suffix == ".safetensors" and draw.random() < 0.5
        print(seed, file, (damage_header if by_header else damage)(file, draw))
        ends_well(*draw.choice(LINES[part]))
        file.write_bytes(raw)


FLAGS = {
    "train": "density block-size score initial-mask reselect-every selection-epochs score-batches layers lora-rank epochs "
    "learning-rate batch-size gradient-accumulation warmup weight-decay patience train-rows max-input-length save-steps seed",
    "merge": "method weights workers dtype",
    "eval": "rows max-input-length max-new-tokens batch-size dtype",
    "export": "rank max-error dtype",
}
PARAMETERS = "density scale trim density_of seed epsilon gamma k mask_lambda max_iter tol clip normalize_weights rescale elect"
VALUES = ["-1", "0", "nan", "inf", "-inf", "1e400", "1e-320", "99999999999999999999", "9223372036854775808", "true", "", "x"]
VALUES += ["[]", "[1, [2]]", "{}", "1.5", "\x1b[2J", "[/red]", "None", "-"]
PLAIN = {
    "train": TRAIN,
    "merge": ["merge", "one", "two", "--out", "O"],
    "eval": EVAL,
    "export": ["export", "one", "--to", "lora", "--out", "O"],
}


@pytest.mark.parametrize("verb", FLAGS)
def test_wrong_settings_end_in_an_error_of_ours(whole, ends_well, tmp_path, monkeypatch, verb):
    shutil.copytree(whole, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    draw = random.Random(verb)
    for flag in FLAGS[verb].split():
        for value in draw.sample(VALUES, 1 if verb == "train" else 4):
            # the flags of a plain line would be given twice
            line = [word for i, word in enumerate(PLAIN[verb]) if f"--{flag}" not in (word, PLAIN[verb][i - 1])]
            ends_well(*line, f"--{flag}", value)


def test_wrong_parameters_of_methods_end_in_an_error_of_ours(whole, ends_well, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    draw = random.Random(0)
    methods = ["ties", "breadcrumbs", "dare", "della", "sce", "pcb", "consensus", "multislerp", "karcher", "arithmetic"]
    for parameter in PARAMETERS.split():
        for value in draw.sample(VALUES, 6):
            ends_well("merge", "one", "two", "--out", "O", "--method", draw.choice(methods), "--set", f"{parameter}={value}")


def test_wrong_values_are_of_every_kind():
    assert {type(value) for value in WRONG} >= {type(None), bool, int, float, str, list, dict}
