"""The cases of our method in PEFT's tests; `run.py` copies this file beside them."""

import torch
from datasets import Dataset, DatasetDict
from helpers.paper import paper_config

from sparselet import SparseletConfig
from sparselet.tuner import SparseletLayer


class SparseletTestConfig(SparseletConfig):
    """The configuration with `init_weights`, by which PEFT's tests ask for an adapter that changes something."""

    def __init__(self, *args, init_weights=True, **kwargs):
        super().__init__(*args, **kwargs)
        self._init_weights = init_weights


_add_adapter = SparseletLayer.add_adapter


def add_adapter(self, name, config):
    """Add an adapter, with noise for values where the configuration asks for it."""
    _add_adapter(self, name, config)
    if not getattr(config, "_init_weights", True) and config.targets is None and not self.sparse_values[name].is_meta:
        with torch.no_grad():
            self.sparse_values[name].normal_()


SparseletLayer.add_adapter = add_adapter

MASK = {"initial_mask": "random", "reselect_every": 0, "density": 0.5}
TILES = {**MASK, "block_size": 2}
NOISE = {"init_weights": False}


def _case(name, model, **config):
    return name, model, SparseletTestConfig, config


def _pair(name, first, second):
    return name, "sparselet", SparseletTestConfig, {**first, **NOISE}, {**second, **NOISE}


LIN0, LIN1 = {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}
CUSTOM = [
    _case("mask, by a name", "MLP", target_modules="lin0", **MASK),
    _case("mask", "MLP", target_modules=["lin0", "lin1"], **MASK),
    _case("dense", "MLP", **LIN0),
    _case("dense, a module saved", "MLP", **LIN0, modules_to_save=["lin1"]),
    _case("mask, a module saved", "MLP", **LIN0, modules_to_save=["lin1"], **MASK),
    _case("tiles", "MLP", target_modules=["lin0", "lin1"], **TILES),
    _case("Conv1D, mask", "EmbConv1D", target_modules=["conv1d"], **MASK),
    _case("Conv1D, dense", "EmbConv1D", target_modules=["conv1d"]),
    _case("Conv1D, embedding saved", "EmbConv1D", target_modules=["conv1d", "lin0"], modules_to_save=["emb"], **MASK),
    _case("pattern, one excluded", "MLP", target_modules="lin.*", exclude_modules=["lin1"], **MASK),
    _case("norm saved", "MLP_LayerNorm", **LIN0, modules_to_save=["layernorm0"], **MASK),
]
PAIRS = [
    _pair("masks of one layer", {**LIN0, **MASK}, {**LIN0, **MASK, "seed": 1}),
    _pair("masks of two layers", {**LIN0, **MASK}, {**LIN1, **MASK}),
    _pair("dense", LIN0, LIN0),
    _pair("dense and mask", LIN0, {**LIN0, **MASK}),
    _pair("tiles and mask", {**LIN0, **TILES}, {**LIN0, **MASK}),
]


def _configs(task, *configs):
    return [(SparseletTestConfig, {"task_type": task, "target_modules": None, **config}) for config in configs]


DECODERS = _configs("CAUSAL_LM", MASK, {}, {**MASK, "target_modules": "all-linear"})
ENCODER_DECODERS = _configs("SEQ_2_SEQ_LM", MASK, {}, {**MASK, "target_modules": "all-linear"})
FEATURES = _configs("FEATURE_EXTRACTION", MASK, {})
CLASSIFIERS = _configs("SEQ_CLS", MASK, {}, {**MASK, "modules_to_save": None})
COMPILED = {
    "sparselet-mask": (paper_config(task_type="CAUSAL_LM", initial_mask="random", reselect_every=0), {}),
    "sparselet-dense": (paper_config(task_type="CAUSAL_LM"), {}),
}


def quotes():
    """In the place of a data set of the hub."""
    rows = [{"quote": f"w{i % 50} w{i % 7} w{i % 11} w{i % 13}", "author": "a", "tags": "t"} for i in range(64)]
    return DatasetDict({"train": Dataset.from_list(rows)})
