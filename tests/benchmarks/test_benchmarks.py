"""The benchmarks run, and write what the tables are drawn from."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks/bench_merge.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=environment)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("results")
    done = run("--quick", "--out", str(out))
    assert done.returncode == 0, done.stderr
    return json.loads((out / "merge.json").read_text())


def test_the_merging_benchmark_says_what_was_run_and_where(results: dict) -> None:
    assert results["command"] == "OMP_NUM_THREADS=1 python benchmarks/bench_merge.py --quick --out OUT"
    assert set(results["machine"]) == {"processor", "cores", "memory_gib", "threads", "load_before"}
    assert set(results["versions"]) == {"python", "sparselet", "peft"}
    assert results["settings"] == {
        "shapes": "smollm2",
        "layers": 2,
        "experts": 2,
        "rounds": 2,
        "heavy_rounds": 2,
        "quick": True,
        "layers_of_model": 30,
    }
    entries = 2 * (576 * 576 + 2 * 192 * 576)
    assert results["inputs"]["entries"] == entries
    assert results["inputs"]["bytes"] == pytest.approx(2 * 8 * 0.1 * entries, rel=0.02)


def test_every_contestant_has_its_times_and_memory(results: dict) -> None:
    rows = results["rows"]
    assert [(row["library"], row["how"], row["method"], len(row["seconds"])) for row in rows] == [
        ("floor", "floor", "load_file and sum", 6),  # one before each run of the others
        ("sparselet", "in memory", "overlap", 2),
        ("sparselet", "to a file", "overlap", 2),
        ("sparselet", "to a file", "ties", 1),
        ("PEFT", "in memory", "linear", 1),
    ]
    for row in rows:
        assert len(row["cpu_seconds"]) == len(row["seconds"])
        assert row["median"] == statistics.median(row["seconds"])
        assert 0 < row["min"] <= row["median"] <= row["max"]
        assert row["times_floor"] == statistics.median(row["ratios"])
        assert 0 <= row["prepared_bytes"] <= row["peak_bytes"] < 1e9


def test_a_ratio_is_to_the_floor_just_before(results: dict) -> None:
    floor, *others = results["rows"]
    assert floor["times_floor"] == 1
    taking_turns = [(i, row) for i in range(2) for row in others if i < len(row["seconds"])]
    for before, (i, row) in zip(floor["seconds"], taking_turns, strict=True):
        assert row["ratios"][i] == row["seconds"][i] / before


def test_every_target_stands_beside_what_was_found(results: dict) -> None:
    named = {target["what"]: target for target in results["targets"]}
    overlap = named["overlap, in memory: times the floor"]
    assert overlap["aim"] == "at most 5"
    assert overlap["found"] == results["rows"][1]["times_floor"]
    assert overlap["met"] == (overlap["found"] <= 5)
    memory = named["overlap, to a file: MB over the import"]
    assert memory["found"] == results["rows"][2]["peak_bytes"] / 1e6
    assert memory["met"]


def test_the_benchmark_writes_nothing_into_the_repository() -> None:
    done = run("--work", str(ROOT / "benchmarks"), "--skip-mergekit")
    assert done.returncode == 2
    assert "--work must not lie in" in done.stderr
    done = run("--quick")
    assert done.returncode == 2
    assert "give --out" in done.stderr
