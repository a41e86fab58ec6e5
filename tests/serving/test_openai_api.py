"""The server through the official client: texts of each expert, streams, sampling, merges, and bodies that are refused."""

import json
import shutil
import threading

import openai
import pytest

from sparselet.adapter import SparseAdapter
from sparselet.apply import apply_temporarily
from sparselet.generation.generate import generate
from sparselet.merging import merge
from sparselet.models import load_model, load_tokenizer
from sparselet.serving.served_expert import content_digest
from sparselet.tasks.rows import Message

PROMPTS = ("ant?", "bee and cat?", "dog")


@pytest.fixture(scope="module")
def reference(served_model, server):
    """The text of an adapter's answer by `sparselet eval`'s decoding."""
    model, tokenizer = load_model(served_model), load_tokenizer(served_model)

    def text(adapter, prompt, template=True, tokens=12):
        arguments = {"chat_template": template, "max_new_tokens": tokens}
        if adapter is None:
            return generate(model, tokenizer, [prompt], **arguments)[0]
        with apply_temporarily(model, adapter):
            return generate(model, tokenizer, [prompt], **arguments)[0]

    return text


@pytest.fixture(scope="module")
def adapters(server):
    return {name: SparseAdapter.load(server.library / name) for name in ("one", "two", "bare")} | {"base": None}


def chat(server, model, prompt, tokens=12, **more):
    return server.client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": prompt}], max_tokens=tokens, **more
    )


def test_models_are_listed_with_their_digests(server, adapters):
    listed = {model.id: model for model in server.client.models.list()}
    assert list(listed) == ["base", "bare", "one", "two"]
    assert listed["one"].digest == content_digest(adapters["one"])
    assert listed["one"].task == "first"
    assert server.client.models.retrieve("two").digest == listed["two"].digest


@pytest.mark.parametrize("name", ["base", "one", "two", "bare"])
def test_chat_answers_are_the_experts(server, reference, adapters, name):
    answers = [chat(server, name, prompt) for prompt in PROMPTS]
    expected = [reference(adapters[name], prompt, template=name != "bare") for prompt in PROMPTS]
    assert [answer.choices[0].message.content.strip() for answer in answers] == expected
    assert len(set(expected)) == len(PROMPTS)
    digest = server.client.models.retrieve(name).digest
    assert {answer.system_fingerprint for answer in answers} == {digest}


@pytest.mark.parametrize("name", ["base", "one"])
def test_text_answers_are_the_experts(server, reference, adapters, name):
    answer = server.client.completions.create(model=name, prompt=PROMPTS[0], max_tokens=12)
    assert answer.choices[0].text.strip() == reference(adapters[name], PROMPTS[0], template=False)
    assert answer.object == "text_completion"


def test_an_experts_prompt_is_put_around_inputs(server, reference, adapters):
    metadata = adapters["one"].metadata.with_fields({"prompt": "Say: {input}!"})
    expert = SparseAdapter(adapters["one"], metadata, adapters["one"].fingerprints)
    expert.save(server.library / "with-prompt")
    assert server.admin("load", name="with-prompt", path="with-prompt").status_code == 200
    try:
        answer = chat(server, "with-prompt", "ant?")
        assert answer.choices[0].message.content.strip() == reference(expert, "Say: ant?!") != reference(expert, "ant?")
        text = server.client.completions.create(model="with-prompt", prompt="ant?", max_tokens=12).choices[0].text
        assert text.strip() == reference(expert, "Say: ant?!", template=False)
        assert answer.system_fingerprint != content_digest(adapters["one"])
        body = {"model": "with-prompt", "messages": [{"role": "assistant", "content": "a"}]}
        assert "no user's message" in server.post("/v1/chat/completions", body).json()["error"]["message"]
    finally:
        server.admin("unload", name="with-prompt")
        shutil.rmtree(server.library / "with-prompt")


def test_usage_and_the_reason_of_the_end(server):
    answer = chat(server, "one", "ant?", 5)
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.usage.completion_tokens <= 5
    assert answer.usage.prompt_tokens == len("[user]ant?\n[assistant]")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_streams_join_to_the_whole_answer(server):
    whole = chat(server, "two", "ant?", 20)
    parts = list(chat(server, "two", "ant?", 20, stream=True, stream_options={"include_usage": True}))
    assert parts[0].choices[0].delta.role == "assistant"
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content
    assert parts[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert parts[-1].usage == whole.usage
    assert {part.system_fingerprint for part in parts} == {whole.system_fingerprint}
    texts = server.client.completions.create(model="two", prompt="ant?", max_tokens=20, stream=True)
    expected = server.client.completions.create(model="two", prompt="ant?", max_tokens=20).choices[0].text
    assert "".join(part.choices[0].text for part in texts) == expected


def test_sampling_by_a_seed(server):
    texts = [chat(server, "one", "ant?", 16, temperature=1, top_p=0.9, seed=s).choices[0].message.content for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_stop_text(server):
    text = server.client.completions.create(model="base", prompt="ant?", max_tokens=30).choices[0].text
    stop = next(text[i : i + 2] for i in range(2, len(text)) if "\ufffd" not in text[i : i + 2])
    stopped = server.client.completions.create(model="base", prompt="ant?", max_tokens=30, stop=[stop]).choices[0]
    assert stopped.text == text[: text.find(stop)]
    assert stopped.finish_reason == "stop"


@pytest.mark.parametrize("method", ["overlap", "ties"])
def test_a_set_of_experts_is_merged_for_the_request(server, reference, adapters, method):
    experts = [{"name": "one", "weight": 1.0}, {"name": "two", "weight": 0.5}]
    body = {"experts": experts, "method": method}
    merged = merge([adapters["one"], adapters["two"]], method, [1.0, 0.5])
    misses = server.service.merges.misses
    answers = [chat(server, "merge", "ant?", extra_body=body) for _ in range(2)]
    for answer in answers:
        assert answer.choices[0].message.content.strip() == reference(merged, "ant?")
        assert answer.system_fingerprint == content_digest(merged)
    assert server.service.merges.misses == misses + 1


def test_a_conversation(server, reference, adapters):
    messages = [("system", "be kind"), ("user", "ant?"), ("assistant", "tna"), ("user", "bee?")]
    answer = server.client.chat.completions.create(
        model="one", messages=[{"role": role, "content": text} for role, text in messages], max_tokens=12
    )
    expected = reference(adapters["one"], [Message(*message) for message in messages])
    assert answer.choices[0].message.content.strip() == expected
    with pytest.raises(openai.BadRequestError) as refused:
        server.client.chat.completions.create(
            model="bare", messages=[{"role": role, "content": text} for role, text in messages]
        )
    assert refused.value.param == "messages"


def test_parts_of_text_are_joined(server):
    parts = [{"type": "text", "text": "an"}, {"type": "text", "text": "t?"}]
    answer = server.client.chat.completions.create(model="one", messages=[{"role": "user", "content": parts}], max_tokens=8)
    assert answer.choices[0].message.content == chat(server, "one", "ant?", 8).choices[0].message.content


def test_an_unknown_name_is_never_answered_by_the_base(server):
    for name in ("absent", "../one", "ONE", ""):
        with pytest.raises(openai.NotFoundError, match="no expert is called"):
            chat(server, name, "ant?")
    with pytest.raises(openai.NotFoundError):
        chat(server, "merge", "ant?", extra_body={"experts": [{"name": "absent"}]})


MESSAGES = [{"role": "user", "content": "ant?"}]
BAD = [
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content.str"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**9}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"seed": -1}, "seed"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": ""}, "stop"),
    ({"n": 2}, "n"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"logprobs": True}, "logprobs"),
    ({"tools": []}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format.type"),
    ({"experts": [{"name": "one"}]}, "model"),
    ({"model": "merge"}, "experts"),
    ({"model": "merge", "experts": []}, "experts"),
    ({"model": "merge", "experts": [{"name": "base"}]}, "experts"),
    ({"model": "merge", "experts": [{"name": "one", "path": "/etc"}]}, "experts.0.path"),
    ({"model": "merge", "experts": [{"name": "one"}], "method": "no such"}, None),
    ({"model": "merge", "experts": [{"name": "one"}], "parameters": {"no": 1}}, None),
    ({"model": "merge", "experts": [{"name": "one", "weight": 1e400}]}, None),
]


@pytest.mark.parametrize(("change", "field"), BAD, ids=str)
def test_a_bad_body_is_refused_with_its_field(server, change, field):
    body = {"model": "one", "messages": MESSAGES, **change}
    if not change:
        del body["messages"]
    text = json.dumps(body)  # the client's own encoder refuses infinity
    response = server.post("/v1/chat/completions", content=text)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == field or field is None
    assert error["message"]


def test_neutral_choices_of_other_clients_are_taken(server):
    neutral = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "user": "me", "logprobs": False, "temperature": 0}
    assert chat(server, "one", "ant?", response_format={"type": "text"}, **neutral).choices


def test_text_that_spells_control_tokens_is_text(server):
    answer = chat(server, "one", "ant<end>?", 5)
    assert answer.usage.prompt_tokens == len("[user]ant<end>?\n[assistant]")


def test_many_clients_at_once_get_their_own_experts_text(server, reference, adapters):
    names, wrong = list(adapters), []
    expected = {
        (name, prompt): reference(adapters[name], prompt, template=name != "bare") for name in names for prompt in PROMPTS
    }

    def ask(number):
        for i in range(4):
            name, prompt = names[(number + i) % 4], PROMPTS[(number * 3 + i) % 3]
            text = chat(server, name, prompt).choices[0].message.content.strip()
            if text != expected[name, prompt]:
                wrong.append((name, prompt, text))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
