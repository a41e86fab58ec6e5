"""A merge as a TOML file: which experts, how weighted, by which method.

method = "ties"
model = "packaged:smollm2-135m"      # where it is needed: full checkpoints among the experts, --as checkpoint, --search
keep_counts = false                  # true with overlap only

[parameters]
density = 0.2

[[experts]]
path = "../expert-a"                 # from the recipe's directory; or a hub name
weight = 0.5

[[experts]]
path = "org/expert-b"
weight = { "*.v_proj" = 1.0, "*" = 0.3 }
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from sparselet.errors import ConfigError, MissingExtra, SparseletError
from sparselet.io.files import read_toml
from sparselet.merging.engine.plan import Weight, check_weights
from sparselet.merging.methods import complete_parameters

_FILE = "file://"
_KINDS = {str: "text", bool: "true or false", dict: "a table", list: "a list of tables"}


@dataclass(frozen=True)
class Recipe:
    """A merge that can be run again.

    experts: paths or hub names. weights: one an expert, 1 each by default. parameters: of the method; those left out are
    filled in. model: the base model. keep_counts: whether experts can be added and removed later.

    Raises ConfigError (no expert, one twice, counts of another method than overlap), ArgumentError, UnknownMethod.
    """

    experts: tuple[str, ...]
    method: str = "overlap"
    weights: tuple[Weight, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    keep_counts: bool = False

    def __post_init__(self) -> None:
        if not self.experts:
            raise ConfigError("a merge needs at least one expert; name them, or list them as [[experts]] in a recipe.")
        places = [os.path.realpath(name) if os.path.exists(name) else name for name in self.experts]
        for name, place in zip(self.experts, places, strict=True):
            if places.count(place) > 1:
                raise ConfigError(f"{name} is there twice; name it once, and give it a weight if it should count for more.")
        object.__setattr__(self, "weights", tuple(check_weights(self.weights or None, len(self.experts))))
        object.__setattr__(self, "parameters", complete_parameters(self.method, self.parameters))
        if self.keep_counts and self.method != "overlap":
            raise ConfigError(f"keep_counts goes with method overlap, not with {self.method}.")


def read_recipe(file: str | Path) -> Recipe:
    """Read a recipe. Paths in it are taken from the file's directory; a name that is not there is one of the hub.

    Raises ConfigError for what is no recipe, and what `Recipe` raises, naming the file.
    """
    file = Path(file)
    content = read_toml(file)
    try:
        return _recipe(content, file.parent)
    except SparseletError as error:
        raise type(error)(f"{file}: {error}") from error


def recipe_text(recipe: Recipe, directory: str | Path) -> str:
    """The recipe as TOML, for a file in `directory`: what is on the disk is named from there. Raises MissingExtra."""
    try:
        import tomli_w
    except ModuleNotFoundError as error:
        raise MissingExtra("writing a recipe needs tomli_w: pip install 'sparselet[cli]'.") from error
    content: dict[str, Any] = {"method": recipe.method}
    if recipe.model is not None:
        content["model"] = _seen_from(directory, recipe.model)
    if recipe.keep_counts:
        content["keep_counts"] = True
    if recipe.parameters:
        content["parameters"] = dict(recipe.parameters)
    content["experts"] = [
        {"path": _seen_from(directory, name), "weight": dict(weight) if isinstance(weight, Mapping) else weight}
        for name, weight in zip(recipe.experts, recipe.weights, strict=True)
    ]
    return tomli_w.dumps(content)


def _recipe(content: dict[str, Any], directory: Path) -> Recipe:
    """The recipe that a file in `directory` holds."""
    paths, weights = [], []
    for i, expert in enumerate(_take(content, "experts", list, []), 1):
        if not isinstance(expert, dict) or not isinstance(expert.get("path"), str):
            raise ConfigError(f"expert {i} must be a table with a path, got {expert!r}.")
        unknown = sorted(set(expert) - {"path", "weight"})
        if unknown:
            raise ConfigError(f"expert {i} has an unknown key {unknown[0]!r}; it takes path and weight.")
        paths.append(_found_from(directory, expert["path"]))
        weights.append(expert.get("weight", 1.0))
    model = _take(content, "model", str, None)
    recipe = {
        "method": _take(content, "method", str, "overlap"),
        "parameters": _take(content, "parameters", dict, {}),
        "model": None if model is None else _found_from(directory, model),
        "keep_counts": _take(content, "keep_counts", bool, False),
    }
    if content:
        known = ", ".join(["experts", *recipe])
        raise ConfigError(f"unknown key {min(content)!r}; a recipe has {known}.")
    return Recipe(tuple(paths), weights=tuple(weights), **recipe)


def _take(content: dict[str, Any], key: str, kind: type, default: Any) -> Any:
    value = content.pop(key, default)
    if value is not default and not isinstance(value, kind):
        raise ConfigError(f"{key} must be {_KINDS[kind]}, got {value!r}.")
    return value


def _seen_from(directory: str | Path, name: str) -> str:
    """A path as seen from `directory`, or as a file URI where its bytes are not UTF-8, which TOML must be; a name that is not
    on the disk as it is."""
    if not os.path.exists(name):
        return name
    path = os.path.relpath(os.path.realpath(name), os.path.realpath(directory))
    return path if path.isprintable() else Path(os.path.realpath(name)).as_uri()


def _found_from(directory: Path, name: str) -> str:
    """What `_seen_from` gave, as seen from here: a path that starts with a dot is never one of the hub."""
    there = Path(os.fsdecode(unquote_to_bytes(name.removeprefix(_FILE)))) if name.startswith(_FILE) else directory / name
    if there.exists():
        return os.path.realpath(there)
    return str(there) if name.startswith((".", _FILE)) else name
