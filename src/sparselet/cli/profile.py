"""`sparselet profile`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from sparselet.api.profiling import ProfileSettings, profile
from sparselet.cli.merging import Many
from sparselet.cli.terminal import print_json, progress, quiet_libraries, say, show, word


def profile_(
    expert: str,
    /,
    *,
    task: Annotated[list[str], Many],
    out: Path | None = None,
    model: str | None = None,
    settings: Annotated[ProfileSettings | None, Parameter(name="*")] = None,
    input_column: str = "input",
    target_column: str = "target",
    dtype: str = "float32",
    json: bool = False,
) -> None:
    """Profile an expert on its own training rows, for `merge --method regmean` and for routing.

    `train` does this at its end; this verb does it for experts of every other origin, such as LoRA adapters of stock PEFT and
    full checkpoints. docs/profiles.md says what a profile reveals of the rows.

        sparselet profile their-lora --task my-task

    Parameters
    ----------
    expert
        Expert: a directory, or a hub name.
    task
        The tasks that it was trained on: directories, builtin:NAME, or hub data sets.
    out
        File to write; by default profile.safetensors in the expert's directory.
    model
        Base model; by default the one that the expert records.
    input_column
        What the rows call the prompt; by default input, prompt or messages, whichever they have.
    target_column
        What the rows call the text to produce; by default target or completion, whichever they have.
    dtype
        Dtype of the model: float32, bfloat16 or float16.
    json
        Print the result as JSON.
    """
    quiet_libraries()
    columns = {"input": input_column, "target": target_column}
    with progress("profiling") as callback:
        result = profile(expert, task, out=out, base=model, settings=settings, columns=columns, dtype=dtype, progress=callback)
    profiled = result.profile
    if json:
        counts = {"tokens": profiled.tokens, "rows": profiled.rows, "prompts": profiled.prompts.count}
        print_json({"profile": str(result.path), "task": profiled.task, "targets": len(profiled.inputs), **counts})
        return
    show(result.table())
    say(f"Written to {result.path}", f"Next: sparselet merge {word(expert)} OTHER-EXPERT --method regmean --out merged")
