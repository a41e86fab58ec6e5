"""Tiny base models and tasks as directories, made once; tests only read them."""

import os

# Read when the libraries are imported: no test may reach the hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def caches_of_their_own(tmp_path_factory):
    """Data sets are cached, and the packaged model is converted, away from the user's caches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory) -> str:
    """A Llama of two layers without a chat template."""
    from tiny import save_base

    return save_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="session")
def chat_dir(tmp_path_factory) -> str:
    """The same model with a chat template."""
    from tiny import save_base

    return save_base(tmp_path_factory.mktemp("models") / "chat", template=True)


@pytest.fixture(scope="session")
def task_dir(tmp_path_factory) -> str:
    """Twelve training rows, four for validation, five for the test."""
    from tiny import save_task

    return save_task(tmp_path_factory.mktemp("tasks") / "backwards")
