"""RECIPES: settings of training that belong together, by name. A setting that is given wins over its recipe's."""

from collections.abc import Mapping
from typing import Any

from sparselet.errors import ConfigError

RECIPES: dict[str, dict[str, Any]] = {
    # Algorithm 1 as printed (Arnob et al. 2025): every setting whose default is another.
    "paper": {"when": "paper", "score": "mcs", "density": 0.1, "learning_rate": 1e-4},
}


def with_recipe(recipe: str | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, and those of the recipe that are not among them. Raises ConfigError for an unknown recipe."""
    if recipe is None:
        return dict(settings)
    if recipe not in RECIPES:
        raise ConfigError(f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}.")
    return {**RECIPES[recipe], **settings}
