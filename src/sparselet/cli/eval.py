"""`sparselet eval`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from sparselet.api.evaluation import evaluate
from sparselet.api.routing import evaluate_routed
from sparselet.cli.merging import Many
from sparselet.cli.terminal import print_json, progress, quiet_libraries, say, show
from sparselet.errors import ConfigError
from sparselet.evaluation import EvalSettings
from sparselet.evaluation.metrics import DEFAULT_METRICS
from sparselet.io.paths import check_output
from sparselet.workflows.routing import RouteSettings


def eval_(
    *,
    task: Annotated[list[str], Many],
    model: str | None = None,
    adapter: Annotated[list[str] | None, Many] = None,
    route: Annotated[list[str] | None, Many] = None,
    routing: Annotated[RouteSettings | None, Parameter(name="*")] = None,
    base: bool | None = None,
    metric: Annotated[list[str] | None, Many] = None,
    input_column: str = "input",
    target_column: str = "target",
    settings: Annotated[EvalSettings | None, Parameter(name="*")] = None,
    dtype: str = "float32",
    attention: str | None = None,
    steer: Path | None = None,
    predictions: Path | None = None,
    json: bool = False,
) -> None:
    """Measure models on tasks: mean Rouge-L (F1 × 100) and exact match of greedy answers to the test rows, or other metrics.

    The base model is loaded once; each adapter, expert or merged, is written into it for its turn.

        sparselet eval --task builtin:table_order --adapter expert-a merged
        sparselet eval --task task-a task-b --model merged-checkpoint
        sparselet eval --task task-a task-b --route expert-a expert-b expert-c

    Parameters
    ----------
    task
        Tasks: directories, builtin:NAME, or hub data sets.
    model
        Base model or merged checkpoint: a hub name, a directory, or packaged:smollm2-135m; by default the base model that the
        adapters record.
    adapter
        Experts to measure on that model: directories or hub names of sparse adapters, PEFT adapters or full checkpoints.
    route
        Experts with profiles, as one library: each prompt is answered by the expert that it belongs to.
    base
        Measure the model without an adapter too; by default only if no adapter is given.
    metric
        Metrics, the first one shown first: rougeL, exact_match, chrf (sacrebleu's chrF2), or MODULE:FUNCTION, a Python function
        of answers and targets that returns a number. By default rougeL and exact_match.
    input_column
        What the tasks' rows call the prompt; by default input, prompt or messages, whichever they have.
    target_column
        What the tasks' rows call the text to produce; by default target or completion, whichever they have.
    dtype
        Dtype of the model: float32, bfloat16 or float16.
    attention
        Sparse attention: window, block, vertical-slash, quest or snapkv, with settings as in block:top=32,block=16.
    steer
        A steering vector (`sparselet steer fit`) that is added while the models answer.
    predictions
        Write every answer to this file, as JSON lines.
    json
        Print the result as JSON.
    """
    quiet_libraries()
    columns = {"input": input_column, "target": target_column}
    if route is not None:
        if adapter or base or predictions or attention or steer:
            raise ConfigError(
                "--route goes with none of --adapter, --base, --attention, --steer and --predictions; it measures one library."
            )
        with progress("answering") as callback:
            routed = evaluate_routed(
                route,
                task,
                model=model,
                settings=settings,
                routing=routing,
                metrics=metric or DEFAULT_METRICS,
                columns=columns,
                dtype=dtype,
                progress=callback,
            )
        if json:
            print_json(routed.as_json())
        else:
            show(routed.table())
        return
    if predictions is not None:
        check_output(predictions, directory=False)
    with progress("answering") as callback:
        evaluation = evaluate(
            adapter or [],
            task,
            model=model,
            include_base=base,
            settings=settings,
            metrics=metric or DEFAULT_METRICS,
            columns=columns,
            dtype=dtype,
            attention=attention,
            steer=steer,
            progress=callback,
        )
    if predictions is not None:
        evaluation.write_predictions(predictions)
    if json:
        print_json(evaluation.scores)
        return
    show(evaluation.table())
    if predictions is not None:
        say(f"Answers written to {predictions}")
    if not adapter:
        say("Next: sparselet train --task TASK --out EXPERT, then measure it with --adapter EXPERT.")
