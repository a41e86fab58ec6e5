"""The application of Ray Serve: two replicas answer as one, follow each other's changes, and survive a killed one."""

import importlib.util
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from helpers.tiny import make_adapter, make_model, save_base

SOURCE = Path(__file__).parents[2] / "deploy" / "ray_serve.py"
ADMIN_KEY = "admin-key"

ray = pytest.importorskip("ray", reason="Ray is not installed")
try:
    from ray import serve
except ImportError as error:
    pytest.skip(f"Ray Serve is not installed: {error}", allow_module_level=True)
httpx2 = pytest.importorskip("httpx2")


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def replica_processes():
    """Processes of replicas on this machine."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            command = (directory / "cmdline").read_bytes().decode()
        except (OSError, UnicodeDecodeError):
            continue
        if command.startswith("ray::ServeReplica") and ":sparselet" in command:
            found.append(int(directory.name))
    return found


@pytest.fixture
def deployed(tmp_path, monkeypatch):
    """The address of an application with two replicas, and its directory of experts."""
    monkeypatch.setenv("SPARSELET_ADMIN_KEY", ADMIN_KEY)
    spec = importlib.util.spec_from_file_location("ray_serve_application", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = save_base(tmp_path / "model", template=True, initializer_range=0.5)
    experts = tmp_path / "experts"
    for name, seed in (("one", 1), ("two", 2)):
        make_adapter(make_model(initializer_range=0.5), seed=seed).save(experts / name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"PYTHONPATH": os.pathsep.join([str(SOURCE.parents[1] / "src"), os.environ.get("PYTHONPATH", "")])}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment})
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        arguments = {"model": model, "experts": str(experts), "state": str(tmp_path / "state"), "replicas": "2", "cpus": "0.5"}
        serve.run(module.application(arguments), name="sparselet", route_prefix="/")
        yield f"http://127.0.0.1:{port}", experts
    finally:
        serve.shutdown()
        ray.shutdown()


def test_two_replicas_and_a_killed_one(deployed):
    address, experts = deployed

    def text(model):
        body = {"model": model, "prompt": "ant?", "max_tokens": 8}
        response = httpx2.post(f"{address}/v1/completions", json=body, timeout=60)
        return response.json()["choices"][0]["text"] if response.status_code == 200 else None

    def names():
        """Of several answers, which come from both replicas."""
        lists = [httpx2.get(f"{address}/v1/models", timeout=60).json()["data"] for _ in range(12)]
        return {tuple(model["id"] for model in each) for each in lists}

    wait_until(lambda: len(replica_processes()) == 2)
    first = text("one")
    assert first
    assert first != text("two")
    admin = {"authorization": f"Bearer {ADMIN_KEY}"}
    body = {"name": "one", "new_name": "uno"}
    assert httpx2.post(f"{address}/admin/rename", json=body, headers=admin, timeout=60).status_code == 200
    make_adapter(make_model(initializer_range=0.5), seed=3).save(experts / "three")
    wait_until(lambda: names() == {("base", "three", "two", "uno")})
    os.kill(replica_processes()[0], signal.SIGKILL)
    wait_until(lambda: text("uno") == first)
    wait_until(lambda: len(replica_processes()) == 2)
    wait_until(lambda: names() == {("base", "three", "two", "uno")})
    assert text("uno") == first
