"""The registry: names, changes that survive a restart, and files that are refused."""

import shutil
import threading
from functools import partial

import pytest
import torch
from helpers.tiny import make_adapter, make_model

from sparselet.apply import target_weights
from sparselet.errors import ConfigError, FormatError, RequestRefused, UnknownExpert, UnsafePath, WrongBase
from sparselet.formats import open_expert
from sparselet.merging import merge
from sparselet.serving.merge_cache import MergeCache
from sparselet.serving.registry import STATE_FILE, ExpertRegistry
from sparselet.serving.served_expert import ServedExpert, content_digest, serve_expert

BASE = ServedExpert("base", None)
MODEL = make_model()


@pytest.fixture
def library(tmp_path):
    """Two experts in a directory."""
    for name, seed in (("one", 1), ("two", 2)):
        make_adapter(MODEL, seed=seed).save(tmp_path / "library" / name)
    return tmp_path / "library"


@pytest.fixture
def registry(library, tmp_path):
    """A registry of the library; each call is a restart."""
    return partial(ExpertRegistry, open_expert, partial(target_weights, MODEL), BASE, [library], tmp_path / "state")


def names(registry):
    return list(registry.registrations())


def test_experts_are_called_as_their_directories(registry, library):
    served = registry()
    assert names(served) == ["one", "two"]
    assert served["base"] is BASE
    assert served["one"].digest == content_digest(make_adapter(MODEL, seed=1))
    for name in ("three", "", "../one", "library/one"):
        with pytest.raises(UnknownExpert, match="/v1/models"):
            served[name]


def test_an_expert_may_be_named_itself(library, tmp_path):
    served = ExpertRegistry(open_expert, partial(target_weights, MODEL), BASE, [library / "two"], tmp_path / "state")
    assert names(served) == ["two"]


def test_changes_survive_a_restart(registry, library):
    served = registry()
    served.rename("one", "uno")
    served.unload("two")
    merged = serve_expert(merge([served["uno"].adapter]), lambda expert: None)
    served.save("mix", merged)
    make_adapter(MODEL, seed=3).save(library / "three")
    again = registry()
    assert names(again) == ["mix", "three", "uno"]
    assert again["mix"].digest == merged.digest
    again.load("two", "two")
    again.unload("mix")
    assert names(registry()) == ["three", "two", "uno"]


def digests(registry):
    return {name: registration.expert.digest for name, registration in registry.registrations().items()}


def test_servers_that_share_a_state_follow_each_other(registry, library):
    first, second = registry(), registry()
    first.rename("one", "uno")
    second.rename("two", "dos")  # begins with what the first has written
    assert names(second) == ["dos", "uno"]
    first.follow()
    assert digests(first) == digests(second)
    merged = serve_expert(merge([first["uno"].adapter]), lambda expert: None)
    second.save("mix", merged)
    make_adapter(MODEL, seed=8).save(library / "newer")
    second.load("dos", "newer")
    first.unload("uno")
    second.follow()
    first.follow()
    assert names(first) == ["dos", "mix"]
    assert digests(first) == digests(second)
    shutil.rmtree(library / "newer")
    make_adapter(MODEL, seed=9).save(library / "newer")
    before = first["dos"]
    first.load("dos", "newer")  # the same path with another content
    second.follow()
    assert second["dos"].digest == first["dos"].digest != before.digest
    with pytest.raises(RequestRefused, match="already"):
        second.rename("mix", "dos")


def test_changes_of_many_servers_at_once_are_all_kept(registry):
    servers = [registry() for _ in range(4)]
    merged = serve_expert(merge([servers[0]["one"].adapter]), lambda expert: None)

    def save(number):
        for i in range(5):
            servers[number].save(f"mix-{number}-{i}", merged)

    threads = [threading.Thread(target=save, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(names(registry())) == 2 + 20


def test_a_broken_file_is_refused_and_the_previous_expert_stays(registry, library):
    served = registry()
    before = served["one"]
    (library / "two" / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(FormatError):
        served.load("one", "two")
    assert served["one"] is before
    make_adapter(make_model(seed=5), seed=1).save(library / "other-base")
    with pytest.raises(WrongBase):
        served.load("one", "other-base")
    assert served["one"] is before
    assert names(registry()) == ["one"]  # the broken one is left out, with a warning
    make_adapter(MODEL, seed=7).save(library / "newer")
    served.load("one", "newer")
    assert served["one"].digest != before.digest


@pytest.mark.parametrize("path", ["..", "../elsewhere", "/etc", "/", "absent", "link", "one\0", "one/adapter_config.json"])
def test_only_directories_in_the_served_ones_are_read(registry, library, path):
    make_adapter(MODEL).save(library.parent / "elsewhere")
    (library / "link").symlink_to(library.parent / "elsewhere")
    with pytest.raises(UnsafePath):
        registry().load("new", path)


@pytest.mark.parametrize("name", ["base", "route", "merge", "", ".hidden", "a/b", "a b", "x" * 97, "é", "a\n"])
def test_names_are_checked(registry, name):
    served = registry()
    for change in (partial(served.load, name, "one"), partial(served.rename, "one", name), partial(served.save, name, BASE)):
        with pytest.raises(RequestRefused):
            change()


def test_a_name_that_is_taken_or_unknown(registry):
    served = registry()
    with pytest.raises(RequestRefused, match="already"):
        served.rename("one", "two")
    for change in (partial(served.rename, "three", "four"), partial(served.unload, "three")):
        with pytest.raises(UnknownExpert):
            change()


def test_two_directories_of_one_name_and_an_absent_one(library, tmp_path):
    shutil.copytree(library / "one", tmp_path / "second" / "one")
    make = partial(ExpertRegistry, open_expert, partial(target_weights, MODEL), BASE)
    with pytest.raises(ConfigError, match="both called one"):
        make([library, tmp_path / "second"], tmp_path / "state")
    with pytest.raises(ConfigError, match="not a directory"):
        make([tmp_path / "absent"], tmp_path / "state")


def test_a_damaged_state_file_is_refused_by_name(registry, tmp_path):
    registry().rename("one", "uno")
    (tmp_path / "state" / STATE_FILE).write_text("{}")
    with pytest.raises(FormatError, match=STATE_FILE):
        registry()


def test_digests_tell_contents_apart():
    adapters = [make_adapter(MODEL, 1, seed=1), make_adapter(MODEL, 4, seed=1), make_adapter(MODEL, 1, seed=2)]
    narrow = {name: delta.to(torch.bfloat16) for name, delta in adapters[0].items()}
    assert len({content_digest(adapter) for adapter in [*adapters, narrow]}) == 4
    assert content_digest(adapters[0]) == content_digest(make_adapter(MODEL, 1, seed=1))


def served_experts(count=3):
    return [serve_expert(make_adapter(MODEL, seed=seed), lambda expert: None) for seed in range(count)]


def test_merges_are_kept_by_content_within_a_bound():
    first, second, third = served_experts()
    merges = MergeCache(2 * first.bytes + 100, lambda expert: None)
    merged = merges.merged([(first, 1.0), (second, 1.0)], "overlap", {})
    expected = merge([first.adapter, second.adapter])
    assert content_digest(merged.adapter) == content_digest(expected)
    assert merges.merged([(first, 1.0), (second, 1.0)], "overlap", {}) is merged
    assert (merges.hits, merges.misses) == (1, 1)
    assert merges.merged([(first, 1.0), (second, 0.5)], "overlap", {}) is not merged
    assert merges.merged([(first, 1.0), (third, 1.0)], "ties", {"density": 0.5}) is not merged
    assert merges.bytes <= merges.limit
    assert merges.merged([(first, 1.0), (second, 1.0)], "overlap", {}).digest == merged.digest
    with pytest.raises(RequestRefused, match="bytes"):
        merges.merged([(first, 1.0), (second, 1.0), (third, 1.0)], "overlap", {})
    for members in ([], [(BASE, 1.0)]):
        with pytest.raises(RequestRefused, match="1 to 64"):
            merges.merged(members, "overlap", {})


def test_one_expert_of_weight_one_is_itself():
    expert = served_experts(1)[0]
    merged = MergeCache(10**6, lambda expert: None).merged([(expert, 1.0)], "overlap", {})
    assert merged.digest == expert.digest
