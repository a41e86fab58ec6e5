"""Tables about recipes: arms (settings of training, by name) compared at equal numbers of trained entries; and claims."""

from sparselet.studies.claim import CellPattern, Claim, than
from sparselet.studies.study import BASE, Experts, Study
from sparselet.studies.table import Cell, Chart, Table

MERGES = ("overlap", "uniform", "ties", "regmean")
_DEFAULT = CellPattern("recipes", "default", "individual")

# What a user may expect of a training without flags. An arm called `default` has the settings of one.
RECIPE_CLAIMS: tuple[Claim, ...] = (
    Claim(
        "The default recipe is at least level with LoRA of equal size, on the same layers and on all (within 1 point).",
        "training without flags",
        than(_DEFAULT, "LoRA, *"),
        margin=1.0,
    ),
    Claim(
        "The default recipe is at most 1.5 points below full fine-tuning.",
        "training without flags",
        than(_DEFAULT, "full"),
        margin=1.5,
    ),
    Claim(
        "The default recipe is better than the paper's, at the same number of entries.",
        "training without flags",
        than(_DEFAULT, "paper, *"),
    ),
)


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
    """The finalists, each at its best learning rate: loss, quality alone, and merged."""
    rows: dict[str, tuple[Cell | None, ...]] = {"base": (None, study.held_in(BASE), *(None for _ in MERGES))}
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
