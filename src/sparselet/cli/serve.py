"""`sparselet serve`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from sparselet.api.serving import serve
from sparselet.cli.merging import Many
from sparselet.cli.terminal import print_json, quiet_libraries, say, status, table, word
from sparselet.serving.limits import ServingLimits
from sparselet.serving.registry import BASE_NAME
from sparselet.serving.service import Service


def serve_(
    *,
    model: str,
    experts: Annotated[list[Path] | None, Many] = None,
    watch: Path | None = None,
    task: Annotated[list[str] | None, Many] = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: Annotated[str | None, Parameter(env_var="SPARSELET_API_KEY")] = None,
    admin_key: Annotated[str | None, Parameter(env_var="SPARSELET_ADMIN_KEY")] = None,
    state: Path | None = None,
    dtype: str = "float32",
    attention: str | None = None,
    steer: Annotated[list[Path] | None, Many] = None,
    limits: Annotated[ServingLimits | None, Parameter(name="*")] = None,
    json: bool = False,
) -> None:
    """Serve many experts of one base model over OpenAI's API.

    A request's `model` names an expert or `base`; `experts`, a list of names with weights, is merged for the request. Experts
    change while the server runs (docs/serving.md). SIGTERM and Ctrl-C end it after what has begun is answered.

        sparselet serve --model packaged:smollm2-135m --experts my-experts

        curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' \\
          -d '{"model": "base", "prompt": "Hello"}'

    Parameters
    ----------
    model
        Base model: a hub name, a directory, or packaged:smollm2-135m.
    experts
        Directories of experts, or experts; each is called by the name of its directory.
    watch
        A directory of experts, in which new, changed and removed ones are noticed while the server runs.
    task
        Tasks on whose validation rows the page measures experts and merges.
    host
        Address to listen at.
    port
        Port; 0 takes a free one.
    api_key
        What clients send as `Authorization: Bearer KEY`; better in the environment, where no list of processes shows it.
    admin_key
        The same for /admin, which is closed without it.
    state
        Directory for the registry and saved merges; by default one in the cache, by model and experts.
    dtype
        Dtype of the model: float32, bfloat16 or float16.
    attention
        Sparse attention of the whole server, as in `sparselet eval`; an expert then answers one request at a time.
    steer
        Steering vectors (`sparselet steer fit`), called by the names of their directories, that requests name in `steer`.
    json
        Print the address and the experts as JSON once clients may connect.
    """
    quiet_libraries()
    spinner = status(f"loading {model}")

    def started(address: str, service: Service) -> None:
        spinner.stop()
        registrations = service.registry.registrations()
        if json:
            experts_json = {name: r.expert.digest for name, r in registrations.items()}
            print_json({"address": address, "experts": experts_json, "steering_vectors": sorted(service.vectors)})
            return
        rows = [(BASE_NAME, "", "", service.registry.base.digest)]
        rows += [
            (name, r.expert.metadata.task or "", f"{r.expert.bytes:,}", r.expert.digest) for name, r in registrations.items()
        ]
        table(f"{len(registrations)} experts", ["model", "task", "bytes", "digest"], rows)
        say(
            f"Serving at {address}, where a browser shows the experts; Ctrl-C ends.",
            f"Next: curl {word(address + '/v1/models')}",
        )

    with spinner:
        serve(
            model,
            experts or (),
            watch=watch,
            tasks=task or (),
            host=host,
            port=port,
            api_key=api_key,
            admin_key=admin_key,
            state=state,
            dtype=dtype,
            attention=attention,
            steer=steer or (),
            limits=limits,
            on_start=started,
        )
