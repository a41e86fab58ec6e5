"""What is said about sparse regions, as claims about the tables.

The sources are statements of the literature: that fine-tuning changes a sparse part of the weights, that hidden states become
sparser on hard and unfamiliar inputs (arXiv 2603.03415), and that this is learned in pre-training (the same).
"""

from sparselet.studies.claim import CellPattern, Claim, than
from sparselet.studies.sparse_regions.attention_claims import ATTENTION_CLAIMS

_UPDATES, _DIFFICULTY, _PRETRAINING = "Are updates sparse?", "arXiv 2603.03415", "arXiv 2603.03415, pre-training"
_FAST_SLOW, _STEERING, _ISOLATION = "arXiv 2605.12484", "arXiv 2507.04742", "arXiv 2508.21741"


def _updates(null: str) -> Claim:
    return Claim(
        f"The largest tenth of a change carries more of it than of {null} draws.",
        _UPDATES,
        than(CellPattern("updates", "all weights", "top 10 %"), f"all weights, {null}")
        + than(CellPattern("updates", "query, key, value", "top 10 %"), f"query, key, value, {null}"),
    )


def _harder(inputs: str, view: str) -> Claim:
    return Claim(
        f"Hidden states are sparser on {inputs} tokens than on natural prompts ({view}).",
        _DIFFICULTY,
        than(CellPattern("activations", f"{inputs}, {view}", "hoyer"), f"natural, {view}"),
    )


_BOTH, _STEERED, _ISOLATED = (
    CellPattern("fast_slow", "both", "reward"),
    CellPattern("steering", "steered", "fewer"),
    CellPattern("isolation", "isolated", "Rouge-L"),
)

LOCALISED_CLAIMS: tuple[Claim, ...] = (
    Claim(
        "Prompt and weights together reach more than either alone.", _FAST_SLOW, than(_BOTH, "weights") + than(_BOTH, "prompt")
    ),
    *(
        Claim(
            f"Weights alone {text} than with prompts.",
            _FAST_SLOW,
            than(CellPattern("fast_slow", "weights", column), "both"),
        )
        for column, text in (
            ("steps", "need more steps to a reward"),
            ("KL", "are, at that reward, farther from the base model"),
            ("loss", "forget, at that reward, more of a second task"),
        )
    ),
    Claim("A steering vector shortens answers by more than 20 %.", _STEERING, than(_STEERED, "goal")),
    Claim(
        "It costs at most 2 points of accuracy.",
        _STEERING,
        than(CellPattern("steering", "steered", "accuracy"), "none"),
        margin=2.0,
    ),
    Claim(
        "Its opposite lengthens answers that are asked for briefly.",
        _STEERING,
        than(CellPattern("steering", "asked briefly", "fewer"), "asked briefly, reversed"),
    ),
    Claim("A random vector of its norm shortens less.", _STEERING, than(_STEERED, "random")),
    Claim(
        "A vector from sums shortens differences too.",
        _STEERING,
        than(CellPattern("steering", "steered", "second fewer"), "none"),
    ),
    *(
        Claim(f"Core isolation is better than {text}.", _ISOLATION, than(_ISOLATED, row))
        for text, row in (
            ("training on all tasks together", "mixed"),
            ("training on one task after another", "sequential"),
            ("merging by Eq. 4", "Eq. 4"),
            ("merging by RegMean", "RegMean"),
        )
    ),
    Claim(
        "It forgets less than training on one task after another.",
        _ISOLATION,
        than(CellPattern("isolation", "sequential", "forgotten"), "isolated"),
    ),
    *(
        Claim(f"It needs {text}.", _ISOLATION, than(_ISOLATED, row))
        for text, row in (
            ("its own cores", "random cores"),
            ("freezing", "nothing frozen"),
            ("groups", "no groups"),
        )
    ),
)

REGION_CLAIMS: tuple[Claim, ...] = (
    _updates("Gaussian"),
    _updates("Laplace"),
    Claim(
        "Most entries of a change are below 1e-5.",
        _UPDATES,
        than(CellPattern("updates", "all weights", "below 1e-5"), "all weights", column="above 1e-5"),
    ),
    Claim(
        "Two runs of one task change the same entries more than by chance.",
        _UPDATES,
        than(CellPattern("overlaps", "{}, two seeds", "jaccard"), "{}, two seeds, chance"),
    ),
    Claim(
        "Two tasks change the same entries more than by chance.",
        _UPDATES,
        than(CellPattern("overlaps", "{}, two tasks", "jaccard"), "{}, two tasks, chance"),
    ),
    Claim(
        "Two runs of one task share more of their largest entries than two tasks do.",
        _UPDATES,
        than(CellPattern("overlaps", "{}, two seeds", "jaccard"), "{}, two tasks"),
    ),
    *(
        Claim(
            f"The largest {100 * share:g} % of the entries do more than as many random ones, rescaled.",
            "arXiv 2302.06600",
            than(CellPattern("grafts", f"top {share:g}", "all weights"), f"random_rescaled {share:g}"),
        )
        for share in (0.01, 0.1)
    ),
    Claim(
        "A tenth of the entries, the largest, is about as good as all (within 1 point).",
        "arXiv 2302.06600",
        than(CellPattern("grafts", "top 0.1", "all weights"), "whole"),
        margin=1.0,
    ),
    *(_harder(inputs, view) for inputs in ("shuffled", "random") for view in ("all channels", "without outliers")),
    Claim(
        "The sparser the state, the higher the row's loss, within a task.",
        _DIFFICULTY,
        than(CellPattern("activations", "natural, all channels", "loss"), "Gaussian"),
    ),
    Claim(
        "Demonstrations make hidden states denser.",
        _DIFFICULTY,
        than(CellPattern("activations", "natural, all channels", "hoyer"), "after * demonstrations, all channels"),
    ),
    Claim(
        "After pre-training, states of unfamiliar facts are sparser than those of familiar ones.",
        _PRETRAINING,
        than(CellPattern("pretraining", "unfamiliar, hoyer", "end"), "familiar, hoyer"),
    ),
    Claim(
        "Along pre-training, states of familiar facts become sparse and then dense again.",
        _PRETRAINING,
        than(CellPattern("pretraining", "familiar, hoyer", "highest"), "familiar, hoyer", column="start")
        + than(CellPattern("pretraining", "familiar, hoyer", "highest"), "familiar, hoyer", column="end"),
    ),
    *LOCALISED_CLAIMS,
    *ATTENTION_CLAIMS,
)
