"""A merge as a TOML file: experts, weights, method, parameters.

method = "ties"
model = "packaged:smollm2-135m"      # needed for full checkpoints among the experts, export as a checkpoint, and search
layer_scaling = [0.5, 0.8]           # alpha and beta of LiNeS
keep_counts = false                  # true with overlap only, without layer_scaling

[parameters]
density = 0.2

[[experts]]
path = "../expert-a"                 # relative to the recipe's directory; or a hub name
weight = 0.5

[[experts]]
path = "org/expert-b"
weight = { "*.v_proj" = 1.0, "*" = 0.3 }
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from sparselet.adapter import SparseAdapter
from sparselet.errors import ConfigError, MissingExtra, prefix_errors
from sparselet.expert import Expert
from sparselet.io.toml_settings import parse_table, read_toml
from sparselet.merging.engine.plan import Weight, check_weights
from sparselet.merging.engine.stream import merge
from sparselet.merging.layer_scaling import LayerScaling, check_layer_scaling
from sparselet.merging.methods import complete_parameters

_FILE = "file://"


@dataclass(frozen=True)
class MergeRecipe:
    """A merge that can be run again.

    experts: paths or hub names. weights: one per expert, 1 by default. parameters: those of the method; missing ones get
    their defaults. model: the base model. keep_counts: whether experts can be added and removed later.
    layer_scaling: (α, β) of `layer_factors`.

    Raises ConfigError (no expert, a repeated expert, keep_counts with another method than overlap or with layer_scaling),
    ArgumentError, UnknownMethod.
    """

    experts: tuple[str, ...]
    method: str = "overlap"
    weights: tuple[Weight, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    keep_counts: bool = False
    layer_scaling: LayerScaling | None = None

    def __post_init__(self) -> None:
        if not self.experts:
            raise ConfigError("a merge needs at least one expert; name them, or list them as [[experts]] in a recipe.")
        locations = [os.path.realpath(name) if os.path.exists(name) else name for name in self.experts]
        for name, location in zip(self.experts, locations, strict=True):
            if locations.count(location) > 1:
                raise ConfigError(f"{name} is listed twice; list it once, and give it a weight if it should count for more.")
        object.__setattr__(self, "weights", tuple(check_weights(self.weights or None, len(self.experts))))
        object.__setattr__(self, "parameters", complete_parameters(self.method, self.parameters))
        object.__setattr__(self, "layer_scaling", check_layer_scaling(self.layer_scaling))
        if self.keep_counts and self.method != "overlap":
            raise ConfigError(f"keep_counts needs method overlap, got {self.method}.")
        if self.keep_counts and self.layer_scaling is not None:
            raise ConfigError("keep_counts and layer_scaling do not go together: counts are of the merge without it.")


@dataclass(frozen=True)
class _ExpertEntry:
    """One [[experts]] table. weight: checked by `MergeRecipe`."""

    path: str
    weight: Any = 1.0


@dataclass(frozen=True)
class _RecipeFile:
    """The tables of a recipe file."""

    experts: tuple[_ExpertEntry, ...] = ()
    method: str = "overlap"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    keep_counts: bool = False
    layer_scaling: tuple[float, ...] | None = None


def merge_by(recipe: MergeRecipe, experts: Sequence[Expert]) -> SparseAdapter:
    """The merge of the recipe's experts, opened, in memory. Raises what `merge` raises."""
    how = (recipe.method, recipe.weights, recipe.parameters)
    return merge(experts, *how, layer_scaling=recipe.layer_scaling)


def read_recipe(file: str | Path) -> MergeRecipe:
    """Read a recipe. Paths in it are relative to the file's directory; a name that does not exist there is a hub name.

    Raises ConfigError for a file that is not a recipe, and what `MergeRecipe` raises, naming the file.
    """
    file = Path(file)
    content = read_toml(file)
    with prefix_errors(file):
        recipe = parse_table(_RecipeFile, content)
        return MergeRecipe(
            tuple(_resolve(file.parent, expert.path) for expert in recipe.experts),
            recipe.method,
            tuple(expert.weight for expert in recipe.experts),
            recipe.parameters,
            None if recipe.model is None else _resolve(file.parent, recipe.model),
            recipe.keep_counts,
            recipe.layer_scaling,
        )


def recipe_text(recipe: MergeRecipe, directory: str | Path) -> str:
    """The recipe as TOML, for a file in `directory`: local paths are written relative to it. Raises MissingExtra."""
    try:
        import tomli_w
    except ModuleNotFoundError as error:
        raise MissingExtra("writing a recipe needs tomli_w: pip install 'sparselet[cli]'.") from error
    content: dict[str, Any] = {"method": recipe.method}
    if recipe.model is not None:
        content["model"] = _relative_name(directory, recipe.model)
    if recipe.keep_counts:
        content["keep_counts"] = True
    if recipe.layer_scaling is not None:
        content["layer_scaling"] = list(recipe.layer_scaling)
    if recipe.parameters:
        content["parameters"] = dict(recipe.parameters)
    content["experts"] = [
        {"path": _relative_name(directory, name), "weight": dict(weight) if isinstance(weight, Mapping) else weight}
        for name, weight in zip(recipe.experts, recipe.weights, strict=True)
    ]
    return tomli_w.dumps(content)


def _relative_name(directory: str | Path, name: str) -> str:
    """A local path relative to `directory`, or as a file URI if its bytes are not UTF-8, as TOML must be; a name that does not
    exist locally stays as it is."""
    if not os.path.exists(name):
        return name
    path = os.path.relpath(os.path.realpath(name), os.path.realpath(directory))
    return path if path.isprintable() else Path(os.path.realpath(name)).as_uri()


def _resolve(directory: Path, name: str) -> str:
    """The inverse of `_relative_name`: a local path, or a hub name. A name that starts with a dot is never a hub name."""
    path = Path(os.fsdecode(unquote_to_bytes(name.removeprefix(_FILE)))) if name.startswith(_FILE) else directory / name
    if path.exists():
        return os.path.realpath(path)
    return str(path) if name.startswith((".", _FILE)) else name
