"""A server under everything at once: clients that ask, go away and send nonsense, while experts are loaded and unloaded.

    python benchmarks/soak_serve.py --requests 10000 --clients 32 --experts 64

Every text is compared with that of the expert alone. Reported are wrong texts, unexpected answers, requests that are left over,
and the server's memory after each fifth of the requests; the exit code is 1 if one of these is not as it should be.
"""

import argparse
import asyncio
import collections
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx2
import torch
from racing.process import memory_of
from tqdm import tqdm

from sparselet.adapter import SparseAdapter
from sparselet.apply import apply_temporarily
from sparselet.delta import SparseDelta
from sparselet.fingerprint import fingerprint_weight
from sparselet.generation.generate import generate
from sparselet.models import load_model, load_tokenizer
from sparselet.names import Names

ADMIN_KEY = "soak"
PROMPTS = ("The capital of France is", "One, two, three,", "Water boils when")
HOT = "hot"  # a name whose expert changes between the first two
GONE = 8  # of the last experts some are unloaded at any time
BAD = (
    {"model": "absent"},
    {"model": "../e00"},
    {"model": None},
    {"max_tokens": -1},
    {"temperature": "hot"},
    {"experts": [{"name": "e00"}]},
    {"prompt": 5},
    {"unknown": True},
)


def make_experts(
    model: torch.nn.Module, directory: Path, count: int, density: float, scale: float = 1.0
) -> list[SparseAdapter]:
    """Random changes of the attention's projections, `scale` times the weights' own spread: at 1, answers differ."""
    layers = {n: x.parameter.detach() for n, x in Names(model).layers.items() if n.endswith(("q_proj", "k_proj", "v_proj"))}
    prints = {name: fingerprint_weight(weight) for name, weight in layers.items()}
    adapters = []
    for seed in range(count):
        generator, deltas = torch.Generator().manual_seed(seed), {}
        for name, weight in layers.items():
            indices = (torch.rand(weight.numel(), generator=generator) < density).nonzero().squeeze(1)
            deltas[name] = SparseDelta(
                tuple(weight.shape), indices, torch.randn(len(indices), generator=generator) * scale * weight.std()
            )
        adapters.append(SparseAdapter(deltas, {"task": f"task {seed}"}, prints))
        adapters[-1].save(directory / f"e{seed:02}")
    return adapters


class Soak:
    """One run against a server at `url`. expected: the text of each expert to each prompt."""

    def __init__(
        self, options: argparse.Namespace, url: str, process: int, library: Path, expected: dict[str, list[str]]
    ) -> None:
        self.options, self.url, self.process, self.library, self.expected = options, url, process, library, expected
        self.counts: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.merged: dict[tuple[str, int], str] = {}  # by digest and prompt
        self.memory: list[int] = []
        self.left = options.requests
        self.bar = tqdm(total=options.requests, unit="request", disable=None)

    async def run(self) -> None:
        """All requests, and changes of the experts until they are answered."""
        limits = httpx2.Limits(max_connections=2 * self.options.clients)
        async with httpx2.AsyncClient(base_url=self.url, timeout=600, limits=limits) as client:
            changing = asyncio.create_task(self.change_experts(client))
            await asyncio.gather(*(self.ask_often(client, random.Random(seed)) for seed in range(self.options.clients)))
            changing.cancel()
            await asyncio.gather(changing, return_exceptions=True)
        self.bar.close()

    async def ask_often(self, client: httpx2.AsyncClient, source: random.Random) -> None:
        while self.left > 0:
            self.left -= 1
            if self.left % max(1, self.options.requests // 5) == 0:
                self.memory.append(memory_of(self.process, "VmRSS"))
            kind = source.choices((self.answer, self.merge, self.disconnect, self.nonsense), (70, 8, 12, 10))[0]
            try:
                await kind(client, source)
            except httpx2.TransportError as error:
                self.wrong.append(f"{kind.__name__}: {error!r}")
            self.bar.update()

    def body(self, source: random.Random, **changes: object) -> tuple[int, dict[str, object]]:
        prompt = source.randrange(len(PROMPTS))
        name = source.choice([*self.expected, HOT])
        return prompt, {"model": name, "prompt": PROMPTS[prompt], "max_tokens": self.options.tokens, **changes}

    async def post(self, client: httpx2.AsyncClient, body: dict[str, object]) -> httpx2.Response:
        while (response := await client.post("/v1/completions", json=body)).status_code == 429:
            self.counts["429"] += 1
            await asyncio.sleep(float(response.headers["retry-after"]))
        return response

    async def answer(self, client: httpx2.AsyncClient, source: random.Random) -> None:
        prompt, body = self.body(source, stream=source.random() < 0.5)
        response = await self.post(client, body)
        self.counts[f"answer {response.status_code}"] += 1
        name = str(body["model"])
        if response.status_code == 404 and name in list(self.expected)[-GONE:]:
            return
        if response.status_code != 200:
            self.wrong.append(f"{name}: {response.status_code} {response.text[:200]}")
            return
        if body["stream"]:
            events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
            text = "".join(event["choices"][0]["text"] for event in events if event.get("choices"))
        else:
            text = response.json()["choices"][0]["text"]
        right = [self.expected[each][prompt] for each in (list(self.expected)[:2] if name == HOT else [name])]
        if text.strip() not in right:
            self.wrong.append(f"{name}, {PROMPTS[prompt]!r}: {text!r} in place of {right}")

    async def merge(self, client: httpx2.AsyncClient, source: random.Random) -> None:
        first = source.randrange(3)  # few sets, so that all are merged early
        experts = [{"name": f"e{first:02}", "weight": 1.0}, {"name": f"e{first + 1:02}", "weight": 0.5}]
        prompt, body = self.body(source, model="merge", experts=experts)
        response = await self.post(client, body)
        self.counts[f"merge {response.status_code}"] += 1
        if response.status_code != 200:
            self.wrong.append(f"merge: {response.status_code} {response.text[:200]}")
            return
        key, text = (response.json()["system_fingerprint"], prompt), response.json()["choices"][0]["text"]
        if self.merged.setdefault(key, text) != text:
            self.wrong.append(f"merge {key}: {text!r} and {self.merged[key]!r}")

    async def disconnect(self, client: httpx2.AsyncClient, source: random.Random) -> None:
        _, body = self.body(source, stream=True, max_tokens=20 * self.options.tokens)
        async with client.stream("POST", "/v1/completions", json=body) as response:
            parts = source.randrange(4)
            async for _ in response.aiter_raw():
                parts -= 1
                if parts < 0:
                    break
        self.counts["disconnected"] += 1

    async def nonsense(self, client: httpx2.AsyncClient, source: random.Random) -> None:
        if source.random() < 0.2:
            content = source.randbytes(source.randrange(200))
            response = await client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        else:
            response = await client.post("/v1/completions", json=self.body(source, **{"model": "e00", **source.choice(BAD)})[1])
        self.counts[f"nonsense {response.status_code}"] += 1
        if response.status_code not in (400, 404):
            self.wrong.append(f"nonsense: {response.status_code} {response.text[:200]}")

    async def change_experts(self, client: httpx2.AsyncClient) -> None:
        """Unload and load the last experts, change the hot one, and offer broken ones, again and again."""
        source, headers = random.Random(0), {"authorization": f"Bearer {ADMIN_KEY}"}
        names = list(self.expected)
        while True:
            name = source.choice(names[-GONE:])
            for path, body, statuses in (
                ("load", {"name": HOT, "path": source.choice(names[:2])}, (200,)),
                ("load", {"name": HOT, "path": "broken"}, (400,)),
                ("unload", {"name": name}, (200, 404)),
                ("load", {"name": name, "path": name}, (200,)),
            ):
                response = await client.post(f"/admin/{path}", json=body, headers=headers)
                self.counts[f"{path} {response.status_code}"] += 1
                if response.status_code not in statuses:
                    self.wrong.append(f"{path} {body}: {response.status_code} {response.text[:200]}")
                await asyncio.sleep(0.2)


def leftovers(url: str) -> dict[str, float]:
    """What should be 0 once nothing is asked."""
    text = httpx2.get(f"{url}/metrics").text
    names = ("waiting_requests", "running_requests", "cache_tokens")
    return {name: float(re.search(rf"^sparselet_{name} (\S+)$", text, re.M)[1]) for name in names}


def soak(options: argparse.Namespace, directory: Path) -> dict[str, object]:
    """Make experts and their texts, start the server, run, and report."""
    library = directory / "library"
    model, tokenizer = load_model(options.model), load_tokenizer(options.model)
    expected = {}
    for i, adapter in enumerate(tqdm(make_experts(model, library, options.experts, options.density), "texts", disable=None)):
        with apply_temporarily(model, adapter):
            expected[f"e{i:02}"] = generate(model, tokenizer, list(PROMPTS), chat_template=False, max_new_tokens=options.tokens)
    del model
    (library / "broken").mkdir()
    (library / "broken" / "adapter_config.json").write_text((library / "e00" / "adapter_config.json").read_text())
    command = [sys.executable, "-m", "sparselet.cli", "serve", "--model", options.model, "--experts", str(library), "--json"]
    command += ["--port", "0", "--state", str(directory / "state"), "--max-queue", str(options.queue)]
    log = (directory / "log").open("w")
    environment = {**os.environ, "SPARSELET_ADMIN_KEY": ADMIN_KEY}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    try:
        assert server.stdout is not None
        url = json.loads("".join(iter(server.stdout.readline, "}\n")) + "}")["address"]
        while True:
            try:
                body = {"name": HOT, "path": "e00"}
                httpx2.post(f"{url}/admin/load", json=body, headers={"authorization": f"Bearer {ADMIN_KEY}"}).raise_for_status()
                break
            except httpx2.TransportError:
                time.sleep(0.2)
        began, run = time.monotonic(), Soak(options, url, server.pid, library, expected)
        asyncio.run(run.run())
        seconds, deadline = time.monotonic() - began, time.monotonic() + 60
        while any((left := leftovers(url)).values()) and time.monotonic() < deadline:
            time.sleep(0.5)
    finally:
        server.terminate()
        server.wait(90)
    return {
        "seconds": round(seconds, 1),
        "counts": dict(sorted(run.counts.items())),
        "wrong": run.wrong,
        "left over": left,
        "memory, MiB": [round(size / 2**20) for size in run.memory],
        "growth": round(run.memory[-1] / run.memory[0] - 1, 4),
        "exit code of the server": server.returncode,
        "tracebacks in its log": (directory / "log").read_text().count("Traceback"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="packaged:smollm2-135m")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=10000)
    parser.add_argument("--tokens", type=int, default=8, help="of an answer")
    parser.add_argument("--queue", type=int, default=24, help="the server's queue; shorter than the clients, so that some wait")
    parser.add_argument("--growth", type=float, default=0.1, help="of memory after the first fifth, at most")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        report = soak(options, Path(directory))
    print(json.dumps(report, indent=2))
    bad = report["wrong"] or any(report["left over"].values()) or report["growth"] > options.growth
    sys.exit(int(bool(bad or report["exit code of the server"] or report["tracebacks in its log"])))


if __name__ == "__main__":
    main()
