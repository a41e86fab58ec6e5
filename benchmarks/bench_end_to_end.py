"""From nothing to a trained and measured expert, and answers to many tasks, against a plain script with LoRA and generate.

    python benchmarks/bench_end_to_end.py --tasks DIR                      SmolLM2-135M, float32, on the CPU
    python benchmarks/bench_end_to_end.py --quick --out OUT                a tiny model on made-up tasks: does it run?

DIR holds a directory a task, with train.jsonl, validation.jsonl and test.jsonl, and held_in.txt, their names. Without it there
is nothing to measure, and the script says so and ends.

*train and evaluate* is everything in processes of its own, imports and model loading included: `sparselet train` and `sparselet
eval`, with their defaults but for the rate, against contestants/plain_lora.py. Both see the same rows as often, in batches of
the same size. Beside them, the same with one validation row, and the same with training replaced by the frozen model's forward
and backward (contestants/frozen_job.py). *evaluate* is the base model's answers to the first rows of each task: sparselet's
`evaluate` against model.generate on batches in the rows' own order, the models being loaded; every answer is compared. Beside
them, the matrix products of sparselet's linear layers alone. `--part` measures one of the two; each has a result of its own.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from racing.options import FLOOR, job_of, parser_of, read, result_name
from racing.process import BENCHMARKS, environment, progress
from racing.race import OURS, Contestant, Race, rows_of
from racing.record import aim, found, middle, run_benchmark
from rouge_score.rouge_scorer import RougeScorer

PYTHON = [sys.executable, "-c"]
CLI = [*PYTHON, "from sparselet.cli.main import run; run()"]
MAKE = "from pathlib import Path; from contestants.models import save_model, save_task; "
RATE = "1e-3"
PLAIN = "LoRA, Trainer, generate"
WHOLE, UNVALIDATED, FROZEN = "train, eval", "train with 1 validation row, eval", "frozen model's steps, eval"
PRODUCTS = "matrix products alone"
GENERATE = "generate, batches in order"


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.set_defaults(batch=16, rounds=3)
    parser.add_argument("--part", choices=("job", "evaluate"), help="measure one of the two")
    parser.add_argument("--tasks", type=Path, help="directory of the tasks")
    parser.add_argument("--task", default="e2e_nlg", help="the one to train on")
    parser.add_argument("--train-rows", type=int, default=300)
    parser.add_argument("--test-rows", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--eval-tasks", type=int, default=20)
    parser.add_argument("--eval-rows", type=int, default=100)
    parser.add_argument("--eval-rounds", type=int, default=1)
    asked = read(parser)
    if asked.quick:
        asked.train_rows, asked.test_rows, asked.epochs, asked.max_new_tokens = 16, 4, 1, 4
        asked.eval_tasks, asked.eval_rows, asked.rounds = 2, 4, 1
    return asked


def run(commands: list[list[str]]) -> dict[str, Any]:
    """Seconds and CPU-seconds of processes one after the other, and what the last one printed."""
    wall, processor, printed = time.perf_counter(), _children(), ""
    for command in commands:
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{command} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        printed = done.stdout
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": _children() - processor, "printed": printed}


def _children() -> float:
    times = os.times()
    return times.children_user + times.children_system


def make_inputs(asked: argparse.Namespace, work: Path) -> str:
    """The model's directory; random models, and tasks where none are given, are written to WORK."""
    if not asked.random_weights:
        return run([[*PYTHON, "from sparselet.models import packaged_model; print(packaged_model())"]])["printed"].strip()
    shapes = job_of(asked)["model"]
    calls = [f"save_model({shapes!r}, Path({str(work / 'model')!r}))"]
    if asked.tasks is None:
        asked.tasks = work / "tasks"
        names = [asked.task, *(f"task-{i}" for i in range(1, asked.eval_tasks))]
        calls += [f"save_task(Path({str(asked.tasks / name)!r}), {asked.train_rows}, {asked.test_rows})" for name in names]
        asked.tasks.mkdir(parents=True)
        (asked.tasks / "held_in.txt").write_text("\n".join(names))
    run([[*PYTHON, MAKE + "; ".join(calls)]])
    return str(work / "model")


def plain_commands(asked: argparse.Namespace, model: str, out: Path) -> list[list[str]]:
    options = {
        "--model": model,
        "--task": asked.tasks / asked.task,
        "--out": out,
        "--learning-rate": RATE,
        "--batch": asked.batch,
    }
    options |= {"--train-rows": asked.train_rows, "--test-rows": asked.test_rows, "--epochs": asked.epochs}
    options |= {"--max-new-tokens": asked.max_new_tokens}
    return [
        [sys.executable, str(BENCHMARKS / "contestants/plain_lora.py"), *(str(w) for pair in options.items() for w in pair)]
    ]


def our_commands(asked: argparse.Namespace, model: str, out: Path, more: tuple[str, ...] = ()) -> list[list[str]]:
    train = ["train", "--task", str(asked.tasks / asked.task), "--out", str(out / "expert"), "--model", model, "--json", *more]
    train += ["--batch-size", str(asked.batch), "--train-rows", str(asked.train_rows), "--epochs", str(asked.epochs)]
    return [[*CLI, *train, "--learning-rate", RATE], eval_command(asked, model, out / "expert", out)]


def unvalidated_commands(asked: argparse.Namespace, model: str, out: Path) -> list[list[str]]:
    return our_commands(asked, model, out, ("--validation-rows", "1"))


def frozen_commands(asked: argparse.Namespace, model: str, out: Path) -> list[list[str]]:
    """The expert that `our_commands` trained in the same round gives the answers."""
    options = {"--model": model, "--task": asked.tasks / asked.task, "--batch": asked.batch}
    options |= {"--train-rows": asked.train_rows, "--epochs": asked.epochs}
    steps = [sys.executable, str(BENCHMARKS / "contestants/frozen_job.py"), *(str(w) for pair in options.items() for w in pair)]
    return [steps, eval_command(asked, model, out.parent / WHOLE / "expert", out)]


def eval_command(asked: argparse.Namespace, model: str, expert: Path, out: Path) -> list[str]:
    test = ["eval", "--task", str(asked.tasks / asked.task), "--adapter", str(expert), "--model", model]
    test += ["--rows", str(asked.test_rows), "--max-new-tokens", str(asked.max_new_tokens)]
    return [*CLI, *test, "--predictions", str(out / "answers.jsonl")]


def trained_and_evaluated(asked: argparse.Namespace, model: str, work: Path) -> list[dict[str, Any]]:
    """The rows of the first group: the plain script, then ours, each beside the plain one of its round."""
    commands = {PLAIN: plain_commands, WHOLE: our_commands, UNVALIDATED: unvalidated_commands, FROZEN: frozen_commands}
    if asked.quick:  # it differs from our own by one option
        del commands[UNVALIDATED]
    libraries = {PLAIN: "PEFT", FROZEN: FLOOR}
    contestants = [Contestant(libraries.get(name, OURS), name, "", {}, None) for name in commands]

    def ask(one: Contestant, number: int) -> dict[str, Any]:
        out = work / f"run-{number}" / one.name
        out.mkdir(parents=True)
        return {**run(commands[one.name](asked, model, out)), "value": {"rougeL": rouge_of(out)}}

    return in_turn("train and evaluate", contestants, asked.rounds, ask)


def in_turn(
    group: str, contestants: Sequence[Contestant], rounds: int, ask: Callable[[Contestant, int], dict[str, Any]]
) -> list[dict[str, Any]]:
    """The rows of a group in which each runs once a round, and the first one's run is the floor of its round."""
    answers: dict[int, list[dict[str, Any]]] = {place: [] for place in range(len(contestants))}
    for number in range(rounds):
        for place, one in enumerate(contestants):
            answer = ask(one, number)
            answers[place].append({**answer, "floor": answers[0][-1] if place else answer})
            progress(f"round {number + 1}: {answer['seconds']:9.1f} s {one}")
    return rows_of(group, contestants, answers, {})


def rouge_of(out: Path) -> float:
    """Rouge-L of what a run answered; ours is computed from its answers in the same way."""
    if (out / "answers.json").exists():
        return json.loads((out / "answers.json").read_text())["rougeL"]
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    scorer = RougeScorer(["rougeL"])
    return 100 * sum(scorer.score(row["target"], row["answer"])["rougeL"].fmeasure for row in rows) / len(rows)


def evaluated(asked: argparse.Namespace, race: Race, model: str, work: Path) -> list[dict[str, Any]]:
    """The rows of the second group, with how many of all answers are the same."""
    names = (asked.tasks / "held_in.txt").read_text().split()[: asked.eval_tasks]
    job = {**job_of(asked), "model": model, "tasks": [str(asked.tasks / name) for name in names], "rows": asked.eval_rows}
    job |= {"max_new_tokens": asked.max_new_tokens, "products": str(work / "products.json")}
    process = "by_evaluation.py" if asked.quick else None
    jobs = (("torch", GENERATE, "plain"), (OURS, "evaluate", "sparselet"), (FLOOR, PRODUCTS, "products"))
    contestants = [
        Contestant(library, name, "by_evaluation.py", {"do": do, **job, "answers": str(work / f"{do}.json")}, process)
        for library, name, do in jobs
    ]
    rows = in_turn("evaluate", contestants, asked.eval_rounds, lambda one, _: race.ask(one))
    both = [json.loads((work / f"{do}.json").read_text()) for do in ("plain", "sparselet")]
    pairs = [pair for plain, ours in zip(*both, strict=True) for pair in zip(plain, ours, strict=True)]
    rows[1]["value"] = {"answers": len(pairs), "same": sum(a == b for a, b in pairs)}
    return rows


def job_targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def times(library: str, name: str) -> float | None:
        return middle(found(rows, library, name).get("times_floor"), "wall")

    aims = [aim("train and evaluate: times the plain script", times(OURS, WHOLE), "at most", 0.5)]
    if any(row["name"] == UNVALIDATED for row in rows):
        aims.append(aim("the same with 1 validation row: times the plain script", times(OURS, UNVALIDATED)))
    aims.append(aim("the frozen model's steps instead of training: times the plain script", times(FLOOR, FROZEN)))
    for library, name in ((OURS, WHOLE), ("PEFT", PLAIN)):
        aims.append(aim(f"{name}: Rouge-L", found(rows, library, name)["value"]["rougeL"]))
    return aims


def evaluate_targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    ours, products = found(rows, OURS, "evaluate"), found(rows, FLOOR, PRODUCTS)
    aims = [aim("evaluate: times generate", middle(ours.get("times_floor"), "wall"), "at most", 0.35)]
    aims.append(aim("its matrix products alone: times generate", middle(products.get("times_floor"), "wall")))
    value = ours["value"]
    aims.append(aim("evaluate: answers that are the same, per hundred", 100 * value["same"] / value["answers"]))
    return aims


def main() -> None:
    asked = arguments()
    if asked.tasks is None and not asked.random_weights:
        print("skipped: there are no tasks to train on and to answer; give --tasks DIR")
        return
    work = Path(tempfile.mkdtemp(prefix="bench-end-to-end-"))
    places = {str(asked.tasks): "DIR"}
    try:
        model = make_inputs(asked, work)

        def measure_job(race: Race) -> dict[str, Any]:
            rows = trained_and_evaluated(asked, model, work)
            versions = {package: version(package) for package in ("sparselet", "torch", "transformers", "peft")}
            return {"rows": rows, "targets": job_targets(rows), "versions": {"python": platform.python_version(), **versions}}

        def measure_evaluate(race: Race) -> dict[str, Any]:
            rows = evaluated(asked, race, model, work)
            return {"rows": rows, "targets": evaluate_targets(rows)}

        for part, name, measure in (("job", "end_to_end", measure_job), ("evaluate", "evaluate", measure_evaluate)):
            if asked.part in (None, part):
                run_benchmark("bench_end_to_end.py", asked, result_name(asked, name), measure, places)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
