"""Quality and cost of attention by a pattern: of a tiny model, against one dense pass, `generate` and counts by hand."""

import math

import pytest
import torch
from helpers.tiny import make_model, make_tokenizer

from sparselet.generation.prompts import prompt_format, prompt_tokens, target_tokens
from sparselet.studies.sparse_regions.frontier_runs import ALL_KEYS, NATURAL_TEXT, frontier
from sparselet.tasks.long_context import long_rows

TOKENIZER = make_tokenizer()
LENGTH, ROWS = 300, 3


@pytest.fixture(scope="module")
def model():
    return make_model(initializer_range=0.3)


def measure(model, attention, task="needle"):
    return frontier(model, TOKENIZER, task=task, attention=attention, length=LENGTH, rows=ROWS)


def test_dense_attention_has_the_likelihood_of_one_pass(model):
    form = prompt_format(model, TOKENIZER, chat_template=False)
    means = []
    for row in long_rows("needle", LENGTH, ROWS, count=len):
        prompt, answer = prompt_tokens(form, row.input), target_tokens(form, row.target)[:-1]
        assert len(prompt) == len(row.input)  # a token a byte
        assert TOKENIZER.decode(answer) == f" {row.target}"
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        means.append(float(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).mean()))
    numbers = measure(model, ALL_KEYS)
    assert numbers["likelihood"] == pytest.approx(100 * math.exp(sum(means) / ROWS), rel=1e-4)
    assert numbers["exact"] == 0
    assert {numbers[name] for name in ("prompts", "answers", "attention", "flops")} == {100}


def test_a_pattern_costs_what_it_computes(model):
    numbers = measure(model, "quest:page=4,budget=32")
    assert numbers["prompts"] == 100
    assert numbers["answers"] == pytest.approx(100 * 32 / LENGTH, rel=0.1)
    layers = model.config.num_hidden_layers
    linear = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    tokens = sum(len(row.input) + len(row.target) for row in long_rows("needle", LENGTH, ROWS, count=len))
    pair = 4 * model.config.head_dim * model.config.num_attention_heads * layers
    prompts = sum(len(row.input) * (len(row.input) + 1) / 2 for row in long_rows("needle", LENGTH, ROWS, count=len))
    answers = sum(sum(range(len(row.input) + 1, len(row.input) + 6)) for row in long_rows("needle", LENGTH, ROWS, count=len))
    computed = prompts + answers * numbers["answers"] / 100
    share = (2 * linear * tokens + pair * computed) / (2 * linear * tokens + pair * (prompts + answers))
    assert numbers["attention"] == pytest.approx(100 * computed / (prompts + answers))
    assert numbers["flops"] == pytest.approx(100 * share)


def test_natural_text_goes_on(model):
    numbers = measure(model, "window:window=64,block=16", NATURAL_TEXT)
    assert 0 < numbers["likelihood"] < 100
    assert numbers["attention"] < 60


def test_an_answer_is_exact_where_greedy_decoding_gives_it(model, monkeypatch):
    """The targets are replaced by what the model says."""
    form = prompt_format(model, TOKENIZER, chat_template=False)

    def greedy(prompt, tokens=5):
        ids = torch.tensor([prompt])
        output = model.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=999, pad_token_id=0)
        return output[0, len(prompt) :].tolist()

    prompts = [prompt_tokens(form, row.input) for row in long_rows("needle", LENGTH, 2, count=len)]
    pairs = [(prompt, greedy(prompt)) for prompt in prompts]
    pairs[1][1][-1] ^= 1
    monkeypatch.setattr("sparselet.studies.sparse_regions.frontier_runs._pairs", lambda *_: iter(pairs))
    assert frontier(model, TOKENIZER, task="needle", attention=ALL_KEYS, length=LENGTH, rows=2)["exact"] == 50
