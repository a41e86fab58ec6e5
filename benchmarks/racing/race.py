"""The runner: all contestants in turn, round after round, the floor before each; and peaks of memory."""

import dataclasses
import statistics
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

from racing.options import FLOOR
from racing.process import BENCHMARKS, Worker, progress

OURS = "sparselet"
ALL = "by_all.py"


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A job of a script in benchmarks/contestants, and which process does it.

    library: "floor", "sparselet" or a peer's name. process: contestants with one name share a process that stays; None is a
    new one for each run. rounds: fewer than the others', for jobs that take minutes. python: of another environment.
    """

    library: str
    name: str
    script: str
    job: dict[str, Any]
    process: str | None
    rounds: int | None = None
    python: str = sys.executable

    def __str__(self) -> str:
        return f"{self.library}: {self.name}"

    def alone(self) -> "Contestant":
        """The same in a new process for each run, as peaks of memory need it."""
        return dataclasses.replace(self, process=None)


class Race:
    """Holds the processes that stay, and asks them.

    together: one process does everything, whatever the contestants say; figures mean little then. versions: of every package
    that a process announced. about: what else they announced (device, threads).
    """

    def __init__(self, together: bool = False) -> None:
        self._together = together
        self._open = ExitStack()
        self._workers: dict[str, Worker] = {}
        self.versions: dict[str, str] = {}
        self.about: dict[str, Any] = {}

    def __enter__(self) -> "Race":
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def start(self, contestants: Iterable[Contestant]) -> None:
        """Start the processes that stay, all at once."""
        for one in contestants:
            script, process = (ALL, ALL) if self._together else (one.script, one.process)
            if process is not None and process not in self._workers:
                self._workers[process] = self._open.enter_context(Worker(BENCHMARKS / "contestants" / script, one.python))

    def ask(self, one: Contestant, **more: Any) -> dict[str, Any]:
        """One run. A failure ends the benchmark; of a peer it is the answer."""
        job = {**one.job, **more}
        if self._together:
            self.start([one])
            answer = self._do(self._workers[ALL], {**job, "do": f"{one.script} {job['do']}"})
        elif one.process is None:
            with Worker(BENCHMARKS / "contestants" / one.script, one.python) as worker:
                answer = self._do(worker, job)
        else:
            self.start([one])
            answer = self._do(self._workers[one.process], job)
        if "error" in answer and one.library in (OURS, FLOOR):
            sys.exit(f"{one} failed: {answer['error']}")
        return answer

    def group(self, name: str, contestants: Sequence[Contestant], rounds: int) -> list[dict[str, Any]]:
        """The rows of a group, whose first contestant is its floor; see `rows_of`.

        Everyone has run once before the first round. A peer that fails is left out, and its row says why.
        """
        self.start(contestants)
        errors: dict[int, str] = {}
        for place, one in enumerate(contestants):
            if one.process is not None and one.job.get("keep", True):  # what is built anew has run once by then
                progress(f"warm-up: {one}")
                answer = self.ask(one, repeat=1)
                errors |= {place: answer["error"]} if "error" in answer else {}
        answers: dict[int, list[dict[str, Any]]] = {place: [] for place in range(len(contestants)) if place not in errors}
        for number in range(rounds):
            for place, one in enumerate(contestants[1:], 1):
                if place in errors or number >= (one.rounds or rounds):
                    continue
                floor = self.ask(contestants[0])
                answer = self.ask(one)
                if "error" in answer:
                    errors[place] = answer["error"]
                    continue
                answers[0].append(floor)
                answers[place].append({**answer, "floor": floor})
                progress(f"round {number + 1}: {answer['seconds']:9.4f} s (floor {floor['seconds']:.4f}) {one}")
        return rows_of(name, contestants, answers, errors)

    def peaks(self, contestants: Sequence[Contestant], rounds: int) -> list[dict[str, Any]]:
        """For each, the peak of every round over what its process had imported, and over the first contestant's median.

        They mean something where each run has a process of its own.

        On a GPU they are those torch had allocated there.
        """
        found: dict[int, list[dict[str, Any]]] = {place: [] for place in range(len(contestants))}
        for number in range(rounds):
            for place, one in enumerate(contestants):
                answer = self.ask(one)
                found[place].append(answer)
                progress(f"round {number + 1}: {_peak(answer) / 1e6 if 'error' not in answer else 0:9.1f} MB {one}")
        floor = statistics.median(_peak(answer) for answer in found[0])
        rows = []
        for place, one in enumerate(contestants):
            row = {"group": "memory", "library": one.library, "name": one.name}
            failed = [answer["error"] for answer in found[place] if "error" in answer]
            if failed:
                rows.append({**row, "error": failed[0]})
                continue
            bytes_ = [_peak(answer) for answer in found[place]]
            row |= {"peak_bytes": bytes_, "over_floor_bytes": statistics.median(bytes_) - floor}
            rows.append({**row, "value": found[place][-1]["value"]})
        return rows

    def _do(self, worker: Worker, job: dict[str, Any]) -> dict[str, Any]:
        about = dict(worker.about)
        self.versions = about.pop("versions") | self.versions  # another environment's torch is not ours
        self.about |= about
        return worker.do(job)


def rows_of(
    group: str, contestants: Sequence[Contestant], answers: dict[int, list[dict[str, Any]]], errors: dict[int, str]
) -> list[dict[str, Any]]:
    """One row a contestant: its seconds and CPU-seconds, and their quartiles as ratios.

    times_floor: to the run of the floor just before. times: to each peer, in the same round, both by their floors. On a GPU
    the seconds are those of its own clock.
    """
    ratios = {place: [_ratios(answer) for answer in found] for place, found in answers.items()}
    rows = []
    for place, one in enumerate(contestants):
        row: dict[str, Any] = {"group": group, "library": one.library, "name": one.name}
        if place in errors or not answers[place]:
            rows.append({**row, "error": errors.get(place, "not measured")})
            continue
        own = answers[place]
        row |= {"seconds": [_seconds(a) for a in own], "cpu_seconds": [a["cpu_seconds"] for a in own]}
        row |= {"median": statistics.median(row["seconds"])}
        if place:
            row["times_floor"] = {kind: quartiles([r[kind] for r in ratios[place]]) for kind in ("wall", "cpu")}
            row["times"] = {
                str(peer): {
                    kind: quartiles([a[kind] / b[kind] for a, b in zip(ratios[place], ratios[other], strict=False)])
                    for kind in ("wall", "cpu")
                }
                for other, peer in enumerate(contestants)
                if peer.library not in (OURS, FLOOR) and other != place and other not in errors
            }
        rows.append({**row, "value": own[-1]["value"]})
    return rows


def quartiles(values: Sequence[float]) -> list[float]:
    """The lower quartile, the median, and the upper quartile."""
    if len(values) == 1:
        return [values[0]] * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def _ratios(answer: dict[str, Any]) -> dict[str, float]:
    floor = answer.get("floor", answer)
    # A process clock that stood still would divide by nothing; it ticks in nanoseconds, so that only a tiny run can.
    return {
        "wall": _seconds(answer) / _seconds(floor),
        "cpu": answer["cpu_seconds"] / max(floor["cpu_seconds"], 1e-9),
    }


def _seconds(answer: dict[str, Any]) -> float:
    return answer.get("device_seconds", answer["seconds"])


def _peak(answer: dict[str, Any]) -> int:
    return answer.get("device_peak", answer["peak"])
