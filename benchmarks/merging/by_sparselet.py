"""Jobs of sparselet: reading the experts' bytes, and merging them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from racing.worker import serve

from sparselet import METHODS, SparseAdapter, merge
from sparselet.adapter import WEIGHTS_FILE
from sparselet.merging import merge_to

BUFFER = 4 * 2**20


def floor(job: dict[str, Any]) -> Callable[[], None]:
    """Every expert's tensors loaded and summed, which touches each byte once."""

    def start() -> None:
        for expert in job["experts"]:
            for tensor in safetensors.torch.load_file(Path(expert) / WEIGHTS_FILE).values():
                tensor.sum()

    return start


def read(job: dict[str, Any]) -> Callable[[], None]:
    """The same files through one buffer."""
    buffer = bytearray(BUFFER)

    def start() -> None:
        for expert in job["experts"]:
            with open(Path(expert) / WEIGHTS_FILE, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    return start


def in_memory(job: dict[str, Any]) -> Callable[[], SparseAdapter]:
    return lambda: merge(job["experts"], job["method"], parameters=job["parameters"])


def to_file(job: dict[str, Any]) -> Callable[[], Path]:
    return lambda: merge_to(job["out"], job["experts"], job["method"], parameters=job["parameters"])


def difference(job: dict[str, Any]) -> Callable[[], float]:
    """‖ΔW − (checkpoint − base)‖ / ‖ΔW‖ over all targets, ΔW being our merge and `checkpoint` another's."""

    def start() -> float:
        ours = merge(job["experts"], job["method"], parameters=job["parameters"])
        squares = [0.0, 0.0]
        with (
            safetensors.safe_open(Path(job["checkpoint"]) / "model.safetensors", "pt") as theirs,
            safetensors.safe_open(Path(job["model"]) / "model.safetensors", "pt") as base,
        ):
            for name, delta in ours.items():
                dense = delta.to_dense().double()
                change = theirs.get_tensor(f"{name}.weight").double() - base.get_tensor(f"{name}.weight").double()
                squares[0] += float((dense - change).square().sum())
                squares[1] += float(dense.square().sum())
        return (squares[0] / squares[1]) ** 0.5

    return start


JOBS = {"floor": floor, "read": read, "in memory": in_memory, "to a file": to_file, "difference": difference}

if __name__ == "__main__":
    serve(JOBS, ("sparselet", "torch", "safetensors", "numpy"), methods=list(METHODS))
