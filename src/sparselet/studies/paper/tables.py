"""Every table of the study, by name: a function and a line each."""

from collections.abc import Callable

from sparselet.errors import ConfigError
from sparselet.studies.paper.merging_tables import interference, merging, number_of_experts, second_stage
from sparselet.studies.paper.training_tables import block_sizes, density, layer_drop, learning_rates, scores, selection, targets
from sparselet.studies.recipes import recipes, sweep
from sparselet.studies.study import Study
from sparselet.studies.table import Table

TABLES: dict[str, Callable[[Study], Table]] = {
    "density": density,
    "merging": merging,
    "scores": scores,
    "layer_drop": layer_drop,
    "second_stage": second_stage,
    "interference": interference,
    "number_of_experts": number_of_experts,
    "targets": targets,
    "selection": selection,
    "learning_rates": learning_rates,
    "block_sizes": block_sizes,
    "sweep": sweep,
    "recipes": recipes,
}
OF_ARMS = ("sweep", "recipes")  # made by default only where the settings have arms


def make_tables(study: Study) -> dict[str, Table]:
    """The tables that the study's settings name, all if they name none. Raises ConfigError for one that is not there."""
    names = study.settings.tables or [name for name in TABLES if study.settings.arms or name not in OF_ARMS]
    unknown = [name for name in names if name not in TABLES]
    if unknown:
        raise ConfigError(f"tables names {unknown[0]!r}; there are {', '.join(TABLES)}.")
    return {name: TABLES[name](study) for name in names}
