"""What proposes a better prompt from trials of one: by templates, demonstrations and rules, or by a language model."""

import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sparselet.adapter_format import PLACEHOLDER, is_prompt
from sparselet.errors import ConfigError, MissingExtra
from sparselet.io.printable import reason

FRAMES = (
    PLACEHOLDER,
    f"{PLACEHOLDER}\nAnswer:",
    f"Question: {PLACEHOLDER}\nAnswer:",
    f"Input: {PLACEHOLDER}\nOutput:",
    f"Instruction: {PLACEHOLDER}\nResponse:",
)
INSTRUCTIONS = ("Think step by step, then write the answer.", "Be brief.")  # rules that need no failure
MOST_DEMONSTRATIONS = 4
MOST_LABELS, LABEL_WORDS, SEEN_FOR_LABELS = 8, 3, 16  # targets that are a choice of few: how many, how long, after how many
LONGER = 1.5  # times as many words as the targets

REFLECTION = f"""A language model is asked with this prompt, in which {PLACEHOLDER} stands for the input of a row:
```
<curr_param>
```

Inputs, what the model answered, and what was expected:
```
<side_info>
```

Write a better prompt for all inputs of this task: say what the answers have in common, how they are written, and what to avoid.
Keep {PLACEHOLDER} in it exactly once, where the input goes. Write the new prompt within ``` blocks and nothing else."""


@dataclass(frozen=True)
class RowTrial:
    """What a model answered to a row's input under a prompt, and its reward."""

    input: str
    answer: str
    target: str
    reward: float

    @property
    def is_right(self) -> bool:
        """Whether the answer is the target up to white space and case."""
        return " ".join(self.answer.split()).casefold() == " ".join(self.target.split()).casefold()


Proposer = Callable[[str, Sequence[RowTrial]], str]
"""A prompt and trials of it to a better prompt, with `{input}` in it once."""


@dataclass(frozen=True)
class PromptParts:
    """A prompt of rules, solved examples and a frame around the input, parted by blank lines."""

    rules: tuple[str, ...] = ()
    demonstrations: tuple[tuple[str, str], ...] = ()
    frame: str = PLACEHOLDER

    def text(self) -> str:
        """The prompt, with the examples in the same frame as the input."""
        between = "\n" if self.frame.endswith(PLACEHOLDER) else " "
        solved = [self.frame.replace(PLACEHOLDER, source) + between + target for source, target in self.demonstrations]
        return "\n\n".join([*(["\n".join(self.rules)] if self.rules else []), *solved, self.frame])


class OfflineProposer:
    """Changes one part of a prompt at a time, without a model: a rule drawn from failures, a demonstration, or the frame.

    Which of the three, and which change of it, is drawn by the seed: equal calls after an equal seed give equal prompts. A
    prompt that it did not propose itself is taken as a rule before a blank line and a frame after it.
    """

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._parts: dict[str, PromptParts] = {}
        self._targets: Counter[str] = Counter()

    def __call__(self, prompt: str, trials: Sequence[RowTrial]) -> str:
        self._targets.update(trial.target for trial in trials)
        parts = self._parts.get(prompt) or _taken_apart(prompt)
        rules = [*_rules([trial for trial in trials if not trial.is_right]), *self._labels(), *INSTRUCTIONS]
        kinds = (
            [replace(parts, rules=(*parts.rules, rule)) for rule in rules if rule not in parts.rules],
            [replace(parts, demonstrations=(*parts.demonstrations, d)) for d in _demonstrations(parts, trials)],
            [replace(parts, frame=frame) for frame in FRAMES if frame != parts.frame],
        )
        proposed = self._random.choice(self._random.choice([kind for kind in kinds if kind]))
        self._parts[proposed.text()] = proposed
        return proposed.text()

    def _labels(self) -> list[str]:
        """A rule that names the targets, where all that were seen are a choice of few."""
        few = len(self._targets) <= MOST_LABELS and self._targets.total() >= SEEN_FOR_LABELS
        labels = sorted(self._targets)
        if not few or any(len(label.split()) > LABEL_WORDS or PLACEHOLDER in label for label in labels):
            return []
        return [f"Answer with one of: {', '.join(labels)}."]


def _taken_apart(prompt: str) -> PromptParts:
    head, _, frame = prompt[: prompt.index(PLACEHOLDER)].rpartition("\n\n")
    return PromptParts((head,) if head else (), (), frame + prompt[prompt.index(PLACEHOLDER) :])


def _rules(failures: Sequence[RowTrial]) -> list[str]:
    """Rules that answers broke and their targets keep."""
    if not failures:
        return []
    answers, targets = [trial.answer for trial in failures], [trial.target for trial in failures]
    words, expected = ([len(text.split()) for text in texts] for texts in (answers, targets))
    longest, shortest = max(expected), min(expected)
    broken = {
        "Always answer.": not all(answers),
        "Answer in one word." if longest == 1 else f"Answer in at most {longest} words.": sum(words) > LONGER * sum(expected),
        f"Answer in at least {shortest} words.": LONGER * sum(words) < sum(expected),
        "Write the answer only, without explanation.": any(t.target in t.answer for t in failures),
        "Do not repeat the input.": any(t.input and t.answer.startswith(t.input) for t in failures),
        "Answer with a number.": _all_but_some(str.isdecimal, targets, answers),
        "Write in small letters.": _all_but_some(str.islower, targets, answers),
        "Write in capital letters.": _all_but_some(str.isupper, targets, answers),
    }
    return [rule for rule, is_broken in broken.items() if is_broken]


def _all_but_some(holds: Callable[[str], bool], targets: Sequence[str], answers: Sequence[str]) -> bool:
    """Whether all targets have a property that some answer lacks."""
    return all(map(holds, targets)) and not all(map(holds, answers))


def _demonstrations(parts: PromptParts, trials: Sequence[RowTrial]) -> list[tuple[str, str]]:
    """Rows that may be shown solved: those answered wrongly, or else any."""
    if len(parts.demonstrations) >= MOST_DEMONSTRATIONS:
        return []
    rows = [t for t in trials if not t.is_right] or trials
    solved = [(t.input, t.target) for t in rows if PLACEHOLDER not in t.input + t.target]
    return [pair for pair in dict.fromkeys(solved) if pair not in parts.demonstrations]


class EndpointProposer:
    """Asks a language model behind an OpenAI-compatible endpoint; gepa fills `REFLECTION` and reads the answer.

    url: such as http://localhost:8000/v1. model: its name there. The key is that of the variable OPENAI_API_KEY.
    Raises MissingExtra, and when it is called ConfigError for an endpoint that does not answer.
    """

    def __init__(self, url: str, model: str) -> None:
        try:
            from openai import OpenAI
        except ModuleNotFoundError as error:
            raise MissingExtra("an endpoint as proposer needs openai: pip install 'sparselet[fast-slow]'.") from error
        self.url, self.model = url, model
        self._client = OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY") or "none")

    def __call__(self, prompt: str, trials: Sequence[RowTrial]) -> str:
        from gepa.strategies.instruction_proposal import InstructionProposalSignature

        records = [{"Input": trial.input, "Answer": trial.answer, "Expected": trial.target} for trial in trials]
        content = {
            "current_instruction_doc": prompt,
            "dataset_with_feedback": records,
            "prompt_template": REFLECTION,
        }
        proposed = InstructionProposalSignature.run(self._ask, content)["new_instruction"]
        return proposed if is_prompt(proposed) else f"{proposed.replace(PLACEHOLDER, 'the input')}\n\n{PLACEHOLDER}"

    def _ask(self, prompt: Any) -> str:
        from openai import OpenAIError

        try:
            completion = self._client.chat.completions.create(model=self.model, messages=[{"role": "user", "content": prompt}])
        except OpenAIError as error:
            raise ConfigError(f"`proposer` {self.url} does not answer: {type(error).__name__}: {reason(error)}") from error
        return completion.choices[0].message.content or ""
