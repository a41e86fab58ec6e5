"""The notebook's API: the README's example on tiny models and tasks; results as text and as HTML."""

import json
from pathlib import Path

import pytest
import torch
from helpers.made_experts import contents
from helpers.tiny import make_adapter, make_model, save_base, save_task

import sparselet as sl
from sparselet.api.merging import weight_text
from sparselet.apply import apply_temporarily
from sparselet.errors import ArgumentError, ConfigError, OutputExists, UnknownMethod
from sparselet.merging import read_recipe

SHORT = sl.EvalSettings(rows=2, max_new_tokens=3)


@pytest.fixture(scope="module")
def expert(base_dir, task_dir):
    return sl.train(task_dir, model=base_dir, epochs=1, batch_size=4, density=0.25, score="gm", chat_template=False)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A full checkpoint of the base model."""
    model = make_model()
    with apply_temporarily(model, make_adapter(model, seed=7)):
        return save_base(tmp_path_factory.mktemp("full") / "full", model=model)


@pytest.fixture(scope="module")
def lora(tmp_path_factory, base_dir):
    """A LoRA adapter of the base model."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(make_model(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    directory = tmp_path_factory.mktemp("lora")
    model.save_pretrained(directory)
    return str(directory)


def same_bits(one, two):
    assert sorted(one) == sorted(two)
    return all(torch.equal(one[name].to_dense(), two[name].to_dense()) for name in one)


def assert_shown(result, *texts):
    """The result prints as text and shows as HTML, and both hold the texts."""
    for shown in (str(result), result._repr_html_()):
        for text in texts:
            assert text in shown
    assert result._repr_html_().startswith("<table>")


def test_the_notebook_example(expert, lora, full, base_dir, task_dir, tmp_path):
    second = save_task(tmp_path / "second")
    merged = sl.merge([expert, lora, full], "ties", density=0.3, base=base_dir)
    scores = sl.evaluate(merged, [task_dir, second], settings=SHORT)
    assert_shown(scores, "Rouge-L", "backwards", "second", "4 test rows", "merged by ties")
    assert scores.scores["merged by ties"]["second"]["rows"] == 2
    exported = sl.export(merged, "lora", tmp_path / "out", rank=16, max_error=1)
    assert_shown(exported, "Exported as lora", f"{merged.nnz:,}")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    changed = {name for name, delta in merged.items() if delta.nnz}
    assert set(exported.errors) == set(sl.load(tmp_path / "out", base=base_dir)) == changed


def test_training_in_memory_leaves_no_file_and_equals_training_to_a_directory(
    expert, base_dir, task_dir, tmp_path, monkeypatch
):
    assert expert.metadata.metrics["steps"] == 3
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    settings = sl.TrainSettings(
        task=task_dir, model=base_dir, epochs=1, batch_size=4, density=0.25, score="gm", chat_template=False
    )
    again = sl.train(settings)
    assert same_bits(again, expert)
    assert not list(tmp_path.iterdir())
    written = sl.train(settings, out=tmp_path / "expert")
    assert same_bits(written, expert)
    assert same_bits(sl.load(tmp_path / "expert"), expert)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"densty": 1}, "train has no setting 'densty'"),
        ({"density": 2}, "density must be in"),
        ({"method": "lora"}, "method lora writes a directory; set `out`"),
        ({"resume": True}, "set `out` with `resume`"),
    ],
)
def test_training_names_the_setting_that_is_wrong(arguments, message, base_dir, task_dir):
    with pytest.raises(ArgumentError, match=message):
        sl.train(task_dir, model=base_dir, **arguments)


def test_a_merge_in_memory_and_one_on_the_disk_are_the_same(expert, experts, tmp_path):
    steps = []
    memory = sl.merge(experts, "dare", [1, 0.5], {"density": 0.5}, seed=7)
    disk = sl.merge(experts, "dare", [1, 0.5], density=0.5, seed=7, out=tmp_path / "m", progress=lambda *s: steps.append(s))
    assert same_bits(memory, disk)
    assert steps[-1] == (len(disk), len(disk))
    recipe = read_recipe(tmp_path / "m" / "recipe.toml")
    assert (recipe.method, recipe.weights, recipe.parameters["seed"]) == ("dare", (1.0, 0.5), 7)
    again = sl.merge_recipe(tmp_path / "m" / "recipe.toml", tmp_path / "again")
    assert_shown(again, "Merged by dare", "one", "two", "0.5", f"{disk.nnz:,}")
    assert contents(tmp_path / "again") == contents(tmp_path / "m")
    mixed = sl.merge([expert, Path(experts[0])], out=tmp_path / "mixed")
    assert same_bits(mixed, sl.merge([expert, sl.load(experts[0])]))
    assert not (tmp_path / "mixed" / "recipe.toml").exists()  # the expert in memory has no name that could be merged again


def test_a_merge_that_makes_no_sense_is_refused(experts, tmp_path):
    for wrong in ([], experts[0], sl.load(experts[0])):
        with pytest.raises(ArgumentError, match="experts must be a list of at least one expert"):
            sl.merge(wrong)
    with pytest.raises(UnknownMethod):
        sl.merge(experts, "average")
    with pytest.raises(UnknownMethod, match="densty"):
        sl.merge(experts, "ties", densty=0.5)
    with pytest.raises(ArgumentError, match="set `out` with `keep_counts`"):
        sl.merge(experts, keep_counts=True)
    (tmp_path / "file").touch()
    for out in (tmp_path, Path(experts[0]) / "inside"):
        with pytest.raises((OutputExists, ConfigError)):
            sl.merge(experts, out=out)


def test_experts_are_added_and_removed(experts, tmp_path):
    others = [make_adapter(make_model(), seed=seed, task=f"seed {seed}").save(tmp_path / str(seed)) for seed in (3, 4)]
    sl.merge([experts[0], others[0]], out=tmp_path / "merged", keep_counts=True)
    updated = sl.update(tmp_path / "merged", tmp_path / "updated", add=[sl.load(others[1])], remove=[others[0]], weights=[0.5])
    sl.merge([experts[0], others[1]], weights=[1, 0.5], out=tmp_path / "new", keep_counts=True)
    assert contents(updated.path) == {
        name: content for name, content in contents(tmp_path / "new").items() if name != "recipe.toml"
    }


@pytest.mark.parametrize("method", ["emr", "consensus"])
def test_a_split_writes_what_a_merge_leaves_of_each_expert(experts, tmp_path, method):
    parts = sl.split(experts, tmp_path / "parts", method)
    assert_shown(parts, f"Split by {method}", "one", "two")
    assert [path.name for path in parts.paths] == ["one", "two"]
    assert set(sl.load(parts.paths[0])) == set(sl.load(experts[0]))


def test_a_search_finds_a_merge_and_writes_it(experts, base_dir, task_dir, tmp_path):
    settings = sl.SearchSettings(trials=2)
    answers = sl.EvalSettings(rows=1, max_new_tokens=2, split="validation")
    report = sl.search(experts, [task_dir], settings, base=base_dir, eval_settings=answers, out=tmp_path / "best")
    assert_shown(report, "Trials of the search", "weight 1", "Rouge-L")
    assert read_recipe(tmp_path / "best" / "recipe.toml").weights == report.search.recipe.weights
    assert len(json.loads((tmp_path / "best" / "search.json").read_text())["trials"]) == 2
    with pytest.raises(ConfigError, match="set `validation`"):
        sl.search(experts, [])


def test_a_weight_of_many_patterns_is_told_by_their_range():
    assert weight_text({f"layers.{i}.*": 0.5 + i for i in range(6)}) == "6 patterns, 0.5 to 5.5"
    assert weight_text({"*": 0.5, "*.v": 2.0}) == "{'*': 0.5, '*.v': 2.0}"
    assert weight_text(0.25) == "0.25"


def test_an_evaluation_takes_model_and_prompts_from_the_experts(expert, experts, base_dir, task_dir, tmp_path):
    seen = []
    scores = sl.evaluate([expert, experts[0]], task_dir, include_base=True, settings=SHORT, progress=lambda *s: seen.append(s))
    assert list(scores.results) == [base_dir, "backwards", experts[0]]
    assert seen[-1] == (6, 6)
    scores.write_predictions(tmp_path / "answers")
    assert len((tmp_path / "answers").read_text().splitlines()) == 6
    assert list(sl.evaluate(None, [task_dir], model=base_dir, settings=SHORT).results) == [base_dir]
    other = make_adapter(make_model(), base_model_name_or_path="other")
    with pytest.raises(ConfigError, match=r"several base models.*Set `model` to one"):
        sl.evaluate([expert, other], task_dir)
    with_template = make_adapter(make_model(), base_model_name_or_path=base_dir, chat_template=True)
    with pytest.raises(ConfigError, match="Set `chat_template=True` or `chat_template=False`"):
        sl.evaluate([expert, with_template], task_dir)


def test_an_evaluation_under_sparse_attention_says_what_it_used(expert, base_dir, task_dir):
    settings = sl.EvalSettings(max_new_tokens=3, chat_template=False)
    dense = sl.evaluate(expert, task_dir, model=base_dir, settings=settings)
    wide = sl.evaluate(expert, task_dir, model=base_dir, settings=settings, attention="window:window=4096")
    assert wide.scores == dense.scores
    assert "attention window: 100 % of pairs in prompts" in str(wide)
    narrow = sl.evaluate(expert, task_dir, model=base_dir, settings=settings, attention="window:window=2,sink=1,block=1")
    assert 0 < narrow.attention.prefill.density < 1
    with pytest.raises(ArgumentError, match="must be one of"):
        sl.evaluate(expert, "nowhere", model="nowhere", attention="flash")


def test_a_checkpoint_and_a_conversion(expert, full, base_dir, tmp_path):
    sl.export(expert, "checkpoint", tmp_path / "model", base=base_dir)
    converted = sl.convert(tmp_path / "model", tmp_path / "converted", base=base_dir)
    assert set(expert) <= set(converted)
    with pytest.raises(ConfigError, match=f"checkpoint needs the base model; set `base={base_dir}`"):
        sl.export(expert, "checkpoint", tmp_path / "no")
    partly = sl.export(expert, "shira", tmp_path / "shira", without=["*.v_proj"])
    assert_shown(partly, "left out", "v_proj")


def test_an_inspection_and_a_push_that_sends_nothing(expert, tmp_path):
    path = expert.save(tmp_path / "expert")
    assert_shown(sl.inspect(path), "backwards", f"{expert.nnz:,} in 6 targets", "size on disk")
    assert_shown(sl.inspect(expert), "backwards")
    pushed = sl.push(expert, "org/name", dry_run=True)
    assert_shown(pushed, "sparse adapter org/name@main", "adapter_model.safetensors")
    assert pushed.place is None


def test_a_study_is_planned_and_run(tmp_path, sources, monkeypatch):
    from cli.test_study_verb import STUDY
    from helpers.units import InThisProcess

    (tmp_path / "study.toml").write_text(STUDY.format(model=sources.model))
    monkeypatch.setattr("sparselet.api.studying.LocalExecutor", lambda store, sources, *_: InThisProcess(store, sources))
    tasks = Path(next(iter(sources.tasks.values()))).parent
    study = sl.study(tmp_path / "study.toml", tasks=tasks, out=str(tmp_path / "out"))
    assert study.plan()["done"] == 0
    result = study.run()
    assert_shown(result, "Best of each column", "interference")
    assert (tmp_path / "out" / "report.html").is_file()
    assert study.status()["missing"] == {}
