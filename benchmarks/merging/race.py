"""Contestants, the processes that run them, and the race: everyone in turn, round after round."""

import dataclasses
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from racing.process import Worker, progress

SCRIPTS = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A job of one of the scripts in benchmarks/merging, and in how many rounds it takes part."""

    library: str
    how: str
    method: str
    parameters: dict[str, Any]
    rounds: int
    job: dict[str, Any] = dataclasses.field(default_factory=dict)
    script: str = "by_sparselet.py"
    fresh: bool = False  # a process for each run, which gives time and memory at once
    same_as: tuple[str, dict[str, Any]] | None = None  # our method and parameters that should give the same

    def __str__(self) -> str:
        return f"{self.library}, {self.how}: {self.method} {self.parameters or ''}".strip()


class Race:
    """Runs contestants, and keeps every answer of each, by its place in the list. The first is the floor.

    inputs: what inputs.py printed; every job gets it. output: where merged models are written, one at a time.
    """

    def __init__(self, inputs: dict[str, Any], output: Path, mergekit_python: str | None) -> None:
        self._inputs, self._output, self._mergekit = inputs, output, mergekit_python
        self._workers: dict[str, Worker] = {}
        self._open = ExitStack()
        self.answers: dict[int, list[dict[str, Any]]] = {}
        self.differences: dict[int, float] = {}
        self.versions: dict[str, dict[str, str]] = {}

    def __enter__(self) -> "Race":
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()
        shutil.rmtree(self._output, ignore_errors=True)

    def start(self, script: str) -> Worker:
        python = self._mergekit if script == "by_mergekit.py" else sys.executable
        assert python is not None
        worker = Worker(SCRIPTS / script, python)
        self.versions[script.removeprefix("by_").removesuffix(".py")] = worker.about["versions"]
        return worker

    def worker(self, script: str) -> Worker:
        """The process that stays for all runs of a script."""
        if script not in self._workers:
            self._workers[script] = self._open.enter_context(self.start(script))
        return self._workers[script]

    def run(self, contestant: Contestant, worker: Worker) -> dict[str, Any]:
        """One run; nothing of it stays on the disk. Ends the benchmark where it fails."""
        shutil.rmtree(self._output, ignore_errors=True)
        os.sync()
        more = {"parameters": contestant.parameters, **self._inputs, **contestant.job, "out": str(self._output)}
        return _whole(contestant, worker.do({"do": contestant.how, "method": contestant.method, **more}))

    def rounds(self, contestants: Sequence[Contestant]) -> None:
        """All rounds, after each contestant that has no process for each run has run once.

        A run of the floor stands before every other. Who has fewer rounds takes part in the first ones.
        """
        for contestant in contestants:
            if not contestant.fresh:
                progress(f"warm-up: {contestant}")
                self.run(contestant, self.worker(contestant.script))
        floor = contestants[0]
        for number in range(max(contestant.rounds for contestant in contestants)):
            for place, contestant in enumerate(contestants[1:], 1):
                if number < contestant.rounds:
                    self.run(floor, self.worker(floor.script))  # the experts come back into the page cache
                    self._turn(0, floor)
                    self._turn(place, contestant)
                    took, least = (self.answers[i][-1]["seconds"] for i in (place, 0))
                    self.answers[place][-1]["times_floor"] = took / least
                    progress(f"round {number + 1}: {took:9.3f} s (floor {least:.3f}) {contestant}")

    def _turn(self, place: int, contestant: Contestant) -> None:
        if contestant.fresh:
            with self.start(contestant.script) as worker:
                answer = self.run(contestant, worker)
        else:
            answer = self.run(contestant, self.worker(contestant.script))
        self.answers.setdefault(place, []).append(answer)
        if contestant.same_as and place not in self.differences:
            self.differences[place] = self._difference(contestant)

    def _difference(self, contestant: Contestant) -> float:
        method, parameters = contestant.same_as or ("", {})
        job = {"method": method, "parameters": parameters, "checkpoint": str(self._output), **self._inputs}
        return _whole(contestant, self.worker("by_sparselet.py").do({**job, "do": "difference"}))["value"]

    def memory(self, contestants: Sequence[Contestant]) -> Iterator[dict[str, int]]:
        """Bytes over the imported library, for each: what was `prepared` before the run, and its `peak`."""
        for place, contestant in enumerate(contestants):
            if contestant.fresh:
                found = self.answers[place]
            else:
                progress(f"memory: {contestant}")
                with self.start(contestant.script) as worker:
                    found = [self.run(contestant, worker)]
            yield {f"{field}_bytes": max(answer[field] for answer in found) for field in ("prepared", "peak")}


def _whole(contestant: Contestant, answer: dict[str, Any]) -> dict[str, Any]:
    if "error" in answer:
        sys.exit(f"{contestant} failed: {answer['error']}")
    return answer
