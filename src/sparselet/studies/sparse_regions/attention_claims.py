"""What The Sparse Frontier (arXiv 2504.17768) says about sparse attention, as claims about the tables."""

from sparselet.studies.claim import CellPattern, Claim, than

_SOURCE = "arXiv 2504.17768"

ATTENTION_CLAIMS: tuple[Claim, ...] = (
    Claim(
        "Blocks chosen by score keep more of the answers than the first and the last keys, as many.",
        _SOURCE,
        than(CellPattern("frontier", "block {}", "likelihood"), "window {}"),
    ),
    Claim(
        "A new token needs a quarter of the keys (within 2 points).",
        _SOURCE,
        than(CellPattern("frontier", "quest 1/4, {}", "likelihood"), "dense, {}"),
        margin=2.0,
    ),
    Claim(
        "Answers bear fewer keys than prompts do.",
        _SOURCE,
        than(CellPattern("frontier", "quest {}", "likelihood"), "block {}"),
    ),
    Claim(
        "Longer prompts bear a smaller share of the keys.",
        _SOURCE,
        than(CellPattern("frontier", "block {}, 2048 tokens", "kept"), "block {}, 512 tokens"),
    ),
    Claim(
        "At equal operations a token, a larger sparse model answers better than a smaller dense one.",
        _SOURCE,
        than(CellPattern("scaling", "4 layers, pages", "answers"), "2 layers, all keys"),
    ),
)
