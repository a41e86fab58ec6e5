"""CONTRIBUTING.md, "Where a new thing goes": each is added as the table says, in one place, and help and checks follow."""

import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

import sparselet as sl
from sparselet.api.exporting import FORMATS, ExportFormat
from sparselet.cli.main import VERBS
from sparselet.cli.terminal import print_json, quiet_libraries
from sparselet.delta import SparseDelta
from sparselet.errors import ArgumentError, ConfigError
from sparselet.merging.method import MergeMethod
from sparselet.scores import SCORES, Score
from sparselet.studies.study import Study
from sparselet.studies.table import Cell, Table
from sparselet.studies.tables import TABLES, make_tables

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
RECIPE = {"epochs": 1, "batch_size": 4, "density": 0.25, "chat_template": False}


def help_of(cli, verb):
    _, out, _ = cli(verb, "--help")
    return " ".join(line.strip("│ ") for line in out.splitlines())


def test_a_score(base_dir, task_dir, monkeypatch):
    def largest_gradient(gradient: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
        """The signed gradient."""
        assert block == (1, 1)
        return gradient.flatten()

    with pytest.raises(ArgumentError, match="no score is called 'signed'"):
        sl.TrainSettings(task=task_dir, score="signed")
    monkeypatch.setitem(SCORES, "signed", Score(largest_gradient, ranks_untrained=True))
    expert = sl.train(task_dir, model=base_dir, score="signed", **RECIPE)
    assert expert.density == pytest.approx(0.25, abs=0.01)
    assert expert.metadata.score == "signed"


def first(deltas: list[SparseDelta], weights: list[float], *, scale: float = 1.0) -> SparseDelta:
    """The first expert's delta."""
    return deltas[0] * (weights[0] * scale)


def test_a_merge_method(cli, refused, experts, tmp_path, monkeypatch):
    monkeypatch.setitem(sl.METHODS, "first", MergeMethod("first", first, "ΔW₁", "nobody"))
    for sources in (experts, [sl.load(path) for path in experts]):
        merged = sl.merge(sources, "first", scale=2.0)
        expected = sl.load(experts[0])
        assert all(torch.equal(merged[name].to_dense(), 2 * expected[name].to_dense()) for name in expected)
    code, out, err = cli("merge", *experts, "--method", "first", "--set", "scale=2", "--out", tmp_path / "merged")
    assert code == 0, err
    assert "Merged by first" in out
    wrong = ("merge", *experts, "--method", "first", "--set", "size=2", "--out", tmp_path / "wrong")
    assert "first has no parameter 'size'; it takes scale" in refused(*wrong)
    parts = ("split", *experts, "--method", "first", "--out", tmp_path / "parts")
    assert "first merges into one adapter only" in refused(*parts)


def test_an_expert_format(cli, refused, experts, tmp_path, monkeypatch):
    def write(expert, out, settings, progress):
        Path(out).mkdir()
        (Path(out) / "names.txt").write_text("\n".join(sorted(expert)))
        return {}

    with pytest.raises(ConfigError, match="to must be one of shira"):
        sl.export(experts[0], "names", tmp_path / "no")
    assert "names" in refused("export", experts[0], "--to", "names", "--out", tmp_path / "no", code=2)
    monkeypatch.setitem(FORMATS, "names", ExportFormat(write, "cat {word}/names.txt"))
    code, out, err = cli("export", experts[0], "--to", "names", "--out", tmp_path / "out")
    assert code == 0, err
    assert f"Next: cat {tmp_path / 'out'}/names.txt" in out
    assert (tmp_path / "out" / "names.txt").read_text().splitlines() == sorted(sl.load(experts[0]))


def count_(adapter: str, /, *, json: bool = False) -> None:
    """Count the entries of an adapter.

        sparselet count my-expert

    Parameters
    ----------
    adapter
        Adapter: a directory, or a hub name.
    json
        Print the result as JSON.
    """
    quiet_libraries()
    print_json({"entries": sl.load(adapter).nnz})


def test_a_verb(cli, refused, experts, monkeypatch, tmp_path):
    module = ModuleType("sparselet.cli.count")
    module.count_ = count_
    monkeypatch.setitem(sys.modules, "sparselet.cli.count", module)
    monkeypatch.setitem(VERBS, "count", "Count the entries of an adapter.")
    assert "count Count the entries of an adapter." in re.sub(r"\s+", " ", help_of(cli, "--help"))
    assert "Adapter: a directory, or a hub name." in help_of(cli, "count")
    code, out, _ = cli("count", experts[0], "--json")
    assert (code, out.split()) == (0, ["{", '"entries":', str(sl.load(experts[0]).nnz), "}"])
    assert "is not a directory" in refused("count", tmp_path / "nothing")
    refused("count", code=2)


def base_only(study: Study) -> Table:
    """The base model on the held-in tasks."""
    units = tuple(study.score(None, task) for task in study.settings.held_in)
    return Table("Base model", "no paper", ("score",), {"base": (Cell((units,)),)})


def test_a_study_table(monkeypatch, sources, tmp_path):
    from cli.test_study_verb import STUDY

    (tmp_path / "study.toml").write_text(STUDY.format(model=sources.model))
    tasks = Path(next(iter(sources.tasks.values()))).parent
    definition = sl.study(tmp_path / "study.toml", tasks=tasks, out=str(tmp_path / "out")).definition
    settings = replace(definition.settings, tables=("base_only",))
    definition = Study(settings, definition.data, definition.base)
    with pytest.raises(ConfigError, match="tables names 'base_only'"):
        make_tables(definition)
    monkeypatch.setitem(TABLES, "base_only", base_only)
    (table,) = make_tables(definition).values()
    assert [unit.task for unit in table.units()] == list(settings.held_in)


def test_the_page_names_places_that_exist():
    section = PAGE[PAGE.index("## Where a new thing goes") : PAGE.index("## PEFT's own tests")]
    rooms_to_come = {"analysis/", "tests/analysis/"}
    for path in set(re.findall(r"`((?:tests/)?[\w/]+(?:/|\.py))`", section)) - rooms_to_come:
        assert (ROOT / path).exists() or (ROOT / "src/sparselet" / path).exists(), path
    for thing in ("score", "merge method", "expert format", "verb", "study table", "analysis"):
        assert re.search(rf"^\| an? {thing} \|", section, flags=re.MULTILINE), thing
