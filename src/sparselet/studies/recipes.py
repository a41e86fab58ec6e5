"""Tables about recipes: arms (settings of training, by name) compared at equal numbers of trained entries."""

from sparselet.studies.study import Experts, Study
from sparselet.studies.table import Cell, Chart, Table

MERGES = ("overlap", "uniform", "ties")


def sweep(study: Study) -> Table:
    """The validation loss of each arm at each of its learning rates, on the sweep tasks."""
    tasks, rows, x, series = study.settings.sweep_tasks, {}, [], []
    for name, arm in study.settings.arms.items():
        for rate in arm.get("learning_rates", (arm["learning_rate"],)):
            trained = study.arm(name, tasks, rate)
            rows[f"{name}, {rate:g}"] = (_validation_loss(trained), study.trained_numbers(trained))
            x, series = [*x, rate], [*series, name]
    return Table(
        "Learning rates of recipes",
        "",
        ("validation loss", "trained numbers"),
        rows,
        f"Of the tasks {', '.join(tasks)}. The lower the better.",
        (Chart("lines", "learning rate", tuple(x), tuple(series), log=True, columns=("validation loss",)),),
    )


def recipes(study: Study) -> Table:
    """The finalists, each at its best learning rate: loss, quality alone, and merged in three ways."""
    rows: dict[str, tuple[Cell | None, ...]] = {}
    for name in study.settings.finalists:
        experts = study.arm(name)
        merged = [study.held_in(study.merge(experts, method)) for method in MERGES]
        rows[name] = (_validation_loss(experts), study.individual(experts), *merged)
    return Table(
        "Recipes",
        "",
        ("validation loss", "individual", *MERGES),
        rows,
        "Each arm at the best of its learning rates by validation loss.",
        (Chart("dots", columns=("individual", *MERGES)),),
    )


def _validation_loss(experts: Experts) -> Cell:
    return Cell(tuple(tuple(by_task.values()) for by_task in experts), "validation_loss")
