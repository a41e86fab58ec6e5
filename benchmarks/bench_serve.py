"""Load on OpenAI-compatible servers of many experts: output tokens a second, time to the first token, time per token.

    OMP_NUM_THREADS=2 python benchmarks/bench_serve.py                     SmolLM2-135M
    python benchmarks/bench_serve.py --quick --out OUT                     a tiny model: does it run?
    python benchmarks/bench_serve.py --vllm-python PYTHON                  beside vLLM (tests/formats/test_vllm.py tells how)
    python benchmarks/bench_serve.py --url http://host:8000 --models base --models one,two    any server, to the terminal

Experts are random changes of a tenth of query, key and value, LoRA adapters of rank 21 as many numbers; both are so small
that answers are the base model's, and all rows have answers of equal length. The servers stand side by side, and each row is
measured in turn, in `--rounds` rounds, so that a change of the machine's speed meets all rows; the floor is the base model
alone through our server. PEFT's server is contestants/peft_server.py; transformers' own, `transformers serve`, knows the base
model alone, and answers a third of the requests; vLLM's has PEFT's adapters. Clients wait for an answer before they ask again;
prompts are those of a task.
"""

import argparse
import asyncio
import contextlib
import json
import platform
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2
import openai
from contestants.models import save_model
from peft import LoraConfig, get_peft_model
from racing.options import FLOOR, parser_of, read, result_name
from racing.process import BENCHMARKS, environment, memory_of, progress
from racing.race import OURS, Race
from racing.record import aim, run_benchmark
from safetensors.torch import load_file, save_file
from soak_serve import make_experts

from sparselet.models import load_model, local_path
from sparselet.tasks.task import load_task

DENSITY, RANK = 0.1, 21
SCALE = 1e-5  # of an expert's values, relative to the weights' spread
FEW = 8
TRANSFORMERS, VLLM = "transformers", "vLLM"
VLLM_SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # a GiB of keys and values; all cores
MERGES = 5  # sets of three experts that nobody has asked for


@dataclass(frozen=True)
class Row:
    """One row: a library's server, the models that are asked, and how often each. zipf: the n-th with weight 1/n."""

    library: str
    name: str
    models: tuple[str, ...]
    zipf: bool = False
    share: float = 1.0  # of the requests


@dataclass
class Load:
    """What one row has measured in one round. All times in seconds."""

    tokens: int = 0
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    each: list[float] = field(default_factory=list)
    failed: int = 0

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


async def ask(client: openai.AsyncOpenAI, model: str, prompt: str, tokens: int, load: Load) -> None:
    """One streamed answer."""
    began, first, count = time.monotonic(), None, 0
    try:
        stream = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": prompt}],
            max_tokens=tokens,
            stream=True,
            stream_options={"include_usage": True},
        )
        async for part in stream:
            if first is None and part.choices and part.choices[0].delta.content:
                first = time.monotonic()
            if part.usage is not None:
                count = part.usage.completion_tokens
    except openai.APIError:
        load.failed += 1
        return
    ended = time.monotonic()
    load.tokens += count
    load.first.append((first or ended) - began)
    if first is not None and count > 1:
        load.each.append((ended - first) / (count - 1))


async def measure(url: str, row: Row, asked: argparse.Namespace, prompts: list[str], seed: int) -> Load:
    """`asked.requests` requests from `asked.clients` clients, each waiting for its answer before the next."""
    source, load = random.Random(seed), Load()
    weights = [1 / (rank + 1) if row.zipf else 1.0 for rank in range(len(row.models))]
    queue = [(source.choices(row.models, weights)[0], source.choice(prompts)) for _ in range(round(row.share * asked.requests))]
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=asked.key, max_retries=0, timeout=600)

    async def work() -> None:
        while queue:
            await ask(client, *queue.pop(), asked.answer_tokens, load)

    began = time.monotonic()
    await asyncio.gather(*(work() for _ in range(asked.clients)))
    load.seconds = time.monotonic() - began
    await client.close()
    return load


def race_rows(rows: list[Row], urls: dict[str, str], asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Each row's figures over all rounds; the first one is the floor of its round."""
    prompts = [str(row.input) for row in load_task(asked.task, ("test",)).rows("test", 64)]
    loads: dict[Row, list[Load]] = {row: [] for row in rows}
    for number in range(asked.rounds):
        for row in rows:
            loads[row].append(asyncio.run(measure(urls[row.library], row, asked, prompts, number)))
            progress(f"round {number + 1}: {loads[row][-1].rate:8.1f} tokens/s {row.library}: {row.name}")
    floors = [load.rate for load in loads[rows[0]]]
    return [summary(row, loads[row], floors) for row in rows]


def summary(row: Row, loads: list[Load], floors: list[float]) -> dict[str, Any]:
    """Rates of all rounds, the median of their ratios to the floor, and quantiles of all answers."""
    quantiles = {}
    for name in ("first", "each"):
        times = [t for load in loads for t in vars(load)[name]]
        cuts = statistics.quantiles(times, n=20) if len(times) > 1 else [None] * 19
        quantiles |= {f"{name}_p50": cuts[9], f"{name}_p95": cuts[18]}
    rates = [load.rate for load in loads]
    share = statistics.median(rate / floor for rate, floor in zip(rates, floors, strict=True))
    answers = sum(len(load.first) for load in loads)
    counts = {"answers": answers, "failed": sum(load.failed for load in loads)}
    figures = {"tokens_per_second": rates, "times_floor": share, **quantiles, **counts}
    return {"library": row.library, "group": "serve", "name": row.name, "value": figures}


def make_adapters(asked: argparse.Namespace, work: Path) -> None:
    """Random experts below WORK/experts, e00 and so on, and random LoRA adapters below WORK/adapters."""
    model = load_model(asked.served, "float32")
    make_experts(model, work / "experts", asked.experts, DENSITY, SCALE)
    (work / "one").mkdir()
    (work / "one/e00").symlink_to(work / "experts/e00")
    wrapped = None
    for number in range(asked.experts):
        name = f"e{number:02}"
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
        if wrapped is None:
            wrapped = get_peft_model(model, config, adapter_name=name)
        else:
            wrapped.add_adapter(name, config)
        wrapped.save_pretrained(str(work / "saved"), selected_adapters=[name])
        (work / "adapters").mkdir(exist_ok=True)
        (work / "saved" / name).rename(work / "adapters" / name)
    scale_adapters(work / "adapters")


def scale_adapters(directory: Path) -> None:
    """Make the changes of all adapters as small as the experts'."""
    for path in directory.glob("*/adapter_model.safetensors"):
        tensors = load_file(path)
        save_file({n: SCALE * x if "lora_B" in n else x for n, x in tensors.items()}, path, {"format": "pt"})


@contextlib.contextmanager
def server_of(library: str, asked: argparse.Namespace, work: Path, experts: str = "experts") -> Iterator[tuple[str, int]]:
    """A library's server, its address and its process. experts: a directory below `work`, of ours."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if library == OURS:
        command = [sys.executable, "-m", "sparselet.cli", "serve", "--model", asked.served, "--experts", str(work / experts)]
        command += ["--state", str(work / f"state-{experts}"), "--json"]
    elif library == TRANSFORMERS:
        command = [str(Path(sys.executable).parent / "transformers"), "serve", str(local_path(asked.served))]
        command += ["--device", "cpu", "--dtype", "float32"]
    elif library == VLLM:
        command = [str(asked.vllm_python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(local_path(asked.served))]
        command += ["--served-model-name", "base", "--dtype", "float32"]
        command += ["--max-model-len", "1024", "--max-num-seqs", str(asked.clients)]
        command += ["--enable-lora", "--max-lora-rank", "32", "--max-loras", str(FEW), "--max-cpu-loras", str(asked.experts)]
        command += ["--lora-modules", *(f"{path.name}={path}" for path in sorted((work / "adapters").iterdir()))]
    else:
        script = str(BENCHMARKS / "contestants/peft_server.py")
        command = [sys.executable, script, "--model", asked.served, "--adapters", str(work / "adapters")]
    log = work / f"{library}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=file, stderr=file, env={**environment(), **VLLM_SETTINGS}
        )
    try:
        while not _answers(f"http://127.0.0.1:{port}"):
            if process.poll() is not None:
                sys.exit(f"{library}'s server ended:\n{log.read_text()[-3000:]}")
            time.sleep(0.3)
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        process.wait(90)


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx2.TransportError):
        return httpx2.get(f"{url}/health").status_code in (200, 404)  # PEFT's has no such address
    return False


def memory_of_an_expert(asked: argparse.Namespace, work: Path) -> float:
    """What a server of ours has more for each further expert when it has read all, in bytes of an expert's file."""
    resident = []
    for experts in ("one", "experts"):
        with server_of(OURS, asked, work, experts) as (_, process):
            resident.append(memory_of(process, "VmRSS"))
    file = sum(path.stat().st_size for path in (work / "experts/e00").iterdir())
    return (resident[1] - resident[0]) / (asked.experts - 1) / file


def merge_seconds(url: str, asked: argparse.Namespace) -> float:
    """What a first answer by three experts takes more than the next one by the same: their merge, and a swap; the median."""
    source, client = random.Random(0), openai.OpenAI(base_url=f"{url}/v1", api_key=asked.key, max_retries=0)
    found = []
    for _ in range(MERGES):
        members = [{"name": f"e{number:02}"} for number in source.sample(range(asked.experts), 3)]
        times = []
        for _ in range(2):
            began = time.monotonic()
            client.completions.create(model="base", prompt="One", max_tokens=1, extra_body={"experts": members})
            times.append(time.monotonic() - began)
        found.append(times[0] - times[1])
    return statistics.median(found)


def swap_seconds(url: str) -> float:
    """The mean time of a swap, so far."""
    metrics = dict(re.findall(r"^sparselet_(swaps|swap_seconds)_total (\S+)$", httpx2.get(f"{url}/metrics").text, re.MULTILINE))
    return float(metrics["swap_seconds"]) / float(metrics["swaps"])


def rows_of(asked: argparse.Namespace) -> list[Row]:
    names = tuple(f"e{number:02}" for number in range(asked.experts))
    few, all_of_them = f"{FEW} experts, uniformly mixed", f"{asked.experts} experts, Zipf"
    rows = [Row(OURS, "base model", ("base",)), Row(OURS, "one expert", names[:1]), Row(OURS, few, names[:FEW])]
    rows += [
        Row(OURS, all_of_them, names, zipf=True),
        Row("PEFT", "base model", ("base",)),
        Row("PEFT", "one expert", names[:1]),
    ]
    rows += [Row("PEFT", few, names[:FEW]), Row("PEFT", all_of_them, names, zipf=True)]
    if asked.vllm_python:
        rows += [replace(row, library=VLLM) for row in rows if row.library == "PEFT"]
    return [*rows, Row(TRANSFORMERS, "base model", (str(local_path(asked.served)),), share=1 / 3)]


def targets(rows: list[dict[str, Any]], ours: Mapping[str, float]) -> list[dict[str, Any]]:
    share = {(row["library"], row["name"]): row["value"]["times_floor"] for row in rows}
    names = [name for library, name in share if library == OURS]
    aims = [
        aim(f"{name}: times the base model", share[OURS, name], "at least", limit)
        for name, limit in zip(names[1:], (0.97, 0.7, 0.5), strict=True)
    ]
    for name, limit in zip(names[2:], (1.5, None), strict=True):
        aims.append(aim(f"{name}: times PEFT's", share[OURS, name] / share["PEFT", name], "at least", limit))
    aims.append(aim("memory of a further expert: times its file", ours["expert_files"], "at most", 1.1))
    aims.append(aim("three experts merged for a request: seconds", ours["merge_seconds"], "at most", 0.3))
    aims.append(aim("a swap: seconds", ours["swap_seconds"]))
    return aims


def main() -> None:
    parser = parser_of(__doc__)
    parser.set_defaults(rounds=3)
    parser.add_argument("--url", help="measure this server alone")
    parser.add_argument("--key", default="none")
    parser.add_argument("--vllm-python", type=Path, metavar="PYTHON", help="of an environment with vLLM; else without it")
    parser.add_argument("--models", action="append", default=[], help="with --url: names joined by commas, a row each")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=48, help="of a row in a round")
    parser.add_argument("--answer-tokens", type=int, default=32)
    parser.add_argument("--task", default="builtin:table_order")
    asked = read(parser)
    asked.served = "packaged:smollm2-135m"
    if asked.url:
        rows = [Row(FLOOR, names, tuple(names.split(","))) for names in asked.models or ["base"]]
        print(json.dumps({row["name"]: row["value"] for row in race_rows(rows, {FLOOR: asked.url}, asked)}, indent=2))
        return

    def measure_all(race: Race) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="bench-serve-") as directory, contextlib.ExitStack() as stack:
            work = Path(directory)
            if asked.quick:
                asked.served, asked.experts, asked.requests, asked.clients = save_tiny(work / "model"), 9, 6, 3
            make_adapters(asked, work)
            ours = {"expert_files": memory_of_an_expert(asked, work)}
            contestants = rows_of(asked)
            libraries = dict.fromkeys(row.library for row in contestants)
            servers = {library: stack.enter_context(server_of(library, asked, work)) for library in libraries}
            rows = race_rows(contestants, {library: url for library, (url, _) in servers.items()}, asked)
            for row in rows:
                row["value"]["server_peak_bytes"] = memory_of(servers[row["library"]][1])
            ours["swap_seconds"] = swap_seconds(servers[OURS][0])
            ours["merge_seconds"] = merge_seconds(servers[OURS][0], asked)
        versions = {package: version(package) for package in ("sparselet", "torch", "transformers", "peft")}
        wrong = [f"{row['library']}, {row['name']}: requests failed" for row in rows if row["value"]["failed"]]
        return {
            "rows": rows,
            "targets": targets(rows, ours),
            "ours": ours,
            "wrong": wrong,
            "versions": {"python": platform.python_version(), **versions},
        }

    run_benchmark("bench_serve.py", asked, result_name(asked, "serve"), measure_all, {str(asked.vllm_python): "PYTHON"})


def save_tiny(directory: Path) -> str:
    """A tiny model with random weights, with a chat template, which transformers' server needs."""
    save_model("random:tiny", directory)
    (directory / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    return str(directory)


if __name__ == "__main__":
    main()
