"""The flags that the merging verbs have in common."""

import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from sparselet.api.merging import FALLBACK
from sparselet.api.opening import open_experts
from sparselet.errors import ConfigError
from sparselet.evaluation import EvalSettings
from sparselet.merging import METHODS, MergeRecipe, read_recipe
from sparselet.merging.default_method import default_method

Many = Parameter(consume_multiple=True, negative="")
MERGE_METHOD_HELP = f"How to merge; by default regmean if all experts have profiles, else tsv: {', '.join(METHODS)}."


@dataclass(frozen=True)
class MergeFlags:
    """Experts as a merge takes them: a method with its weights and parameters, or a recipe."""

    method: Annotated[str | None, Parameter(help=MERGE_METHOD_HELP)] = None
    weights: Annotated[list[float] | None, Many] = None
    """One factor an expert, 1 each by default."""
    set_: Annotated[list[str] | None, Parameter(name="--set", consume_multiple=True, negative="")] = None
    """Parameters of the method, as name=value."""
    layer_scaling: Annotated[tuple[float, float] | None, Parameter(negative="")] = None
    """Alpha and beta of LiNeS: layer l of L of the merged change times alpha + beta * l / (L - 1)."""
    recipe: Path | None = None
    """Run this TOML file, which names experts, weights, method and parameters."""
    model: str | None = None
    """Base model: a hub name, a directory, or packaged:smollm2-135m. Full checkpoints among the experts need it."""

    def read(self, experts: list[str] | None, keep_counts: bool = False) -> MergeRecipe:
        """The recipe that the flags describe. Raises ConfigError."""
        flags = {"experts": experts, "--method": self.method, "--weights": self.weights, "--set": self.set_}
        flags |= {"--layer-scaling": self.layer_scaling, "--keep-counts": keep_counts}
        if self.recipe is None:
            method, weights = self.method or FALLBACK, tuple(self.weights or ())
            parameters = parse_parameters(self.set_)
            names = tuple(experts or ())
            return MergeRecipe(names, method, weights, parameters, self.model, keep_counts, self.layer_scaling)
        for flag, value in flags.items():
            if value:
                raise ConfigError(f"--recipe and {flag} do not go together.")
        recipe = read_recipe(self.recipe)
        return replace(recipe, model=self.model or recipe.model)

    def with_default_method(self, recipe: MergeRecipe) -> MergeRecipe:
        """The recipe with the method that suits its experts, if the flags name neither a method nor what one is needed for."""
        if self.recipe is not None or self.method is not None or self.set_ or recipe.keep_counts:
            return recipe
        return replace(recipe, method=default_method(open_experts(recipe.experts, recipe.model), recipe.weights), parameters={})


@dataclass(frozen=True)
class ValidationFlags:
    """How the merged models answer validation rows."""

    validation_rows: int | None = None
    """Validation rows of each task: 50 by default, 32 with merge."""
    chat_template: bool | None = None
    """Ask through the tokenizer's chat template; by default as the experts were trained."""
    max_new_tokens: int = 64
    """Longest answer, in tokens."""

    def settings(self, defaults: EvalSettings) -> EvalSettings:
        """The settings that the flags describe. Raises ConfigError."""
        rows = defaults.rows if self.validation_rows is None else self.validation_rows
        return replace(defaults, rows=rows, chat_template=self.chat_template, max_new_tokens=self.max_new_tokens)


def parse_parameters(assignments: list[str] | None) -> dict[str, Any]:
    """`name=value` texts, each value as in TOML, or else as text. Raises ConfigError."""
    parameters = {}
    for text in assignments or []:
        name, _, value = text.partition("=")
        if not name or not value:
            raise ConfigError(f"--set takes name=value, got {text!r}.")
        try:
            parameters[name] = tomllib.loads(f"value = {value}")["value"]
        except ValueError:
            parameters[name] = value
    return parameters
