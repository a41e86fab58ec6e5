"""A server of two experts in a thread, and the official client."""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("fastapi")

import httpx2
import openai
import uvicorn
from helpers.tiny import make_adapter, make_model, save_base

from sparselet.evaluation.metrics import rouge_l_of_each
from sparselet.generation.generate import generate
from sparselet.models import load_model, load_tokenizer
from sparselet.serving.app import create_app
from sparselet.serving.limits import ServingLimits
from sparselet.serving.measuring import Measuring
from sparselet.serving.service import Service, open_service
from sparselet.tasks.rows import Row
from sparselet.tasks.task import Task

API_KEY, ADMIN_KEY = "client-key", "admin-key"


class Running:
    """A server in a thread of this process."""

    def __init__(self, service: Service, library, url: str) -> None:
        self.service, self.library, self.url = service, library, url
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key=API_KEY, max_retries=0, timeout=60)

    def post(self, path: str, body=None, key: str | None = API_KEY, **more) -> httpx2.Response:
        headers = {"content-type": "application/json"} | ({} if key is None else {"authorization": f"Bearer {key}"})
        return httpx2.post(self.url + path, json=body, headers=headers, timeout=60, **more)

    def get(self, path: str, key: str | None = API_KEY) -> httpx2.Response:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return httpx2.get(self.url + path, headers=headers, timeout=60)

    def admin(self, verb: str, **body) -> httpx2.Response:
        return self.post(f"/admin/{verb}", body, ADMIN_KEY)

    def settle(self) -> None:
        """Wait until nothing is answered."""
        deadline = time.monotonic() + 30
        while self.service.engine.running or self.service.engine.scheduler.waiting:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture(scope="session")
def served_model(tmp_path_factory) -> str:
    """A base model with a chat template whose answers differ from token to token."""
    return save_base(tmp_path_factory.mktemp("served") / "model", template=True, initializer_range=0.5)


@functools.cache
def measured_tasks(model: str) -> list[Task]:
    """Two tasks whose targets are the base model's answers, so that experts answer some of them in part."""
    prompts = [f"{i} and {i}?" for i in range(20, 26)]
    answers = generate(load_model(model), load_tokenizer(model), prompts, max_new_tokens=64)
    rows = tuple(map(Row, prompts, answers))
    return [Task("first", {"validation": rows}), Task("second", {"validation": rows[::-1]})]


@contextlib.contextmanager
def serving(model: str, library, state, vectors=(), **limits) -> Iterator[Running]:
    service = open_service(model, [library], state, limits=ServingLimits(**limits), vectors=vectors)
    app = create_app(service, API_KEY, ADMIN_KEY, Measuring(service, measured_tasks(model), rouge_l_of_each))
    config = uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=5)
    listener = config.bind_socket()
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield Running(service, library, f"http://127.0.0.1:{listener.getsockname()[1]}")
    finally:
        server.should_exit = True
        thread.join(30)


def make_library(directory) -> None:
    """An expert trained through the template, one of tiles, and one trained without a template."""
    model = make_model(initializer_range=0.5)
    make_adapter(model, seed=1, task="first").save(directory / "one")
    make_adapter(model, 4, seed=2, task="second").save(directory / "two")
    make_adapter(model, seed=3, chat_template=False).save(directory / "bare")


@pytest.fixture
def start(served_model, tmp_path) -> Iterator[Callable[..., Running]]:
    """Start a server of a library of its own with these limits; a second call is a restart."""
    with contextlib.ExitStack() as stack:

        def begin(**limits) -> Running:
            stack.close()
            if not (tmp_path / "library").exists():
                make_library(tmp_path / "library")
            return stack.enter_context(serving(served_model, tmp_path / "library", tmp_path / "state", **limits))

        yield begin


@pytest.fixture(scope="module")
def server(served_model, tmp_path_factory) -> Iterator[Running]:
    """A server that tests share, which change nothing of its own three experts."""
    directory = tmp_path_factory.mktemp("shared")
    make_library(directory / "library")
    with serving(served_model, directory / "library", directory / "state") as running:
        yield running
