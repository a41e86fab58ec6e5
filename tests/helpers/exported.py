"""Adapters to export, and a look at what was written."""

import json

import torch

from sparselet import SparseAdapter, SparseDelta

FIRST = "model.layers.0.self_attn.q_proj"
SECOND = "model.layers.1.self_attn.k_proj"


def rows_only(model, seed=3):
    """An adapter of three rows of one target, two columns of another, and one that is empty."""
    generator = torch.Generator().manual_seed(seed)
    modules = dict(model.named_modules())
    deltas = {}
    for name, rows, columns in ((FIRST, [1, 5, 9], None), (SECOND, None, [0, 7])):
        dense = torch.zeros(modules[name].weight.shape)
        if rows:
            dense[rows] = torch.randn((len(rows), dense.shape[1]), generator=generator)
        else:
            dense[:, columns] = torch.randn((dense.shape[0], len(columns)), generator=generator)
        deltas[name] = SparseDelta.from_dense(dense)
    deltas["model.layers.1.self_attn.q_proj"] = SparseDelta.empty((16, 16))
    return SparseAdapter(deltas, {"task_type": "CAUSAL_LM"})


def config_of(directory):
    return json.loads((directory / "adapter_config.json").read_text())
