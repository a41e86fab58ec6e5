"""Load on an OpenAI-compatible server: output tokens a second, time to the first token, time per token.

    sparselet serve --model packaged:smollm2-135m --experts EXPERTS &
    python benchmarks/bench_serve.py --url http://127.0.0.1:8000 --models base --models one,two,three --mix zipf

Each `--models` is a row, measured in turn, in `--rounds` rounds, so that a change of the machine's speed meets all rows.
Prompts are those of a task. Any server of that API can be measured, such as vLLM's or `transformers serve`.
"""

import argparse
import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass, field

import openai

from sparselet.tasks.task import load_task


@dataclass
class Load:
    """What one row has measured. All times in seconds."""

    tokens: int = 0
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    each: list[float] = field(default_factory=list)
    failed: int = 0

    def summary(self) -> dict[str, float]:
        """Rates and quantiles."""
        quantiles = {}
        for name, times in (("first_token", self.first), ("per_token", self.each)):
            cuts = statistics.quantiles(times, n=20) if len(times) > 1 else [float("nan")] * 19
            quantiles |= {f"{name}_p50": cuts[9], f"{name}_p95": cuts[18]}
        return {"tokens_per_second": self.tokens / self.seconds, **quantiles, "answers": len(self.first), "failed": self.failed}


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


async def measure(url: str, models: list[str], options: argparse.Namespace, prompts: list[str], seed: int, load: Load) -> None:
    """`options.requests` requests from `options.clients` clients, each waiting for its answer before the next."""
    source = random.Random(seed)
    weights = [1 / (rank + 1) if options.mix == "zipf" else 1.0 for rank in range(len(models))]
    queue = [(source.choices(models, weights)[0], source.choice(prompts)) for _ in range(options.requests)]
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=options.key, max_retries=0, timeout=600)

    async def work() -> None:
        while queue:
            await ask(client, *queue.pop(), options.tokens, load)

    began = time.monotonic()
    await asyncio.gather(*(work() for _ in range(options.clients)))
    load.seconds += time.monotonic() - began
    await client.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", default="none")
    parser.add_argument("--models", action="append", required=True, help="names joined by commas; a row each")
    parser.add_argument("--mix", choices=["uniform", "zipf"], default="uniform")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64, help="of a row in a round")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--task", default="builtin:table_order")
    options = parser.parse_args()
    prompts = [str(row.input) for row in load_task(options.task, ("test",)).rows("test", 64)]
    loads = {names: Load() for names in options.models}
    for number in range(options.rounds):
        for names, load in loads.items():
            asyncio.run(measure(options.url, names.split(","), options, prompts, number, load))
    print(json.dumps({names: load.summary() for names, load in loads.items()}, indent=2))


if __name__ == "__main__":
    main()
