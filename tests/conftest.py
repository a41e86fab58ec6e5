"""Tiny base models, tasks and experts as directories, made once, which tests only read; and the command line."""

import gc
import logging
import os
import subprocess
import warnings

# Read when the libraries are imported: no test may reach the hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Processes that tests start compute as the tests do, by one thread: two workers fill two cores.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

pytest_plugins = ("helpers.training_fixtures", "helpers.study_fixtures")


def pytest_collection_finish():
    """What is imported by now stays: collecting garbage, as each Trainer does, need not look through it every time."""
    gc.collect()
    gc.freeze()


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
    from helpers.tiny import save_base

    return save_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="session")
def chat_dir(tmp_path_factory) -> str:
    """The same model with a chat template."""
    from helpers.tiny import save_base

    return save_base(tmp_path_factory.mktemp("models") / "chat", template=True)


@pytest.fixture(scope="session")
def task_dir(tmp_path_factory) -> str:
    """Twelve training rows, four for validation, five for the test."""
    from helpers.tiny import save_task

    return save_task(tmp_path_factory.mktemp("tasks") / "backwards")


# The command line


@pytest.fixture
def loud_again(monkeypatch):
    """What a verb does to the libraries' loggers is undone."""
    from transformers.utils import logging as transformers_logging

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    names = ("sparselet", "absl")
    levels = {name: logging.getLogger(name).level for name in names}
    verbosity = transformers_logging.get_verbosity()
    yield
    for name in names:
        logging.getLogger(name).setLevel(levels[name])
    logging.getLogger("sparselet").handlers.clear()
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()


@pytest.fixture
def cli(capsys, loud_again):
    """Run a command line in this process: its exit code, standard output and standard error."""
    from sparselet.cli.main import run

    def call(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return exit_.value.code, captured.out, captured.err

    return call


@pytest.fixture
def refused(cli):
    """Run a command line that must fail with one line, and return that line."""

    def call(*arguments, code=1):
        found, out, err = cli(*arguments)
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert found == code, err
        assert len(lines) == 1, err
        assert "Traceback" not in err
        assert not out
        return lines[0]

    return call


@pytest.fixture(scope="session")
def experts(tmp_path_factory, base_dir) -> list[str]:
    """Two random experts of the base model: single entries and tiles."""
    from helpers.made_profiles import profile_for
    from helpers.tiny import make_adapter, make_model

    directory, model = tmp_path_factory.mktemp("experts"), make_model()
    for name, block_size, seed in (("one", 1, 1), ("two", 4, 2)):
        about = {"task": name, "base_model_name_or_path": base_dir, "task_type": "CAUSAL_LM", "chat_template": False}
        adapter = make_adapter(model, block_size, seed=seed, **about)
        adapter.profile = profile_for(adapter, seed)
        adapter.save(directory / name)
    return [str(directory / "one"), str(directory / "two")]


@pytest.fixture
def small_disk(tmp_path):
    """Mount a disk of some kibibytes. Skips where that is not allowed."""
    mounted = []

    def mount(kibibytes):
        directory = tmp_path / f"disk{len(mounted)}"
        directory.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(directory)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            pytest.skip(f"no disk can be mounted here: {error}")
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        mounted.append(directory)
        return directory

    yield mount
    for directory in mounted:
        subprocess.run(["umount", str(directory)], check=True)
