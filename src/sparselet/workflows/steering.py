"""From pairs of texts to a steering vector, and what it does to answers."""

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparselet.errors import ArgumentError, ConfigError, TaskError, prefix_errors
from sparselet.evaluation import EvalResult, EvalSettings, evaluate
from sparselet.evaluation.metrics import DEFAULT_METRICS, Metric
from sparselet.evaluation_mode import evaluation_mode
from sparselet.fingerprint import fingerprint_weight
from sparselet.generation.prompts import PromptFormat, longest_prompt, prompt_format, prompt_tokens, target_tokens
from sparselet.setting_checks import check_at_least, check_settings
from sparselet.steering import SteeringVector, steered
from sparselet.steering.strength import Divergence, calibrate, log_probability
from sparselet.steering.switch import block_outputs, blocks_of, embedding_of
from sparselet.tasks.row_files import read_file
from sparselet.tasks.task import Task
from sparselet.tuner.mask_state import seeded

logger = logging.getLogger("sparselet")

SIDES = ("concise", "verbose")
OPTIONAL = ("prompt", "concise_prompt", "verbose_prompt")
CALIBRATION_ROWS = 16  # verbose answers that the strength is measured on
COMPARED_ROWS, COMPARED_PAIRS = 4, 8  # verbose answers and pairs that layers are compared on

Encoding = tuple[list[int], int]  # tokens, and the position from which the answer is predicted


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, or two texts where it is None. Raises TaskError for one of the last two without the other."""

    concise: str
    verbose: str
    prompt: str | None = None
    concise_prompt: str | None = None
    """The prompt that asks for the concise answer, as `verbose_prompt` for the verbose one: both, or neither."""
    verbose_prompt: str | None = None

    def __post_init__(self) -> None:
        asking = [bool(self.concise_prompt), bool(self.verbose_prompt)]
        if any(asking) and not (all(asking) and self.prompt):
            raise TaskError("concise_prompt and verbose_prompt go together, and with prompt.")


@dataclass(frozen=True)
class SteerSettings:
    """How a vector is fitted. Raises ConfigError."""

    layer: int | Literal["auto"] = "auto"
    """Number of the block whose output is moved, from 0; auto takes the one that favours concise answers most at the bound."""
    kl: float = 0.005
    """Bound of the KL divergence from the unsteered model, in nats a token, which sets the strength."""
    max_length: int = 1024
    """Tokens of a prompt and an answer; longer ones are cut from the left."""

    def __post_init__(self) -> None:
        check_settings(self)
        check_at_least(self, 2, "max_length")
        if not self.kl > 0:
            raise ConfigError(f"kl must be above 0, got {self.kl}.")


def read_pairs(file: str | Path) -> list[Pair]:
    """Pairs from JSON lines, a JSON array or Parquet: fields concise and verbose, and those of `Pair` that may be left out.

    Raises TaskError, with file and line, for a row without one side, an empty side, one of two prompts, and no rows.
    """
    pairs = []
    for where, row in read_file(Path(file), lambda columns, _: tuple(n for n in (*SIDES, *OPTIONAL) if n in columns)):
        with prefix_errors(where):
            if not isinstance(row, dict):
                raise TaskError(f"expected an object with {' and '.join(SIDES)}, got {row!r:.60}.")
            for side in SIDES:
                if not isinstance(row.get(side), str) or not row[side].strip():
                    raise TaskError(f"{side} must be a text that is not empty, got {row.get(side)!r:.60}.")
            for field in OPTIONAL:
                if not isinstance(row.get(field), str | None):
                    raise TaskError(f"{field} must be a text, or left out, got {row[field]!r:.60}.")
            pairs.append(Pair(row["concise"], row["verbose"], *(row.get(field) or None for field in OPTIONAL)))
    if not pairs:
        raise TaskError(f"{file} has no pairs.")
    return pairs


def fit_vector(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    settings: SteerSettings,
    *,
    chat_template: bool = True,
    base: str | None = None,
    progress: Callable[[float], None] | None = None,
) -> SteeringVector:
    """v = mean over pairs of h(concise) − h(verbose), h the block's output at the last token; added, it makes answers concise.

    The sides are the prompt, once, with each answer, as in ASC (Azizi et al. 2025); its code subtracts what was extracted as
    short − long, adds it one block from where it was read, and repeats the prompt in the long side. Of pairs with
    `concise_prompt` and `verbose_prompt` the sides are these, without answers: what being asked for the one or the other
    changes (Stolfo et al. 2025, arXiv 2410.12877, compare prompts with an instruction and without). ASC's strengths are
    chosen by hand; here the strength is that of a KL bound (`calibrate`), over the first tokens of verbose answers to
    `prompt`.

    `layer` auto: the block with the largest number of `favours`. base: recorded. progress: called with 1 after each of
    `fit_steps` steps.
    Raises ArgumentError (a layer that there is not), ConfigError, ModelError, TaskError.
    """
    if not pairs:
        raise TaskError("pairs is empty; give at least one.")
    blocks = len(blocks_of(model))
    if settings.layer != "auto" and not 0 <= settings.layer < blocks:
        raise ArgumentError(f"layer must be a block of the model, 0 to {blocks - 1}, or auto; got {settings.layer}.")
    if settings.layer == "auto" and len(pairs) < 2:
        raise ConfigError("layer auto compares pairs with one another; give two pairs or more, or a number.")
    form = prompt_format(model, tokenizer, chat_template)
    encoded = []
    for number, pair in enumerate(pairs, 1):
        with prefix_errors(f"pair {number}"):
            encoded.append([_encode(form, pair.prompt, answer, settings.max_length) for answer in (pair.concise, pair.verbose)])
    read = [_read(form, pair, answers, settings.max_length) for pair, answers in zip(pairs, encoded, strict=True)]
    with evaluation_mode(model):
        stacked = _differences(model, read, progress)
        favour = None if isinstance(settings.layer, int) else favours(model, encoded, stacked, form.end, settings.kl, progress)
        layer = int(settings.layer if favour is None else favour.argmax())
        values = stacked[:, layer].double().mean(0).float()
        if not values.any():
            raise ConfigError(f"the two sides of the pairs do not differ at layer {layer}; take other pairs.")
        vector = SteeringVector(values, layer, 1.0, base, fingerprint_weight(embedding_of(model)))
        if favour is not None and not favour[layer] > 0:
            logger.warning("at no layer does the vector favour concise answers; look at the pairs (docs/steering.md).")
        logger.info("layer %d: measuring the strength.", layer)
        rows = [verbose for _, verbose in encoded[:CALIBRATION_ROWS]]
        strength = calibrate(Divergence(model, vector, rows), settings.kl)
    record = {
        "pairs": len(pairs),
        "kl_bound": settings.kl,
        "norm": float(values.norm()),
        "favour": None if favour is None else favour.tolist(),
        "chat_template": form.template,
        **{name: value for name, value in vars(strength).items() if name != "strength"},
    }
    return replace(vector, strength=strength.strength, record=record)


def fit_steps(model: PreTrainedModel, pairs: int, settings: SteerSettings) -> int:
    """The number of steps that `fit_vector` reports: pairs, and with layer auto pairs and blocks."""
    return pairs if isinstance(settings.layer, int) else pairs + len(blocks_of(model))


def _differences(
    model: PreTrainedModel, read: Sequence[Sequence[list[int]]], progress: Callable[[float], None] | None
) -> Tensor:
    """h(concise) − h(verbose) of each pair, float32 [pairs, blocks, width]."""
    differences = []
    for sides in read:
        concise, verbose = (block_outputs(model, tokens) for tokens in sides)
        differences.append(concise - verbose)
        if progress is not None:
            progress(1)
    return torch.stack(differences)


def favours(
    model: PreTrainedModel,
    encoded: Sequence[Sequence[Encoding]],
    differences: Tensor,
    end: int | None,
    bound: float,
    progress: Callable[[float], None] | None = None,
) -> Tensor:
    """How much more likely each block's vector makes concise answers than verbose ones at the bound, float64 [blocks].

    The mean over some pairs of log p(concise) − log p(verbose), in nats, each a mean over its first tokens and the end token,
    less the same unsteered; a pair is steered by the mean of the other pairs' differences, at the strength that moves some
    verbose answers by the bound. 0 where that is out of reach.
    differences: [pairs, blocks, width]. end: the token that ends answers, so that ending soon counts.
    """
    ending = [] if end is None else [end]
    compared = [[([*tokens, *ending], start) for tokens, start in sides] for sides in encoded[:COMPARED_PAIRS]]
    unsteered = [log_probability(model, *concise) - log_probability(model, *verbose) for concise, verbose in compared]

    def preference(sides: Sequence[Encoding], vector: SteeringVector, strength: float) -> float:
        with steered(model, vector, strength) as steering:
            logs = []
            for tokens, start in sides:
                steering.start = start
                logs.append(log_probability(model, tokens, start))
        return logs[0] - logs[1]

    wide = differences.double()
    layers = [SteeringVector(values, layer, 1.0) for layer, values in enumerate(wide.mean(0).float())]
    divergence = Divergence(model, layers[0], [verbose for _, verbose in encoded[:COMPARED_ROWS]])
    favour = torch.zeros(len(layers), dtype=torch.float64)
    begin = 1.0
    for layer, own in enumerate(wide.unbind(1)):
        divergence.vector = layers[layer]
        with contextlib.suppress(ConfigError):  # of a vector that does not move the answers so far
            strength = calibrate(divergence, bound, tolerance=0.1, begin=begin).strength
            begin = strength / 5  # of neighbours the strengths are similar
            for sides, before, difference in zip(compared, unsteered, own, strict=False):
                vector = SteeringVector(((own.sum(0) - difference) / (len(own) - 1)).float(), layer, 1.0)
                favour[layer] += preference(sides, vector, strength) - before
        if progress is not None:
            progress(1)
    return favour / len(compared)


def _read(form: PromptFormat, pair: Pair, answers: Sequence[Encoding], max_length: int) -> list[list[int]]:
    """The tokens whose last is read, concise and verbose: of the prompts that ask for either side, or of prompt and answer."""
    if not (pair.concise_prompt and pair.verbose_prompt):
        return [tokens for tokens, _ in answers]
    room = longest_prompt(form, max_length, 0)
    return [prompt_tokens(form, prompt)[-room:] for prompt in (pair.concise_prompt, pair.verbose_prompt)]


def _encode(form: PromptFormat, prompt: str | None, answer: str, max_length: int) -> Encoding:
    """Tokens of prompt and answer without an end token, and the position from which the answer is predicted."""
    if prompt is None:
        tokens = prompt_tokens(replace(form, template=False), answer)[-longest_prompt(form, max_length, 0) :]
        if len(tokens) < 2:
            raise TaskError("a side has one token only; give at least two, or a prompt.")
        return tokens, 0
    target = target_tokens(form, answer)[:-1]
    room = longest_prompt(form, max_length - len(target), len(target))
    if room < 1 or not target:
        raise TaskError(
            f"the answer has {len(target)} tokens, of at most {max_length} with its prompt; give a larger `max_length`."
        )
    before = prompt_tokens(form, prompt)[-room:]
    return [*before, *target], len(before) - 1


@dataclass(frozen=True)
class SteeredScore:
    """Answers of one arm: none, steered, reversed or random. tokens: their mean length. strength: the factor on the vector."""

    arm: str
    strength: float
    tokens: float
    results: tuple[EvalResult, ...]

    def mean(self, metric: str) -> float:
        """The mean of a metric over the tasks."""
        return sum(result.scores[metric] for result in self.results) / len(self.results)


def steered_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vector: SteeringVector,
    tasks: Sequence[Task],
    settings: EvalSettings,
    *,
    metrics: Sequence[str | Metric] = DEFAULT_METRICS,
    draws: int = 1,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> list[SteeredScore]:
    """Answers without the vector, with it, with its opposite, and with `draws` random vectors of its length, which show what
    any vector would do. Raises what `steered` and `evaluate` raise."""
    norm, arms = float(vector.values.norm()), [("none", vector, 0.0)]
    arms += [("steered", vector, vector.strength), ("reversed", vector, -vector.strength)]
    for draw in range(draws):
        drawn = torch.randn(vector.width, generator=seeded(seed, "steering", draw))
        arms.append(("random", replace(vector, values=drawn * (norm / float(drawn.norm()))), vector.strength))
    scores = []
    for arm, chosen, strength in arms:
        with steered(model, chosen, strength):
            results = evaluate(model, tokenizer, tasks, None, settings, progress, metrics)
        answers = [answer for result in results for _, answer in result.predictions]
        lengths = [len(cast(list[int], tokenizer(answer, add_special_tokens=False)["input_ids"])) for answer in answers]
        scores.append(SteeredScore(arm, strength, sum(lengths) / max(1, len(lengths)), tuple(results)))
    return scores
