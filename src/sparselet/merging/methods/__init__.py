"""The merge methods by name. To add one, write its function and its `MergeMethod` in a file here, and list it below."""

from collections.abc import Mapping
from typing import Any

from sparselet.errors import UnknownMethod
from sparselet.merging.method import MergeMethod
from sparselet.merging.methods.actmat import ACTMAT
from sparselet.merging.methods.arithmetic import ARITHMETIC, MAGMAX
from sparselet.merging.methods.average import OVERLAP, UNIFORM
from sparselet.merging.methods.breadcrumbs import BREADCRUMBS
from sparselet.merging.methods.consensus import CONSENSUS
from sparselet.merging.methods.cpi import CPI
from sparselet.merging.methods.dare import DARE
from sparselet.merging.methods.della import DELLA
from sparselet.merging.methods.emr import EMR
from sparselet.merging.methods.iso import ISO_C, ISO_CTS
from sparselet.merging.methods.localize import LOCALIZE
from sparselet.merging.methods.model_stock import MODEL_STOCK
from sparselet.merging.methods.pcb import PCB
from sparselet.merging.methods.regmean import REGMEAN
from sparselet.merging.methods.sce import SCE
from sparselet.merging.methods.sphere import KARCHER, MULTISLERP
from sparselet.merging.methods.ties import TIES
from sparselet.merging.methods.tsv import TSV

METHODS: dict[str, MergeMethod] = {
    method.name: method
    for method in (
        OVERLAP,
        UNIFORM,
        ARITHMETIC,
        MAGMAX,
        TIES,
        BREADCRUMBS,
        DARE,
        DELLA,
        SCE,
        PCB,
        EMR,
        CONSENSUS,
        MODEL_STOCK,
        MULTISLERP,
        KARCHER,
        REGMEAN,
        ACTMAT,
        LOCALIZE,
        CPI,
        TSV,
        ISO_C,
        ISO_CTS,
    )
}


def get_method(name: str) -> MergeMethod:
    """A merge method by name. Raises UnknownMethod."""
    if name not in METHODS:
        raise UnknownMethod(f"no merge method is called {name!r}; there are {', '.join(METHODS)}.")
    return METHODS[name]


def complete_parameters(method: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """`MergeMethod.complete_parameters` of the method with that name. Raises UnknownMethod, ArgumentError."""
    return get_method(method).complete_parameters(parameters)


def per_expert_methods() -> list[str]:
    """The names of the methods that also give a delta per expert."""
    return [name for name, method in METHODS.items() if method.per_expert]
