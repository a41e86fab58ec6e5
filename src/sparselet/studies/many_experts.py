"""The table of many experts: merged into one model, merged in groups, and routed; and claims about it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sparselet.studies.claim import CellPattern, Claim, than
from sparselet.studies.engine.unit import TrainUnit
from sparselet.studies.settings import MERGE_KEYS
from sparselet.studies.study import BASE, Experts, Study
from sparselet.studies.table import Cell, Measured, Table

_KEPT = "kept, %"
_COLUMNS = ("held-in", "worst task", _KEPT, "held-out", "right, %", "unsure, %")
_Draws = tuple[tuple[Measured, ...], ...]


def many_experts(study: Study) -> Table:
    """More and more experts of each arm: each alone, merged, merged in groups, and, of the first arm, routed."""
    settings = study.settings
    base = study.held_in(BASE)
    rows: dict[str, tuple[Cell | None, ...]] = {"base": _row(base, base, base, study.held_out(BASE))}
    for arm in settings.finalists:
        experts = study.arm(arm)
        for count in settings.n_experts:
            sets: list[Experts] = [tuple({t: by_task[t] for t in tasks} for by_task in experts) for tasks in study.draws(count)]
            unseen = settings.held_out if count == len(settings.held_in) else ()
            own = Cell(_of_sets(sets, lambda chosen: study.individual(chosen).draws))
            rows[f"{arm}, {count}: own expert"] = _row(own, own, base)
            for name, method, parameters in _merges_of(study, arm, count):

                def merged(chosen: Experts, tasks: Sequence[str], how: tuple[str, Any] = (method, parameters)) -> _Draws:
                    return study.held_in(study.merge(chosen, *how), tasks=tasks).draws

                rows[f"{arm}, {count}: {name}"] = _row_of_sets(sets, merged, own, base, unseen)
            for name, how in _routes_of(study, count) if arm == settings.finalists[0] else ():

                def routed(chosen: Experts, tasks: Sequence[str], how: Mapping[str, Any] = how) -> _Draws:
                    return tuple(tuple(_routed(study, by_task, task, how) for task in tasks) for by_task in chosen)

                rows[f"{arm}, {count}: {name}"] = _row_of_sets(sets, routed, own, base, unseen, right=True)
    return Table(
        "Many experts in one model",
        "",
        _COLUMNS,
        rows,
        "kept: (merged − base) / (own expert − base), of the means. routed: each prompt is answered by the expert, or the "
        "merge of a group of experts, whose prompts it is nearest to; groups are of similar prompts or, by change, of changes "
        "at small angles. right: share of the prompts routed to the task's own. "
        "unsure: share of held-out prompts without a clear nearest, which the base model answers.",
    )


def _row_of_sets(
    sets: Sequence[Experts],
    answer: Callable[[Experts, Sequence[str]], _Draws],
    own: Cell,
    base: Cell,
    unseen: Sequence[str],
    right: bool = False,
) -> tuple[Cell | None, ...]:
    """The row of a way to answer the tasks of each set of experts. unseen: other tasks. right: it routes."""
    seen = Cell(_of_sets(sets, lambda chosen: answer(chosen, tuple(chosen[0]))))
    outside = Cell(answer(sets[0], unseen)) if unseen else None
    return _row(seen, own, base, outside, right)


def _row(seen: Cell, own: Cell, base: Cell, outside: Cell | None = None, right: bool = False) -> tuple[Cell | None, ...]:
    kept = None if seen is base else replace(seen, minus=base, percent_of=replace(own, minus=base))
    routes = (
        (replace(seen, measure="right"), replace(outside, measure="unsure") if outside else None) if right else (None, None)
    )
    return seen, replace(seen, worst=True), kept, outside, *routes


def _of_sets(sets: Sequence[Experts], draws: Callable[[Experts], _Draws]) -> _Draws:
    return tuple(draw for chosen in sets for draw in draws(chosen))


def _merges_of(study: Study, arm: str, count: int) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, method and parameters of the merges that are made of so many experts of an arm."""
    for name, merge in study.settings.merges.items():
        if arm in merge.get("arms", (arm,)) and count in merge.get("numbers", (count,)):
            yield name, merge["method"], {key: value for key, value in merge.items() if key not in MERGE_KEYS}


def _routes_of(study: Study, count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and settings of the ways in which so many experts are routed, apart and in groups."""
    yield "routed", {"groups": 0}
    for groups in study.settings.groups:
        if groups < count:
            yield f"routed, {groups} merges", {"groups": groups}
            yield f"routed, {groups} merges by change", {"groups": groups, "by": "change"}


def _routed(study: Study, experts: Mapping[str, TrainUnit], task: str, how: Mapping[str, Any]) -> Measured:
    settings = study.settings
    return study.analyse(
        "routed",
        task,
        tuple(experts.values()),
        (task,),
        splits=("test",),
        rows=settings.test_rows,
        max_input_length=settings.max_input_length,
        max_new_tokens=settings.max_new_tokens,
        fallback="base" if task in settings.held_out else "nearest",
        **how,
    )


def _keeps(what: str, row: str, margin: float) -> Claim:
    better = CellPattern("many_experts", f"default, 20: {row}", _KEPT)
    return Claim(
        f"{what} keeps at least {100 - margin:g} % of the gain of 20 experts.",
        "20 tasks",
        than(better, "default, 20: own expert"),
        margin,
    )


_MERGED = CellPattern("many_experts", "default, 20: regmean", "held-in")
_OTHERS = ("overlap", "uniform", "ties", "actmat", "tsv", "iso_c")

MANY_CLAIMS: tuple[Claim, ...] = (
    _keeps("Routing", "routed", 3.0),
    _keeps("A choice among four merged models", "routed, 4 merges", 5.0),
    _keeps("One merged model", "regmean", 8.0),
    Claim(
        "Of merges into one model RegMean is the best.",
        "20 tasks",
        sum((than(_MERGED, f"default, 20: {other}") for other in _OTHERS), ()),
    ),
    Claim(
        "One merged model is not worse than the base model on held-out tasks.",
        "20 tasks",
        than(replace(_MERGED, column="held-out"), "base"),
    ),
)
