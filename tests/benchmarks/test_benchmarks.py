"""The benchmarks run on tiny inputs, and their rows, ratios and checks are right."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMON = {"processor", "cores", "memory_gib", "threads", "load_before"}
PEERS = [
    ("PEFT", "LoRA r 8"),
    ("PEFT", "LoRA r 64"),
    ("PEFT", "LoRA r 128"),
    ("PEFT", "SHiRA 0.1"),
    ("PEFT", "Super-Tuning 0.1"),
    ("torch", "QKV fine-tuning"),
    ("torch", "full fine-tuning"),
    ("torch", "side product, dense mask 0.1"),
]
TILES = [f"tiles of {side}, 0.1" for side in (16, 64, 128)]
MASKS = ["element 0.1", *TILES, "rows, 0.1", "columns, 0.1", "element 0.01"]
LONG = pytest.mark.skipif(os.environ.get("SPARSELET_SLOW") != "1", reason="half a minute of processes; set SPARSELET_SLOW=1")
COMPARED = ["element 0.1", "tiles of 16, 0.1", "rows, 0.1"]


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=variables)


def script(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, str(ROOT / f"benchmarks/bench_{name}.py"), *options])


def quick(name: str, out: Path, *options: str, measured: str = "") -> dict:
    done = script(name, "--quick", *options, "--out", str(out))
    assert done.returncode == 0, done.stderr
    (file,) = out.iterdir()
    results = json.loads(file.read_text())
    assert re.fullmatch(rf"{measured or name}-[a-z0-9-]+-{results['machine']['cores']}-cores-{results['date']}", file.stem)
    told = " ".join(["OMP_NUM_THREADS=1 python", f"benchmarks/bench_{name}.py --quick", *options, "--out OUT"])
    assert results["command"] == told
    assert set(results["machine"]) >= COMMON
    assert {"python", "sparselet", "torch", "peft"} <= set(results["versions"])
    assert results["settings"]["quick"]
    assert not [row for row in results["rows"] if "error" in row]
    return results


@pytest.fixture(scope="module")
def train(tmp_path_factory) -> dict:
    return quick("train", tmp_path_factory.mktemp("train"))


def named(results: dict, *labels: str) -> dict:
    """A row by its group and name."""
    (row,) = [row for row in results["rows"] if labels in ((row["group"], row["name"]), (row["name"],))]
    return row


def found(results: dict, what: str) -> dict:
    (target,) = [target for target in results["targets"] if target["what"] == what]
    return target


def test_everyone_makes_a_step_from_the_same_model(train: dict) -> None:
    floor, *others = train["rows"]
    stepping = [row for row in others if row["value"] is not None]
    names = [("sparselet", name) for name in MASKS] + PEERS
    assert [(row["library"], row["name"]) for row in stepping] == names
    assert train["wrong"] == []
    for row in stepping:
        assert row["value"]["first"] == pytest.approx(floor["value"]["first"], rel=1e-5)
        assert row["value"]["last"] < row["value"]["first"]
    assert floor["value"] == {"first": floor["value"]["first"], "last": floor["value"]["first"], "trained": 0}


def test_contestants_train_as_many_numbers_as_their_names_say(train: dict) -> None:
    layers, model, small = 2, 256, 128  # q is 256×256, k and v are 128×256
    entries = layers * (model * model + 2 * small * model)
    sums = layers * (2 * model + 2 * (small + model))
    trained = {row["name"]: row["value"]["trained"] for row in train["rows"] if row["value"]}
    assert trained["QKV fine-tuning"] == trained["side product, dense mask 0.1"] == entries
    assert trained["LoRA r 64"] == 64 * sums
    for name in (*COMPARED, "columns, 0.1", "SHiRA 0.1", "Super-Tuning 0.1"):
        assert trained[name] == pytest.approx(0.1 * entries, rel=0.05)
    assert trained["SHiRA 0.1"] % sums == 0
    assert trained["element 0.01"] == pytest.approx(0.01 * entries, rel=0.01)


def test_ratios_are_to_the_floor_before_and_to_each_peer_in_the_same_round(train: dict) -> None:
    floor, *others = train["rows"]
    rounds = 2
    assert len(floor["seconds"]) == rounds * len(others)
    ours, lora = named(train, "element 0.1"), named(train, "LoRA r 128")
    ratios = {}
    for row in (ours, lora):
        before = floor["seconds"][others.index(row) :: len(others)]
        ratios[row["name"]] = [seconds / least for seconds, least in zip(row["seconds"], before, strict=True)]
        low, middle, high = row["times_floor"]["wall"]
        assert middle == pytest.approx(sum(ratios[row["name"]]) / rounds)
        assert min(ratios[row["name"]]) <= low <= middle <= high <= max(ratios[row["name"]])
    pairs = zip(*ratios.values(), strict=True)
    assert ours["times"]["PEFT: LoRA r 128"]["wall"][1] == pytest.approx(sum(a / b for a, b in pairs) / rounds)
    assert set(ours["times"]) == {f"{library}: {name}" for library, name in PEERS}


def test_steps_of_the_few_alone(tmp_path: Path) -> None:
    results = quick("train", tmp_path, "--steps", measured="train_steps")
    assert [row["name"] for row in results["rows"]] == ["frozen model", *COMPARED, "LoRA r 128"]
    assert len(results["targets"]) == 12
    assert all(aim["found"] > 0 for aim in results["targets"])


def test_aims_are_read_from_the_rows(train: dict) -> None:
    step = found(train, "step, element 0.1: times the floor, CPU")
    assert step["found"] == named(train, "element 0.1")["times_floor"]["cpu"][1]
    assert step["aim"] == "at most 1.06"
    assert step["met"] == (step["found"] <= 1.06)
    rest = found(train, "gather, optimizer and weights twice, tiles of 16, 0.1: times the floor")
    parts = [named(train, f"tiles of 16, 0.1: {part}")["times_floor"]["wall"][1] for part in ("gather", "optimizer", "weights")]
    assert rest["found"] == pytest.approx(sum(parts) + parts[-1])
    assert found(train, "selection (dense): times an ordinary step")["met"] is None


def test_memory_is_measured_for_the_same_contestants_and_for_selection(tmp_path: Path) -> None:
    results = quick("memory", tmp_path)
    floor, *others = results["rows"]
    phases = [f"selecting ({initial}), {name}" for initial in ("gradient", "dense") for name in COMPARED]
    assert [(row["library"], row["name"]) for row in others] == [("sparselet", name) for name in MASKS + phases] + PEERS
    assert floor["over_floor_bytes"] == 0
    for row in results["rows"]:
        assert len(row["peak_bytes"]) == 2
        assert 0 < min(row["peak_bytes"]) < 1e9
        middle = sum(row["peak_bytes"]) / 2 - sum(floor["peak_bytes"]) / 2
        assert row["over_floor_bytes"] == pytest.approx(middle)
    dense = found(results, "element 0.1, selecting (dense): MB over the floor")
    entries = named(results, "QKV fine-tuning")["value"]["trained"]
    assert dense["aim"] == f"at most {20 * entries / 1e6:g}"


def test_switching_back_leaves_no_trace_of_a_sparse_adapter(tmp_path: Path) -> None:
    results = quick("switch", tmp_path)
    assert [row["name"] for row in results["rows"] if row["group"] == "load"] == [
        "read and sum",
        "SparseAdapter.load",
        "load_adapter",
        "LoRA r 64, load_adapter",
    ]
    changed = {row["name"]: row["value"]["changed"] for row in results["rows"] if row["group"] == "switch" and row["value"]}
    assert changed.pop("LoRA r 64, unmerge and merge") > 0  # the comparison can tell
    assert set(changed.values()) == {0}
    assert len(changed) == 5
    assert found(results, "unmerge and merge: base entries changed after switching back")["met"]


def test_choices_and_gradients_are_those_of_torch(tmp_path: Path) -> None:
    results = quick("select", tmp_path)
    values = {(row["group"], row["name"]): row["value"] for row in results["rows"] if row["library"] == "sparselet"}
    assert results["wrong"] == []
    assert [value for key, value in values.items() if key[0] != "gradient"] == [{"same": 1}] * 3
    gradients = [value["difference"] for key, value in values.items() if key[0] == "gradient"]
    assert len(gradients) == 14
    assert max(gradients) < 1e-5


def test_sparse_attention_is_attention_under_a_mask(tmp_path: Path) -> None:
    results = quick("attention", tmp_path)
    assert results["wrong"] == []
    own = [row for row in results["rows"] if row["library"] == "sparselet"]
    assert len(own) == 2 * (4 + 2) * 2  # lengths, patterns, with and without the choice of keys
    for row in own:
        assert row["value"]["density"] == 1, "prompts are too short to leave keys out"
        assert row["value"]["computed"] >= 1
    assert found(results, "a prompt of 128, block:block=64,top=4: the same over its density")["aim"] == "at most 2"


def test_profiles_merges_and_routes_have_their_floors(tmp_path: Path) -> None:
    results = quick("library", tmp_path)
    groups = {row["group"]: row["library"] for row in reversed(results["rows"])}
    assert groups == dict.fromkeys(("profile", "merge of 2", "route", "memory"), "floor")
    for row in results["rows"]:
        assert row["group"] == "memory" or row["library"] == "floor" or row["times_floor"]["cpu"][1] > 0
    told = {target["what"]: target["found"] for target in results["targets"]}
    for what in ("profile, rank 32: seconds", "merge of 2, regmean: times the floor, CPU", "merge, tsv: MB over the import"):
        assert told[what] > 0
    assert told["route, among 2: times the floor, CPU"] > 0


@pytest.mark.slow
@LONG
def test_the_whole_job_runs_by_both_ways_and_with_the_frozen_model(tmp_path: Path) -> None:
    results = quick("end_to_end", tmp_path, "--part", "job")
    assert [(row["group"], row["library"]) for row in results["rows"]] == [
        ("train and evaluate", "PEFT"),
        ("train and evaluate", "sparselet"),
        ("train and evaluate", "floor"),
    ]
    trained, frozen = results["rows"][1:]
    assert trained["value"] == frozen["value"], "the frozen model's steps are followed by another expert's answers"
    assert found(results, "train and evaluate: times the plain script")["found"] > 0


@pytest.mark.slow
def test_all_answers_are_those_of_generate_and_their_products_are_repeated(tmp_path: Path) -> None:
    results = quick("end_to_end", tmp_path, "--part", "evaluate", measured="evaluate")
    assert [(row["library"], row["group"]) for row in results["rows"]] == [
        (name, "evaluate") for name in ("torch", "sparselet", "floor")
    ]
    assert results["rows"][1]["value"] == {"answers": 8, "same": 8}
    steps = 2 * 4  # tasks, tokens of an answer; every linear layer makes a product for each
    tried = 2 * 6  # passes that find out on which side the model's rows may be padded, at most
    layers = 2 * 7 + 1
    assert results["rows"][2]["value"]["products"] % layers == 0
    assert steps * layers <= results["rows"][2]["value"]["products"] <= (2 * steps + tried) * layers


def test_merges_have_times_and_memory(tmp_path: Path) -> None:
    results = quick("merge", tmp_path)
    names = ["load_file and sum", "read()", "overlap, in memory", "ties (density 0.05, trim global), in memory"]
    names += ["overlap, to a file", "ties (density 0.05, trim global), to a file", "linear, in memory"]
    times, memory = (names_of(results, group) for group in ("merge", "memory"))
    assert list(times) == list(memory) == names
    floor = times.pop(names[0])
    assert len(floor["seconds"]) == 2 * len(times)
    for row in times.values():
        assert len(row["cpu_seconds"]) == len(row["seconds"]) == 2
        assert 0 < min(row["seconds"]) <= row["median"] <= max(row["seconds"])
    for row in memory.values():
        assert 0 <= row["peak_bytes"][0] < 1e9
    assert (results["settings"]["shapes"], results["settings"]["layers"], results["settings"]["experts"]) == ("smollm2", 2, 2)
    overlap = found(results, "overlap, in memory: times the floor")
    assert (overlap["aim"], overlap["found"]) == ("at most 5", times[names[2]]["times_floor"]["wall"][1])
    assert overlap["met"] == (overlap["found"] <= 5)
    peak = found(results, "overlap, to a file: MB over the import")
    assert peak["found"] == memory[names[4]]["peak_bytes"][0] / 1e6
    assert peak["met"]


def names_of(results: dict, group: str) -> dict[str, dict]:
    """The rows of a group by name."""
    return {row["name"]: row for row in results["rows"] if row["group"] == group}


def test_the_merging_benchmark_writes_nothing_into_the_repository() -> None:
    done = script("merge", "--work", str(ROOT / "benchmarks"))
    assert done.returncode == 2
    assert "--work must not lie in" in done.stderr


@LONG
def test_servers_of_many_experts_are_asked_in_turn(tmp_path: Path) -> None:
    results = quick("serve", tmp_path)
    names = ["base model", "one expert", "8 experts, uniformly mixed", "9 experts, Zipf"]
    expected = [(library, name) for library in ("sparselet", "PEFT") for name in names]
    assert [(row["library"], row["name"]) for row in results["rows"]] == [*expected, ("transformers", "base model")]
    for row in results["rows"]:
        value = row["value"]
        assert (value["answers"], value["failed"]) == (2 * (2 if row["library"] == "transformers" else 6), 0)
        assert min(value["tokens_per_second"]) > 0
        assert value["server_peak_bytes"] > 1e8
        assert 0 < value["first_p50"] <= value["first_p95"]
    assert found(results, "8 experts, uniformly mixed: times PEFT's")["aim"] == "at least 1.5"


def test_without_tasks_there_is_no_whole_job(tmp_path: Path) -> None:
    done = script("end_to_end", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "skipped" in done.stdout
    assert "--tasks DIR" in done.stdout
    assert not list(tmp_path.iterdir())


def test_the_gpu_script_runs_every_benchmark_and_goes_on_after_a_failure(tmp_path: Path) -> None:
    log, stub = tmp_path / "log", tmp_path / "python"
    stub.write_text(f'#!/bin/sh\necho "$@" >> {log}\ncase "$1" in *memory*) exit 1;; esac\n')
    stub.chmod(0o755)
    command = [str(ROOT / "benchmarks/gpu.sh")]
    done = run([*command, "--dry-run", str(tmp_path)], PYTHON=str(stub))
    names = ("train", "memory", "switch", "select", "end_to_end")
    assert log.read_text().splitlines() == [f"benchmarks/bench_{n}.py --quick --dtype bf16 --out {tmp_path}" for n in names]
    assert done.returncode == 1
    assert done.stderr.endswith("failed: memory\n")
    log.unlink()
    run([*command, str(tmp_path)], PYTHON=str(stub))
    lines = log.read_text().splitlines()
    assert len(lines) == 8
    assert all("--device cuda" in line for line in lines)
    assert {f"--model {model}" for model in ("phi3", "smollm2")} == {f"--model {line.split()[4]}" for line in lines[:6]}


def test_tables_are_drawn_from_the_latest_date_of_a_benchmark(tmp_path: Path) -> None:
    results = tmp_path / "benchmarks/results"
    results.mkdir(parents=True)
    names = ["train-b-2-cores-2026-01-09", "train-a-2-cores-2026-02-01", "train-c-2-cores-2025-12-31"]
    names += ["train_cuda_phi3-nvidia-h100-2026-03-01", "merge", "switch-left-by-hand"]
    for name in names:
        (results / f"{name}.json").touch()
    code = "import sys, pathlib, tables; tables.ROOT = pathlib.Path(sys.argv[1])\n"
    code += "for name in sys.argv[2:]: print(tables.file_of(name).stem)"
    asked = ["train", "train_cuda_phi3", "merge", "switch"]
    done = run([sys.executable, "-c", code, str(tmp_path), *asked], PYTHONPATH=str(ROOT / "benchmarks"))
    assert done.stdout.split() == [names[1], names[3], "merge", "switch"], done.stderr


@pytest.mark.parametrize(
    ("device", "expected"), [("cpu", "amd-epyc-9v74-80-core-processor-2-cores"), ("cuda", "nvidia-h100-80gb-hbm3")]
)
def test_a_results_name_tells_the_machine(device: str, expected: str) -> None:
    machine = {"processor": "AMD EPYC 9V74 80-Core Processor", "cores": 2, "gpu": "NVIDIA H100 80GB HBM3"}
    code = "import sys, json; from racing.record import slug; print(slug(json.loads(sys.argv[1])))"
    told = json.dumps({"machine": machine, "settings": {"device": device}})
    assert run([sys.executable, "-c", code, told], PYTHONPATH=str(ROOT / "benchmarks")).stdout == expected + "\n"


@pytest.mark.parametrize("name", ["train", "merge"])
def test_a_quick_run_is_not_kept(name: str) -> None:
    done = script(name, "--quick")
    assert done.returncode == 2
    assert "give --out" in done.stderr
