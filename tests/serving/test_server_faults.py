"""Keys, changes while the server runs, limits, clients that go away, restarts and signals."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx2
import openai
import pytest
from helpers.tiny import make_adapter, make_model
from serving.conftest import ADMIN_KEY, make_library

from sparselet.serving.row_batch import RowBatch

MODEL = make_model(initializer_range=0.5)
LONG = {"model": "base", "prompt": "ant?", "max_tokens": 1000}  # this model's greedy answer does not end before


def text(server, model, tokens=10):
    return server.client.completions.create(model=model, prompt="ant?", max_tokens=tokens).choices[0].text


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_up(address):
    with contextlib.suppress(httpx2.TransportError):
        return httpx2.get(f"{address}/health").status_code == 200
    return False


@pytest.fixture
def slow(monkeypatch):
    """Each step takes a while, so that a long answer outlasts a test."""
    step = RowBatch.step

    def slowed(batch):
        time.sleep(0.02)
        return step(batch)

    monkeypatch.setattr(RowBatch, "step", slowed)


@contextlib.contextmanager
def long_streams(server, count):
    """Streams that have begun and are not read on."""
    parts = []  # an iterator that nobody holds closes its response
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            headers = {"authorization": "Bearer client-key"}
            body = {**LONG, "stream": True}
            response = stack.enter_context(httpx2.stream("POST", f"{server.url}/v1/completions", json=body, headers=headers))
            parts.append(response.iter_raw())
            next(parts[-1])
        yield


@pytest.mark.parametrize("key", [None, "x", "wrong", "client-ke", "client-key2", "admin-key", "é"])
def test_clients_need_the_key(server, key):
    for path in ("/v1/models", "/metrics"):
        headers = {} if key is None else {"authorization": f"Bearer {key}".encode()}
        response = httpx2.get(server.url + path, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["type"] == "authentication_error"
        assert "client-key" not in response.text
    assert server.get("/health", key=None).json() == {"status": "ok"}


@pytest.mark.parametrize("verb", ["load", "unload", "rename", "merge"])
def test_the_registry_needs_a_key_of_its_own(server, verb):
    assert server.post(f"/admin/{verb}", {"name": "one"}).status_code == 401
    assert server.post(f"/admin/{verb}", {}, ADMIN_KEY).status_code == 400
    assert server.get("/admin/experts").status_code == 401
    assert {expert["name"] for expert in server.get("/admin/experts", ADMIN_KEY).json()} == {"one", "two", "bare"}


def test_experts_change_while_the_server_answers_and_survive_a_restart(start):
    server = start()
    first, second = text(server, "one"), text(server, "two")
    assert server.admin("rename", name="one", new_name="uno").status_code == 200
    with pytest.raises(openai.NotFoundError):
        text(server, "one")
    assert text(server, "uno") == first
    make_adapter(MODEL, seed=9).save(server.library / "new")
    assert server.admin("load", name="uno", path="new").status_code == 200
    third = text(server, "uno")
    assert third not in (first, second)
    saved = server.admin("merge", name="mix", experts=[{"name": "uno"}, {"name": "two", "weight": 0.5}], method="overlap")
    assert saved.status_code == 200
    mixed = text(server, "mix")
    assert server.admin("unload", name="two").status_code == 200
    server = start()
    assert [model.id for model in server.client.models.list()] == ["base", "bare", "mix", "uno"]
    assert (text(server, "uno"), text(server, "mix")) == (third, mixed)


def test_a_broken_file_is_refused_and_the_old_one_goes_on(start):
    server = start()
    before = text(server, "one")
    broken = server.library / "broken"
    shutil.copytree(server.library / "two", broken)
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-20])
    for path in ("broken", "absent", "../library2", "/etc", "one/adapter_config.json"):
        response = server.admin("load", name="one", path=path)
        assert response.status_code == 400, path
    assert text(server, "one") == before
    make_adapter(make_model(seed=3), seed=1).save(server.library / "other")
    response = server.admin("load", name="one", path="other")
    assert "base weights differ" in response.json()["error"]["message"]
    assert text(server, "one") == before


def test_a_full_queue_is_429_with_the_seconds_to_wait(start, slow):
    server = start(max_rows=1, max_queue=1, max_wait=100.0)
    with long_streams(server, 1):
        waiting = threading.Thread(target=server.post, args=("/v1/completions", {**LONG, "max_tokens": 2}))
        waiting.start()
        wait_until(lambda: server.service.engine.scheduler.waiting)
        response = server.post("/v1/completions", LONG)
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["type"] == "rate_limit_error"
    waiting.join(30)
    server.settle()


def test_a_client_that_goes_away_frees_its_place(start, slow):
    server = start(max_rows=2)
    with long_streams(server, 2):
        assert server.service.engine.running == 2
    with contextlib.suppress(httpx2.TimeoutException):  # a client that does not stream goes away, too
        httpx2.post(f"{server.url}/v1/completions", json=LONG, headers={"authorization": "Bearer client-key"}, timeout=0.3)
    server.settle()
    assert server.service.engine.scheduler.cache_tokens == 0
    assert text(server, "one")


def test_a_body_beyond_the_limit_is_413(start):
    server = start(max_body_bytes=2000)
    long = json.dumps({"model": "base", "prompt": "x" * 3000})
    for content in (long, (long[i : i + 500].encode() for i in range(0, len(long), 500))):  # the second says no length
        response = server.post("/v1/completions", content=content)
        assert response.status_code == 413
        assert response.json()["error"]["message"]
    assert text(server, "one")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"model": "\xff"}', b"[" * 1500])
def test_what_is_no_json_object_is_400(server, content):
    response = server.post("/v1/chat/completions", content=content)
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_a_body_without_its_type_says_what_to_send(server):
    headers = {"authorization": "Bearer client-key"}
    response = httpx2.post(f"{server.url}/v1/completions", content=json.dumps(LONG), headers=headers)
    assert response.status_code == 400
    assert "content-type: application/json" in response.json()["error"]["message"]


def test_other_routes_and_methods(server):
    assert server.get("/v1/nothing").status_code == 404
    assert server.get("/v1/completions").status_code == 405
    assert server.get("/docs").status_code == 404


def test_a_prompt_beyond_the_positions_is_refused(start):
    server = start()
    response = server.post("/v1/completions", {"model": "base", "prompt": "x" * 5000})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"


def test_metrics_count_what_was_answered(start):
    server = start()
    text(server, "one", 5)
    text(server, "two", 5)
    server.post("/v1/completions", {"model": "absent", "prompt": "x"})
    lines = dict(line.rsplit(" ", 1) for line in server.get("/metrics").text.splitlines() if not line.startswith("#"))
    assert float(lines['sparselet_requests_total{expert="one",status="200"}']) == 1
    assert float(lines['sparselet_tokens_total{expert="one",kind="prompt"}']) == 4
    assert float(lines['sparselet_time_to_first_token_seconds_count{expert="two"}']) == 1
    assert float(lines["sparselet_swaps_total"]) >= 2
    assert float(lines["sparselet_waiting_requests"]) == 0
    assert "absent" not in server.get("/metrics").text


# The command line, in a process of its own


@pytest.fixture
def command(served_model, tmp_path):
    """Start `sparselet serve` with further flags: the process and its address."""
    if not (tmp_path / "library").exists():
        make_library(tmp_path / "library")
    processes = []

    def begin(*flags):
        arguments = ["--model", served_model, "--experts", str(tmp_path / "library"), "--port", "0", "--json", *flags]
        process = subprocess.Popen(
            [sys.executable, "-m", "sparselet.cli", "serve", "--state", str(tmp_path / "state"), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "SPARSELET_ADMIN_KEY": ADMIN_KEY},
        )
        processes.append(process)
        lines = []
        while not lines or lines[-1] != "}\n":
            line = process.stdout.readline()
            assert line, process.stderr.read()
            lines.append(line)
        return process, json.loads("".join(lines))["address"]

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def test_sigterm_drains_and_kill_loses_no_expert(command):
    process, address = command()
    admin = {"authorization": f"Bearer {ADMIN_KEY}"}
    body = {"name": "one", "new_name": "uno"}
    wait_until(lambda: is_up(address))
    assert httpx2.post(f"{address}/admin/rename", json=body, headers=admin).status_code == 200
    process.kill()
    process.wait()
    process, address = command()
    wait_until(lambda: is_up(address))
    answers = []

    def ask():
        answers.append(httpx2.post(f"{address}/v1/completions", json={**LONG, "model": "uno", "max_tokens": 1000}, timeout=60))

    asking = threading.Thread(target=ask)
    asking.start()
    wait_until(lambda: answers or "sparselet_running_requests 1.0" in httpx2.get(f"{address}/metrics").text)
    assert not answers
    process.send_signal(signal.SIGTERM)
    asking.join(60)
    assert answers[0].status_code == 200
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert ADMIN_KEY not in out + err


def test_a_watched_directory(command, tmp_path):
    (tmp_path / "watched").mkdir()
    process, address = command("--watch", str(tmp_path / "watched"))
    wait_until(lambda: is_up(address))
    make_adapter(MODEL, seed=9).save(tmp_path / "watched" / "late")
    wait_until(lambda: "late" in httpx2.get(f"{address}/v1/models").text)
    shutil.rmtree(tmp_path / "watched" / "late")
    wait_until(lambda: "late" not in httpx2.get(f"{address}/v1/models").text)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


def test_an_address_that_cannot_be_served_is_one_line(refused, served_model, tmp_path):
    make_library(tmp_path / "library")
    flags = ["--model", served_model, "--experts", tmp_path / "library", "--state", tmp_path / "state"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "--port" in refused("serve", *flags, "--port", taken.getsockname()[1])
    assert "--experts" in refused("serve", *flags[:2], "--experts", tmp_path / "absent")
    assert "--experts or --watch" in refused("serve", *flags[:2])
