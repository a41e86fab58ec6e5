"""`model: "route"`: the expert is the one that `sparselet route` names, and the answer says so."""

import threading

import openai
import pytest
from helpers.tiny import WORDS, make_adapter, make_model, save_task
from serving.conftest import serving

import sparselet as sl
from sparselet.profiles.file import read_profile, write_profile
from sparselet.serving.served_expert import content_digest

MODEL = make_model(initializer_range=0.5)
SETTINGS = sl.ProfileSettings(tokens=200)


def make_routed_library(directory, model):
    """Two experts with profiles of prompts that differ, and one without."""
    for name, seed in (("words", 1), ("digits", 2), ("plain", 3)):
        make_adapter(MODEL, seed=seed, task=name).save(directory / name)
    tasks = {"words": save_task(directory.parent / "words")}
    digits = directory.parent / "digits"
    digits.mkdir()
    (digits / "train.jsonl").write_text(
        "".join(f'{{"input": "{i}{i + 3} + {7 * i}", "target": "{8 * i}"}}\n' for i in range(12))
    )
    tasks["digits"] = str(digits)
    for name, task in tasks.items():
        sl.profile(directory / name, task, base=model, settings=SETTINGS)


@pytest.fixture(scope="module")
def routed(served_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("routed")
    make_routed_library(directory / "library", served_model)
    with serving(served_model, directory / "library", directory / "state") as running:
        yield running


def chat(server, model, prompt, **more):
    return server.client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": prompt}], max_tokens=8, **more
    )


PROMPTS = ("tant?", "tbee?", "44 + 9", "1213 + 70")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_expert_is_that_of_route(routed, served_model, prompt):
    paths = [str(routed.library / name) for name in ("words", "digits")]
    expected = sl.route([prompt], paths, base=served_model)[0]
    name = expected.expert.rpartition("/")[2]
    answer = chat(routed, "route", prompt)
    alone = chat(routed, name, prompt)
    assert answer.model == answer.route["expert"] == name
    assert answer.route["margin"] == pytest.approx(expected.margin, rel=1e-5)
    assert answer.route["unsure"] == expected.unsure
    assert set(answer.route["distances"]) == {"words", "digits"}  # one has no profile
    assert answer.choices == alone.choices
    assert answer.system_fingerprint == alone.system_fingerprint


def test_routes_differ(routed):
    assert {chat(routed, "route", prompt).model for prompt in PROMPTS} == {"words", "digits"}


def test_the_last_part_of_a_stream_says_whom(routed):
    whole = chat(routed, "route", PROMPTS[0])
    parts = list(chat(routed, "route", PROMPTS[0], stream=True))
    assert parts[-1].route == whole.route
    assert {part.model for part in parts} == {whole.model}
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
    text = routed.client.completions.create(model="route", prompt="44 + 9", max_tokens=4)
    assert text.route["expert"] == text.model


def test_profiled_experts_are_merged_by_regmean_for_a_request(routed, served_model):
    members = ("words", "digits")
    merging = {"experts": [{"name": name} for name in members], "method": "regmean"}
    answer = chat(routed, "merge", PROMPTS[0], extra_body=merging)
    merged = sl.merge([routed.library / name for name in members], "regmean", base=served_model)
    assert answer.system_fingerprint == content_digest(merged)
    again = [{"name": name} for name in ("words", "plain")]
    with pytest.raises(openai.BadRequestError, match="profile"):
        chat(routed, "merge", PROMPTS[0], extra_body={**merging, "experts": again})


def test_a_prompts_state_is_computed_once(routed, monkeypatch):
    submitted = []
    submit = routed.service.engine.submit
    monkeypatch.setattr(routed.service.engine, "submit", lambda request: (submitted.append(request), submit(request)))
    for _ in range(3):
        chat(routed, "route", "a prompt of its own")
    assert [request.state_only for request in submitted].count(True) == 1


def test_many_routed_requests_beside_others(routed):
    expected = {prompt: chat(routed, "route", prompt).choices[0].message.content for prompt in PROMPTS}
    wrong = []

    def ask(number):
        for i in range(5):
            prompt = PROMPTS[(number + i) % len(PROMPTS)]
            chat(routed, ("base", "plain")[i % 2], f"{WORDS[i]} {number}")
            chat(routed, "route", f"{number} {i} {WORDS[i]}")
            if chat(routed, "route", prompt).choices[0].message.content != expected[prompt]:
                wrong.append(prompt)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    routed.settle()


def test_experts_without_profiles_are_no_candidates(start):
    server = start()
    with pytest.raises(openai.BadRequestError, match="0 of the served experts have one") as refused:
        chat(server, "route", "ant?")
    assert refused.value.param == "model"


def test_candidates_follow_the_registry(served_model, tmp_path):
    make_routed_library(tmp_path / "library", served_model)
    with serving(served_model, tmp_path / "library", tmp_path / "state") as server:
        assert chat(server, "route", "tant?").model == "words"
        assert server.admin("rename", name="words", new_name="spelling").status_code == 200
        assert chat(server, "route", "tant?").model == "spelling"
        assert server.admin("unload", name="digits").status_code == 200
        with pytest.raises(openai.BadRequestError, match="1 of the served experts have one"):
            chat(server, "route", "tant?")
        assert server.admin("load", name="digits", path="digits").status_code == 200
        assert chat(server, "route", "44 + 9").model == "digits"


def test_a_damaged_profile_and_one_of_another_base_are_refused(served_model, tmp_path):
    make_routed_library(tmp_path / "library", served_model)
    file = tmp_path / "library" / "digits" / "profile.safetensors"
    with serving(served_model, tmp_path / "library", tmp_path / "state") as server:
        whole = file.read_bytes()
        file.write_bytes(whole[:-9])
        assert server.admin("load", name="digits", path="digits").status_code == 400
        assert chat(server, "route", "44 + 9").model == "digits"
        file.write_bytes(whole)
        profile = read_profile(file)
        for fingerprint in profile.fingerprints.values():
            fingerprint["sample"] = "0" * len(fingerprint["sample"])
        write_profile(profile, tmp_path / "other").replace(file)
        response = server.admin("load", name="digits", path="digits")
        assert response.status_code == 400
        assert "base weights differ" in response.json()["error"]["message"]
