"""Tables about training that builds on localised change: core isolation, steering vectors, fast–slow training."""

from typing import Any

from sparselet.studies.engine.unit import AnalysisUnit
from sparselet.studies.sparse_regions.isolation_runs import ISOLATED, MERGED_BY
from sparselet.studies.study import Study
from sparselet.studies.table import Cell, Table

_SEEDS = range(3)
_TAUGHT, _SECOND = "copa", "restaurant_slots"  # trained on by reward; not trained on
_PAIRS = ("trec", "stsb_paraphrase", "antonyms", "num_to_words")  # two tasks that choose a label, two that write a word
_FAST_SLOW = {"batch_size": 4, "epochs": 1, "learning_rate": 1e-3}
_HOW = {"generations": 6, "pool": 3, "fast_every": 4, "fast_calls": 100, "fast_rows": 24, "max_new_tokens": 16}
_ARMS: dict[str, dict[str, Any]] = {"both": {}, "weights": {"fast_calls": 0}, "supervised": {"slow": "sft"}}
_BOUND = 0.005  # of the KL divergence of steering, in nats a token
_GAIN = 0.4  # of the reward, at which steps, KL and loss are compared


def fast_slow(study: Study) -> Table:
    """Prompt and weights apart and together, and what reaching a reward costs."""
    held_in = study.settings.held_in
    task = _TAUGHT if _TAUGHT in held_in else held_in[0]
    second = next(name for name in (_SECOND, *held_in) if name in held_in and name != task)
    units = {
        arm: tuple(
            study.analyse(
                "fast_slow",
                f"seed {seed}",
                (),
                (task, second),
                train={**_FAST_SLOW, "train_rows": _at_most(study, 64), "seed": seed},
                how={**_HOW, **changes},
                gain=_GAIN,
                rows=study.settings.test_rows and 2 * study.settings.test_rows,
            )
            for seed in _SEEDS
        )
        for arm, changes in _ARMS.items()
    }

    def row(arm: str, reward: str, cost: bool = False) -> tuple[Cell | None, ...]:
        costs = tuple(Cell((units[arm],), name) if cost else None for name in ("steps", "KL", "loss"))
        return Cell((units[arm],), reward), *costs

    rows = {
        "base": row("both", "base first"),
        "prompt": row("both", "base final"),
        "weights": row("weights", "tuned first", cost=True),
        "weights of both, first prompt": row("both", "tuned first"),
        "both": row("both", "tuned final", cost=True),
        "both, supervised": row("supervised", "tuned final", cost=True),
    }
    return Table(
        "Fast–slow training",
        "",
        ("reward", "steps", "KL", "loss"),
        rows,
        f"{task}, which the base model answers sometimes; Rouge-L of test rows. weights: GRPO under the first prompt; both: "
        "with a pool of prompts; supervised: a variant of this project, on targets. steps: until a reward on validation rows "
        f"{_GAIN:g} above the base model's, or all of them. KL, loss: at that step, from the base model on the task's targets, "
        f"and the rise of the loss of {second}, in nats times 100.",
    )


def steering(study: Study) -> Table:
    """What a vector does to the length and the accuracy of worked sums, and of differences, on which it is not fitted."""
    units = tuple(
        study.analyse(
            "steering",
            f"seed {seed}",
            seed=seed,
            train_settings={"epochs": 3, "batch_size": 16},
            train_rows=_at_most(study, 192, 3),
            pairs=50,
            kl=_BOUND,
            rows=40,
            max_new_tokens=64,
        )
        for seed in _SEEDS
    )
    columns = [f"{task}{name}" for task in ("", "second ") for name in ("tokens", "fewer", "accuracy")]

    def row(arm: str, prefix: str = "") -> tuple[Cell | None, ...]:
        second = (None,) * 3 if prefix else tuple(Cell((units,), f"second {arm} {name}") for name in columns[:3])
        return *(Cell((units,), f"{prefix}{arm} {name}") for name in columns[:3]), *second

    rows = {arm: row(arm) for arm in ("none", "steered", "reversed", "random")}
    rows |= {"steered, ends of answers": row("steered", "ends ")}
    rows |= {"asked briefly": row("none", "brief "), "asked briefly, reversed": row("reversed", "brief ")}
    rows["goal"] = (None, Cell((units,), "goal fewer"), *(None for _ in columns[2:]))
    return Table(
        "Steering vectors",
        "",
        tuple(columns),
        rows,
        "A sparse expert taught sums and differences: with worked steps where a prompt asks for them, without where it asks to "
        "be brief, and mostly with them where it asks for nothing, as here. The vector, at "
        f"{_BOUND:g} nats a token, is the difference between asking for the one and for the other in 50 sums; ends of answers: "
        "that between the last tokens of both answers. tokens: of an answer. fewer: than without a vector, in percent. "
        "accuracy: of the last number. second: differences. random: of the same norm.",
    )


def isolation(study: Study) -> Table:
    """Core isolation and its ablations, against training on all tasks, one after another, and merging, at as many steps."""
    tasks = tuple(task for task in _PAIRS if task in study.settings.held_in)
    tasks = tasks if len(tasks) > 2 else study.settings.held_in[:4]

    def units(arm: str) -> tuple[AnalysisUnit, ...]:
        rows = {"train_rows": _at_most(study, 32), "validation_rows": 8}
        return tuple(
            study.analyse(
                "isolation",
                f"seed {seed}",
                (),
                tasks,
                arm=arm,
                train_settings={"batch_size": 4, **rows, "seed": seed},
                epochs=1.0,
                rows=study.settings.test_rows and min(12, study.settings.test_rows),
                validation_rows=4,
                max_new_tokens=study.settings.max_new_tokens,
            )
            for seed in _SEEDS
        )

    rows: dict[str, tuple[Cell | None, ...]] = {}
    for arm in (*ISOLATED, "mixed", "sequential", *MERGED_BY):
        own = (units(arm),)
        staged = arm in ISOLATED or arm == "sequential"
        rows[arm] = (Cell(own, "rougeL"), Cell(own, "forgotten") if staged else None)
    return Table(
        "Core isolation",
        "",
        ("Rouge-L", "forgotten"),
        rows,
        f"{', '.join(tasks)}; sparse experts but for `all entries`, which trains all of query, key and value. Each arm sees a "
        "task's rows at most three times. forgotten: Rouge-L of validation rows that tasks have lost since their own stage.",
    )


def _at_most(study: Study, rows: int, times: int = 1) -> int:
    """Training rows: `times` · `rows`, or of a smaller study `times` its own."""
    return times * min(rows, study.settings.train_rows or rows)
