"""Proposers: what the offline one draws from trials, that a seed decides it, and what an endpoint is asked and answers."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from sparselet.errors import ConfigError
from sparselet.workflows.proposers import EndpointProposer, OfflineProposer, PromptParts, RowTrial

WORDY = [RowTrial("2 + 3?", "The sum of these is 5", "5", 0.2), RowTrial("4 + 4?", "I think that it is 8", "8", 0.2)]


def proposals(seed, trials, calls=40, prompt="{input}"):
    proposer, prompts = OfflineProposer(seed), [prompt]
    for _ in range(calls):
        prompts.append(proposer(prompts[-1], trials))
    return prompts[1:]


def test_a_seed_decides_what_is_proposed():
    assert proposals(3, WORDY) == proposals(3, WORDY)
    assert proposals(3, WORDY) != proposals(4, WORDY)
    assert all(prompt.count("{input}") == 1 for prompt in proposals(5, WORDY))


def first_lines(trials, seeds=60):
    """The rules that are proposed first."""
    proposed = (OfflineProposer(seed)("{input}", trials) for seed in range(seeds))
    return {prompt.partition("\n\n")[0] for prompt in proposed if prompt.endswith("\n\n{input}")}


@pytest.mark.parametrize(
    ("trials", "rule"),
    [
        (WORDY, "Answer in one word."),
        (WORDY, "Answer with a number."),
        (WORDY, "Write the answer only, without explanation."),
        ([RowTrial("a", "b", "a b c", 0)], "Answer in at least 3 words."),
        ([RowTrial("a", "", "b", 0)], "Always answer."),
        ([RowTrial("say a", "say a b", "c", 0)], "Do not repeat the input."),
        ([RowTrial("a", "B", "c", 0)], "Write in small letters."),
        ([RowTrial("a", "b", "C", 0)], "Write in capital letters."),
        ([RowTrial(f"row {i}", "?", "yes" if i % 2 else "no", 0) for i in range(16)], "Answer with one of: no, yes."),
    ],
)
def test_a_rule_that_answers_break_and_targets_keep(trials, rule):
    assert rule in first_lines(trials)
    right = [RowTrial(trial.input, trial.target, trial.target, 1) for trial in trials[:4]]
    assert rule not in first_lines(right)


def test_demonstrations_stand_in_the_frame_of_the_input():
    parts = PromptParts(("Be brief.",), (("a", "b"),), "Q: {input}\nA:")
    assert parts.text() == "Be brief.\n\nQ: a\nA: b\n\nQ: {input}\nA:"
    assert PromptParts(demonstrations=(("a", "b"),)).text() == "a\nb\n\n{input}"
    demonstrated = [p for p in proposals(0, WORDY) if "2 + 3?" in p]
    assert demonstrated
    assert not any("{input}" in t for t in proposals(0, [RowTrial("{input}", "x", "y", 0)]) if t.count("{input}") != 1)


def test_a_prompt_of_another_keeps_its_instruction():
    proposed = proposals(1, WORDY, 20, "Add.\n\nNumbers: {input}")
    assert all(prompt.startswith("Add.") for prompt in proposed)


@pytest.fixture
def endpoint():
    """An endpoint that answers with the text of a list; the bodies that it got."""
    answers, bodies = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            content = {"message": {"role": "assistant", "content": answers[0]}, "index": 0, "finish_reason": "stop"}
            body = json.dumps(
                {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [content]}
            ).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", answers, bodies
    server.shutdown()
    server.server_close()


def test_an_endpoint_is_asked_with_the_trials(endpoint):
    url, answers, bodies = endpoint
    proposer = EndpointProposer(url, "big")
    answers.append("Here:\n```\nAdd the numbers: {input}\n```")
    assert proposer("Sum {input}", WORDY) == "Add the numbers: {input}"
    asked = bodies[0]["messages"][0]["content"]
    assert bodies[0]["model"] == "big"
    assert all(text in asked for text in ("Sum {input}", "2 + 3?", "The sum of these is 5"))
    answers[0] = "```\nAdd {input} and {input}.\n```"
    assert proposer("Sum {input}", WORDY) == "Add the input and the input.\n\n{input}"


def test_an_endpoint_that_does_not_answer():
    proposer = EndpointProposer("http://127.0.0.1:9/v1", "big")
    proposer._client = proposer._client.with_options(max_retries=0)
    with pytest.raises(ConfigError, match=r"`proposer` http://127.0.0.1:9/v1 does not answer"):
        proposer("{input}", WORDY)
