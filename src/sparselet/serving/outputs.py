"""From the engine's thread to a coroutine: a queue of a request's outputs, watched for a client that has gone."""

import asyncio
import contextlib
from collections.abc import Callable

from fastapi import Request

from sparselet.serving.request import Output

DISCONNECT_SECONDS = 0.2  # between two looks whether a client has gone


def output_queue() -> tuple[asyncio.Queue[Output], Callable[[Output], None]]:
    """A queue of this loop, and the function that puts an output into it from another thread."""
    outputs: asyncio.Queue[Output] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def emit(output: Output) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended with its clients
            loop.call_soon_threadsafe(outputs.put_nowait, output)

    return outputs, emit


async def next_output(outputs: asyncio.Queue[Output], http: Request) -> Output | None:
    """The next output, None if the client has gone before it comes."""
    getting = asyncio.ensure_future(outputs.get())
    try:
        while not (await asyncio.wait({getting}, timeout=DISCONNECT_SECONDS))[0]:
            if await http.is_disconnected():
                return None
        return getting.result()
    finally:
        getting.cancel()
