"""Requests that name a steering vector: the answers of `sparselet eval --steer`, whatever else is in the batch."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from serving.conftest import make_library, serving

from sparselet import EvalSettings, SteeringVector, evaluate
from sparselet.adapter import SparseAdapter
from sparselet.errors import ConfigError, ShapeMismatch, WrongBase
from sparselet.fingerprint import fingerprint_weight
from sparselet.models import load_model
from sparselet.serving.service import open_service
from sparselet.serving.step_costs import StepCosts
from sparselet.tasks.rows import Row
from sparselet.tasks.task import Task

PROMPTS = ("ant?", "bee and cat?", "dog", "eel or fox")
TASK = Task("asked", {"test": tuple(Row(prompt, "x") for prompt in PROMPTS)})


def save_vector(path, model, layer, seed, strength=1.0, width=16, **changes):
    values = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    fingerprint = changes.get("fingerprint", fingerprint_weight(model.get_input_embeddings().weight))
    return SteeringVector(values, layer, strength, None, fingerprint).save(path)


@pytest.fixture(scope="module")
def steering_server(served_model, tmp_path_factory):
    directory, model = tmp_path_factory.mktemp("steering"), load_model(served_model)
    make_library(directory / "library")
    vectors = [save_vector(directory / f"v{i}", model, layer, i, 1.0 + i) for i, layer in enumerate((0, 1, 0))]
    with serving(served_model, directory / "library", directory / "state", vectors) as running:
        yield running


def expected(server, served_model, name, vector, strength):
    """The answers to PROMPTS by `evaluate`."""
    expert = [] if name == "base" else SparseAdapter.load(server.library / name)
    path = None if vector is None else server.library.parent / vector
    steer = None if path is None else SteeringVector.load(path)
    if steer is not None and strength is not None:
        steer = SteeringVector(steer.values, steer.layer, strength, steer.base, steer.fingerprint)
    settings = EvalSettings(max_new_tokens=12)
    (results,) = evaluate(expert, TASK, model=served_model, settings=settings, steer=steer).results.values()
    return [answer for _, answer in results[0].predictions]


def ask(server, name, prompt, vector, strength):
    body = {"steer": vector, "steer_strength": strength}
    messages = [{"role": "user", "content": prompt}]
    answer = server.client.chat.completions.create(
        model=name, messages=messages, max_tokens=12, extra_body={k: v for k, v in body.items() if v is not None}
    )
    return answer.choices[0].message.content.strip()


@pytest.mark.parametrize("mixed", [False, True])
def test_answers_are_those_of_eval(steering_server, served_model, monkeypatch, mixed):
    monkeypatch.setattr(StepCosts, "mixed_is_cheaper", lambda *_: mixed)
    cases = [("base", "v0", None), ("one", None, None), ("one", "v1", None), ("two", "v0", -2.0), ("bare", "v2", None)]
    asked = [(name, prompt, vector, strength) for name, vector, strength in cases for prompt in PROMPTS]
    counts = steering_server.service.engine.counts
    before = counts.mixed_steps
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda each: ask(steering_server, *each), asked))
    right = [text for case in cases for text in expected(steering_server, served_model, *case)]
    assert answers == right
    assert answers[4:8] != answers[8:12]
    assert (counts.mixed_steps > before) == mixed


def test_vectors_are_listed_and_unknown_ones_refused(steering_server):
    assert steering_server.get("/v1/models").json()["steering_vectors"] == ["v0", "v1", "v2"]
    message = {"model": "one", "messages": [{"role": "user", "content": "a"}]}
    for more, field, text in (
        ({"steer": "concise"}, "steer", "no steering vector is called 'concise'; there are v0, v1, v2"),
        ({"steer_strength": 1.0}, "steer_strength", "without steer"),
        ({"steer": 3}, "steer", "string"),
    ):
        answer = steering_server.post("/v1/chat/completions", {**message, **more})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == field
        assert text in answer.json()["error"]["message"]


def test_a_vector_that_does_not_fit_ends_the_start(served_model, tmp_path):
    model = load_model(served_model)
    make_library(tmp_path / "library")
    other = fingerprint_weight(torch.ones(3, 16))
    wide, foreign = (
        save_vector(tmp_path / "wide", model, 0, 1, width=8),
        save_vector(tmp_path / "f", model, 0, 1, fingerprint=other),
    )
    (tmp_path / "more").mkdir()
    same = save_vector(tmp_path / "more" / "wide", model, 0, 1)
    for vectors, error in (([wide], ShapeMismatch), ([foreign], WrongBase), ([wide, same], ConfigError)):
        with pytest.raises(error):
            open_service(served_model, [tmp_path / "library"], tmp_path / "state", vectors=vectors)
