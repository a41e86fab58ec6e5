"""Fast–slow training: prompts that are improved in rounds, and a few entries of the weights that are trained under them."""

import contextlib
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from transformers import TrainerCallback, set_seed

from sparselet.adapter import SparseAdapter
from sparselet.apply import apply_temporarily
from sparselet.errors import ConfigError, NonFiniteValue, TrainingDiverged
from sparselet.evaluation.metrics import Metric
from sparselet.evaluation.rewards import choose_reward
from sparselet.evaluation_mode import evaluation_mode
from sparselet.generation.generate import generate
from sparselet.generation.prompts import in_prompt, prompt_format
from sparselet.io.atomic import atomic_directory
from sparselet.io.json_files import write_json
from sparselet.io.paths import check_output
from sparselet.models import load_model, load_tokenizer
from sparselet.tasks.rows import Prompt
from sparselet.tasks.task import Task, load_task, write_task
from sparselet.training import TrainSettings, train
from sparselet.training.learning_rate import default_learning_rate
from sparselet.training.methods import FAST_SLOW
from sparselet.training.processes import process_count, refuse_parallelism
from sparselet.training.run_directory import DATA, RUN_FILE
from sparselet.training.train import LoadedModel, adapter_config, preserve_requires_grad, preserve_switches
from sparselet.tuner import to_adapter
from sparselet.tuner.model import versions
from sparselet.workflows.fast_slow_settings import FastSlowSettings
from sparselet.workflows.prompt_pool import PromptPool, PromptTrials, require_fast_slow
from sparselet.workflows.proposers import EndpointProposer, OfflineProposer, Proposer
from sparselet.workflows.rollouts import AfterSteps, make_rollout_trainer, preserve_token_settings

logger = logging.getLogger("sparselet")


def fast_slow(
    settings: TrainSettings,
    how: FastSlowSettings,
    output: Path,
    *,
    reward: Metric | None = None,
    proposer: Proposer | None = None,
    base: LoadedModel | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> SparseAdapter:
    """Train a sparse adapter with its prompt, and write it as the directory `output`, which appears when it is complete.

    Fast-slow training (arXiv 2605.12484): prompts are improved by gepa before the first step, after every `fast_every` steps
    and after the last one, with the weights of that moment; between rounds entries are trained by GRPO on rollouts of each
    row under several prompts of the pool (`make_rollout_trainer`). The adapter's prompt is the pool's best in the end.

    reward, proposer: in the place of those that `how` names. base: the base model and tokenizer, if they are loaded.
    Metrics: mean rewards of greedy answers to the validation rows of the base and the tuned model, under the first prompt
    (seed) and the final one (evolved). A stopped run leaves nothing.
    Raises ConfigError, also for a reward that fails; OutputExists, MissingExtra, TrainingDiverged; what `train` raises.
    """
    refuse_parallelism()
    chosen = choose_reward(how.reward if reward is None else reward)
    _check(settings, how)
    check_output(output)
    task = load_task(settings.tasks[0], ("train", "validation"), _columns(settings))
    rows, judged = task.rows("train", settings.train_rows), task.rows("validation", how.fast_rows)
    if how.slow == "grpo" and len(rows) < settings.batch_size:
        raise ConfigError(f"batch_size must be at most the {len(rows)} training rows, got {settings.batch_size}.")
    chosen([judged[0].target], [judged[0].target])  # raises before any work
    require_fast_slow()
    propose = proposer or (
        OfflineProposer(settings.seed) if how.proposer == "offline" else EndpointProposer(how.proposer, how.proposer_model)
    )
    started = time.time()
    loaded = base or (load_model(settings.model, settings.dtype), load_tokenizer(settings.model))
    if loaded[0].config.is_encoder_decoder:
        raise ConfigError("method fast-slow trains decoders; this model is an encoder and a decoder.")
    set_seed(settings.seed)
    numbered = {("train", i): row for i, row in enumerate(rows)} | {("validation", i): row for i, row in enumerate(judged)}
    trials = PromptTrials(_answerer(loaded, settings, how), chosen, numbered, propose)
    pool = PromptPool(how.prompts, trials, size=how.pool, calls=how.fast_calls, seed=settings.seed)
    adapter, history = _train(FastSlowRun(loaded, settings, how, task, pool, callbacks))
    record = {
        "settings": asdict(settings),
        "fast_slow": asdict(how),
        "versions": versions(),
        "seconds": time.time() - started,
        "started": started,
        "history": history,
        "rounds": pool.rounds,
        DATA: adapter.metadata.data_fingerprint,
        "task": task.name,
        "metrics": adapter.metadata.metrics,
    }
    with atomic_directory(output) as directory:
        adapter.save(directory)
        write_json(directory / RUN_FILE, record)
    return adapter


@dataclass(frozen=True)
class FastSlowRun:
    """What a run works with."""

    base: LoadedModel
    settings: TrainSettings
    how: FastSlowSettings
    task: Task
    pool: PromptPool
    callbacks: Sequence[TrainerCallback]


History = Sequence[Mapping[str, Any]]


def _train(run: FastSlowRun) -> tuple[SparseAdapter, History]:
    """Both halves: the adapter with its prompt and its figures, and the log of the slow half."""
    pool, first = run.pool, run.how.prompts[0]
    pool.improve(0)
    slow = _by_reward if run.how.slow == "grpo" else _by_targets
    with slow(run) as (adapter, steps, history):
        evolved = pool.improve(steps)[0].prompt
        figures = {f"reward_tuned_{name}": pool.reward_of(p) for name, p in (("seed", first), ("evolved", evolved))}
    pool.trials.forget()
    figures |= {f"reward_base_{name}": pool.reward_of(p) for name, p in (("seed", first), ("evolved", evolved))}
    fields = {
        "base_model_name_or_path": run.settings.model,
        "task": run.task.name,
        "data_fingerprint": run.task.fingerprint(),
        "chat_template": run.settings.chat_template,
        "prompt": evolved,
        "metrics": {**figures, "rows": len(pool.validation), "steps": steps},
        "training": {"method": FAST_SLOW, "slow": run.how.slow, "reward": pool.trials.reward.name},
    }
    return SparseAdapter(adapter, adapter.metadata.with_fields(fields), adapter.fingerprints), history


@contextlib.contextmanager
def _by_reward(run: FastSlowRun) -> Iterator[tuple[SparseAdapter, int, History]]:
    """Within the block the model has the entries that GRPO trained: the adapter, the steps and the log."""
    settings, how, pool = run.settings, run.how, run.pool
    model, tokenizer = run.base
    rate = settings.learning_rate or default_learning_rate(settings.method, model.config)
    with (
        tempfile.TemporaryDirectory() as directory,
        preserve_requires_grad(model),
        preserve_token_settings(model),
        preserve_switches(model, settings),
    ):
        trainer = make_rollout_trainer(
            run.base,
            prompt_format(model, tokenizer, settings.chat_template),
            run.task.rows("train", settings.train_rows),
            lambda: pool.prompts,
            pool.trials.reward,
            replace(settings, learning_rate=rate),
            how,
            adapter_config(settings, model, run.task.fingerprint()),
            [AfterSteps(how.fast_every, pool.improve), *run.callbacks],
            Path(directory),
        )
        wrapped = trainer.accelerator.unwrap_model(trainer.model)
        try:
            trainer.train()
            if all(log.get("frac_reward_zero_std", 1.0) == 1 for log in trainer.state.log_history):
                logger.warning(
                    "all rollouts of each row had equal rewards, so the weights have not moved: take a task that the base "
                    "model answers sometimes, a reward that grades answers, or more generations."
                )
            adapter = to_adapter(wrapped)
            try:
                adapter.check_values()
            except NonFiniteValue as error:
                raise TrainingDiverged(f"{error} Nothing was written; lower the learning rate than {rate:g}.") from error
            yield adapter, trainer.state.global_step, trainer.state.log_history
        finally:
            wrapped.unload()


@contextlib.contextmanager
def _by_targets(run: FastSlowRun) -> Iterator[tuple[SparseAdapter, int, History]]:
    """Within the block the model has the entries that were trained on the rows' targets, row i under prompt i mod P."""
    settings, prompts = run.settings, run.pool.prompts
    with tempfile.TemporaryDirectory() as directory:
        limits = {"train": settings.train_rows, "validation": settings.validation_rows}
        splits = {
            split: tuple(
                replace(row, input=in_prompt(prompts[i % len(prompts)], row.input))
                for i, row in enumerate(run.task.rows(split, limit))
            )
            for split, limit in limits.items()
        }
        place = write_task(Task("task", splits), Path(directory))
        columns = {name: TrainSettings.__dataclass_fields__[name].default for name in ("input_column", "target_column")}
        plain = replace(settings, method="sparse", task=str(place), profile=False, **columns)
        adapter = cast(SparseAdapter, train(plain, Path(directory, "expert"), base=run.base, callbacks=run.callbacks))
    figures = adapter.metadata.metrics or {}
    with apply_temporarily(run.base[0], adapter):
        yield adapter, figures["steps"], [figures]


def _answerer(base: LoadedModel, settings: TrainSettings, how: FastSlowSettings) -> Callable[[Sequence[Prompt]], list[str]]:
    """Greedy answers with the weights as they are."""
    model, tokenizer = base

    def answer(prompts: Sequence[Prompt]) -> list[str]:
        with evaluation_mode(model):
            return generate(
                model,
                tokenizer,
                prompts,
                chat_template=settings.chat_template,
                max_input_length=settings.max_input_length,
                max_new_tokens=how.max_new_tokens,
            )

    return answer


def _check(settings: TrainSettings, how: FastSlowSettings) -> None:
    """Raise ConfigError for what this method does not do."""
    if len(settings.tasks) != 1:
        raise ConfigError(f"method fast-slow improves the prompts of one task; task names {len(settings.tasks)}.")
    if process_count() > 1:
        raise ConfigError("method fast-slow runs in one process; start it without torchrun.")
    if how.slow == "grpo":
        if settings.learning_rate == "auto":
            raise ConfigError("learning_rate auto compares validation losses, which slow=grpo has not; give a number.")
        for name in ("patience", "save_steps"):
            if vars(settings)[name]:
                raise ConfigError(f"{name} does not apply to method fast-slow with slow=grpo. Leave it out.")


def _columns(settings: TrainSettings) -> dict[str, str]:
    return {"input": settings.input_column, "target": settings.target_column}
