"""The slow half of fast–slow training: policy gradient on rollouts of each row under the prompts of a pool, by TRL's GRPO."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import PrinterCallback

from sparselet.evaluation.rewards import Reward
from sparselet.generation.generate import encode_prompts
from sparselet.generation.prompts import PromptFormat, in_prompt
from sparselet.tasks.rows import Row
from sparselet.training import TrainSettings
from sparselet.training.processes import needs_cpu
from sparselet.training.schedule import MaskSchedule
from sparselet.tuner import SparseletConfig
from sparselet.workflows.fast_slow_settings import FastSlowSettings


class AfterSteps(TrainerCallback):
    """Calls a function with the number of steps done, after each `interval` optimizer steps but the last; 0 never does."""

    def __init__(self, interval: int, call: Callable[[int], object]) -> None:
        self.interval, self.call = interval, call

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.interval and state.global_step % self.interval == 0 and state.global_step < state.max_steps:
            self.call(state.global_step)


def make_rollout_trainer(
    base: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    form: PromptFormat,
    rows: Sequence[Row],
    prompts: Callable[[], Sequence[str]],
    reward: Reward,
    settings: TrainSettings,
    how: FastSlowSettings,
    config: SparseletConfig,
    callbacks: Sequence[TrainerCallback],
    directory: Path,
) -> Any:
    """TRL's `GRPOTrainer` over `rows`, with a new sparse adapter of `config` on the base model.

    Of the G rollouts of a row the i-th is under prompt i mod P of the P that `prompts` gives at that moment. Advantages are
    those of TRL: (r − mean) / (σ + 1e-4) over the G rewards of the row, σ the sample's standard deviation. The loss is TRL's
    CISPO, −sg(min(ρ, clip)) · A · log π summed over tokens and divided by their number (MiniMax 2025; `clip` is set, since
    TRL's own default, 0.2, scales the gradient where ρ = 1). Prompts and end tokens are those of evaluation.

    settings: with a number as `learning_rate`; `batch_size` rows a step. directory: nothing stays in it.
    """
    from trl.trainer.grpo_trainer import GRPOTrainer

    class RolloutTrainer(GRPOTrainer):
        """The prompts of a pool, as tokens of our own."""

        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
            pool, size = prompts(), how.generations
            texts = [in_prompt(pool[i % size % len(pool)], rows[each["row"]].input) for i, each in enumerate(inputs)]
            tokens = encode_prompts(form, texts, settings.max_input_length, how.max_new_tokens)
            drawn = [{**each, "prompt": ids} for each, ids in zip(inputs, tokens, strict=True)]
            return super()._generate_and_score_completions(drawn)

        def _tokenize_prompts(self, prompts: list[Any]) -> tuple[Any, None, dict[str, Any]]:
            return prompts, None, {}

    def rewards(completions: Sequence[str], row: Sequence[int], **_: object) -> list[float | None]:
        return [*reward([text.strip() for text in completions], [rows[i].target for i in row])]

    ends = sorted(form.ends)
    model, tokenizer = base
    trainer = RolloutTrainer(
        model=model,
        reward_funcs=rewards,
        args=_arguments(settings, how, ends, directory),
        train_dataset=Dataset.from_list([{"prompt": "", "row": i} for i in range(len(rows))]),
        processing_class=deepcopy(tokenizer),  # TRL sets its padding token
        callbacks=[MaskSchedule(), *callbacks],
        peft_config=config,
    )
    trainer.eos_token_ids = ends
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(settings: TrainSettings, how: FastSlowSettings, ends: list[int], directory: Path) -> Any:
    """The `GRPOConfig` of a run."""
    from trl.trainer.grpo_config import GRPOConfig

    return GRPOConfig(
        output_dir=str(directory),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size * how.generations // settings.gradient_accumulation,
        gradient_accumulation_steps=settings.gradient_accumulation,
        num_generations=how.generations,
        max_completion_length=how.max_new_tokens,
        temperature=how.temperature,
        generation_kwargs={"eos_token_id": ends},
        loss_type="cispo",
        epsilon_high=how.clip,
        beta=how.kl_weight,
        learning_rate=cast(float, settings.learning_rate),
        lr_scheduler_type="linear",
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        optim="adamw_torch_fused",
        activation_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing=settings.gradient_checkpointing,
        bf16=False,
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=1,
        report_to=list(settings.report_to) or "none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=settings.seed,
        use_cpu=needs_cpu(),
    )


@contextmanager
def preserve_token_settings(model: PreTrainedModel) -> Iterator[None]:
    """After the block the model's generation settings and padding token, which TRL sets, are as before it."""
    config = model.config.get_text_config()
    generation, pad_token = deepcopy(model.generation_config), config.pad_token_id
    try:
        yield
    finally:
        model.generation_config, config.pad_token_id = generation, pad_token
