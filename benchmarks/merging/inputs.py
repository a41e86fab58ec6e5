"""Synthetic experts with the shapes of a model's query, key and value projections, and whole checkpoints of the same deltas.

    python benchmarks/merging/inputs.py WORK --shapes smollm2 --layers 30 --experts 20 --model packaged --checkpoints

What is there already is kept. Prints, as JSON, where everything lies and what it is: `experts` (directories), `bytes` (of
their weights), `entries`, `targets`, `rank` (of a LoRA with as many parameters), `model` and `checkpoints` (directories).
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import safetensors.torch
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparselet import SparseAdapter, SparseDelta
from sparselet.adapter import WEIGHTS_FILE
from sparselet.io.atomic import atomic_directory
from sparselet.models import packaged_model

# (rows, columns) of each target of one layer, by its module's name.
SHAPES = {
    "smollm2": {"q_proj": (576, 576), "k_proj": (192, 576), "v_proj": (192, 576)},
    "phi3": {"qkv_proj": (9216, 3072)},
}
DENSITY = 0.1
MAGNITUDE = 1e-3  # standard deviation of the values
TENSORS = "model.safetensors"


def random_expert(shapes: dict[str, tuple[int, int]], layers: int, seed: int) -> SparseAdapter:
    """Each entry of each target is in the mask with probability `DENSITY`; the values are normal."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for layer in range(layers):
        for target, (rows, columns) in shapes.items():
            indices = (torch.rand(rows * columns, generator=generator) < DENSITY).nonzero().squeeze(1)
            values = torch.randn(len(indices), generator=generator) * MAGNITUDE
            deltas[f"model.layers.{layer}.self_attn.{target}"] = SparseDelta((rows, columns), indices, values)
    return SparseAdapter(deltas, {"task": f"synthetic-{seed}"})


def write_experts(directory: Path, shapes: dict[str, tuple[int, int]], layers: int, count: int) -> list[Path]:
    """Expert i has seed i."""
    paths = [directory / f"expert-{seed:02}" for seed in range(count)]
    missing = [path for path in paths if not (path / WEIGHTS_FILE).exists()]
    require_space(directory, len(missing) * int(8 * DENSITY * layers * size_of(shapes)))
    for path in missing:
        print(f"writing {path}", file=sys.stderr)
        random_expert(shapes, layers, paths.index(path)).save(path)
    return paths


def write_checkpoints(directory: Path, model: Path, experts: list[Path]) -> list[Path]:
    """The base model with each expert's deltas added, in float32, as transformers and mergekit read it."""
    paths = [directory / expert.name for expert in experts]
    missing = [(path, expert) for path, expert in zip(paths, experts, strict=True) if not path.exists()]
    require_space(directory, len(missing) * (model / TENSORS).stat().st_size)
    base = safetensors.torch.load_file(model / TENSORS) if missing else {}
    for path, expert in missing:
        print(f"writing {path}", file=sys.stderr)
        deltas = SparseAdapter.load(expert)
        changed = {f"{name}.weight": base[f"{name}.weight"] + delta.to_dense() for name, delta in deltas.items()}
        with atomic_directory(path) as unfinished:
            safetensors.torch.save_file({**base, **changed}, unfinished / TENSORS, metadata={"format": "pt"})
            for file in model.iterdir():
                if file.name != TENSORS:
                    shutil.copyfile(file, unfinished / file.name)
    return paths


def small_model(directory: Path, layers: int) -> Path:
    """A random model with the attention of SmolLM2-135M and little else, for quick runs."""
    if not directory.exists():
        sizes = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": layers}
        with atomic_directory(directory) as unfinished:
            LlamaForCausalLM(LlamaConfig(vocab_size=64, intermediate_size=64, **sizes)).save_pretrained(unfinished)
    return directory


def equal_rank(shapes: dict[str, tuple[int, int]]) -> int:
    """The rank of a LoRA of all targets with as many parameters as an expert has entries: Σ r(m + n) ≈ density · Σ mn."""
    return round(DENSITY * size_of(shapes) / sum(rows + columns for rows, columns in shapes.values()))


def size_of(shapes: dict[str, tuple[int, int]]) -> int:
    """Entries of one layer's targets."""
    return sum(rows * columns for rows, columns in shapes.values())


def require_space(directory: Path, needed: int) -> None:
    """End unless the disk has room for `needed` bytes and 4 GB for what is merged."""
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    if needed and free < needed + 4e9:
        sys.exit(f"{directory} has {free / 1e9:.1f} GB free; {needed / 1e9:.1f} GB are to be written, and 4 are left free.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--shapes", choices=SHAPES, required=True)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--experts", type=int, required=True)
    parser.add_argument("--model", choices=("none", "small", "packaged"), default="none")
    parser.add_argument("--checkpoints", action="store_true", help="of the packaged model with each expert added")
    asked = parser.parse_args()

    directory, shapes = asked.work / f"{asked.shapes}-{asked.layers}-layers", SHAPES[asked.shapes]
    experts = write_experts(directory / "experts", shapes, asked.layers, asked.experts)
    model = {"none": lambda: None, "small": lambda: small_model(directory / "model", asked.layers), "packaged": packaged_model}
    base = model[asked.model]()
    checkpoints = write_checkpoints(directory / "checkpoints", base, experts) if asked.checkpoints else []
    found = {
        "experts": [str(path) for path in experts],
        "bytes": sum((path / WEIGHTS_FILE).stat().st_size for path in experts),
        "entries": size_of(shapes) * asked.layers,
        "targets": len(shapes) * asked.layers,
        "rank": equal_rank(shapes),
        "model": base and str(base),
        "checkpoints": [str(path) for path in checkpoints],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
