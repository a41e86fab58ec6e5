"""Tables about sparse attention: quality against cost, and a larger sparse model against a smaller dense one."""

from typing import Any

from sparselet.studies.engine.unit import AnalysisUnit
from sparselet.studies.sparse_regions.frontier_runs import ALL_KEYS, NATURAL_TEXT, text_digest
from sparselet.studies.sparse_regions.scaling_runs import MOST_HOPS
from sparselet.studies.study import Study
from sparselet.studies.table import Cell, Table

_TASKS = ("needle", "recall", "variables", "copy", NATURAL_TEXT)
_ROWS = {512: 5, 2048: 3}  # prompts of each task by their length in tokens
_SHARES = (4, 16)  # one of so many keys is kept
_SCALING_MEASURES = ("answers", *(f"{hops} hops" for hops in range(1, MOST_HOPS + 1)), "flops")
_SCALING_SEEDS = 3
_MEASURES = ("exact", "likelihood", "kept", "prompts", "answers", "attention", "flops")


def frontier(study: Study) -> Table:
    """Answers of the base model by patterns of attention, at two lengths and two budgets, with what they cost."""
    rows: dict[str, tuple[Cell | None, ...]] = {}
    for length in _ROWS:
        dense = Cell((_units(study, ALL_KEYS, length),), "likelihood")
        for name, pattern in _patterns(length).items():
            units = (_units(study, pattern, length),)
            cells = {measure: Cell(units, measure) for measure in _MEASURES}
            cells["exact"] = Cell((tuple(unit for unit in units[0] if unit.subject != NATURAL_TEXT),), "exact")
            cells["kept"] = Cell(units, "likelihood", percent_of=dense)
            rows[f"{name}, {length} tokens"] = tuple(cells.values())
    return Table(
        "Sparse attention: quality against cost",
        "",
        _MEASURES,
        rows,
        "In percent, means over tasks: a number in a text, one of many numbers, a number through three names, a copied note, "
        "and natural text going on. exact: answers that greedy decoding gives, without natural text. likelihood: exp of the "
        "mean log-probability of an answer's tokens; kept: of dense attention's mean. prompts, answers: pairs of a query and a "
        "key that are used. attention: pairs whose score is computed. flops: of all layers. 1/4, 1/16: keys that a pattern "
        "keeps, of the prompt's.",
    )


def scaling(study: Study) -> Table:
    """Small models trained to recall: the smaller with all keys, the larger with as many as that costs, and with all."""
    rows: dict[str, tuple[Cell | None, ...]] = {}
    for layers, way, name in (
        (2, "all", "2 layers, all keys"),
        (4, "pages", "4 layers, pages"),
        (4, "all", "4 layers, all keys"),
    ):
        runs = (tuple(study.analyse("scaling", f"seed {seed}", seed=seed, layers=layers) for seed in range(_SCALING_SEEDS)),)
        name = f"{layers} layers, {'pages' if way == 'pages' else 'all keys'}"
        rows[name] = tuple(Cell(runs, f"{way} {measure}") for measure in _SCALING_MEASURES)
    return Table(
        "A larger sparse model against a smaller dense one",
        "",
        _SCALING_MEASURES,
        rows,
        "Llamas of width 64, trained alike from scratch on texts of up to 512 facts; right answers in percent of questions "
        "about 512 facts, which one fact answers (1 hop) or a chain of facts. Pages of 16 keys by their bounds, for questions "
        "alone: facts are read with all keys. flops: of a question's token, in thousands.",
    )


def _patterns(length: int) -> dict[str, str]:
    patterns = {"dense": ALL_KEYS}
    for share in _SHARES:
        kept = length // share
        patterns |= {
            f"window 1/{share}": f"window:sink=4,window={kept - 4},block=16",
            f"block 1/{share}": f"block:block=16,top={kept // 16}",
            f"vertical-slash 1/{share}": f"vertical-slash:vertical={kept // 2},slash={kept // 32},block=16",
            f"quest 1/{share}": f"quest:budget={kept}",
            f"snapkv 1/{share}": f"snapkv:budget={kept},window=16",
        }
    return patterns


def _units(study: Study, pattern: str, length: int) -> tuple[AnalysisUnit, ...]:
    """A unit for each task."""
    settings: dict[str, Any] = {"attention": pattern, "length": length, "rows": _ROWS[length]}
    of_task: dict[str, dict[str, Any]] = {NATURAL_TEXT: {"digest": text_digest()}}
    return tuple(study.analyse("frontier", task, task=task, **settings, **of_task.get(task, {})) for task in _TASKS)
