"""`merge`, `update`, `search` and `split`: every flag, what is refused, what is written; experts of other kinds in `eval`."""

import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.made_experts import contents, names_in
from helpers.tiny import make_adapter, make_model, save_base, save_task
from transformers import AutoModelForCausalLM, PreTrainedConfig

from sparselet import METHODS, SparseAdapter, merge
from sparselet.adapter import CONFIG_FILE, WEIGHTS_FILE
from sparselet.api import opening
from sparselet.apply import apply_temporarily
from sparselet.errors import ModelError
from sparselet.evaluation import EvalResult
from sparselet.formats import open_expert
from sparselet.merging import merge_with_counts, per_expert_methods, read_recipe
from sparselet.merging.incremental import COUNTS_FILE
from sparselet.profiles.file import PROFILE_FILE

searching = importlib.import_module("sparselet.workflows.search")


@pytest.fixture
def third(tmp_path):
    """Another expert of the base model, of single entries."""
    return make_adapter(make_model(), seed=3, task="three", chat_template=False).save(tmp_path / "experts" / "three")


@pytest.fixture
def counted(tmp_path, experts, third):
    """A merge of the first and the third expert that kept its counts."""
    return merge_with_counts(tmp_path / "experts" / "counted", [experts[0], third])


@pytest.fixture(scope="module")
def full(tmp_path_factory, base_dir):
    """A full checkpoint of the base model with an expert in it."""
    model, directory = make_model(), tmp_path_factory.mktemp("full") / "full"
    with apply_temporarily(model, make_adapter(model, seed=7)):
        return save_base(directory, model=model)


@pytest.fixture(scope="module")
def lora(tmp_path_factory, base_dir):
    """A LoRA adapter of the base model whose factors are not 0."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(make_model(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    directory = tmp_path_factory.mktemp("lora")
    model.save_pretrained(directory)
    return str(directory)


def same_change(found, expected):
    assert sorted(found) == sorted(expected)
    for name in expected:
        assert torch.equal(found[name].to_dense(), expected[name].to_dense())


# What is written


def test_the_result_the_recipe_and_what_is_said(cli, tmp_path, experts):
    code, out, err = cli("merge", *experts, "--out", tmp_path / "x")
    assert code == 0, err
    assert names_in(tmp_path / "x") == [CONFIG_FILE, WEIGHTS_FILE, "recipe.toml"]
    merged = SparseAdapter.load(tmp_path / "x")
    same_change(merged, merge(experts))
    crowding = sum(SparseAdapter.load(path).nnz for path in experts) / merged.nnz
    for said in ("Merged by regmean", "one", "two", f"{merged.nnz:,}", f"The experts have {crowding:.2f} entries for each one"):
        assert said in out
    assert f"Written to {tmp_path / 'x'}, with recipe.toml" in out
    assert f"Next: sparselet eval --task TASK --adapter {tmp_path / 'x'}" in out


def test_without_a_profile_of_each_expert_or_with_a_negative_weight_the_default_is_tsv(cli, tmp_path, experts):
    bare = shutil.copytree(experts[1], tmp_path / "bare")
    (bare / PROFILE_FILE).unlink()
    for name, paths, weights in (("x", [experts[0], str(bare)], None), ("y", experts, [1.0, -0.5])):
        flags = ["--weights", *weights] if weights else []
        code, out, err = cli("merge", *paths, *flags, "--out", tmp_path / name)
        assert code == 0, err
        assert "Merged by tsv" in out
        same_change(SparseAdapter.load(tmp_path / name), merge(paths, "tsv", weights))
        same_change(merge(paths, weights=weights), merge(paths, "tsv", weights))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_by_name(cli, tmp_path, experts, method):
    code, out, err = cli("merge", *experts, "--out", tmp_path / "x", "--method", method, "--json")
    assert code == 0, err
    same_change(SparseAdapter.load(tmp_path / "x"), merge(experts, method))
    merged = SparseAdapter.load(tmp_path / "x")
    told = json.loads(out)
    assert set(told) == {"output", "method", "entries", "experts_per_entry"}
    assert (told["output"], told["method"], told["entries"]) == (str(tmp_path / "x"), method, merged.nnz)


def test_weights_and_parameters(cli, tmp_path, experts):
    flags = ("--method", "dare", "--weights", -1, 0.5, "--set", "density=0.5", "seed=7", "merge=ties", "--workers", 2)
    code, out, err = cli("merge", *experts, "--out", tmp_path / "x", *flags)
    assert code == 0, err
    parameters = {"density": 0.5, "seed": 7, "merge": "ties"}
    same_change(SparseAdapter.load(tmp_path / "x"), merge(experts, "dare", [-1, 0.5], parameters))
    assert "Parameters: density = 0.5, scale = 1.0, merge = ties, rescale = density, seed = 7" in out
    recipe = read_recipe(tmp_path / "x" / "recipe.toml")
    assert (recipe.method, recipe.weights) == ("dare", (-1.0, 0.5))
    assert recipe.parameters == {**METHODS["dare"].defaults, **parameters}


def test_settings_come_from_a_file_too(cli, tmp_path, experts):
    text = f"method = 'ties'\nweights = [1, 2]\nset = ['density=0.5']\nout = '{tmp_path}/x'\n"
    (tmp_path / "settings.toml").write_text(text)
    code, _, err = cli("merge", *experts, "--config", tmp_path / "settings.toml")
    assert code == 0, err
    same_change(SparseAdapter.load(tmp_path / "x"), merge(experts, "ties", [1, 2], {"density": 0.5}))


@pytest.mark.parametrize("method", ["overlap", "ties", "dare"])
def test_the_recipe_run_again_gives_the_same_bytes(cli, tmp_path, experts, method, monkeypatch):
    flags = ("--weights", 0.3, 1.1, "--method", method)
    assert cli("merge", *experts, "--out", tmp_path / "x", *flags)[0] == 0
    monkeypatch.chdir(tmp_path / "x")
    code, _, err = cli("merge", "--recipe", "recipe.toml", "--out", tmp_path / "y")
    assert code == 0, err
    assert contents(tmp_path / "x") == contents(tmp_path / "y")


def test_a_recipe_with_weights_by_pattern_is_told(cli, tmp_path, experts):
    text = "".join(f'[[experts]]\npath = "{path}"\nweight = {{ "*" = 0.5, "*.v_proj" = 2 }}\n' for path in experts)
    (tmp_path / "r.toml").write_text(text)
    code, out, err = cli("merge", "--recipe", tmp_path / "r.toml", "--out", tmp_path / "x")
    assert code == 0, err
    assert "{'*': 0.5, '*.v_proj': 2.0}" in out
    same_change(SparseAdapter.load(tmp_path / "x"), merge(experts, "overlap", weights=[{"*": 0.5, "*.v_proj": 2}] * 2))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_checkpoint_is_the_base_model_with_the_adapter_applied(cli, tmp_path, experts, base_dir, dtype):
    flags = ("--to", "checkpoint", "--model", base_dir, *(["--dtype", dtype] if dtype else []))
    assert cli("merge", *experts, "--out", tmp_path / "m", "--weights", 2, 1)[0] == 0
    code, out, err = cli("export", tmp_path / "m", "--out", tmp_path / "x", *flags)
    assert code == 0, err
    assert f"--model {tmp_path / 'x'}" in out
    assert not [name for name in names_in(tmp_path / "x") if name.startswith(".") or "adapter" in name]
    base = AutoModelForCausalLM.from_pretrained(base_dir)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "x", dtype="auto")
    with apply_temporarily(base, merge(experts, weights=[2, 1])):
        for name, parameter in found.named_parameters():
            assert torch.equal(parameter, base.get_parameter(name).to(parameter.dtype)), name  # summed, then rounded once
    assert all(parameter.dtype is getattr(torch, dtype or "float32") for parameter in found.parameters())


@pytest.mark.parametrize("method", per_expert_methods())
def test_a_split_is_one_adapter_an_expert(cli, tmp_path, experts, method):
    code, out, err = cli("split", *experts, "--method", method, "--out", tmp_path / "parts")
    assert code == 0, err
    for shown in (f"Split by {method}", f"{tmp_path}/parts/one", f"{tmp_path}/parts/two"):
        assert shown in out
    assert names_in(tmp_path / "parts") == ["one", "two"]
    assert SparseAdapter.load(tmp_path / "parts" / "one").metadata.task == "one"
    _, out, _ = cli("split", *experts, "--method", method, "--out", tmp_path / "again", "--json")
    assert json.loads(out)["adapters"] == [f"{tmp_path}/again/one", f"{tmp_path}/again/two"]
    assert contents(tmp_path / "parts") == contents(tmp_path / "again")


def test_a_merge_that_kept_its_counts_is_changed(cli, tmp_path, experts, third):
    code, _, err = cli("merge", experts[0], third, "--out", tmp_path / "x", "--keep-counts")
    assert code == 0, err
    assert names_in(tmp_path / "x") == [CONFIG_FILE, WEIGHTS_FILE, COUNTS_FILE, "recipe.toml"]
    assert read_recipe(tmp_path / "x" / "recipe.toml").keep_counts
    fourth = make_adapter(make_model(), seed=4).save(tmp_path / "four")
    flags = ("--add", fourth, "--remove", third, "--weights", 0.5, "--workers", 2)
    code, out, err = cli("update", tmp_path / "x", "--out", tmp_path / "y", *flags)
    assert code == 0, err
    assert contents(tmp_path / "y") == contents(merge_with_counts(tmp_path / "new", [experts[0], fourth], [1.0, 0.5]))
    for said in ("Merged by overlap", "one", "0.5", f"Written to {tmp_path / 'y'}"):
        assert said in out
    code, out, _ = cli("update", tmp_path / "y", "--out", tmp_path / "z", "--add", third, "--json")
    told = json.loads(out)
    assert told == {
        "output": str(tmp_path / "z"),
        "method": "overlap",
        "entries": SparseAdapter.load(tmp_path / "z").nnz,
        "experts": 3,
    }


# Experts of other kinds


def test_experts_of_all_kinds_merge_together(cli, tmp_path, experts, lora, full, base_dir, monkeypatch):
    monkeypatch.chdir(Path(base_dir).parent)
    code, _, err = cli("merge", experts[0], lora, full, "--out", tmp_path / "x", "--model", Path(base_dir).name)
    assert code == 0, err
    expected = merge([experts[0], lora, full], base=base_dir)
    same_change(SparseAdapter.load(tmp_path / "x"), expected)
    assert cli("merge", "--recipe", tmp_path / "x" / "recipe.toml", "--out", tmp_path / "y")[0] == 0
    assert contents(tmp_path / "x") == contents(tmp_path / "y")


def test_a_checkpoint_needs_its_base_model(refused, tmp_path, experts, full, base_dir, task_dir):
    assert "--model" in refused("merge", experts[0], full, "--out", tmp_path / "x")
    assert "does not exist" in refused("merge", experts[0], full, "--out", tmp_path / "x", "--model", "./nothing")
    assert not names_in(tmp_path)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_experts_of_other_kinds_are_measured(cli, tmp_path, base_dir, task_dir, lora, full, kind):
    path = {"lora": lora, "full": full}[kind]
    arguments = ("--task", task_dir, "--rows", 3, "--max-new-tokens", 6, "--no-chat-template")
    answers = {}
    for name, model in (("expert", ("--model", base_dir, "--adapter", path)), ("model", ("--model", full))):
        code, _, err = cli("eval", *model, *arguments, "--predictions", tmp_path / name)
        assert code == 0, err
        answers[name] = [json.loads(line)["answer"] for line in (tmp_path / name).read_text().splitlines()]
    assert (answers["expert"] == answers["model"]) == (kind == "full")


def test_the_base_model_is_called_as_it_was_asked_for(tmp_path, full, base_dir, monkeypatch):
    monkeypatch.setattr(opening, "local_path", lambda name: base_dir if name == "packaged:model" else name)
    (opened,) = opening.open_experts([full], "packaged:model")
    assert opened.metadata.base_model_name_or_path == "packaged:model"


def test_a_base_model_on_the_hub_is_fetched_only_where_its_files_are_needed(tmp_path, experts, full, base_dir, monkeypatch):
    fetched = []
    monkeypatch.setattr("sparselet.hub.sources.fetch", lambda name: fetched.append(name) or Path(base_dir))
    read, here = PreTrainedConfig.get_config_dict, {"org/base": base_dir}
    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", lambda name, **k: read(here.get(name, name), **k))
    assert len(opening.open_experts(experts, "org/base")) == 2
    assert not fetched
    (opened,) = opening.open_experts([full], "org/base")
    assert set(fetched) == {"org/base"}
    assert opened.metadata.base_model_name_or_path == "org/base"
    assert opened.nnz == open_expert(full, base_dir).nnz


# Search


@pytest.fixture
def scored(monkeypatch):
    """Stands in for answering: a higher score for larger weights."""
    asked = []

    def stand_in(model, tokenizer, tasks, adapter, settings):
        asked.append(settings)
        return [
            EvalResult(task.name, {"rougeL": sum(abs(d.values).sum().item() for d in adapter.values())}, 1, ())
            for task in tasks
        ]

    monkeypatch.setattr(searching, "evaluate", stand_in)
    return asked


def test_a_search_writes_the_best_recipe_and_all_trials(cli, tmp_path, experts, base_dir, task_dir, scored):
    flags = ("--choose", "weights", "--validation", task_dir, save_task(tmp_path / "other"), "--model", base_dir)
    more = ("--trials", 6, "--validation-rows", 3, "--max-new-tokens", 9, "--seed", 2)
    code, out, err = cli("search", *experts, "--out", tmp_path / "x", *flags, *more)
    assert code == 0, err
    assert "Asking without the chat template, as the adapters were trained" in err
    assert {(s.rows, s.chat_template, s.max_new_tokens, s.split) for s in scored} == {(3, False, 9, "validation")}
    trials = json.loads((tmp_path / "x" / "search.json").read_text())["trials"]
    assert len(trials) == 6
    assert trials[0]["chosen"] == {"weight 1": 1.0, "weight 2": 1.0}
    assert set(trials[0]["tasks"]) == {"backwards", "other"}
    best = max(trials, key=lambda trial: trial["score"])
    recipe = read_recipe(tmp_path / "x" / "recipe.toml")
    assert list(recipe.weights) == list(best["chosen"].values())
    same_change(SparseAdapter.load(tmp_path / "x"), merge(experts, "overlap", weights=recipe.weights))
    assert f"Best of 6 trials: weight 1 = {recipe.weights[0]:.3g}, weight 2" in out
    assert f"first trial {trials[0]['score']:.1f}" in out
    code, out, _ = cli("search", *experts, "--out", tmp_path / "y", *flags, *more, "--json", "--chat-template")
    assert json.loads(out)["search"] == {"score": best["score"], "chosen": best["chosen"]}
    assert (tmp_path / "y" / "search.json").read_bytes() == (tmp_path / "x" / "search.json").read_bytes()
    assert scored[-1].chat_template


def test_a_search_may_be_short_and_start_from_a_recipe(cli, tmp_path, experts, base_dir, task_dir, scored):
    assert cli("merge", *experts, "--out", tmp_path / "x", "--method", "ties", "--set", "density=0.5")[0] == 0
    flags = ("--choose", "density", "--validation", task_dir, "--model", base_dir, "--seconds", 1e-9)
    code, _, err = cli("search", "--recipe", tmp_path / "x" / "recipe.toml", "--out", tmp_path / "y", *flags)
    assert code == 0, err
    (trial,) = json.loads((tmp_path / "y" / "search.json").read_text())["trials"]
    assert trial["chosen"] == {"density": 0.5}
    assert (tmp_path / "x" / WEIGHTS_FILE).read_bytes() == (tmp_path / "y" / WEIGHTS_FILE).read_bytes()


def test_a_search_by_real_answers(cli, tmp_path, experts, base_dir, task_dir):
    flags = ("--choose", "lambda", "--validation", task_dir, "--model", base_dir, "--trials", 2, "--validation-rows", 1)
    code, out, err = cli("search", *experts, "--out", tmp_path / "x", *flags, "--max-new-tokens", 2)
    assert code == 0, err
    assert "Best of 2 trials: scale =" in out


# What is refused


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("merge --method average", f"no merge method is called 'average'; there are {', '.join(METHODS)}"),
        ("merge --weights 1", "2 experts need as many weights, got 1"),
        ("merge --weights 1 nan", "weight 2 must be a finite number, got nan"),
        ("merge --set density=0.5", "overlap has no parameter 'density'; it takes none"),
        ("merge --method ties --set density", "--set takes name=value, got 'density'"),
        ("merge --method ties --set =1", "--set takes name=value, got '=1'"),
        ("merge --method ties --set density=", "--set takes name=value, got 'density='"),
        ("merge --method ties --set density=much", "density must be"),
        ("merge --method ties --keep-counts", "--keep-counts needs method overlap, got ties"),
        ("merge --workers 0", "workers must be at least 1, got 0"),
        ("merge --recipe r.toml", "--recipe and experts do not go together"),
        ("merge --recipe nothing.toml", "--recipe and experts do not go together"),
        ("search --choose density --validation TASK --model BASE", "method overlap has no density to search; ties"),
        ("search --weights 1 -1 --validation TASK --model BASE", "the recipe starts outside: weight 2 -1"),
        ("search --trials 0 --validation TASK --model BASE", "trials must be at least 1"),
        ("search --validation nothing/there/is --model BASE", "nothing/there/is is not a directory"),
        ("search --validation TASK --validation-rows 0 --model BASE", "rows must be at least 1, got 0"),
        ("search --validation TASK TASK --model BASE", "two tasks are called backwards"),
        ("search --recipe r.toml --validation TASK", "--recipe and experts do not go together"),
        ("split --method overlap", "overlap merges into one adapter only; emr, consensus give one per expert"),
        ("split --weights 1", "2 experts need as many weights, got 1"),
        ("split --set density", "--set takes name=value, got 'density'"),
    ],
)
def test_a_merge_that_makes_no_sense_is_refused(refused, tmp_path, experts, base_dir, task_dir, arguments, reason, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "file").touch()
    monkeypatch.chdir(tmp_path / "here")
    verb, *flags = [{"BASE": base_dir, "TASK": task_dir}.get(word, word) for word in arguments.split()]
    assert reason in refused(verb, *experts, "--out", tmp_path / "x", *flags)
    assert contents(tmp_path) == {"here/file": b""}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["merge", "--seed", "3"], "sparselet search EXPERTS"),
        (["merge", "--search", "weights"], "sparselet search EXPERTS"),
        (["merge", "--add", "c"], "sparselet update MERGED"),
        (["merge", "--remove=c"], "sparselet update MERGED"),
        (["merge", "--per-task", "d"], "sparselet split EXPERTS"),
        (["merge", "--as", "checkpoint"], "sparselet export MERGED"),
        (["merge", "--workers", "many"], "many"),
        (["search", "--validation", "task", "--choose", "all"], "all"),
        (["search"], "--validation"),
    ],
)
def test_wrong_usage_names_the_word_or_the_new_verb(refused, tmp_path, experts, arguments, named):
    verb, *flags = arguments
    assert named in refused(verb, *experts, "--out", tmp_path / "x", *flags, code=2)
    assert not names_in(tmp_path)


def test_no_expert_and_one_twice_are_refused(refused, tmp_path, experts):
    assert "a merge needs at least one expert" in refused("merge", "--out", tmp_path / "x")
    assert "is listed twice; list it once" in refused("merge", *experts, f"{experts[0]}/", "--out", tmp_path / "x")
    assert not names_in(tmp_path)


def test_changes_that_make_no_sense_are_refused(refused, tmp_path, experts, third, counted):
    before = contents(tmp_path)
    for arguments, reason in (
        ((counted, "--add", third), f"{third} is already in the merge"),
        ((counted, "--remove", experts[1]), "is not in the merge; remaining experts:"),
        ((counted, "--remove", experts[0], third), "no expert would remain in the merge"),
        ((counted, "--add", experts[1]), "sums and counts need one kind of block"),
        ((counted, "--add"), "nothing to change; give experts to add or to remove"),
        ((counted, "--remove", third, "--weights", 2), "0 experts need as many weights, got 1"),
        ((experts[0], "--add", third), "so experts cannot be added or removed"),
        ((tmp_path / "nothing", "--add", third), "nothing is not a directory"),
    ):
        assert reason in refused("update", *arguments, "--out", tmp_path / "x")
        assert contents(tmp_path) == before


def test_an_output_inside_an_expert_is_refused(refused, tmp_path, experts, third, counted):
    before = contents(tmp_path)
    for inside in (third / "merged", third / "deep" / "er", third / ".." / "three" / "merged"):
        assert f"would lie in the expert {third}" in refused("merge", experts[0], third, "--out", inside)
        assert f"would lie in the expert {third}" in refused("split", experts[0], third, "--out", inside)
    assert f"would lie in the expert {counted}" in refused("update", counted, "--remove", third, "--out", counted / "x")
    assert f"would lie in the expert {third}" in refused("update", counted, "--remove", third, "--out", third / "x")
    assert contents(tmp_path) == before


def test_a_hub_name_that_cannot_be_had_is_named(refused, tmp_path, experts, base_dir, monkeypatch):
    def absent(name):
        raise ModelError(f"cannot fetch {name}: no such repository.")

    monkeypatch.setattr("sparselet.hub.sources.fetch", absent)
    for arguments in (
        ("merge", experts[0], "org/nothing"),
        ("update", experts[0], "--add", "org/nothing"),
        ("update", "org/nothing", "--add", experts[0]),
    ):
        assert "cannot fetch org/nothing" in refused(*arguments, "--out", tmp_path / "x")
    assert not names_in(tmp_path)


def test_help_lists_the_methods(cli):
    for verb, text in (
        (
            "merge",
            f"How to merge; by default regmean if all experts have profiles, else tsv: {', '.join(METHODS)}.",
        ),
        ("split", f"How to merge: {' or '.join(per_expert_methods())}."),
    ):
        _, out, _ = cli(verb, "--help")
        assert text in " ".join(line.strip("│ ") for line in out.splitlines())


# Stopped, and a full disk


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_in_a_merge_leaves_nothing(cli, tmp_path, experts, monkeypatch, workers):
    calls = []

    def interrupt(deltas, weights):
        if any(delta.nnz for delta in deltas):
            calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return deltas[0]

    monkeypatch.setitem(METHODS, "overlap", replace(METHODS["overlap"], function=interrupt))
    code, out, err = cli("merge", *experts, "--method", "overlap", "--out", tmp_path / "x", "--workers", workers)
    assert len(calls) >= 3
    assert code == 130
    assert not out
    assert "error: interrupted" in err
    assert not names_in(tmp_path)
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("verb", ["merge", "split", "search"])
def test_ctrl_c_elsewhere_leaves_nothing(cli, tmp_path, base_dir, task_dir, experts, third, monkeypatch, verb):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("sparselet.merging.incremental.overlap_sums", interrupt)
    monkeypatch.setattr(searching, "evaluate", interrupt)
    monkeypatch.setitem(METHODS, "emr", replace(METHODS["emr"], per_expert=interrupt))
    flags = {"merge": ["--keep-counts"], "split": [], "search": ["--validation", task_dir, "--model", base_dir]}
    before = contents(tmp_path)
    assert cli(verb, experts[0], third, "--out", tmp_path / "x", *flags[verb])[0] == 130
    assert contents(tmp_path) == before
    assert names_in(tmp_path) == ["experts"]


@pytest.mark.parametrize("kibibytes", [4, 16, 40, 60])
@pytest.mark.parametrize("line", ["merge 1 2", "export 1 --to checkpoint", "merge 1 2 --keep-counts"])
def test_a_full_disk_is_named_and_nothing_is_left(refused, tmp_path, small_disk, kibibytes, line, monkeypatch):
    base = save_base(tmp_path / "base", hidden_size=64)
    for seed in (1, 2):
        make_adapter(make_model(hidden_size=64), seed=seed, density=0.9).save(tmp_path / str(seed))
    disk = small_disk(kibibytes)
    monkeypatch.chdir(tmp_path)
    error = refused(*line.split(), "--out", disk / "x", "--model", base)
    assert f"cannot write {disk}/x" in error
    assert "No space left on device" in error
    assert not list(disk.iterdir())
