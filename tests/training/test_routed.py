"""A library of two trained experts, routed and measured."""

import json

import pytest
from helpers.tiny import make_adapter, make_model, save_base, write_rows

import sparselet as sl
from sparselet.apply import apply_temporarily
from sparselet.errors import ArgumentError, MissingProfile, WrongBase
from sparselet.formats import open_expert
from sparselet.generation.generate import generate
from sparselet.models import load_model, load_tokenizer
from sparselet.studies.analyses import AnalysisContext, run_analysis
from sparselet.tasks.rows import Row
from sparselet.tasks.task import Task, load_task

TASKS = ("upper", "digits")


@pytest.fixture(scope="module")
def library(base_dir, tmp_path_factory):
    """Two tasks whose prompts end unlike each other, an expert of each, and their directory."""
    directory = tmp_path_factory.mktemp("library")
    for name, text in zip(TASKS, ("say {}!", "{} + 1 ="), strict=True):
        (directory / name).mkdir()
        for split, first in (("train", 10), ("validation", 40), ("test", 60)):
            rows = [{"input": text.format(i), "target": str(i + 1)} for i in range(first, first + 12)]
            write_rows(directory / name / f"{split}.jsonl", rows)
        sl.train(str(directory / name), model=base_dir, epochs=2, batch_size=4, out=directory / f"{name}-expert")
    return directory


def test_prompts_are_routed_to_their_experts(library):
    experts = [str(library / f"{name}-expert") for name in TASKS]
    routes = sl.route(["say 77!", "88 + 1 ="], experts)
    assert [route.expert for route in routes] == experts


@pytest.mark.parametrize("fallback", ["nearest", "merge", "base"])
def test_a_routed_library_scores_as_the_experts_that_answer(library, fallback):
    experts, tasks = [str(library / f"{name}-expert") for name in TASKS], [str(library / name) for name in TASKS]
    settings = sl.EvalSettings(rows=4, max_new_tokens=8)
    margin = 0.0 if fallback == "nearest" else 0.99
    routed = sl.evaluate_routed(experts, tasks, settings=settings, routing=sl.RouteSettings(margin=margin, fallback=fallback))
    alone = sl.evaluate(experts, tasks, settings=settings)
    sources = {"nearest": experts, "merge": [sl.merge(experts)] * 2, "base": [None] * 2}[fallback]
    for task, expert, source in zip(routed.tasks, experts, sources, strict=True):
        assert task.oracle == {m: alone.scores[expert][task.task][m] for m in ("rougeL", "exact_match")}
        assert (task.accuracy, task.unsure) == (1.0, float(fallback != "nearest"))
        (answered,) = sl.evaluate(
            source, str(library / task.task), model=alone_base(library), settings=settings
        ).results.values()
        assert task.scores == answered[0].scores
    assert "mean" in str(routed.table())
    assert routed.seconds > 0


def test_a_study_measures_routing_among_experts_and_among_merges_of_groups(library):
    """The targets are the answers of the task's own expert, so routing to it scores 100, and to another less."""
    experts = [open_expert(str(library / f"{name}-expert")) for name in TASKS]
    base = alone_base(library)
    model, tokenizer = load_model(base), load_tokenizer(base)
    rows = load_task(library / "digits").rows("test", 4)
    with apply_temporarily(model, experts[1]):
        answers = generate(model, tokenizer, [row.input for row in rows], max_new_tokens=8, chat_template=False)
    task = Task("digits", {"test": tuple(Row(row.input, answer) for row, answer in zip(rows, answers, strict=True))})

    def numbers(chosen, **arguments):
        reports = []
        context = AnalysisContext(model, tokenizer, chosen, [task], reports.append)
        arguments = {"rows": 4, "max_input_length": 2048, "max_new_tokens": 8, "method": "uniform", **arguments}
        found = run_analysis("routed", context, arguments)
        assert reports[-1] == 1.0
        return found["rougeL"], found["right"]

    assert numbers(experts) == (100.0, 100.0)
    for by in ("prompts", "change"):  # two equal experts are a group, whose merge is either
        assert numbers([*experts, experts[1]], groups=2, by=by) == (100.0, 100.0)
    score, right = numbers([experts[0], experts[0]])
    assert score < 100
    assert right == 0


def alone_base(library):
    return sl.load(library / "upper-expert").metadata.base_model_name_or_path


def test_the_command_line_measures_a_library(cli, refused, library):
    experts, tasks = [library / f"{name}-expert" for name in TASKS], [library / name for name in TASKS]
    code, out, err = cli("eval", "--route", *experts, "--task", *tasks, "--rows", "2", "--max-new-tokens", "4")
    assert code == 0, err
    assert "worst" in out
    code, out, _ = cli("eval", "--route", *experts, "--task", tasks[0], "--rows", "2", "--max-new-tokens", "4", "--json")
    assert json.loads(out)["tasks"]["upper"]["accuracy"] == 1.0
    assert "--route goes with none of" in refused("eval", "--route", *experts, "--adapter", experts[0], "--task", tasks[0])
    assert "at least two experts" in refused("eval", "--route", experts[0], "--task", tasks[0])


def test_what_cannot_be_routed_is_refused_before_the_model_is_loaded(library, base_dir, tmp_path, monkeypatch):
    expert = sl.load(library / "upper-expert")
    bare = make_adapter(make_model(), base_model_name_or_path=base_dir, task="bare")
    other = save_base(tmp_path / "other", model=make_model(seed=5))
    with pytest.raises(WrongBase, match="the base model and the profile of"):
        sl.route(["say 3!"], [expert, sl.load(library / "digits-expert")], base=other)
    monkeypatch.setattr("sparselet.api.routing.load_model", None)
    with pytest.raises(MissingProfile, match="a router needs a profile of each expert, and bare has none"):
        sl.route(["say 3!"], [expert, bare])
    with pytest.raises(ArgumentError, match="fallback must be one of nearest, merge, base"):
        sl.RouteSettings(fallback="nobody")
    with pytest.raises(ArgumentError, match="two experts are called"):
        sl.route(["say 3!"], [expert, expert])
