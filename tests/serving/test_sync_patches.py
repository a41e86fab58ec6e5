"""`SyncPatches` in a plain `Trainer`: an engine that takes the patches in turn has the trained weights, and can go back."""

import json

import pytest
import torch
from formats.test_weight_patch import patched, same
from helpers.tiny import make_model
from helpers.training_runs import QUIET
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from sparselet import MaskSchedule, SparseAdapter, SparseDelta, SparseletConfig, SyncPatches, to_adapter
from sparselet.apply import apply_temporarily
from sparselet.errors import ConfigError
from sparselet.formats.weight_patch import PATCH_CONFIG, read_patch
from sparselet.serving.sync_patches import latest_patch

ROWS = [
    {"input_ids": ids, "labels": ids} for ids in torch.randint(30, 258, (16, 6), generator=torch.Generator().manual_seed(5))
]


class Adapters(TrainerCallback):
    """Notes the adapter after each step."""

    def __init__(self):
        self.at = {}

    def on_step_end(self, args, state, control, model, **kwargs):
        deltas = to_adapter(model).items()  # they share memory with the layers
        copies = {name: SparseDelta(d.shape, d.indices.clone(), d.values.clone()) for name, d in deltas}
        self.at[state.global_step] = SparseAdapter(copies)


@pytest.fixture
def fit(tmp_path):
    """Train six steps; masks change during the first three."""

    def run(**settings):
        model = get_peft_model(
            make_model(), SparseletConfig(density=0.1, score="gm", when="paper", reselect_every=1, selection_epochs=1)
        )
        noted = Adapters()
        arguments = {**QUIET, "output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 4, "max_steps": 6}
        sync = SyncPatches(tmp_path / "patches", dtype=torch.float32, **settings)
        callbacks = [MaskSchedule(), sync, noted]
        Trainer(model=model, args=TrainingArguments(**arguments), train_dataset=ROWS, callbacks=callbacks).train()
        return noted.at, tmp_path / "patches"

    return run


def merged(adapter):
    model = make_model()
    with apply_temporarily(model, adapter):
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_patches_taken_in_turn_are_the_trained_weights(fit):
    adapters, directory = fit(interval=1, keep=10)
    base = {name: tensor.clone() for name, tensor in make_model().state_dict().items()}
    engine, version = base, None
    for step, adapter in adapters.items():
        patch = directory / f"patch-{step}"
        content = json.loads((patch / PATCH_CONFIG).read_text())
        assert (content["version"], content["previous"]) == (step, version)
        engine, version = patched(engine, read_patch(patch)), step
        assert same(engine, merged(adapter))
        assert same(patched(engine, read_patch(patch, reverse=True)), base)
    assert latest_patch(directory) == directory / "patch-6"
    sizes = [sum(len(patch.values) for patch in read_patch(directory / f"patch-{step}")) for step in adapters]
    assert sizes[-1] == adapters[6].nnz < max(sizes)  # nothing but the mask, once it stays


def test_an_engine_that_missed_some_goes_back_first(fit):
    adapters, directory = fit(interval=2, keep=3)
    assert sorted(path.name for path in directory.glob("patch-*")) == ["patch-2", "patch-4", "patch-6"]
    base = {name: tensor.clone() for name, tensor in make_model().state_dict().items()}
    engine = patched(base, read_patch(directory / "patch-2"))
    engine = patched(engine, read_patch(directory / "patch-2", reverse=True))
    assert same(patched(engine, read_patch(directory / "patch-6")), merged(adapters[6]))


def test_old_patches_are_removed(fit):
    _, directory = fit(interval=1, keep=2)
    assert sorted(path.name for path in directory.glob("patch-*")) == ["patch-5", "patch-6"]


def test_numbers_below_one_are_refused(tmp_path):
    for settings in ({"interval": 0}, {"keep": 0}):
        with pytest.raises(ConfigError, match="at least 1"):
            SyncPatches(tmp_path, **settings)
