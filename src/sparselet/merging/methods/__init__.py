"""The merge methods by name. A method is a function of the deltas of one target and the experts' weights, and a line here.

A method is called as `method(deltas, weights, **parameters)`: deltas of one target, one an expert (empty where the expert
has no such target), and one weight each; its own parameters are keyword-only, with defaults.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from sparselet.delta import SparseDelta
from sparselet.errors import UnknownMethod
from sparselet.merging.algebra.trim import Targets
from sparselet.merging.methods.arithmetic import arithmetic, magmax
from sparselet.merging.methods.average import overlap, uniform
from sparselet.merging.methods.breadcrumbs import breadcrumbs, survey_breadcrumbs
from sparselet.merging.methods.consensus import consensus, consensus_experts
from sparselet.merging.methods.dare import dare
from sparselet.merging.methods.della import della
from sparselet.merging.methods.emr import emr, emr_experts, survey_emr
from sparselet.merging.methods.model_stock import model_stock
from sparselet.merging.methods.pcb import pcb
from sparselet.merging.methods.sce import sce
from sparselet.merging.methods.sphere import karcher, multislerp
from sparselet.merging.methods.ties import survey_ties, ties

Method = Callable[..., SparseDelta]
# Reads every target, as (deltas, weights), and returns keyword arguments for the method.
Survey = Callable[[Targets, Mapping[str, Any]], dict[str, Any]]

METHODS: dict[str, Method] = {
    "overlap": overlap,
    "uniform": uniform,
    "arithmetic": arithmetic,
    "magmax": magmax,
    "ties": ties,
    "breadcrumbs": breadcrumbs,
    "dare": dare,
    "della": della,
    "sce": sce,
    "pcb": pcb,
    "emr": emr,
    "consensus": consensus,
    "model_stock": model_stock,
    "multislerp": multislerp,
    "karcher": karcher,
}

# What a method must know of whole experts before it can merge the first target.
SURVEYS: dict[str, Survey] = {
    "ties": survey_ties,
    "breadcrumbs": survey_breadcrumbs,
}

# An entry that these merge depends on the experts' values at that entry alone, and on what was surveyed; they can be given
# some of a target's rows.
BY_ENTRY = ("overlap", "uniform", "arithmetic", "magmax", "ties", "breadcrumbs", "emr", "consensus")

# What becomes of each single expert, for methods that compress as well as merge: one delta an expert.
PER_TASK: dict[str, Callable[..., list[SparseDelta]]] = {
    "emr": emr_experts,
    "consensus": consensus_experts,
}

PER_TASK_SURVEYS: dict[str, Survey] = {
    "emr": survey_emr,
}

# Keyword arguments that a survey fills in, and nobody else.
SURVEYED = ("cutoffs", "rescalers")


def defaults(method: str) -> dict[str, Any]:
    """The parameters of a method with their defaults. Raises UnknownMethod."""
    if method not in METHODS:
        raise UnknownMethod(f"no merge method is called {method!r}; there are {', '.join(METHODS)}.")
    found = inspect.signature(METHODS[method]).parameters.values()
    return {p.name: p.default for p in found if p.kind is p.KEYWORD_ONLY and p.name not in SURVEYED}


def complete_parameters(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters of a method: those given, and the defaults of the others.

    Raises UnknownMethod for a parameter that it does not take, ArgumentError for a value out of range.
    """
    known = defaults(method)
    unknown = sorted(set(given) - set(known))
    if unknown:
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        raise UnknownMethod(f"{method} has no parameter {unknown[0]!r}; {takes}.")
    parameters = {**known, **given}
    METHODS[method]([SparseDelta.empty((1, 1))] * 2, [1.0, 1.0], **parameters)  # refuses values before any work is done
    return parameters
