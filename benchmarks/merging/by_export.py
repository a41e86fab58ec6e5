"""The job of `sparselet merge` and `export --to checkpoint`: what mergekit does, a whole checkpoint, from sparse experts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from racing.worker import serve

from sparselet import merge
from sparselet.formats.checkpoint.write import export_checkpoint
from sparselet.models import load_model, load_tokenizer


def to_checkpoint(job: dict[str, Any]) -> Callable[[], Path]:
    """The base model is loaded within the measurement, as the command does."""

    def start() -> Path:
        merged = merge(job["experts"], job["method"], parameters=job["parameters"])
        return export_checkpoint(load_model(job["model"]), load_tokenizer(job["model"]), merged, job["out"])

    return start


if __name__ == "__main__":
    serve({"to a checkpoint": to_checkpoint}, ("sparselet", "torch", "transformers"))
