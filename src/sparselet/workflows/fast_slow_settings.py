"""`FastSlowSettings`: the settings of the training method fast-slow, beside those of training."""

from dataclasses import dataclass
from typing import Literal

from sparselet.adapter_format import PLACEHOLDER
from sparselet.errors import ConfigError
from sparselet.generation.prompts import check_prompt
from sparselet.setting_checks import check_at_least, check_settings


@dataclass(frozen=True)
class FastSlowSettings:
    """Settings of method fast-slow. Raises ConfigError."""

    prompts: tuple[str, ...] = (PLACEHOLDER,)
    """Prompts to begin with, with {input} in each where a row's input goes; results are compared with the first."""
    reward: str = "rougeL"
    """Of an answer: rougeL, exact_match or chrf, from 0 to 1, or MODULE:FUNCTION, a Python function of answers and targets."""
    slow: Literal["grpo", "sft"] = "grpo"
    """How entries are trained: by reward, or on the targets under the pool's prompts (sft), a variant of this project."""
    proposer: str = "offline"
    """What proposes prompts: offline, by templates, demonstrations and rules, or an OpenAI-compatible URL."""
    proposer_model: str = ""
    """The name of the model at that URL, whose key is in the environment as OPENAI_API_KEY."""
    pool: int = 4
    """Prompts at a time, the best on some validation row."""
    fast_every: int = 20
    """Optimizer steps between rounds that improve prompts; 0 has one before the first step only."""
    fast_calls: int = 100
    """Answers that a round may score; 0 keeps and only measures the prompts, which trains the slow half alone."""
    fast_rows: int = 16
    """Validation rows that prompts are compared on."""
    generations: int = 8
    """Rollouts of a row, over which its rewards are normalised."""
    temperature: float = 1.0
    """Temperature of rollouts."""
    max_new_tokens: int = 64
    """Longest answer, in tokens."""
    kl_weight: float = 0.0
    """Weight of the KL divergence from the base model in the loss."""
    clip: float = 5.0
    """CISPO's upper bound of the importance ratio."""

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.prompts:
            raise ConfigError(f"prompts is empty; give at least one, such as {PLACEHOLDER!r}.")
        for prompt in self.prompts:
            check_prompt("prompts", prompt)
        check_at_least(self, 2, "generations")
        check_at_least(self, 1, "pool", "fast_rows", "max_new_tokens", "clip")
        check_at_least(self, 0, "fast_every", "fast_calls", "kl_weight")
        if self.pool > self.generations:
            raise ConfigError(f"pool must be at most generations, {self.generations}, got {self.pool}.")
        if 0 < self.fast_calls <= self.fast_rows:
            raise ConfigError(f"fast_calls must be above fast_rows, {self.fast_rows}, or 0; got {self.fast_calls}.")
        if not self.temperature > 0:
            raise ConfigError(f"temperature must be above 0, got {self.temperature}.")
        if self.proposer != "offline" and not (self.proposer.startswith(("http://", "https://")) and self.proposer_model):
            raise ConfigError(f"proposer must be offline, or a URL with `proposer_model`; got {self.proposer!r:.80}.")
