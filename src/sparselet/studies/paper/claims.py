"""The claims of the paper about the cells of its tables."""

from sparselet.studies.claim import CellPattern, Claim, than

# Whether any layer was dropped.
_DROPPED = (
    CellPattern("layer_drop", "layer drop {}", "active layers"),
    CellPattern("layer_drop", "sparse {}", "active layers"),
)

PAPER_CLAIMS: tuple[Claim, ...] = (
    Claim(
        "Sparse adapters make better single experts than LoRA of equal size, at every density.",
        "Section 4.1, Figure 3a",
        than(CellPattern("density", "sparse {}", "individual"), "LoRA {}, *"),
    ),
    Claim(
        "Sparse adapters make better single experts than full fine-tuning (density 0.1).",
        "Abstract, Figure 3a",
        than(CellPattern("density", "sparse 0.1", "individual"), "full"),
    ),
    Claim(
        "One percent of the targets' weights is enough to outperform full fine-tuning.",
        "Section 4.1, Figure 3a",
        than(CellPattern("density", "sparse 0.01", "individual"), "full"),
    ),
    Claim(
        "A single expert's quality rises with the density up to 0.5.",
        "Section 4.1, Figure 3a",
        than(CellPattern("density", "sparse 0.1", "individual"), "sparse 0.01")
        + than(CellPattern("density", "sparse 0.5", "individual"), "sparse 0.1"),
    ),
    Claim(
        "It falls again at density 0.8.",
        "Section 4.1, Figure 3a",
        than(CellPattern("density", "sparse 0.5", "individual"), "sparse 0.8"),
    ),
    Claim(
        "Training every entry of the targets is worse than half of them.",
        "Section 4.1, Figure 3a",
        than(CellPattern("density", "sparse 0.5", "individual"), "sparse 1"),
    ),
    Claim(
        "Density 0.1 merges best, on held-in tasks.",
        "Appendix B, Figure 11",
        than(CellPattern("density", "sparse 0.1", "held-in"), "sparse *"),
    ),
    Claim(
        "Density 0.1 merges best, on held-out tasks.",
        "Appendix B, Figure 11",
        than(CellPattern("density", "sparse 0.1", "held-out"), "sparse *"),
    ),
    Claim(
        "Merged element-sparse experts beat every merge of fully fine-tuned models, on held-in tasks.",
        "Section 4.2, Table 1",
        than(CellPattern("merging", "element-sparse, overlap", "held-in"), "full, *"),
    ),
    Claim(
        "Merged block-sparse experts beat every merge of fully fine-tuned models, on held-in tasks.",
        "Section 4.2, Table 1",
        than(CellPattern("merging", "block-sparse, overlap", "held-in"), "full, *"),
    ),
    Claim(
        "Merged element-sparse experts beat merged LoRA experts, on held-in tasks.",
        "Section 4.2, Table 1",
        than(CellPattern("merging", "element-sparse, overlap", "held-in"), "LoRA, uniform"),
    ),
    Claim(
        "Merged sparse experts are about as good as merged LoRA experts on held-out tasks (within 1 point).",
        "Section 4.2, Table 1",
        than(CellPattern("merging", "element-sparse, overlap", "held-out"), "LoRA, uniform"),
        margin=1.0,
    ),
    Claim(
        "Block-sparse experts merge about as well as element-sparse ones, on held-in tasks (within 1.5 points).",
        "Section 1, Table 1",
        than(CellPattern("merging", "block-sparse, overlap", "held-in"), "element-sparse, overlap"),
        margin=1.5,
    ),
    Claim(
        "Multitask training outperforms all merges, on held-in tasks.",
        "Section 4.2, Table 1",
        than(CellPattern("merging", "multitask", "held-in"), "*"),
    ),
    Claim(
        "Multitask training outperforms all merges, on held-out tasks.",
        "Section 4.2, Table 1",
        than(CellPattern("merging", "multitask", "held-out"), "*"),
    ),
    Claim(
        "MCS makes the best single experts of all scores.",
        "Section 4.2, Table 2",
        than(CellPattern("scores", "mcs", "individual"), "*"),
    ),
    Claim(
        "MCS makes the experts that merge best, on held-in tasks.",
        "Section 4.2, Table 2",
        than(CellPattern("scores", "mcs", "held-in"), "*"),
    ),
    Claim(
        "Without the absolute value connection sensitivity chooses better.",
        "Section 3, Equation 2; Table 2",
        than(CellPattern("scores", "mcs", "individual"), "cs"),
    ),
    Claim(
        "Layer drop costs little on held-in tasks (within 3 points).",
        "Section 4.3, Table 3",
        than(CellPattern("layer_drop", "layer drop {}", "held-in"), "sparse {}"),
        margin=3.0,
        if_differ=_DROPPED,
    ),
    Claim(
        "Layer drop costs little on held-out tasks (within 2 points).",
        "Section 4.3, Table 3",
        than(CellPattern("layer_drop", "layer drop {}", "held-out"), "sparse {}"),
        margin=2.0,
        if_differ=_DROPPED,
    ),
    Claim(
        "With layer drop, merged sparse experts still beat the merges of fully fine-tuned models, on held-in tasks.",
        "Section 4.3, Table 3",
        than(CellPattern("layer_drop", "layer drop *", "held-in"), "full, *", table="merging"),
        if_differ=_DROPPED,
    ),
    Claim(
        "After merging, one epoch of multitask training of the sparse weights improves the model.",
        "Appendix B, Table 4",
        than(CellPattern("second_stage", "sparse weights, 1 epoch", "held-in"), "merged"),
    ),
    Claim(
        "Further epochs improve it further.",
        "Appendix B, Table 4",
        than(CellPattern("second_stage", "sparse weights, 5 epochs", "held-in"), "sparse weights, 1 epoch"),
    ),
    Claim(
        "Five epochs of the sparse weights close the gap to multitask training (within 1 point).",
        "Appendix B, Table 4",
        than(CellPattern("second_stage", "sparse weights, 5 epochs", "held-in"), "multitask"),
        margin=1.0,
    ),
    Claim(
        "What a merge loses is mostly lost inside the experts' masks.",
        "Section 4.3, Figure 5",
        than(CellPattern("interference", "merged, own mask only", "lost, %"), "merged"),
    ),
    Claim(
        "Merged sparse experts beat all other merges, for every number of experts.",
        "Section 4.3, Figure 6",
        than(CellPattern("number_of_experts", "element-sparse, overlap, {} experts", "held-in"), "full, *, {} experts")
        + than(CellPattern("number_of_experts", "element-sparse, overlap, {} experts", "held-in"), "LoRA, *, {} experts"),
    ),
    Claim(
        "Training query, key and value is better than training the output projection as well, for single experts.",
        "Appendix A, Figure 7",
        than(CellPattern("targets", "QKV", "individual"), "QKV + O"),
    ),
    Claim(
        "Training the MLP's down projection merges better on held-in tasks.",
        "Appendix A, Figure 7",
        than(CellPattern("targets", "MLP down", "held-in"), "QKV"),
    ),
    Claim(
        "It is worse on held-out tasks, so query, key and value are preferred.",
        "Appendix A, Figure 7",
        than(CellPattern("targets", "QKV", "held-out"), "MLP down"),
    ),
    Claim(
        "Selecting the mask repeatedly is better than selecting it once.",
        "Section 3, Figure 8",
        than(CellPattern("selection", "repeated", "individual"), "once"),
    ),
    Claim(
        "Blocks of 16 are the best.",
        "Appendix A, Figure 10",
        than(CellPattern("block_sizes", "16", "individual"), "*"),
    ),
)
