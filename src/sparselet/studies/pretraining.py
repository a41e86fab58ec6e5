"""A small Llama trained from scratch on synthetic facts, whose hidden states are probed along the way."""

from collections.abc import Callable, Sequence
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from sparselet.activations.callback import ProbeCallback
from sparselet.activations.probe import ProbeRow
from sparselet.tuner.mask_state import seeded

_LETTERS, _RELATIONS, _START = 26, 8, 34  # tokens: letters, relations, and the one that each fact begins with
_SUBJECT, _VALUE = 6, 4  # letters
_FACTS, _UNSEEN = 512, 256
_BATCH, _LEARNING_RATE = 64, 1e-3
_LAST = "3"  # the output of the last block
_STATISTICS = ("top5", "hoyer", "effective_rank")


def pretrain(
    seed: int, steps: int = 3000, probe_every: int = 100, progress: Callable[[float], None] | None = None
) -> dict[str, float]:
    """Train on facts, and measure states before a fact's value on as many seen (`familiar`) and unseen ones (`unfamiliar`).

    A fact is a subject of random letters, a relation, and a value of random letters, a token each; unseen ones are drawn alike.
    Returns each statistic and the loss of the value, in percent and nats times 100, at the start and the end and the highest of
    all probes: `familiar hoyer end`, …. steps: of AdamW with a linear decay. progress: called with the fraction that is done.
    """
    facts = _facts(_FACTS + _UNSEEN, seed)
    seen, unseen = facts[:_FACTS], facts[_FACTS:]
    sets = {"familiar": _rows(seen[:_UNSEEN]), "unfamiliar": _rows(unseen)}
    set_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=_START + 1,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=int(_LAST),
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=32,
            bos_token_id=_START,
            eos_token_id=None,
        )
    )
    callback = ProbeCallback(sets, layers=(int(_LAST),), steps=probe_every)
    callbacks = [callback] if progress is None else [callback, _Progress(progress)]
    with TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=_BATCH,
            learning_rate=_LEARNING_RATE,
            seed=seed,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        rows = [{"input_ids": fact, "labels": fact} for fact in seen]
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)  # pyright: ignore[reportArgumentType]
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return _numbers(callback.history)


class _Progress(TrainerCallback):
    """Reports the fraction of the steps that are done."""

    def __init__(self, report: Callable[[float], None]) -> None:
        self.report = report

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.report(state.global_step / state.max_steps)


def _facts(count: int, seed: int) -> list[list[int]]:
    generator = seeded(seed, "facts")
    letters = torch.randint(_LETTERS, (count, _SUBJECT + _VALUE), generator=generator)
    relations = _LETTERS + torch.randint(_RELATIONS, (count, 1), generator=generator)
    start = torch.full((count, 1), _START)
    return torch.cat([start, letters[:, :_SUBJECT], relations, letters[:, _SUBJECT:]], dim=1).tolist()


def _rows(facts: Sequence[Sequence[int]]) -> list[ProbeRow]:
    return [ProbeRow(tuple(fact), _VALUE) for fact in facts]


def _numbers(history: Sequence[dict[str, Any]]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for facts in ("familiar", "unfamiliar"):
        for name in (*_STATISTICS, "loss"):
            own = [100 * (p[facts]["loss"] if name == "loss" else p[facts]["layers"][_LAST]["raw"][name]) for p in history]
            numbers |= {f"{facts} {name} start": own[0], f"{facts} {name} highest": max(own), f"{facts} {name} end": own[-1]}
    return numbers
