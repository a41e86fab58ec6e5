"""Small Llamas trained from scratch to recall, and their answers with all keys or with as many as their cost allows.

A text is facts, a name and the name it leads to, each fact one token: their embeddings side by side. A question is a name and a
number of hops: with one the answer stands in a fact, with two it is where that answer leads, and so on.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaModel, set_seed

from sparselet.attention import sparse_attention
from sparselet.studies.sparse_regions.frontier_runs import ALL_KEYS
from sparselet.tuner.mask_state import seeded

SMALLEST_LAYERS = 2  # layers of the model whose cost with all keys the others are held to
MOST_HOPS = 4  # facts that lead to an answer, at most
_WIDTH, _HEADS, _PAGE = 64, 2, 16
_BATCH_TOKENS, _LEARNING_RATE = 2048, 3e-3
_TESTED_TEXTS, _TESTED_QUESTIONS = 16, 32
# Texts of a sixteenth of the facts come first, since a model finds out there how to look a name up; then longer ones.
_LENGTHS = ((0.6, 16), (0.8, 4), (1.0, 1))  # until this share of the steps; what the number of facts is divided by


@dataclass(frozen=True)
class Recall:
    """names, next_names: of facts, [texts, facts]. starts, hops, answers: of questions, [texts, questions]. All integers."""

    names: Tensor
    next_names: Tensor
    starts: Tensor
    hops: Tensor
    answers: Tensor


def draw_recall(texts: int, facts: int, questions: int, names: int, generator: torch.Generator) -> Recall:
    """Random texts, in each of which every name leads to another one or to itself, no two to the same."""
    own = torch.rand(texts, names, generator=generator).argsort(-1)[:, :facts]
    leads = torch.rand(texts, facts, generator=generator).argsort(-1)
    places = torch.randint(facts, (texts, questions), generator=generator)
    hops = torch.randint(1, MOST_HOPS + 1, (texts, questions), generator=generator)
    place = places
    for hop in range(1, MOST_HOPS + 1):
        place = torch.where(hops >= hop, leads.gather(1, place), place)
    return Recall(own, own.gather(1, leads), own.gather(1, places), hops, own.gather(1, place))


class _RecallModel(nn.Module):
    def __init__(self, layers: int, names: int, positions: int) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=1,
            hidden_size=_WIDTH,
            intermediate_size=_WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=_HEADS,
            num_key_value_heads=_HEADS,
            max_position_embeddings=positions,
            initializer_range=0.1,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.decoder = LlamaModel(config)
        self.name, self.hops = nn.Embedding(names, _WIDTH // 2), nn.Embedding(MOST_HOPS + 1, _WIDTH // 2)
        self.answer = nn.Linear(_WIDTH, _WIDTH // 2, bias=False)

    def facts(self, recall: Recall) -> Tensor:
        return torch.cat([self.name(recall.names), self.name(recall.next_names)], dim=-1)

    def questions(self, recall: Recall) -> Tensor:
        return torch.cat([self.name(recall.starts), self.hops(recall.hops)], dim=-1)

    def logits(self, states: Tensor) -> Tensor:
        return self.answer(states) @ self.name.weight.T


def scaling_run(
    *,
    seed: int,
    layers: int,
    steps: int = 3000,
    facts: int = 512,
    names: int = 512,
    progress: Callable[[float], None] | None = None,
) -> dict[str, float]:
    """Train a model of `layers` layers, and ask it with all keys (`all`) and with pages of keys (`pages`).

    Pages are as many as keep the operations of a question's token at those of SMALLEST_LAYERS layers with all keys: 2 · weights
    of the layers, and 4 · width for each key in each layer; choosing pages is not counted. At least one is kept.
    Returns the right answers in percent, `all answers`, `all 1 hops`, `pages 2 hops`, …, and `all flops` and `pages flops`, the
    operations of a question's token in thousands, as counted.
    """
    set_seed(seed)
    model, generator = _RecallModel(layers, names, 2 * facts), seeded(seed, "recall")
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 50) * (1 - 0.9 * step / steps))
    for step in range(steps):
        length = max(1, facts // next(part for until, part in _LENGTHS if step < until * steps))
        recall = draw_recall(max(1, _BATCH_TOKENS // (2 * length)), length, length, names, generator)
        inputs = torch.cat([model.facts(recall), model.questions(recall)], dim=1)
        states = model.decoder(inputs_embeds=inputs, use_cache=False).last_hidden_state[:, length:]
        functional.cross_entropy(model.logits(states).flatten(0, 1), recall.answers.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if progress is not None:
            progress((step + 1) / steps)
    recall = draw_recall(_TESTED_TEXTS, facts, _TESTED_QUESTIONS, names, seeded(seed, "questions"))
    budget = affordable_keys(model.decoder, layers, facts)
    patterns = {"all": ALL_KEYS, "pages": f"quest:page={_PAGE},budget={max(_PAGE, budget)}"}
    return {
        f"{name} {key}": value for name, pattern in patterns.items() for key, value in _answers(model, recall, pattern).items()
    }


def affordable_keys(decoder: nn.Module, layers: int, keys: int) -> int:
    """How many of `keys` keys a question's token may see in each layer, at the cost of SMALLEST_LAYERS layers with all."""
    weights = _weights(decoder) // layers
    allowed = SMALLEST_LAYERS * (2 * weights + 4 * _WIDTH * keys) - layers * 2 * weights
    return min(keys, max(0, allowed // (4 * _WIDTH * layers)))


def _weights(decoder: nn.Module) -> int:
    return sum(module.weight.numel() for module in decoder.modules() if isinstance(module, nn.Linear))


@torch.inference_mode()
def _answers(model: _RecallModel, recall: Recall, attention: str) -> dict[str, float]:
    """The right answers, and the operations of a token: facts in one pass, question by question."""
    questions, logits = model.questions(recall), []
    with sparse_attention(model.decoder, attention) as counted:
        cache = model.decoder(inputs_embeds=model.facts(recall), use_cache=True).past_key_values
        for i in range(questions.shape[1]):
            states = model.decoder(inputs_embeds=questions[:, i : i + 1], past_key_values=cache).last_hidden_state
            logits.append(model.logits(states))
    right = torch.cat(logits, dim=1).argmax(-1) == recall.answers
    numbers = {f"{hop} hops": 100 * float(right[recall.hops == hop].float().mean()) for hop in range(1, MOST_HOPS + 1)}
    flops = 2 * _weights(model.decoder) + counted.decode.flops / recall.starts.numel()
    return {"answers": 100 * float(right.float().mean()), **numbers, "flops": flops / 1000}
