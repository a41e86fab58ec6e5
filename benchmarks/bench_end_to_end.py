"""From nothing to a trained and measured expert, and answers to many tasks, against a plain script with LoRA and generate.

    python benchmarks/bench_end_to_end.py --tasks DIR                      SmolLM2-135M, float32, on the CPU
    python benchmarks/bench_end_to_end.py --quick --out OUT                a tiny model on made-up tasks: does it run?

DIR holds a directory a task, with train.jsonl, validation.jsonl and test.jsonl, and held_in.txt, their names. Without it there
is nothing to measure, and the script says so and ends.

*train and evaluate* is everything in processes of its own, imports and model loading included: `sparselet train` and `sparselet
eval`, with their defaults but for the rate, against training/plain_lora.py. Both see the same rows as often, in batches of the
same size. *evaluate* is the base model's answers to the first rows of each task: sparselet's `evaluate` against model.generate
on batches in the rows' own order, the models being loaded; every answer is compared.
"""

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from racing.options import job_of, parser_of, read, result_name
from racing.process import BENCHMARKS, environment, progress
from racing.race import OURS, Contestant, Race, rows_of
from racing.record import aim, found, load_before, middle, record, settings_of, write
from rouge_score.rouge_scorer import RougeScorer

PYTHON = [sys.executable, "-c"]
CLI = [*PYTHON, "from sparselet.cli.main import run; run()"]
MAKE = "from pathlib import Path; from training.models import save_model, save_task; "
RATE = "1e-3"
PLAIN = "LoRA, Trainer, generate"
GENERATE = "generate, batches in order"


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.set_defaults(batch=16, rounds=3)
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
    return [[sys.executable, str(BENCHMARKS / "training/plain_lora.py"), *(str(w) for pair in options.items() for w in pair)]]


def our_commands(asked: argparse.Namespace, model: str, out: Path) -> list[list[str]]:
    task, expert = str(asked.tasks / asked.task), str(out / "expert")
    train = ["train", "--task", task, "--out", expert, "--model", model, "--learning-rate", RATE, "--json"]
    train += ["--batch-size", str(asked.batch), "--train-rows", str(asked.train_rows), "--epochs", str(asked.epochs)]
    test = ["eval", "--task", task, "--adapter", expert, "--model", model, "--rows", str(asked.test_rows)]
    test += ["--max-new-tokens", str(asked.max_new_tokens), "--predictions", str(out / "answers.jsonl")]
    return [[*CLI, *train], [*CLI, *test]]


def trained_and_evaluated(asked: argparse.Namespace, model: str, work: Path) -> list[dict[str, Any]]:
    """The rows of the first group: plain, then ours."""
    answers: dict[int, list[dict[str, Any]]] = {0: [], 1: []}
    contestants = [Contestant("PEFT", PLAIN, "", {}, None), Contestant(OURS, "train, eval", "", {}, None)]
    for number in range(asked.rounds):
        for place, commands in enumerate((plain_commands, our_commands)):
            out = work / f"run-{number}-{place}"
            out.mkdir()
            answer = run(commands(asked, model, out))
            answers[place].append({**answer, "value": {"rougeL": rouge_of(out)}, "floor": answers[0][-1] if place else answer})
            progress(f"round {number + 1}: {answer['seconds']:9.1f} s {contestants[place]}")
    return rows_of("train and evaluate", contestants, answers, {})


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
    job |= {"max_new_tokens": asked.max_new_tokens}
    process = "by_evaluation.py" if asked.quick else None
    contestants = [
        Contestant(library, name, "by_evaluation.py", {"do": do, **job, "answers": str(work / f"{do}.json")}, process)
        for library, name, do in (("torch", GENERATE, "plain"), (OURS, "evaluate", "sparselet"))
    ]
    rows = race.group("evaluate", contestants, asked.eval_rounds)
    both = [json.loads((work / f"{do}.json").read_text()) for do in ("plain", "sparselet")]
    pairs = [pair for plain, ours in zip(*both, strict=True) for pair in zip(plain, ours, strict=True)]
    rows[1]["value"] = {"answers": len(pairs), "same": sum(a == b for a, b in pairs)}
    return rows


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    whole, answering = found(rows, OURS, "train, eval"), found(rows, OURS, "evaluate")
    aims = [aim("train and evaluate: times the plain script", middle(whole.get("times_floor"), "wall"), "at most", 0.5)]
    for library, name in ((OURS, "train, eval"), ("PEFT", PLAIN)):
        aims.append(aim(f"{name}: Rouge-L", found(rows, library, name)["value"]["rougeL"]))
    aims.append(aim("evaluate: times generate", middle(answering.get("times_floor"), "wall"), "at most", 0.35))
    value = answering["value"]
    aims.append(aim("evaluate: answers that are the same, per hundred", 100 * value["same"] / value["answers"]))
    return aims


def main() -> None:
    asked = arguments()
    if asked.tasks is None and not asked.random_weights:
        print("skipped: there are no tasks to train on and to answer; give --tasks DIR")
        return
    load, started = load_before(), datetime.datetime.now(datetime.UTC)
    work = Path(tempfile.mkdtemp(prefix="bench-end-to-end-"))
    try:
        places = {str(asked.out): "OUT", str(asked.tasks): "DIR"}
        model = make_inputs(asked, work)
        rows = trained_and_evaluated(asked, model, work)
        with Race() as race:
            rows += evaluated(asked, race, model, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    about = record("bench_end_to_end.py", places, settings_of(asked), started, load, race.versions, race.about)
    write({**about, "rows": rows, "targets": targets(rows)}, asked.out, result_name(asked, "end_to_end"))


if __name__ == "__main__":
    main()
