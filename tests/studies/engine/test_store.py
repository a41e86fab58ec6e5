"""Where results lie: written whole or not at all, in a directory here or on another file system."""

import json

import pytest

from sparselet.errors import BadConfig, ConfigError, MissingExtra, WriteFailed
from sparselet.io.json_files import write_json
from sparselet.studies.engine.store import ANSWERS, EXPERT, Store
from sparselet.studies.engine.unit import ModelSettings, TrainUnit
from sparselet.studies.engine.unit_results import TrainUnitResult, UnitCost
from sparselet.training.settings import TrainSettings

UNIT = TrainUnit(ModelSettings("tiny", "base"), {"a": "rows"}, TrainSettings(task="a"), label="an expert")
OTHER = TrainUnit(ModelSettings("tiny", "base"), {"b": "rows"}, TrainSettings(task="b"))
RESULT = TrainUnitResult(12, 2, 0.5, 3)
COST = UnitCost(1.0, bytes=3)


@pytest.fixture(params=["directory", "URL"])
def out(request, tmp_path):
    return str(tmp_path / "out") if request.param == "directory" else f"file://{tmp_path}/out"


def publish(store):
    directory = store.directory(UNIT)
    (directory / EXPERT / "deep").mkdir(parents=True)
    (directory / EXPERT / "deep" / "weights").write_bytes(b"\0\1" * 1000)
    (directory / ANSWERS).write_text("{}\n")
    store.publish(UNIT, RESULT, COST)


def test_what_one_process_published_another_reads(out, tmp_path):
    publish(Store(out))
    store = Store(out)
    assert store.results([UNIT, OTHER]) == {UNIT.key: RESULT}
    assert (store.result(UNIT), store.result(OTHER)) == (RESULT, None)
    assert store.cost(UNIT.key) == COST
    assert (store.expert(UNIT.key) / "deep" / "weights").read_bytes() == b"\0\1" * 1000
    assert json.loads((tmp_path / "out" / "units" / UNIT.key / "unit.json").read_text())["label"] == "an expert"
    assert (tmp_path / "out" / "units" / UNIT.key / ANSWERS).read_text() == "{}\n"


def test_files_of_a_url_are_made_elsewhere(tmp_path):
    store = Store(f"file://{tmp_path}/out")
    assert store.is_remote
    assert not store.path.is_relative_to(tmp_path / "out")
    assert store.directory(UNIT).is_relative_to(store.path)
    assert not store.lock.is_relative_to(tmp_path / "out")


def test_a_unit_is_done_only_when_all_its_files_are_there(tmp_path, monkeypatch):
    """Its result is the last file that is written."""
    store, written = Store(f"file://{tmp_path}/out"), []
    monkeypatch.setattr(Store, "_write", lambda self, name, content: written.append(name))
    publish(store)
    assert [name.rpartition("/")[2] for name in written] == ["unit.json", "cost.json", ANSWERS, "weights", "result.json"]


def test_an_attempt_that_was_killed_leaves_no_result(out):
    store = Store(out)
    (store.directory(UNIT) / ".result.json.abc.tmp").write_text("{")
    (store.directory(UNIT) / ".expert.abc.tmp").mkdir()
    assert store.results([UNIT]) == {}
    assert list(store.directory(UNIT).iterdir()) == []


def test_failures_are_kept_and_cleared(out):
    store = Store(out)
    assert store.failures() == {}
    store.fail(UNIT, "no luck")
    assert Store(out).failures() == {UNIT.key: "no luck"}
    store.clear_failures([UNIT.key, "0" * 32])
    assert Store(out).failures() == {}


def test_top_level_files_are_uploaded(out, tmp_path):
    store = Store(out)
    write_json(store.path / "results.json", {"a": 1})
    write_json(store.path / "figures" / "one.json", {})
    store.upload("results.json", "figures")
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == {"a": 1}
    assert (tmp_path / "out" / "figures" / "one.json").is_file()
    assert Store(out).read("results.json") == {"a": 1}


@pytest.mark.parametrize("content", ["{", "[1]", "\xff", "{}", '{"steps": 1, "more": 2}'])
def test_a_result_that_is_none_is_refused(out, content):
    store = Store(out)
    publish(store)
    root = store.path if not store.is_remote else store.out.removeprefix("file://")
    with open(f"{root}/units/{UNIT.key}/result.json", "w", encoding="latin-1") as file:
        file.write(content)
    with pytest.raises(BadConfig, match=r"units/\w+/result\.json.*[Rr]emove it"):
        Store(out).results([UNIT])


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteFailed, match="cannot write"):
        Store(tmp_path / "file" / "out").directory(UNIT)
    with pytest.raises(WriteFailed, match="cannot write file:"):
        Store(f"file://{tmp_path}/file/out").fail(UNIT, "no luck")


def test_a_url_of_no_known_kind():
    with pytest.raises(ConfigError, match="nosuch://bucket/x cannot be reached"):
        Store("nosuch://bucket/x")


def test_a_file_system_whose_package_is_absent(monkeypatch):
    def absent(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", absent)
    with pytest.raises(MissingExtra, match="s3://bucket cannot be reached: Install s3fs"):
        Store("s3://bucket")
