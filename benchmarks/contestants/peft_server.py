"""LoRA adapters of one base model by PEFT's mixed batches (`adapter_names`), behind OpenAI's chat endpoint.

    python benchmarks/contestants/peft_server.py --model MODEL --adapters DIR --port 8001

DIR holds a directory for each adapter. All requests that wait, up to `--rows`, are one batch of `generate`, each row with its
own adapter; the next batch begins when all of it is answered. An answer comes in one part, also where a stream is asked for.
"""

import argparse
import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from peft import PeftModel
from plain_lora import load_tokenizer, prompt_of

from sparselet.models import load_model, local_path

BASE = "__base__"  # PEFT's name for no adapter


class Batches:
    """Answers what waits, batch after batch."""

    def __init__(self, model: Any, tokenizer: Any, rows: int) -> None:
        self.model, self.tokenizer, self.rows = model, tokenizer, rows
        self.waiting: asyncio.Queue[tuple[str, str, int, asyncio.Future]] = asyncio.Queue()

    async def run(self) -> None:
        while True:
            batch = [await self.waiting.get()]
            while not self.waiting.empty() and len(batch) < self.rows:
                batch.append(self.waiting.get_nowait())
            texts = await asyncio.to_thread(self.answer, [one[:3] for one in batch])
            for (*_, future), text in zip(batch, texts, strict=True):
                future.set_result(text)

    @torch.no_grad()
    def answer(self, batch: Sequence[tuple[str, str, int]]) -> list[tuple[str, int]]:
        """The text of each answer, and its tokens with the end token."""
        names, prompts, lengths = zip(*batch, strict=True)
        encoded = self.tokenizer(list(prompts), return_tensors="pt", padding=True, add_special_tokens=False)
        adapters = {} if set(names) == {BASE} else {"adapter_names": list(names)}
        ids = self.model.generate(**encoded, **adapters, max_new_tokens=max(lengths), do_sample=False)
        answers = ids[:, encoded["input_ids"].shape[1] :]
        counts = [min(int((row != self.tokenizer.pad_token_id).sum()) + 1, len(row)) for row in answers]
        return list(zip(self.tokenizer.batch_decode(answers, skip_special_tokens=True), counts, strict=True))


def make_app(batches: Batches) -> FastAPI:
    app = FastAPI()
    running: list[asyncio.Task] = []

    @app.on_event("startup")
    async def start() -> None:
        running.append(asyncio.create_task(batches.run()))

    @app.post("/v1/chat/completions")
    async def chat(http: Request) -> StreamingResponse:
        body = await http.json()
        prompt = prompt_of(batches.tokenizer, body["messages"][-1]["content"])
        future = asyncio.get_running_loop().create_future()
        name = BASE if body["model"] == "base" else body["model"]
        await batches.waiting.put((name, prompt, body["max_tokens"], future))
        text, count = await future
        choice = {"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": "length"}
        frame = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": body["model"]}
        usage = {"prompt_tokens": 0, "completion_tokens": count, "total_tokens": count}
        parts = [{**frame, "choices": [choice]}, {**frame, "choices": [], "usage": usage}]
        events = [*(f"data: {json.dumps(part)}\n\n" for part in parts), "data: [DONE]\n\n"]
        return StreamingResponse(iter(events), media_type="text/event-stream")

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapters", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--rows", type=int, default=16)
    asked = parser.parse_args()
    model, tokenizer = load_model(asked.model, "float32"), load_tokenizer(local_path(asked.model))
    first, *others = sorted(asked.adapters.iterdir())
    wrapped = PeftModel.from_pretrained(model, first, adapter_name=first.name).eval()
    for directory in others:
        wrapped.load_adapter(directory, adapter_name=directory.name)
    uvicorn.run(make_app(Batches(wrapped, tokenizer, asked.rows)), port=asked.port, log_level="warning")


if __name__ == "__main__":
    main()
