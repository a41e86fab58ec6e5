"""`serve`: an OpenAI-compatible server of many experts of one base model."""

import contextlib
import ipaddress
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import uvicorn

from sparselet.attention import AttentionPattern, parse_pattern, sparse_attention
from sparselet.errors import ConfigError
from sparselet.evaluation.metrics import rouge_l_of_each
from sparselet.io.paths import cache_directory
from sparselet.io.printable import reason
from sparselet.serving.app import create_app
from sparselet.serving.engine import Engine
from sparselet.serving.limits import ServingLimits
from sparselet.serving.measuring import MEASURED_SPLIT, Measuring
from sparselet.serving.service import Service, open_service
from sparselet.serving.watch import DirectoryWatcher
from sparselet.tasks.task import load_task

logger = logging.getLogger("sparselet")

DRAIN_SECONDS = 60


def serve(
    model: str,
    experts: Sequence[str | Path] = (),
    *,
    watch: str | Path | None = None,
    tasks: Sequence[str | Path] = (),
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    admin_key: str | None = None,
    state: str | Path | None = None,
    dtype: str = "float32",
    limits: ServingLimits | None = None,
    attention: str | AttentionPattern | None = None,
    steer: Sequence[str | Path] = (),
    on_start: Callable[[str, Service], None] | None = None,
) -> None:
    """Serve experts over HTTP until SIGTERM or Ctrl-C; then what has begun is answered, for at most a minute.

        sl.serve("packaged:smollm2-135m", ["experts"])

    model: the base model. experts: directories of experts, or experts themselves, called by the names of their directories.
    watch: a further directory of experts, in which new, changed and removed ones are noticed while the server runs.
    tasks: on whose validation rows the page measures experts and merges.
    port: 0 takes a free one. api_key: what clients must send; None lets everyone ask. admin_key: the same for changes of the
    registry, which are closed without one. state: a directory for the registry and saved merges; by default one in the cache,
    by model and experts. dtype: of the model. attention: a pattern of sparse attention for all answers, dense by default; an
    expert then answers one request at a time, since blocks and pages of keys begin with a prompt. steer: directories of
    steering vectors, which requests name. on_start: called with the address and the service when clients may connect.
    Raises ConfigError for an address that cannot be served, TaskError, and what `open_service` and `sparse_attention` raise.
    """
    config = uvicorn.Config(
        "", host, port, log_config=None, log_level="warning", access_log=False, timeout_graceful_shutdown=DRAIN_SECONDS
    )
    if not experts and watch is None:
        raise ConfigError("there is nothing to serve: set `experts` or `watch`.")
    pattern = parse_pattern(attention) if isinstance(attention, str) else attention
    if pattern is not None:
        limits = replace(limits or ServingLimits(), max_rows=1, mixed=False)
    loaded = [load_task(task, (MEASURED_SPLIT,)) for task in tasks]
    watcher = None if watch is None else DirectoryWatcher(watch)
    experts = [*experts, *([] if watch is None else [watch])]
    service = open_service(model, experts, _state(model, experts, state), dtype=dtype, limits=limits, vectors=steer)
    with contextlib.nullcontext() if pattern is None else _attending(service.engine, pattern):
        config.app = create_app(service, api_key, admin_key, Measuring(service, loaded, rouge_l_of_each) if loaded else None)
        try:
            listener = config.bind_socket()
        except (SystemExit, OSError) as error:  # uvicorn exits
            why = reason(error.__context__ or error)
            raise ConfigError(f"cannot serve on `host` {host} and `port` {port}: {why}.") from error
        if api_key is None and not _is_loopback(host):
            logger.warning("Everyone who reaches %s may ask; set `api_key`.", host)
        if on_start is not None:
            on_start(f"http://{host}:{listener.getsockname()[1]}", service)
        watching = contextlib.nullcontext() if watcher is None else watcher.watching(service.registry)
        with watching, contextlib.suppress(KeyboardInterrupt):  # uvicorn repeats the signal after the drain
            uvicorn.Server(config).run([listener])


@contextlib.contextmanager
def _attending(engine: Engine, pattern: AttentionPattern) -> Iterator[None]:
    """The engine's model attends by a pattern within the block."""
    with sparse_attention(engine.model, pattern) as attention:
        engine.remembering = attention.remembering
        yield


def _state(model: str, experts: Sequence[str | Path], state: str | Path | None) -> Path:
    """The registry's directory."""
    if state is not None:
        return Path(state)
    key = "\n".join([model, *sorted(os.path.realpath(directory) for directory in experts)])
    return cache_directory() / "serving" / sha256(key.encode(errors="surrogateescape")).hexdigest()[:16]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
