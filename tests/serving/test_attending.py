"""A server that attends by a pattern gives the tokens of an evaluation that attends by it."""

import contextlib
import random

import pytest

pytest.importorskip("fastapi")

import torch
import uvicorn
from attention.test_attention import NARROW
from helpers.tiny import make_tokenizer
from serving.conftest import make_library
from serving.test_engine import BASE, ENDS, answer, ask, draw_prompt, experts, fingerprints, tiny

from sparselet.api.serving import serve
from sparselet.apply import apply_temporarily
from sparselet.attention import PATTERNS, sparse_attention
from sparselet.errors import ArgumentError
from sparselet.serving.engine import Engine
from sparselet.serving.limits import ServingLimits

LIMITS = ServingLimits(max_rows=1, mixed=False, max_wait=0.0)


def by_generate(model, expert, prompt, tokens, pattern):
    """The answer of transformers' `generate` within `sparse_attention`, as evaluation decodes."""
    applied = contextlib.nullcontext() if expert.adapter is None else apply_temporarily(model, expert.adapter)
    with applied, sparse_attention(model, pattern), torch.no_grad():
        ids = torch.tensor([prompt])
        output = model.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=sorted(ENDS), pad_token_id=0)
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_answers_are_those_of_generate_by_the_same_pattern(name):
    model, source = tiny(), random.Random(1)
    pattern = PATTERNS[name].with_parameters(NARROW[name])
    served = [BASE, *experts(model, 2)]
    requests = [(source.choice(served), draw_prompt(source, 40), source.randrange(8, 24)) for _ in range(24)]
    expected = [by_generate(model, *each, pattern) for each in requests]
    engine = Engine(model, make_tokenizer(), fingerprints(model), LIMITS)
    with sparse_attention(model, pattern) as attention:
        engine.remembering = attention.remembering
        engine.start()
        outputs = [ask(engine, *each)[1] for each in requests]
        assert [answer(each) for each in outputs] == expected
        engine.stop()
    assert engine.counts.swaps > 3  # experts took turns while they answered
    assert (attention.prefill if pattern.prefill else attention.decode).density < 1


def test_the_whole_server_attends_by_the_pattern(served_model, tmp_path, monkeypatch):
    make_library(tmp_path / "library")
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: [each.close() for each in sockets])
    services = []

    def started(address, service):
        services.append(service)
        assert service.engine.model.config._attn_implementation == "sparselet"
        assert (service.engine.limits.max_rows, service.engine.limits.mixed) == (1, False)
        assert service.engine.remembering is not None

    serve(served_model, [tmp_path / "library"], port=0, state=tmp_path / "state", attention="quest:budget=64", on_start=started)
    assert services[0].engine.model.config._attn_implementation != "sparselet"
    with pytest.raises(ArgumentError, match="attention must be one of"):
        serve(served_model, [tmp_path / "library"], attention="flash")
