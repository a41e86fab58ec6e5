"""`sparselet probe`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from sparselet.api.probing import ProbeSettings, probe
from sparselet.cli.merging import Many
from sparselet.cli.terminal import progress, quiet_libraries, show_analysis
from sparselet.io.paths import check_output
from sparselet.models import PACKAGED


def probe_(
    *,
    model: str = PACKAGED,
    task: Annotated[list[str] | None, Many] = None,
    texts: Annotated[list[Path] | None, Many] = None,
    adapter: str | None = None,
    settings: Annotated[ProbeSettings | None, Parameter(name="*", consume_multiple=True)] = None,
    input_column: str = "input",
    target_column: str = "target",
    dtype: str = "float32",
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Measure how sparse a causal model's hidden states are over rows of tasks or texts, and whether loss goes with it.

    Every statistic stands raw and without outlier channels, beside a Gaussian vector. The same rows with shuffled tokens or
    after demonstrations are compared pair by pair.

        sparselet probe --model packaged:smollm2-135m --task my-task --shuffled --out sparsity.html
        sparselet probe --model org/base --task my-task --demonstrations 4 --layers 10 20 -1
        sparselet probe --model org/base --texts english.txt german.txt

    Parameters
    ----------
    model
        Causal model: a hub name, a directory, or packaged:smollm2-135m.
    task
        Tasks: directories, builtin:NAME, or hub data sets.
    texts
        Files of texts: .txt with one on each line, or rows with a field `text`.
    adapter
        An expert of any kind that is written into the model meanwhile.
    input_column
        What the tasks' rows call the prompt; by default input, prompt or messages, whichever they have.
    target_column
        What the tasks' rows call the text to produce; by default target or completion, whichever they have.
    dtype
        Dtype of the model: float32, bfloat16 or float16.
    out
        Write the pictures to this file, as one HTML page.
    json
        Print all numbers as JSON, those of each row too.
    """
    quiet_libraries()
    if out is not None:
        check_output(out, directory=False)
    columns = {"input": input_column, "target": target_column}
    with progress("probing") as callback:
        probed = probe(
            model,
            task or (),
            texts=texts or (),
            expert=adapter,
            settings=settings,
            columns=columns,
            dtype=dtype,
            progress=callback,
        )
    following = "" if out else "the same command with --shuffled, and --out FILE.html for pictures."
    show_analysis(probed, out, json, following)
