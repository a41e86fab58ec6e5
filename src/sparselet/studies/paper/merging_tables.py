"""Tables about merged experts: methods, a second stage, interference, the number of experts."""

from sparselet.studies.study import Study, Subject
from sparselet.studies.table import Cell, Chart, Table

HELD = ("held-in", "held-out")

# The paper's figures by row: percent of parameters, held-in, held-out.
PAPER_MERGES = {
    "full, uniform": (100.0, 45.33, 38.98),
    "full, arithmetic": (100.0, 39.40, 25.31),
    "full, ties": (100.0, 50.21, 46.16),
    "full, breadcrumbs": (100.0, 39.44, 25.33),
    "LoRA, uniform": (1.54, 45.96, 44.01),
    "element-sparse, overlap": (2.37, 51.44, 43.09),
    "block-sparse, overlap": (2.37, 50.37, 43.61),
}
PAPER_MULTITASK = (77.15, 54.00)
# The same by row and epochs: held-in, held-out.
PAPER_SECOND_STAGE: dict[tuple[str, float], tuple[float | None, float | None]] = {
    ("sparse weights", 1): (69.70, 50.96),
    ("sparse weights", 5): (76.45, None),
    ("all weights", 1): (73.90, 43.04),
    ("all weights", 5): (76.72, None),
}


def merging(study: Study) -> Table:
    """Experts of each kind merged, and what multitask training reaches."""
    rows: dict[str, tuple[Cell | None, ...]] = {}
    for name, (experts, method, parameters) in _merges(study).items():
        percent, held_in, held_out = PAPER_MERGES.get(name, (None, None, None))
        merged = study.merge(experts, method, parameters)
        measured = study.held_in(merged, held_in), study.held_out(merged, held_out)
        rows[name] = study.parameters(experts, percent), *measured
    multitask = study.multitask()
    rows["multitask"] = study.parameters(multitask, 100.0), *_held(study, multitask, PAPER_MULTITASK)
    return Table(
        "Merged experts",
        "Table 1",
        ("% of parameters", *HELD),
        rows,
        f"LoRA has rank {study.settings.lora_rank}; in the paper its experts are smaller than the sparse ones.",
        (Chart("dots", columns=HELD),),
    )


def second_stage(study: Study) -> Table:
    """Multitask training after merging."""
    settings = study.settings
    first = study.experts() if settings.first_stage_epochs is None else study.experts(epochs=settings.first_stage_epochs)
    merged = study.merge(first, "overlap")
    rows = {"merged": _held(study, merged)}
    for weights in ("sparse weights", "all weights"):
        for epochs in settings.second_stage_epochs:
            trained = study.second_stage(merged, epochs, all_weights=weights == "all weights")
            paper = PAPER_SECOND_STAGE.get((weights, epochs), (None, None))
            rows[f"{weights}, {epochs:g} epoch{'s' if epochs != 1 else ''}"] = _held(study, trained, paper)
    rows["multitask"] = _held(study, study.multitask(), PAPER_MULTITASK)
    fewer = settings.second_stage_rows not in (None, settings.train_rows)
    return Table(
        "Second stage: multitask training of the merged model",
        "Table 4",
        HELD,
        rows,
        f"The second stage trains on {settings.second_stage_rows} rows of each task." if fewer else "",
        (Chart("dots"),),
    )


def interference(study: Study) -> Table:
    """How much of an expert is lost in a merge, inside its mask and outside."""
    experts = study.experts()
    merged = study.merge(experts, "overlap")
    alone, own, final = (
        study.individual(experts, 77.54),
        study.own_masks(merged, experts),
        study.held_in(merged, 51.44),
    )
    lost_inside = Cell(alone.draws, paper=20.61, minus=own, percent_of=alone)
    lost_outside = Cell(own.draws, paper=13.05, minus=final, percent_of=alone)
    return Table(
        "Interference in a merge",
        "Figure 5",
        ("held-in", "lost, %"),
        {
            "expert alone": (alone, None),
            "merged, own mask only": (own, lost_inside),
            "merged": (final, lost_outside),
        },
        "Lost: share of the expert's quality, relative to the row above. Own mask only: the changes of others inside the "
        "expert's mask; the last row adds their changes outside of it.",
        (Chart("dots", columns=("held-in",)),),
    )


def number_of_experts(study: Study) -> Table:
    """More and more experts in one merge, each model evaluated on the tasks of its experts."""
    settings = study.settings
    rows, x, series = {}, [], []
    for name, (experts, method, parameters) in _merges(study).items():
        for n in settings.n_experts:
            draws = []
            for tasks in study.draws(n):
                merged = study.merge(experts, method, parameters, tasks)
                draws.extend(study.held_in(merged, tasks=tasks).draws)
            rows[f"{name}, {n} experts"] = (Cell(tuple(draws)),)
            x, series = [*x, float(n)], [*series, name]
    return Table(
        "Number of experts",
        "Figure 6",
        ("held-in",),
        rows,
        f"Mean over at most {settings.draws} random sets of experts; there is only one set of all experts.",
        (Chart("lines", "experts", tuple(x), tuple(series)),),
    )


def _merges(study: Study) -> dict:
    """Experts, method and parameters of each merge that is compared, by the name of its row."""
    full = study.experts(method="full")
    merges = {f"full, {method}": (full, method, parameters) for method, parameters in study.settings.full_merges.items()}
    merges["LoRA, uniform"] = study.experts(method="lora"), "uniform", {}
    merges["element-sparse, overlap"] = study.experts(), "overlap", {}
    merges["block-sparse, overlap"] = study.experts(block_size=study.settings.block_size), "overlap", {}
    return merges


def _held(study: Study, subject: Subject, paper: tuple[float | None, float | None] = (None, None)) -> tuple[Cell, Cell]:
    return study.held_in(subject, paper[0]), study.held_out(subject, paper[1])
