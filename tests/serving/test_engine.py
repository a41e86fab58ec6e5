"""The engine: each request's tokens are those of its expert alone, whatever else is answered meanwhile."""

import queue
import random
import threading

import pytest
import torch
from helpers.tiny import make_adapter, make_gpt2, make_model, make_t5, make_tokenizer

from sparselet.apply import apply_temporarily
from sparselet.errors import ModelError, RequestRefused, ServerBusy
from sparselet.fingerprint import fingerprint_weight
from sparselet.generation.decode import decode
from sparselet.names import Names
from sparselet.serving.engine import Engine
from sparselet.serving.limits import ServingLimits
from sparselet.serving.request import GenerationRequest, Output, Sampling
from sparselet.serving.served_expert import ServedExpert, base_digest, serve_expert

ENDS = frozenset({1, 77, 130})
BASE = ServedExpert("base", None)


def fingerprints(model):
    return {name: fingerprint_weight(layer.parameter) for name, layer in Names(model).layers.items()}


def tiny(dtype=torch.float32):
    return make_model(dtype, initializer_range=0.5)


def experts(model, count=3):
    adapters = [make_adapter(model, (1, 4)[i % 2], seed=i + 1) for i in range(count)]
    return [serve_expert(adapter, lambda expert: None) for adapter in adapters]


@pytest.fixture
def engine():
    """Start an engine with these limits; it is stopped after the test."""
    started = []

    def start(model=None, **limits):
        model = model or tiny()
        new = Engine(model, make_tokenizer(), fingerprints(model), ServingLimits(**limits))
        new.start()
        started.append(new)
        return new

    yield start
    for each in started:
        each.stop(drain=False)


def ask(engine, expert, prompt, tokens=8, stream=False, stop=(), **sampling):
    outputs = queue.SimpleQueue()
    request = GenerationRequest(expert, prompt, ENDS, Sampling(max_tokens=tokens, stop=stop, **sampling), outputs.put, stream)
    engine.submit(request)
    return request, outputs


def parts(outputs) -> list[Output]:
    received = []
    while not received or not (received[-1].finish or received[-1].error):
        received.append(outputs.get(timeout=60))
    return received


def answer(outputs) -> list[int]:
    last = parts(outputs)[-1]
    if last.error is not None:
        raise last.error
    return list(last.tokens)


def alone(model, expert, prompt, tokens=8):
    """The tokens that `sparselet eval` decodes."""
    if expert.adapter is None:
        return decode(model, None, 0, ENDS, tokens, [prompt])[0]
    with apply_temporarily(model, expert.adapter):
        return decode(model, None, 0, ENDS, tokens, [prompt])[0]


def draw_prompt(source, longest=20):
    return [source.randrange(2, 258) for _ in range(source.randrange(1, longest))]


@pytest.mark.parametrize(
    ("dtype", "limits"),
    [
        (torch.float32, {}),
        (torch.float32, {"max_rows": 2, "max_wait": 0.0}),
        (torch.float32, {"cache_tokens": 60, "max_wait": 0.0}),
        (torch.bfloat16, {"max_rows": 1, "max_wait": 0.0}),  # with 16 bits sums of other sizes may tie otherwise
    ],
)
def test_every_answer_is_its_experts_alone(engine, dtype, limits):
    model, source = tiny(dtype), random.Random(1)
    served = [BASE, *experts(model)]
    asked = [(source.choice(served), draw_prompt(source), source.randrange(1, 20)) for _ in range(60)]
    expected = [alone(model, expert, prompt, tokens) for expert, prompt, tokens in asked]
    before = [parameter.clone() for parameter in model.parameters()]
    running = engine(model, **limits)
    answers = [ask(running, *each)[1] for each in asked]
    assert [answer(each) for each in answers] == expected
    assert len({tuple(each) for each in expected}) > 30  # the experts differ
    running.stop()
    assert running.counts.swaps + running.counts.mixed_steps >= len(served) - 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_rows_join_and_leave_while_others_are_decoded(engine):
    model, source = tiny(), random.Random(2)
    served = experts(model, 2)
    running = engine(model, max_wait=0.001)
    results, expected = [], []
    for _ in range(40):
        each = (source.choice(served), draw_prompt(source), source.randrange(1, 40))
        results.append((each, ask(running, *each)[1]))
        if source.random() < 0.3:
            parts(results[-1][1])
            results.pop()
    found = [answer(outputs) for _, outputs in results]
    running.stop()
    expected = [alone(model, *each) for each, _ in results]
    assert found == expected


def test_gpt2_with_learned_positions(engine):
    model = make_gpt2()
    running = engine(model)
    prompts = [[5, 9, 200], [7], [3, 4, 5, 6, 7, 8, 9]]
    answers = [ask(running, BASE, prompt)[1] for prompt in prompts]
    assert [answer(each) for each in answers] == [alone(model, BASE, prompt) for prompt in prompts]


def test_a_model_whose_rows_cannot_be_decoded_together_is_refused():
    with pytest.raises(ModelError, match="cannot be served"):
        Engine(make_t5(), make_tokenizer(), {})


def test_streamed_parts_join_to_the_text(engine):
    running = engine()
    prompt = [40, 41, 42, 43]
    whole = parts(ask(running, BASE, prompt, 30)[1])
    streamed = parts(ask(running, BASE, prompt, 30, stream=True)[1])
    assert len(whole) == 1
    assert "".join(part.text for part in streamed) == whole[0].text
    assert streamed[-1].tokens == whole[0].tokens


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_ends_the_answer_before_it(engine, stream):
    running = engine()
    prompt = [40, 41, 42, 43]
    whole = parts(ask(running, BASE, prompt, 40)[1])[-1]
    pairs = [whole.text[i : i + 2] for i in range(3, len(whole.text) - 4)]
    stop = next(pair for pair in pairs if "\ufffd" not in pair)
    received = parts(ask(running, BASE, prompt, 40, stream=stream, stop=("never", stop))[1])
    assert "".join(part.text for part in received) == whole.text[: whole.text.find(stop)]
    assert received[-1].finish == "stop"
    assert len(received[-1].tokens) < len(whole.tokens)


def test_the_same_seed_gives_the_same_answer_in_any_batch(engine):
    running = engine()
    first = answer(ask(running, BASE, [5, 6, 7], 20, temperature=1.0, top_p=0.9, seed=3)[1])
    noise = [ask(running, BASE, [8, 9], 20, temperature=1.5)[1] for _ in range(5)]
    again = answer(ask(running, BASE, [5, 6, 7], 20, temperature=1.0, top_p=0.9, seed=3)[1])
    other = answer(ask(running, BASE, [5, 6, 7], 20, temperature=1.0, top_p=0.9, seed=4)[1])
    for each in noise:
        parts(each)
    assert first == again != other


def test_an_answer_of_the_longest_length_and_one_that_ends(engine):
    running = engine()
    assert parts(ask(running, BASE, [5, 6, 7], 1)[1])[-1].finish == "length"
    source = random.Random(4)
    finishes = [parts(ask(running, BASE, draw_prompt(source), 40)[1])[-1] for _ in range(10)]
    for last in finishes:
        assert (last.finish == "stop") == (last.tokens[-1] in ENDS)
        assert not ENDS & set(last.tokens[:-1])
    assert "stop" in {last.finish for last in finishes}


def test_a_cancelled_request_leaves_and_its_place_is_free(engine):
    running = engine(max_rows=1)
    never = frozenset()
    outputs = queue.SimpleQueue()
    long = GenerationRequest(BASE, [5], never, Sampling(max_tokens=1000), outputs.put, stream=True)
    running.submit(long)
    outputs.get(timeout=30)
    waiting, waiting_outputs = ask(running, BASE, [6])
    cancelled, cancelled_outputs = ask(running, BASE, [7])
    cancelled.cancelled = True
    long.cancelled = True
    assert answer(waiting_outputs)
    assert cancelled_outputs.empty()
    assert waiting.cancelled is False
    running.stop()
    assert running.running == running.scheduler.waiting == running.scheduler.cache_tokens == 0


def test_a_full_queue_and_a_request_beyond_the_cache_are_refused():
    model = tiny()
    idle = Engine(model, make_tokenizer(), fingerprints(model), ServingLimits(max_queue=2, cache_tokens=50))
    for _ in range(2):
        ask(idle, BASE, [5])
    with pytest.raises(ServerBusy, match="2 requests wait"):
        ask(idle, BASE, [5])
    with pytest.raises(RequestRefused, match="max_tokens"):
        ask(idle, BASE, [5] * 40, 11)
    idle.stop(drain=False)


def test_stopping_answers_what_began_and_refuses_more(engine):
    running = engine()
    answers = [ask(running, BASE, [5, i], 50)[1] for i in range(2, 10)]
    running.stop()
    assert all(answer(each) for each in answers)
    with pytest.raises(ServerBusy, match="shutting down"):
        ask(running, BASE, [5])


def test_a_failing_expert_fails_its_requests_alone(engine):
    model = tiny()
    running = engine(model)
    good, bad = experts(model, 2)
    bad = ServedExpert("bad", make_adapter(make_model(hidden_size=32), seed=3))
    failing, fine = ask(running, bad, [5, 6])[1], ask(running, good, [5, 6])[1]
    assert parts(failing)[-1].error is not None
    found = answer(fine)
    running.stop()
    assert found == alone(model, good, [5, 6])


def test_many_threads_may_submit(engine):
    model = tiny()
    served = [BASE, *experts(model)]
    expected = {(expert.digest, n): alone(model, expert, [n, n + 1]) for expert in served for n in range(5, 10)}
    running = engine(model, max_wait=0.001)
    wrong = []

    def client(seed):
        source = random.Random(seed)
        for _ in range(10):
            expert, n = source.choice(served), source.randrange(5, 10)
            request, outputs = ask(running, expert, [n, n + 1])
            if source.random() < 0.2:
                request.cancelled = True
            elif answer(outputs) != expected[expert.digest, n]:
                wrong.append((expert.digest, n))

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    running.stop()
    assert running.scheduler.cache_tokens == 0


def test_the_base_has_a_digest_of_its_weights():
    assert base_digest(fingerprints(tiny())) == base_digest(fingerprints(tiny()))
    assert base_digest(fingerprints(tiny())) != base_digest(fingerprints(make_model(seed=1)))
