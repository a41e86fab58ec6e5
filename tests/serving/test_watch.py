"""Watching a directory: experts come, change and go; what is half-written or broken is refused and changes nothing."""

import logging
import os
import shutil
import time
from functools import partial

import pytest
from helpers.tiny import make_adapter, make_model

from sparselet.apply import target_weights
from sparselet.errors import ConfigError
from sparselet.formats import open_expert
from sparselet.serving.registry import ExpertRegistry
from sparselet.serving.served_expert import ServedExpert, content_digest
from sparselet.serving.watch import DirectoryWatcher

MODEL = make_model()
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def library(tmp_path):
    make_adapter(MODEL, seed=1).save(tmp_path / "library" / "one")
    return tmp_path / "library"


@pytest.fixture
def begin(library, tmp_path):
    """A watcher and its registry; each call is a restart."""

    def start():
        watcher = DirectoryWatcher(library)
        base = ServedExpert("base", None)
        return watcher, ExpertRegistry(open_expert, partial(target_weights, MODEL), base, [library], tmp_path / "state")

    return start


def digests(registry):
    return {name: registration.expert.digest for name, registration in registry.registrations().items()}


def digest_of(seed):
    return content_digest(make_adapter(MODEL, seed=seed))


def look(watcher, registry, times=2):
    for _ in range(times):
        watcher.look(registry)
    return digests(registry)


def replace(path, seed):
    """Another expert in the place of one."""
    make_adapter(MODEL, seed=seed).save(path.parent / ".new")
    shutil.rmtree(path, ignore_errors=True)
    (path.parent / ".new").rename(path)


def test_experts_come_change_and_go(begin, library):
    watcher, registry = begin()
    assert look(watcher, registry) == {"one": digest_of(1)}
    make_adapter(MODEL, seed=2).save(library / "two")
    assert look(watcher, registry, 1) == {"one": digest_of(1)}  # it may be half-written
    assert look(watcher, registry, 1) == {"one": digest_of(1), "two": digest_of(2)}
    replace(library / "one", 3)
    assert look(watcher, registry) == {"one": digest_of(3), "two": digest_of(2)}
    shutil.rmtree(library / "two")
    assert look(watcher, registry, 1) == {"one": digest_of(3), "two": digest_of(2)}  # it may be being replaced
    assert look(watcher, registry, 1) == {"one": digest_of(3)}
    make_adapter(MODEL, seed=2).save(library / "two")
    assert look(watcher, registry) == {"one": digest_of(3), "two": digest_of(2)}
    assert digests(begin()[1]) == {"one": digest_of(3), "two": digest_of(2)}


def test_what_is_broken_is_refused_once_and_the_previous_expert_stays(begin, library, caplog):
    watcher, registry = begin()
    whole = (library / "one" / WEIGHTS).read_bytes()
    (library / "one" / WEIGHTS).write_bytes(whole[:-20])
    make_adapter(make_model(seed=3), seed=1).save(library / "other")
    (library / "base").mkdir()  # a name that cannot be served
    shutil.copy(library / "other" / "adapter_config.json", library / "base")
    with caplog.at_level(logging.WARNING, "sparselet"):
        assert look(watcher, registry, 6) == {"one": digest_of(1)}
    assert len(caplog.records) == 3
    assert "base weights differ" in caplog.text
    (library / "one" / WEIGHTS).write_bytes(whole)
    replace(library / "other", 4)
    assert look(watcher, registry) == {"one": digest_of(1), "other": digest_of(4)}


def test_an_expert_that_grows_is_read_when_it_is_whole(begin, library, caplog):
    watcher, registry = begin()
    make_adapter(MODEL, seed=2).save(library.parent / "two")
    (library / "two").mkdir()
    shutil.copy(library.parent / "two" / "adapter_config.json", library / "two")
    watcher.look(registry)
    whole = (library.parent / "two" / WEIGHTS).read_bytes()
    for length in (100, len(whole) // 2, len(whole)):
        (library / "two" / WEIGHTS).write_bytes(whole[:length])
        assert "two" not in look(watcher, registry, 1)
    assert look(watcher, registry, 1)["two"] == digest_of(2)
    assert not caplog.records


def test_names_that_the_admin_gave_stay(begin, library):
    watcher, registry = begin()
    make_adapter(MODEL, seed=2).save(library / "two")
    look(watcher, registry)
    registry.rename("one", "uno")
    registry.unload("two")
    assert look(watcher, registry) == {"uno": digest_of(1)}
    watcher, registry = begin()
    assert look(watcher, registry) == {"uno": digest_of(1)}
    replace(library / "one", 3)
    replace(library / "two", 4)
    assert look(watcher, registry) == {"uno": digest_of(3), "two": digest_of(4)}
    shutil.rmtree(library / "one")
    assert look(watcher, registry) == {"two": digest_of(4)}


def test_a_name_of_another_directory_is_not_taken(begin, library, caplog):
    watcher, registry = begin()
    registry.rename("one", "two")
    make_adapter(MODEL, seed=2).save(library / "two")
    assert look(watcher, registry) == {"two": digest_of(1)}
    assert "is the name of" in caplog.text


def test_removed_while_the_server_was_down(begin, library):
    begin()
    registry = begin()[1]
    registry.rename("one", "uno")
    shutil.rmtree(library / "one")
    watcher, registry = begin()
    look(watcher, registry)
    assert registry.paths() == {}
    assert registry.refused == {}


def test_links_and_other_directories_are_left_alone(begin, library):
    watcher, registry = begin()
    make_adapter(MODEL, seed=2).save(library.parent / "outside")
    (library / "link").symlink_to(library.parent / "outside")
    (library / "notes").mkdir()
    (library / "file").write_text("x")
    assert look(watcher, registry, 3) == {"one": digest_of(1)}
    with pytest.raises(ConfigError, match="`watch`"):
        DirectoryWatcher(library / "one")
    with pytest.raises(ConfigError, match="`watch`"):
        DirectoryWatcher(library / "absent")


def test_a_thread_looks_until_the_end(begin, library, caplog):
    _, registry = begin()
    watcher = DirectoryWatcher(library, interval=0.02)
    with watcher.watching(registry):
        make_adapter(MODEL, seed=2).save(library / "two")
        deadline = time.monotonic() + 30
        while "two" not in registry.registrations():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.rename(library, library.with_name("away"))  # as a mount that is lost, and comes back
        while not caplog.records:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(caplog.records) == 1
        os.rename(library.with_name("away"), library)
        make_adapter(MODEL, seed=3).save(library / "three")
        while "three" not in registry.registrations():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert list(registry.registrations()) == ["one", "three", "two"]
