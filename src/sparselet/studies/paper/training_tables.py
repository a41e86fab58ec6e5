"""Tables about how experts are trained: density, score, layers, targets, selection, learning rate, block size."""

from sparselet.studies.study import BASE, Experts, Study
from sparselet.studies.table import Cell, Chart, Table

# The paper's figures by name: individual, merged held-in, held-out.
PAPER_SCORES = {
    "mcs": (77.54, 51.44, 43.03),
    "cs": (75.92, 49.49, 43.16),
    "gm": (76.64, 48.04, 42.89),
    "wm": (77.28, 47.37, 36.54),
    "gd": (76.23, 46.23, 43.38),
}
# Held-in, held-out, active layers: without and with layer drop.
PAPER_LAYERS = ((51.44, 43.03, 32.0), (48.45, 41.29, 20.02))
QUALITY = ("individual", "held-in", "held-out")
NO_FIGURES = (None, None, None)


def density(study: Study) -> Table:
    """Quality against density, beside LoRA of equal size and full fine-tuning."""
    settings = study.settings
    rows: dict[str, tuple[Cell | None, ...]] = {"base": (study.held_in(BASE), study.held_in(BASE), study.held_out(BASE))}
    x, series = [min(settings.densities)], ["base"]
    for kept in settings.densities:
        experts = study.dense() if kept == 1 else study.experts(density=kept)
        paper = PAPER_SCORES["mcs"] if kept == 0.1 and settings.score == "mcs" else NO_FIGURES
        rows[f"sparse {kept:g}"] = _alone_and_merged(study, experts, "overlap", paper)
        x, series = [*x, kept], [*series, "sparse"]
    for kept, rank in zip(settings.densities, settings.lora_ranks, strict=False):
        experts = study.experts(method="lora", lora_rank=rank)
        rows[f"LoRA {kept:g}, rank {rank}"] = _alone_and_merged(study, experts, "uniform")
        x, series = [*x, kept], [*series, "LoRA"]
    rows["full"] = _alone_and_merged(study, study.experts(method="full"), "uniform")
    return Table(
        "Density, beside LoRA of equal size and full fine-tuning",
        "Figures 3 and 11",
        QUALITY,
        rows,
        "LoRA n, rank r: as many parameters as density n of the targets. Sparse experts are merged by overlap, the others "
        "uniformly. Density 1 trains every entry of the targets; full fine-tuning, all weights, is drawn there as well.",
        (Chart("lines", "density", (*x, 1.0), (*series, "full"), log=True),),
    )


def scores(study: Study) -> Table:
    """Scores that entries are chosen by."""
    return Table(
        "Scores",
        "Table 2",
        QUALITY,
        {
            score: _alone_and_merged(study, study.experts(score=score), "overlap", PAPER_SCORES.get(score, NO_FIGURES))
            for score in study.settings.scores
        },
        "mcs_neg and random are not in the paper.",
        (Chart("dots"),),
    )


def layer_drop(study: Study) -> Table:
    """Dropping the layers whose scores are all below the global threshold."""
    rows = {}
    for kept in study.settings.layer_drop_densities:
        paper = PAPER_LAYERS if kept == 0.1 else (NO_FIGURES, NO_FIGURES)
        rows[f"sparse {kept:g}"] = _with_layers(study, study.experts(density=kept), paper[0])
        rows[f"layer drop {kept:g}"] = _with_layers(study, study.experts(density=kept, layer_drop=True), paper[1])
    return Table(
        "Layer drop",
        "Table 3, Equations 5 and 6",
        (*QUALITY, "active layers"),
        rows,
        "A layer is dropped if no score in it reaches the k-th highest of all, k = density · entries: the higher the density, "
        "the fewer are.",
        (Chart("dots", columns=QUALITY),),
    )


def targets(study: Study) -> Table:
    """Which layers are adapted."""
    experts = {"QKV": study.experts()}
    experts |= {name: study.experts(target_modules=modules) for name, modules in study.settings.targets.items()}
    return Table(
        "Targets",
        "Figure 7",
        QUALITY,
        {name: _alone_and_merged(study, trained, "overlap") for name, trained in experts.items()},
        f"Density {study.settings.density:g} of each.",
        (Chart("dots"),),
    )


def selection(study: Study) -> Table:
    """Selecting the mask once, or again and again in the first epoch."""
    tasks = study.settings.sweep_tasks
    return Table(
        "Selection",
        "Figure 8",
        ("individual",),
        {
            "once": (study.individual(study.experts(tasks, reselect_every=0)),),
            "repeated": (study.individual(study.experts(tasks)),),
        },
        f"Once is at the end of the first epoch, of which all entries train until then. {_of_tasks(study)}",
        (Chart("dots"),),
    )


def learning_rates(study: Study) -> Table:
    """Each method over learning rates."""
    methods = {"sparse": {}, "LoRA": {"method": "lora"}, "full": {"method": "full"}}
    rates = study.settings.learning_rates
    return Table(
        "Learning rates",
        "Figure 9",
        ("individual",),
        {
            f"{name} {rate:g}": (study.individual(study.experts(study.settings.sweep_tasks, learning_rate=rate, **changes)),)
            for name, changes in methods.items()
            for rate in rates
        },
        _of_tasks(study),
        (Chart("lines", "learning rate", rates * len(methods), tuple(n for n in methods for _ in rates), log=True),),
    )


def block_sizes(study: Study) -> Table:
    """The side of the tiles of block-sparse experts."""
    tasks, sizes = study.settings.sweep_tasks, study.settings.block_sizes
    return Table(
        "Block sizes",
        "Figure 10",
        ("individual",),
        {f"{size}": (study.individual(study.experts(tasks, block_size=size)),) for size in sizes},
        _of_tasks(study),
        (Chart("lines", "block size", tuple(map(float, sizes)), ("block-sparse",) * len(sizes), log=True),),
    )


def _alone_and_merged(
    study: Study, experts: Experts, method: str, paper: tuple[float | None, ...] = NO_FIGURES
) -> tuple[Cell, Cell, Cell]:
    """The three cells of `QUALITY`."""
    merged = study.merge(experts, method)
    return study.individual(experts, paper[0]), study.held_in(merged, paper[1]), study.held_out(merged, paper[2])


def _with_layers(study: Study, experts: Experts, paper: tuple[float | None, ...]) -> tuple[Cell, ...]:
    quality = _alone_and_merged(study, experts, "overlap", (None, *paper[:2]))
    return *quality, study.active_layers(experts, paper[2])


def _of_tasks(study: Study) -> str:
    return f"Of the tasks {', '.join(study.settings.sweep_tasks)}."
