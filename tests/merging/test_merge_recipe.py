"""Recipes: there and back through TOML, relative to their directory, and everything wrong with one."""

import builtins
from pathlib import Path

import pytest
from helpers.made_experts import contents, expert, patterns, saved, weights
from helpers.strategies import few
from hypothesis import given
from hypothesis import strategies as st

from sparselet.errors import ArgumentError, ConfigError, MissingExtra, SparseletError, UnknownMethod
from sparselet.merging import METHODS, MergeRecipe, merge_to, read_recipe, recipe_text


def there_and_back(recipe, directory):
    file = directory / "recipe.toml"
    file.write_text(recipe_text(recipe, directory), encoding="utf-8")
    return read_recipe(file)


names = st.text(st.characters(codec="utf-8", exclude_characters="\0/."), min_size=1, max_size=12).map(
    lambda name: f"org/{name}"
)


@few
@given(st.lists(names, min_size=1, max_size=4, unique=True), st.data())
def test_a_recipe_comes_back_as_it_was(tmp_path_factory, experts, data):
    method = data.draw(st.sampled_from(sorted(METHODS)))
    recipe = MergeRecipe(
        tuple(experts),
        method,
        tuple(data.draw(weights | patterns) for _ in experts),
        {"density": 0.8} if "density" in METHODS[method].defaults else {},
        data.draw(st.sampled_from([None, "packaged:smollm2-135m", "gpt2", "org/base@v1"])),
        (counts := method == "overlap" and data.draw(st.booleans())),
        None if counts else data.draw(st.none() | st.tuples(weights, weights)),
    )
    assert there_and_back(recipe, tmp_path_factory.mktemp("recipe")) == recipe


@pytest.mark.parametrize("method", METHODS)
def test_defaults_are_filled_in_and_written(tmp_path, method):
    recipe = MergeRecipe(("org/a", "org/b"), method)
    assert recipe.parameters == METHODS[method].defaults
    assert recipe.weights == (1.0, 1.0)
    assert there_and_back(recipe, tmp_path) == recipe


def test_a_recipe_may_say_little(tmp_path):
    (tmp_path / "r.toml").write_text('[[experts]]\npath = "org/a"\n[[experts]]\npath = "org/b"\nweight = 2\n')
    assert read_recipe(tmp_path / "r.toml") == MergeRecipe(("org/a", "org/b"), "overlap", (1.0, 2.0))


def test_paths_are_those_seen_from_the_recipe_wherever_it_is_read(tmp_path, monkeypatch):
    (first, second) = saved(tmp_path / "experts", [expert(1), expert(2)])
    (tmp_path / "base").mkdir()
    (tmp_path / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    recipe = MergeRecipe(("experts/expert0", str(second)), model="base")
    Path("deep/er/r.toml").write_text(recipe_text(recipe, "deep/er"))
    text = Path("deep/er/r.toml").read_text()
    assert '"../../experts/expert0"' in text
    assert '"../../experts/expert1"' in text
    assert '"../../base"' in text
    monkeypatch.chdir(tmp_path / "deep")
    for file in ("er/r.toml", tmp_path / "deep" / "er" / "r.toml"):
        found = read_recipe(file)
        assert found.experts == (str(first.resolve()), str(second.resolve()))
        assert found.model == str((tmp_path / "base").resolve())


def test_links_on_the_way_do_not_mislead(tmp_path):
    (path,) = saved(tmp_path / "a" / "b", [expert(1)])
    (tmp_path / "out").mkdir()
    (tmp_path / "a" / "b" / "link").symlink_to(tmp_path / "out")
    through = tmp_path / "a" / "b" / "link"
    (through / "r.toml").write_text(recipe_text(MergeRecipe((str(path),)), through))
    assert Path(read_recipe(through / "r.toml").experts[0]).resolve() == path


def test_a_relative_path_that_is_not_there_is_not_looked_for_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    saved(tmp_path, [expert(1)])
    (tmp_path / "here" / "r.toml").write_text('[[experts]]\npath = "./expert0"\n')
    monkeypatch.chdir(tmp_path)  # where there is one
    assert read_recipe("here/r.toml").experts == ("here/expert0",)


@pytest.mark.parametrize("method", ["overlap", "ties", "dare", "consensus"])
def test_a_recipe_run_again_gives_the_same_bytes(tmp_path, method):
    paths = saved(tmp_path, [expert(1), expert(5, 3)])
    recipe = MergeRecipe(tuple(map(str, paths)), method, (0.3, {"*.v": 2.0, "*": 0.1}))
    again = there_and_back(recipe, tmp_path)
    found = [
        contents(merge_to(tmp_path / out, r.experts, r.method, r.weights, r.parameters))
        for out, r in (("first", recipe), ("second", again))
    ]
    assert found[0] == found[1]


# Refusals

ONE = '[[experts]]\npath = "org/a"\n'


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", ConfigError, r"at least one expert; name them, or list them as \[\[experts\]\]"),
        ("experts = []", ConfigError, "at least one expert"),
        ("experts = 3", ConfigError, "experts must be a list, got 3"),
        ('experts = ["org/a"]', ConfigError, "experts\\[0\\] must be a table, got 'org/a'"),
        (ONE + "[[experts]]\nweight = 1", ConfigError, r"experts\[1\].path is missing"),
        ("[[experts]]\npath = 3", ConfigError, r"experts\[0\].path must be text, got 3"),
        (ONE + "weigth = 1", ConfigError, r"unknown key 'experts\[0\].weigth'; the keys are path, weight"),
        (ONE + 'weight = "much"', ArgumentError, "weight 1 must be a finite number, got 'much'"),
        (ONE + "weight = nan", ArgumentError, "weight 1 must be a finite number, got nan"),
        (ONE + "weight = true", ArgumentError, "weight 1 must be a finite number, got True"),
        (ONE + 'weight = {"*.v" = "x"}', ArgumentError, r"weight 1 for \*\.v must be a finite number"),
        (ONE + ONE, ConfigError, "org/a is listed twice; list it once"),
        ('metod = "ties"\n' + ONE, ConfigError, "unknown key 'metod'; the keys are experts, method, parameters, model, keep_c"),
        ("method = 3\n" + ONE, ConfigError, "method must be text, got 3"),
        ('method = "mean"\n' + ONE, UnknownMethod, "no merge method is called 'mean'"),
        ("model = 3\n" + ONE, ConfigError, "model must be text, got 3"),
        ("parameters = 3\n" + ONE, ConfigError, "parameters must be a table, got 3"),
        ('keep_counts = "yes"\n' + ONE, ConfigError, "keep_counts must be true or false, got 'yes'"),
        ("keep_counts = 1\n" + ONE, ConfigError, "keep_counts must be true or false, got 1"),
        ('method = "ties"\nkeep_counts = true\n' + ONE, ConfigError, "keep_counts needs method overlap, got ties"),
        ("layer_scaling = 1\n" + ONE, ConfigError, "layer_scaling must be a list, got 1"),
        ("layer_scaling = [1, 'x']\n" + ONE, ConfigError, r"layer_scaling\[1\] must be a number, got 'x'"),
        ("layer_scaling = [1.0]\n" + ONE, ArgumentError, "layer_scaling must be two numbers, alpha and beta"),
        ("layer_scaling = [1, nan]\n" + ONE, ArgumentError, "layer_scaling must be a finite number, got nan"),
        ('method = "ties"\nparameters = {sparsity = 1}\n' + ONE, UnknownMethod, "ties has no parameter 'sparsity'"),
        ('method = "ties"\nparameters = {density = 2}\n' + ONE, ArgumentError, "density must be in"),
        ("method = ", ConfigError, "is not TOML"),
        ("method = 'a'\nmethod = 'b'", ConfigError, "is not TOML"),
    ],
)
def test_a_wrong_recipe_is_refused_by_file_and_key(tmp_path, text, error, message):
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(error, match=rf"r\.toml:? .*{message}"):
        read_recipe(tmp_path / "r.toml")


def test_a_recipe_that_cannot_be_read_is_named(tmp_path):
    for path, reason in ((tmp_path / "nothing.toml", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError, match=f"cannot read {path}: {reason}"):
            read_recipe(path)
    (tmp_path / "latin.toml").write_bytes(b'model = "caf\xe9"')
    with pytest.raises(ConfigError, match=r"latin\.toml is not TOML"):
        read_recipe(tmp_path / "latin.toml")


def test_the_same_expert_under_two_names_is_refused(tmp_path, monkeypatch):
    (path,) = saved(tmp_path, [expert(1)])
    (tmp_path / "link").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    for other in ("./expert0", "expert0/", str(path), "link", "expert0/../expert0"):
        with pytest.raises(ConfigError, match="expert0 is listed twice; list it once, and give it a weight"):
            MergeRecipe(("expert0", other))
    assert len(MergeRecipe(("org/a", "org/b")).experts) == 2


@pytest.mark.parametrize("recipe", [{"experts": ()}, {"experts": ("a",), "weights": (1.0, 2.0)}])
def test_recipes_made_in_python_are_checked_too(recipe):
    with pytest.raises(SparseletError):
        MergeRecipe(**recipe)


def test_writing_names_what_is_missing(tmp_path, monkeypatch):
    imported = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "tomli_w":
            raise ModuleNotFoundError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=r"pip install 'sparselet\[cli\]'"):
        recipe_text(MergeRecipe(("org/a",)), tmp_path)
