"""Jobs of mergekit: merging whole checkpoints, and dense tensors in memory. Runs in an environment that has mergekit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods.api import merge_tensors
from mergekit.options import MergeOptions
from racing.worker import serve
from torch import Tensor

TENSORS = "model.safetensors"


def to_checkpoint(job: dict[str, Any]) -> Callable[[], None]:
    """What `mergekit-yaml` runs, on the CPU, in float32; reading its experts and writing the merged model included."""
    models = [{"model": path, "parameters": job["each"]} for path in job["checkpoints"]]
    config = MergeConfiguration.model_validate(
        {
            "merge_method": job["method"],
            "base_model": job["model"],
            "models": models,
            "parameters": job["shared"],
            "dtype": "float32",
        }
    )
    return lambda: run_merge(config, job["out"], MergeOptions(quiet=True, device="cpu", lazy_unpickle=False))


def in_memory(job: dict[str, Any]) -> Callable[[], float]:
    """`merge_tensors` for each target, all its inputs being dense tensors in memory already."""
    base = safetensors.torch.load_file(Path(job["model"]) / TENSORS)
    experts = [safetensors.torch.load_file(Path(path) / "adapter_model.safetensors") for path in job["adapters"]]
    parameters = {**job["each"], **job["shared"]}
    names = sorted({tensor.removesuffix(".sparse_values") for tensor in experts[0] if tensor.endswith(".sparse_values")})
    targets = []
    for name in names:
        weight = base[f"{name.removeprefix('base_model.model.')}.weight"]
        targets.append([weight, *(weight + dense(expert, name, weight) for expert in experts)])
    del base, experts

    def start() -> None:
        for tensors in targets:
            merge_tensors(tensors, job["method"], parameters=parameters, base_index=0)

    return start


def dense(expert: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    """One target's change, of the weight's shape."""
    change = torch.zeros(like.numel())
    change[expert[f"{name}.sparse_indices"].long()] = expert[f"{name}.sparse_values"]
    return change.view_as(like)


if __name__ == "__main__":
    serve(
        {"merge to a checkpoint": to_checkpoint, "merge in memory": in_memory},
        ("mergekit", "torch", "transformers", "safetensors"),
    )
