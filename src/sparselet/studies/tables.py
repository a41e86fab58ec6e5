"""Every table of a study, and every set of claims, by name: a function and a line each."""

from collections.abc import Callable, Sequence

from sparselet.errors import ConfigError
from sparselet.studies.claim import Claim
from sparselet.studies.many_experts import MANY_CLAIMS, many_experts
from sparselet.studies.paper.claims import PAPER_CLAIMS
from sparselet.studies.paper.merging_tables import interference, merging, number_of_experts, second_stage
from sparselet.studies.paper.training_tables import block_sizes, density, layer_drop, learning_rates, scores, selection, targets
from sparselet.studies.recipes import RECIPE_CLAIMS, recipes, sweep
from sparselet.studies.sparse_regions.attention_tables import frontier, scaling
from sparselet.studies.sparse_regions.claims import REGION_CLAIMS
from sparselet.studies.sparse_regions.localised_tables import fast_slow, isolation, steering
from sparselet.studies.sparse_regions.tables import activations, grafts, overlaps, pretraining, updates
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
    "many_experts": many_experts,
    "updates": updates,
    "overlaps": overlaps,
    "grafts": grafts,
    "activations": activations,
    "pretraining": pretraining,
    "fast_slow": fast_slow,
    "steering": steering,
    "isolation": isolation,
    "frontier": frontier,
    "scaling": scaling,
}
OF_ARMS = ("sweep", "recipes", "many_experts")  # made by default only where the settings have arms
OF_ATTENTION = ("frontier", "scaling")
# Made only where they are named.
OF_REGIONS = (
    "updates",
    "overlaps",
    "grafts",
    "activations",
    "pretraining",
    "fast_slow",
    "steering",
    "isolation",
    *OF_ATTENTION,
)
CLAIMS: dict[str, Sequence[Claim]] = {
    "paper": PAPER_CLAIMS,
    "recipes": RECIPE_CLAIMS,
    "many_experts": MANY_CLAIMS,
    "sparse_regions": REGION_CLAIMS,
}


def make_tables(study: Study) -> dict[str, Table]:
    """The tables that the study's settings name, all if they name none. Raises ConfigError for one that is not there."""
    hidden = OF_REGIONS if study.settings.arms else (*OF_REGIONS, *OF_ARMS)
    names = study.settings.tables or [name for name in TABLES if name not in hidden]
    unknown = [name for name in names if name not in TABLES]
    if unknown:
        raise ConfigError(f"tables names {unknown[0]!r}; there are {', '.join(TABLES)}.")
    if study.settings.claims not in CLAIMS:
        raise ConfigError(f"claims must be one of {', '.join(CLAIMS)}, got {study.settings.claims!r}.")
    return {name: TABLES[name](study) for name in names}
