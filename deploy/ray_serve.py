"""The server as a Ray Serve application: replicas with one directory of experts and one registry on a shared path.

    pip install 'sparselet[serve,train,cli]' 'ray[serve]'
    cd deploy
    serve run ray_serve:application model=packaged:smollm2-135m experts=/shared/experts state=/shared/state replicas=2

Any request can go to any replica. A change by /admin reaches the others within a second, as does what is put into `experts`.
Ray starts a replica in place of one that dies. Keys are SPARSELET_API_KEY and SPARSELET_ADMIN_KEY of the environment.
"""

import contextlib
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from fastapi import FastAPI
from ray import serve

from sparselet.serving.app import create_app
from sparselet.serving.service import open_service
from sparselet.serving.watch import DirectoryWatcher


def application(arguments: Mapping[str, str]) -> serve.Application:
    """The application that `serve run` deploys.

    arguments: model, experts and state as in `sparselet serve`; dtype; replicas, at the start and at least; max_replicas, up to
    which Ray adds some while each has more than `ongoing` requests (16); cpus and gpus of a replica (1 and 0).
    """
    fields = {"model", "experts", "state", "dtype", "replicas", "max_replicas", "ongoing", "cpus", "gpus"}
    wrong = sorted(arguments.keys() - fields) or sorted({"model", "experts", "state"} - arguments.keys())
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: expected model, experts, state and some of {', '.join(sorted(fields))}.")
    api_key, admin_key = os.environ.get("SPARSELET_API_KEY"), os.environ.get("SPARSELET_ADMIN_KEY")
    least = int(arguments.get("replicas", 1))
    scaling = {
        "min_replicas": least,
        "initial_replicas": least,
        "max_replicas": max(least, int(arguments.get("max_replicas", least))),
        "target_ongoing_requests": float(arguments.get("ongoing", 16)),
    }

    def build() -> FastAPI:
        """One replica's server."""
        watcher = DirectoryWatcher(arguments["experts"])
        state, dtype = Path(arguments["state"]), arguments.get("dtype", "float32")
        service = open_service(arguments["model"], [arguments["experts"]], state, dtype=dtype)
        app = create_app(service, api_key, admin_key)
        start_and_stop = app.router.lifespan_context

        @contextlib.asynccontextmanager
        async def lifespan(started: FastAPI) -> AsyncIterator[None]:
            async with start_and_stop(started):
                with watcher.watching(service.registry):
                    yield

        app.router.lifespan_context = lifespan
        return app

    deployment = serve.deployment(
        serve.ingress(build)(),
        name="sparselet",
        autoscaling_config=scaling,
        max_ongoing_requests=256,
        ray_actor_options={"num_cpus": float(arguments.get("cpus", 1)), "num_gpus": float(arguments.get("gpus", 0))},
        graceful_shutdown_timeout_s=60,
        health_check_period_s=5,
    )
    return deployment.bind()
