"""Tables about where a task's change lies: in the weights, in the activations, and along pre-training."""

from typing import Any

from sparselet.studies.engine.unit import AnalysisUnit
from sparselet.studies.study import Experts, Study
from sparselet.studies.table import Cell, Chart, Table

_CONCENTRATION = ("50 %", "90 %", "99 %", "top 0.1 %", "top 1 %", "top 10 %", "Gini", "Hoyer")
_UNCHANGED = ("unchanged", "below 1e-5", "above 1e-5")
_OVERLAP = ("jaccard", "signs", "cosine", "directions")
_FRACTIONS = (0.001, 0.01, 0.1, 0.5)
_PARTS = ("top", "random", "random_rescaled", "bottom", "complement")
_LARGEST = 0.01  # share of the entries whose overlap is measured
_PROBED_ROWS = 200
_DEMONSTRATIONS = 4
_HIDDEN = ("hoyer", "gini", "top5", "effective_rank")
_PRETRAINING_RUNS = 3
_MOMENTS = ("start", "highest", "end")


def updates(study: Study) -> Table:
    """How concentrated the change of fine-tuning is, with nothing imposed, beside independent draws."""
    rows: dict[str, tuple[Cell | None, ...]] = {}
    for name, experts in _dense_experts(study).items():
        units = _of_each(study, "locate", experts)
        rows[name] = tuple(Cell(units, measure) for measure in (*_CONCENTRATION, *_UNCHANGED))
        for null in ("Gaussian", "Laplace"):
            own = tuple(Cell(units, f"{null} {measure}") for measure in _CONCENTRATION)
            rows[f"{name}, {null}"] = (*own, *(None for _ in _UNCHANGED))
    return Table(
        "Concentration of the change of fine-tuning",
        "",
        (*_CONCENTRATION, *_UNCHANGED),
        rows,
        "In percent. 50, 90, 99 %: the fewest entries with that share of the squared change. top: the share of the largest "
        "entries. below, above 1e-5: entries by |Δ|. Gaussian, Laplace: independent draws of one scale, in closed form.",
    )


def overlaps(study: Study) -> Table:
    """The largest entries of two changes: of one task with two seeds, and of two tasks."""
    rows: dict[str, tuple[Cell | None, ...]] = {}
    for name, experts in _dense_experts(study).items():
        tasks = list(experts[0])
        following = dict(zip(tasks, [*tasks[1:], tasks[0]], strict=True))
        pairs = {
            "two seeds": [{task: (experts[0][task], other[task]) for task in tasks} for other in experts[1:]],
            "two tasks": [{task: (by_task[task], by_task[following[task]]) for task in tasks} for by_task in experts],
        }
        for relation, draws in pairs.items():
            units = tuple(
                tuple(study.analyse("compare", task, pair, density=_LARGEST) for task, pair in draw.items()) for draw in draws
            )
            if units:
                rows[f"{name}, {relation}"] = tuple(Cell(units, measure) for measure in _OVERLAP)
                chance = (Cell(units, "chance"), Cell(units, "signs by chance"), None, Cell(units, "directions by chance"))
                rows[f"{name}, {relation}, chance"] = chance
    return Table(
        "Overlap of two changes",
        "",
        _OVERLAP,
        rows,
        f"In percent. jaccard, signs: of the largest {100 * _LARGEST:g} % of a target's entries. cosine: of the whole changes. "
        "directions: cos² between the leading output directions. Two tasks: each task and the next.",
    )


def grafts(study: Study) -> Table:
    """Quality with a part of the change in the base model, against the kept share."""
    rows: dict[str, tuple[Cell | None, ...]] = {}
    x, series = [], []
    columns = tuple(_dense_experts(study))
    settings = {
        "rows": study.settings.test_rows,
        "fractions": list(_FRACTIONS),
        "parts": list(_PARTS),
        "max_new_tokens": study.settings.max_new_tokens,
    }
    units = [_of_each(study, "graft", experts[:1], with_rows=True, **settings) for experts in _dense_experts(study).values()]
    for name, share in (("base", _FRACTIONS[0]), ("whole", 1.0)):
        rows[name] = tuple(Cell(draws, name) for draws in units)
        x, series = [*x, share], [*series, name]
    for part in _PARTS:
        for share in _FRACTIONS:
            rows[f"{part} {share:g}"] = tuple(Cell(draws, f"{part} {share:g}") for draws in units)
            x, series = [*x, share], [*series, part]
    return Table(
        "Grafts of the change of fine-tuning",
        "",
        columns,
        rows,
        "Rouge-L of greedy answers, first seed. random_rescaled: divided by the kept share. complement: all but the largest.",
        (Chart("lines", "kept share of the entries", tuple(x), tuple(series), log=True),),
    )


def activations(study: Study) -> Table:
    """Sparsity of the base model's hidden states on prompts, and on the same prompts made harder or easier."""
    units = {
        demonstrations: (
            tuple(
                study.analyse("probe", task, (), (task,), rows=_PROBED_ROWS, demonstrations=demonstrations)
                for task in study.settings.held_in
            ),
        )
        for demonstrations in (0, _DEMONSTRATIONS)
    }
    rows: dict[str, tuple[Cell | None, ...]] = {}
    for view, title in (("raw", "all channels"), ("rest", "without outliers")):
        for inputs in ("natural", "shuffled", "random"):
            cells = tuple(Cell(units[0], f"{view} {statistic} {inputs}") for statistic in _HIDDEN)
            loss = Cell(units[0], f"{view} hoyer loss") if inputs == "natural" else None
            rows[f"{inputs}, {title}"] = (*cells, loss)
        cells = tuple(Cell(units[_DEMONSTRATIONS], f"{view} {statistic} natural") for statistic in _HIDDEN)
        rows[f"after {_DEMONSTRATIONS} demonstrations, {title}"] = (*cells, None)
    rows["Gaussian"] = (*(Cell(units[0], f"Gaussian {statistic}") for statistic in _HIDDEN), Cell(units[0], "no correlation"))
    return Table(
        "Sparsity of hidden states",
        "",
        (*_HIDDEN, "loss"),
        rows,
        "Last layer, last prompt token; in percent. shuffled: the prompt's tokens in random order. random: drawn from the "
        "vocabulary. loss: Spearman's correlation of Hoyer sparsity and loss over a task's rows, times 100. Without outliers: "
        "without the 1 % of channels with the largest energy.",
    )


def pretraining(study: Study) -> Table:
    """Sparsity of hidden states along the training of a small model from scratch, on facts it sees and facts it does not."""
    runs = (tuple(study.analyse("pretrain", f"run {seed}", seed=seed) for seed in range(_PRETRAINING_RUNS)),)
    rows: dict[str, tuple[Cell | None, ...]] = {
        f"{facts}, {statistic}": tuple(Cell(runs, f"{facts} {statistic} {moment}") for moment in _MOMENTS)
        for facts in ("familiar", "unfamiliar")
        for statistic in ("top5", "hoyer", "effective_rank", "loss")
    }
    return Table(
        "Sparsity along pre-training",
        "",
        _MOMENTS,
        rows,
        "A Llama of three layers on synthetic facts; last layer, last token before a fact's value. In percent; losses in nats "
        "times 100. highest: of all probes.",
    )


def _dense_experts(study: Study) -> dict[str, Experts]:
    """Fine-tuning that imposes no sparsity: all weights, and query, key and value."""
    return {"all weights": study.experts(method="full"), "query, key, value": study.dense()}


def _of_each(
    study: Study, analysis: str, experts: Experts, *, with_rows: bool = False, **settings: Any
) -> tuple[tuple[AnalysisUnit, ...], ...]:
    """An analysis of each expert, by seed. with_rows: it reads the expert's task."""
    return tuple(
        tuple(
            study.analyse(analysis, task, (unit,), (task,) if with_rows else (), **settings) for task, unit in by_task.items()
        )
        for by_task in experts
    )
