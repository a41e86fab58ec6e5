"""`MergeNoise`: noise in the place of other experts' changes, so that an expert learns to bear what a merge adds."""

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparselet.tuner import sparselet_layers
from sparselet.tuner.layer import SparseletLayer


class MergeNoise(TrainerCallback):
    """In each optimizer step, noise stands in the targets' base weights where up to `others` other experts might change them.

    K ~ U{1, …, others}. Each entry outside of the mask is changed with the chance 1 − (1 − density)^K, by z ~ Laplace(0, b),
    b the mean |Ŵ| of the target's own values. Forward and backward passes of the step are at those weights. After the step,
    and in validation, the base weights are the base model's, bit for bit.

    MergOPT (ICLR 2026) adds (α·K − 1)·z to all weights, as a scaled sum of K dense changes would. Deviations: the noise is
    sparse, and without a factor, since a merge by overlap (Eq. 4) keeps the change of an entry that one expert trains.

    Draws depend on the seed and the step alone, so a resumed run has those of an uninterrupted one.
    """

    def __init__(self, others: int, seed: int) -> None:
        self.others, self.seed = others, seed
        self.displaced: list[tuple[Tensor, Tensor, Tensor]] = []  # the flat weight, entries, their values

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Write the noise."""
        generator = torch.Generator().manual_seed(self.seed * 2**32 + state.global_step)
        experts = int(torch.randint(1, self.others + 1, (), generator=generator))
        for layer in sparselet_layers(kwargs["model"]).values():  # type: ignore[arg-type]
            for name in layer.active_adapters:
                self._disturb(layer, name, experts, generator)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Restore the base weights."""
        self.restore()

    def restore(self) -> None:
        """Write all displaced entries back."""
        for weight, entries, before in self.displaced:
            weight[entries] = before
        self.displaced = []

    def _disturb(self, layer: SparseletLayer, name: str, experts: int, generator: torch.Generator) -> None:
        delta = layer.delta(name)
        weight = layer.base_weight.data.view(-1)
        chance = 1 - (1 - delta.density) ** experts
        chosen = torch.rand(weight.shape, generator=generator) < chance
        chosen[delta.expand().indices.cpu()] = False
        entries = chosen.nonzero().squeeze(1).to(weight.device)
        signs = torch.randint(0, 2, (len(entries),), generator=generator) * 2 - 1
        noise = signs * torch.empty(len(entries)).exponential_(generator=generator) * float(delta.values.abs().mean())
        before = weight[entries]
        self.displaced.append((weight, entries, before))
        weight[entries] = (before.float() + noise.to(weight.device)).to(weight.dtype)
