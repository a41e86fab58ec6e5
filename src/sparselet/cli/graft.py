"""`sparselet graft`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from sparselet.analysis.grafts import PARTS
from sparselet.api.grafting import graft
from sparselet.cli.merging import Many
from sparselet.cli.terminal import progress, quiet_libraries, show_analysis, word
from sparselet.evaluation import EvalSettings
from sparselet.io.paths import check_output
from sparselet.workflows.graft import GRAFTS, GraftSettings

_PARTS = f"Parts: {', '.join(GRAFTS)}; by default all but learned."


def graft_(
    expert: str,
    /,
    *,
    task: str,
    model: str | None = None,
    fraction: Annotated[list[float] | None, Many] = None,
    part: Annotated[list[str] | None, Parameter(help=_PARTS, consume_multiple=True, negative="")] = None,
    draws: int = 1,
    seed: int = 0,
    settings: Annotated[EvalSettings | None, Parameter(name="*")] = None,
    input_column: str = "input",
    target_column: str = "target",
    dtype: str = "float32",
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Measure which part of an expert's change is enough for a task: Rouge-L with only that part in the base model.

    Parts are the largest entries, random ones, random ones scaled up to the whole, the smallest, the largest without the very
    largest, and all but the largest. A change is concentrated only if the largest beat the scaled random ones.

        sparselet graft my-expert --task my-task --rows 50 --out curve.html
        sparselet graft checkpoint --task my-task --model org/base --fraction 0.001 0.01 --part top random_rescaled

    Parameters
    ----------
    expert
        An expert of any kind: directory or hub name.
    task
        Task to answer: a directory, builtin:NAME, or a hub data set.
    model
        Base model; by default the one that the expert records.
    fraction
        Shares of the changed entries of each target; by default 0.001, 0.01, 0.05, 0.1 and 0.5.
    draws
        Draws of the random parts.
    seed
        Seed of the draws.
    input_column
        What the task's rows call the prompt; by default input, prompt or messages, whichever they have.
    target_column
        What the task's rows call the text to produce; by default target or completion, whichever they have.
    dtype
        Dtype of the model: float32, bfloat16 or float16.
    out
        Write the curves to this file, as one HTML page.
    json
        Print all numbers as JSON.
    """
    quiet_libraries()
    chosen = GraftSettings(tuple(fraction or GraftSettings.fractions), tuple(part or PARTS), draws, seed)
    if out is not None:
        check_output(out, directory=False)
    columns = {"input": input_column, "target": target_column}
    with progress("answering") as callback:
        grafted = graft(
            expert,
            task,
            model=model,
            settings=chosen,
            eval_settings=settings,
            columns=columns,
            dtype=dtype,
            progress=callback,
        )
    model_flag = f" --model {word(model)}" if model else ""
    show_analysis(grafted, out, json, f"sparselet locate {word(expert)}{model_flag}")
