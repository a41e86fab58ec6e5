"""Options that the benchmarks of training share."""

import argparse
from pathlib import Path
from typing import Any

FLOOR = "floor"
ROOT = Path(__file__).parent.parent.parent


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A parser with the shared options; read them by `read`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=("smollm2", "phi3", "tiny"), default="smollm2", help="which shapes")
    parser.add_argument("--random-weights", action="store_true", help="do not fetch SmolLM2-135M; always so on a GPU")
    parser.add_argument("--dtype", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="the tiny model, two rounds: does it run, and is it right?")
    parser.add_argument("--out", type=Path, help="directory of the result (default: benchmarks/results)")
    return parser


def read(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, completed. Ends with a message where they do not go together."""
    asked = parser.parse_args()
    if asked.quick:
        if asked.out is None:
            parser.error("--quick measures nothing worth keeping; give --out")
        asked.model, asked.batch, asked.tokens, asked.rounds = "tiny", 2, 16, 2
    asked.out = asked.out or ROOT / "benchmarks/results"
    asked.random_weights = asked.random_weights or asked.device == "cuda" or asked.model != "smollm2"
    return asked


def job_of(asked: argparse.Namespace) -> dict[str, Any]:
    """What every job of a model holds: the model, its dtype and device, the size of a step.

    keep: a process holds on to all it has built; of models that one GPU cannot hold several of it holds the last.
    """
    return {
        "model": f"random:{asked.model}" if asked.random_weights else "packaged:smollm2-135m",
        "dtype": {"bf16": "bfloat16"}.get(asked.dtype, asked.dtype),
        "device": asked.device,
        "batch": asked.batch,
        "tokens": asked.tokens,
        "keep": asked.model != "phi3",
    }


def process_of(asked: argparse.Namespace, script: str, name: str) -> str:
    """Who shares a process: where models are kept everyone has one, since an optimizer's step writes back for all adapters in
    its process; where they are not, all of a script share one, but for the floor."""
    return script if asked.model == "phi3" and name != FLOOR else f"{script} {name}"


def result_name(asked: argparse.Namespace, name: str) -> str:
    """What the file's name begins with: `train` on this machine's processor, `train_cuda_phi3` and the like elsewhere."""
    if asked.quick or (asked.device, asked.model) == ("cpu", "smollm2"):
        return name
    return f"{name}_{asked.device}_{asked.model}"
