"""A callback of transformers' Trainer that probes named sets of rows along training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparselet.activations.probe import ProbeRow, probe
from sparselet.activations.statistics import outlier_channels, sparsity, without_channels
from sparselet.errors import ArgumentError
from sparselet.io.atomic import atomic_write
from sparselet.io.json_files import json_bytes


class ProbeCallback(TrainerCallback):
    """Record the sparsity of hidden states over sets of rows, such as familiar and unfamiliar ones, while a model is trained.

        sets = {"familiar": sl.probe_rows(model, tokenizer, rows), "unfamiliar": …}
        callback = sl.ProbeCallback(sets, steps=50, file="probe.json")
        Trainer(..., callbacks=[callback])

    sets: by name. layers: as `probe` takes them. steps: optimizer steps between two probes; the first is before training, the
    last after it. file: the history is written there as JSON after each probe.
    history: a dictionary a probe: `step`, and by set the mean `loss` and for each layer the mean statistics, `raw` and without
    the 1 % of channels with the largest mean energy over all sets at the first probe (`without_outliers`).
    Raises ArgumentError for no rows, and what `probe` raises. In a run of several processes each probes its own model.
    """

    def __init__(
        self,
        sets: Mapping[str, Sequence[ProbeRow]],
        *,
        layers: Sequence[int] = (-1,),
        steps: int = 100,
        file: str | Path | None = None,
    ) -> None:
        if not sets or not all(sets.values()) or steps < 1:
            raise ArgumentError("a probe needs named sets of at least one row each, and `steps` of at least 1.")
        self.sets, self.layers, self.steps = dict(sets), tuple(layers), steps
        self.file = None if file is None else Path(file)
        self.history: list[dict[str, Any]] = []
        self._outliers: dict[int, Any] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._record(state, kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.steps == 0:
            self._record(state, kwargs["model"])

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.history[-1]["step"] != state.global_step:
            self._record(state, kwargs["model"])

    def _record(self, state: TrainerState, model: Any) -> None:
        rows = [row for rows in self.sets.values() for row in rows]
        probed = probe(model, rows, self.layers)
        point: dict[str, Any] = {"step": state.global_step}
        start = 0
        for name, own in self.sets.items():
            chosen = slice(start, start + len(own))
            start += len(own)
            layers = {}
            for layer, states in zip(probed.layers, probed.states[:, :, 0], strict=True):
                channels = self._outliers.setdefault(layer, outlier_channels(states))
                rest = without_channels(states[chosen], channels)
                layers[str(layer)] = {"raw": sparsity(states[chosen]).means(), "without_outliers": sparsity(rest).means()}
            losses = probed.losses[chosen]
            point[name] = {"loss": float(losses.mean()) if bool(losses.isfinite().all()) else None, "layers": layers}
        self.history.append(point)
        if self.file is not None:
            with atomic_write(self.file) as file:
                file.write(json_bytes({"probes": self.history}))
