"""The fast half of fast–slow training: a pool of prompts that gepa improves while the weights stay as they are."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from sparselet.adapter_format import is_prompt
from sparselet.errors import ConfigError, MissingExtra, SparseletError
from sparselet.evaluation.rewards import Reward
from sparselet.generation.prompts import in_prompt
from sparselet.tasks.rows import Prompt, Row
from sparselet.workflows.proposers import Proposer, RowTrial

logger = logging.getLogger("sparselet")

MINIBATCH = 4  # training rows that a proposal is drawn from and first tried on
PERFECT = 1.0  # the largest reward of METRICS
_COMPONENT = "prompt"  # gepa's name for the only text

RowKey = tuple[str, int]  # split and number
Answer = Callable[[Sequence[Prompt]], list[str]]


@dataclass(frozen=True)
class PromptScore:
    """A prompt and its mean reward on the validation rows."""

    prompt: str
    reward: float


@dataclass
class PromptTrials:
    """Trials of prompts on rows with the weights as they are: gepa's adapter. Nothing is answered twice.

    answer: greedy answers to prompts. rows: by split and number. failure: of a proposal; gepa would go on after it.
    """

    answer: Answer
    reward: Reward
    rows: Mapping[RowKey, Row]
    propose: Proposer
    failure: SparseletError | None = None
    _trials: dict[tuple[str, RowKey], RowTrial] = field(default_factory=dict)

    def trials(self, prompt: str, keys: Sequence[RowKey]) -> list[RowTrial]:
        """The trials of a prompt on these rows. Raises what answering and the reward raise."""
        missing = [key for key in dict.fromkeys(keys) if (prompt, key) not in self._trials]
        rows = [self.rows[key] for key in missing]
        answers = self.answer([in_prompt(prompt, row.input) for row in rows])
        rewards = self.reward(answers, [row.target for row in rows])
        for key, row, answer, reward in zip(missing, rows, answers, rewards, strict=True):
            self._trials[prompt, key] = RowTrial(_input_text(row), answer, row.target, reward)
        return [self._trials[prompt, key] for key in keys]

    def forget(self) -> None:
        """Forget all trials, since the weights have changed."""
        self._trials.clear()

    def evaluate(self, batch: list[RowKey], candidate: Mapping[str, str], capture_traces: bool = False) -> Any:
        """What gepa asks for: answers and rewards of a candidate."""
        from gepa.core.adapter import EvaluationBatch

        trials = self.trials(candidate[_COMPONENT], batch)
        return EvaluationBatch([trial.answer for trial in trials], [trial.reward for trial in trials], trials)

    def make_reflective_dataset(self, candidate: Mapping[str, str], batch: Any, components: list[str]) -> Any:
        """The trials of a batch, the worst first, as gepa passes them to `propose_new_texts`."""
        ordered = sorted(batch.trajectories, key=lambda trial: trial.reward)
        return {name: [{"trial": trial} for trial in ordered] for name in components}

    def propose_new_texts(self, candidate: Mapping[str, str], dataset: Any, components: list[str]) -> dict[str, str]:
        """A proposal. Raises ConfigError for one without its placeholder, and what the proposer raises."""
        try:
            proposed = self.propose(candidate[_COMPONENT], [record["trial"] for record in dataset[_COMPONENT]])
            if not is_prompt(proposed):
                raise ConfigError(f"the proposer must keep {{input}} in a prompt once; it gave {proposed!r:.80}.")
        except SparseletError as error:
            self.failure = error
            raise
        except Exception as error:  # of a function that a user wrote
            self.failure = ConfigError(f"the proposer fails on {candidate[_COMPONENT]!r:.80}: {type(error).__name__}: {error}")
            raise self.failure from error
        return {_COMPONENT: proposed}


class PromptPool:
    """Prompts that no other is better than on every row, the best in the mean first.

    trials: with training rows, which proposals are drawn from, under ("train", i), and the validation rows, which prompts are
    compared on, under ("validation", i). size: most prompts. calls: answers that gepa may score in a round; 0 proposes nothing.
    """

    def __init__(self, prompts: Sequence[str], trials: PromptTrials, *, size: int, calls: int, seed: int) -> None:
        self.prompts, self.trials = tuple(dict.fromkeys(prompts)), trials
        self.size, self.calls, self.seed = size, calls, seed
        self.train, self.validation = (
            sorted(key for key in trials.rows if key[0] == split) for split in ("train", "validation")
        )
        self.rounds: list[dict[str, Any]] = []

    def reward_of(self, prompt: str) -> float:
        """The mean reward of a prompt on the validation rows, with the weights as they are."""
        rewards = [trial.reward for trial in self.trials.trials(prompt, self.validation)]
        return sum(rewards) / len(rewards)

    def improve(self, step: int) -> list[PromptScore]:
        """A round of gepa from the pool's best prompt, after so many steps of the slow half; the pool is chosen anew.

        Candidates are chosen for mutation by their rows on the Pareto front (Agrawal et al. 2025), and kept if better on a
        minibatch. The new pool is that of `pareto_prompts`, of the old pool and what gepa kept, all under the weights as they
        are. Raises what answering, the reward and the proposer raise.
        """
        self.trials.forget()
        prompts = list(self.prompts)
        if self.calls:
            logger.info("step %d: improving prompts, by up to %d answers.", step, self.calls)
            start = max(prompts, key=self.reward_of)  # the first of equals
            prompts = list(dict.fromkeys([*prompts, *self._search(start, step)]))
        rewards = {p: [trial.reward for trial in self.trials.trials(p, self.validation)] for p in prompts}
        self.prompts = tuple(pareto_prompts(rewards, self.size))
        scores = [PromptScore(prompt, self.reward_of(prompt)) for prompt in self.prompts]
        self.rounds.append({"step": step, "tried": len(prompts), "pool": [vars(score) for score in scores]})
        logger.info("step %d: %d prompts; the best has reward %.3f.", step, len(scores), scores[0].reward)
        return scores

    def _search(self, start: str, step: int) -> list[str]:
        """The prompts that gepa kept."""
        from gepa.api import optimize

        trials = self.trials
        is_bounded = trials.reward.scale != 1.0
        result = optimize(
            {_COMPONENT: start},
            self.train,
            self.validation,
            adapter=cast(Any, trials),
            reflection_minibatch_size=min(MINIBATCH, len(self.train)),
            skip_perfect_score=is_bounded,
            perfect_score=PERFECT,
            max_metric_calls=self.calls,
            stop_callbacks=lambda gepa_state: trials.failure is not None,
            logger=_DebugLog(),
            seed=self.seed + step,
        )
        if trials.failure is not None:
            raise trials.failure
        return [candidate[_COMPONENT] for candidate in result.candidates]


def pareto_prompts(rewards: Mapping[str, Sequence[float]], size: int) -> list[str]:
    """At most `size` prompts: the best in the mean, then those that no other surpasses on some row, by their mean reward.

    rewards: of each prompt, row by row. Equal prompts stay in their order.
    """
    best = [max(column) for column in zip(*rewards.values(), strict=True)]
    front = [p for p, row in rewards.items() if any(value == top for value, top in zip(row, best, strict=True))]
    first = max(rewards, key=lambda prompt: sum(rewards[prompt]))
    others = sorted((p for p in front if p != first), key=lambda prompt: -sum(rewards[prompt]))
    return [first, *others][:size]


def require_fast_slow() -> None:
    """Raise MissingExtra unless gepa and TRL are installed."""
    try:
        import gepa
        import trl
    except ModuleNotFoundError as error:
        raise MissingExtra(f"method fast-slow needs {error.name}: pip install 'sparselet[fast-slow]'.") from error
    del gepa, trl


class _DebugLog:
    """gepa's messages, for those who look."""

    def log(self, message: str) -> None:
        logger.debug("%s", message)


def _input_text(row: Row) -> str:
    """The text that a prompt is put around."""
    return row.input if isinstance(row.input, str) else next(m.content for m in reversed(row.input) if m.role == "user")
