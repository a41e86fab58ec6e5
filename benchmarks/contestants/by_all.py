"""The jobs of all scripts of this environment in one process, for quick runs: the imports take longer than all that is done."""

from collections.abc import Callable
from typing import Any

from racing.worker import Job, serve

from contestants import by_evaluation, by_peft, by_sparselet, by_torch

SCRIPTS = {
    "by_evaluation.py": by_evaluation.JOBS,
    "by_torch.py": by_torch.JOBS,
    "by_peft.py": by_peft.JOBS,
    "by_sparselet.py": by_sparselet.JOBS,
}


def named(name: str, job: Job) -> Job:
    def prepare(asked: dict[str, Any]) -> Callable[[], Any]:
        return job({**asked, "do": name})

    return prepare


if __name__ == "__main__":
    jobs = {f"{script} {name}": named(name, job) for script, jobs in SCRIPTS.items() for name, job in jobs.items()}
    serve(jobs, ("sparselet", "torch", "transformers", "peft"))
