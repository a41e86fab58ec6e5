"""`sparselet steer`."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from sparselet.api.steering import evaluate_steering, fit_steering
from sparselet.cli.merging import Many
from sparselet.cli.terminal import facts, print_json, progress, quiet_libraries, say, show, word
from sparselet.errors import ConfigError
from sparselet.evaluation import EvalSettings
from sparselet.evaluation.metrics import DEFAULT_METRICS
from sparselet.workflows.steering import SteerSettings


def steer_(
    action: Literal["fit", "eval"],
    vector: str | None = None,
    /,
    *,
    pairs: Path | None = None,
    out: Path | None = None,
    fit: Annotated[SteerSettings | None, Parameter(name="*")] = None,
    model: str | None = None,
    adapter: str | None = None,
    task: Annotated[list[str] | None, Many] = None,
    metric: Annotated[list[str] | None, Many] = None,
    draws: int = 1,
    seed: int = 0,
    settings: Annotated[EvalSettings | None, Parameter(name="*")] = None,
    input_column: str = "input",
    target_column: str = "target",
    dtype: str = "float32",
    json: bool = False,
) -> None:
    """Make answers shorter by a vector: fit it to pairs of a concise and a verbose answer, and measure what it does.

    fit writes a directory that `eval --steer` and sl.steered take. eval answers a task's rows without the vector, with it,
    with its opposite, and with random vectors of its length.

        sparselet steer fit --pairs pairs.jsonl --layer auto --model packaged:smollm2-135m --out concise
        sparselet steer fit --pairs pairs.jsonl --model packaged:smollm2-135m --adapter my-expert --out concise
        sparselet steer eval concise --task my-task --adapter my-expert --max-new-tokens 200

    Parameters
    ----------
    action
        fit or eval.
    vector
        The steering vector to measure.
    pairs
        Pairs to fit: JSON lines, a JSON array or Parquet, with the fields concise and verbose, and perhaps prompt,
        concise_prompt and verbose_prompt (docs/steering.md).
    out
        Directory to write the vector to; it must not exist.
    model
        Base model; eval takes the one that the vector records by default.
    adapter
        An expert of any kind that is applied to the model meanwhile.
    task
        Tasks to measure on: directories, builtin:NAME, or hub data sets.
    metric
        Metrics of eval; by default rougeL and exact_match.
    draws
        Random vectors that eval compares with.
    seed
        Seed of the random vectors.
    input_column
        What the task's rows call the prompt; by default input, prompt or messages, whichever they have.
    target_column
        What the task's rows call the text to produce; by default target or completion, whichever they have.
    dtype
        Dtype of the model: float32, bfloat16 or float16.
    json
        Print the result as JSON.
    """
    quiet_libraries()
    if action == "fit":
        _refuse_flags(action, {"--pairs": pairs, "--out": out, "--model": model}, {"VECTOR": vector, "--task": task})
        _fit(str(pairs), str(model), Path(str(out)), fit, adapter, settings, dtype, json)
        return
    _refuse_flags(action, {"VECTOR": vector, "--task": task}, {"--pairs": pairs, "--out": out})
    with progress("answering") as callback:
        report = evaluate_steering(
            str(vector),
            task or [],
            model=model,
            expert=adapter,
            settings=settings,
            metrics=metric or DEFAULT_METRICS,
            columns={"input": input_column, "target": target_column},
            dtype=dtype,
            draws=draws,
            seed=seed,
            progress=callback,
        )
    if json:
        print_json(report.as_json())
    else:
        show(report.table())


def _fit(
    pairs: str,
    model: str,
    out: Path,
    fit: SteerSettings | None,
    adapter: str | None,
    settings: EvalSettings | None,
    dtype: str,
    json: bool,
) -> None:
    template = settings.chat_template if settings else None
    with progress("fitting") as callback:
        vector = fit_steering(pairs, model, out, fit, expert=adapter, chat_template=template, dtype=dtype, progress=callback)
    record = vector.record
    if json:
        print_json({"vector": str(out), "layer": vector.layer, "strength": vector.strength, **record})
        return
    rows: list[tuple[str, object]] = [
        ("pairs", record["pairs"]),
        ("layer", vector.layer if record["favour"] is None else f"{vector.layer}, chosen of {len(record['favour'])}"),
        ("length of the vector", f"{record['norm']:.4g}"),
        ("strength", f"{vector.strength:.4g}"),
        ("KL from the unsteered model", f"{record['kl']:.4f} nats a token (bound {record['kl_bound']:g})"),
    ]
    facts("Steering vector", rows)
    expert = f" --adapter {word(adapter)}" if adapter else ""
    say(f"Written to {out}", f"Next: sparselet steer eval {word(out)} --task TASK{expert}")


def _refuse_flags(action: str, needed: dict[str, object], other: dict[str, object]) -> None:
    """Raise ConfigError for flags that the action lacks, or that belong to the other one."""
    for flag, value in needed.items():
        if not value:
            raise ConfigError(f"steer {action} needs {', '.join(needed)}; {flag} is missing.")
    for flag, value in other.items():
        if value:
            raise ConfigError(f"{flag} does not go with steer {action}.")
