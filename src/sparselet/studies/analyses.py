"""ANALYSES: functions of experts, tasks and the base model that a study's tables take numbers from."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparselet.activations.correlation import spearman
from sparselet.activations.probe import ProbeRow, probe
from sparselet.activations.statistics import gaussian_sparsity, outlier_channels, sparsity, without_channels
from sparselet.adapter import require_profile
from sparselet.analysis.compare import compare as compare_experts
from sparselet.analysis.concentration import Concentration, Null
from sparselet.analysis.locate import locate as locate_expert
from sparselet.errors import ConfigError
from sparselet.evaluation import EvalSettings
from sparselet.evaluation.metrics import rouge_l_of_each
from sparselet.expert import Expert
from sparselet.merging import merge
from sparselet.merging.engine.plan import MergePlan
from sparselet.merging.grouping import change_cosines, greedy_groups
from sparselet.profiles.pool import pool_profiles
from sparselet.profiles.router import Router, prompt_similarity
from sparselet.studies.pretraining import pretrain
from sparselet.studies.sparse_regions.fast_slow_runs import fast_slow_run
from sparselet.studies.sparse_regions.frontier_runs import frontier
from sparselet.studies.sparse_regions.isolation_runs import isolation_run
from sparselet.studies.sparse_regions.scaling_runs import scaling_run
from sparselet.studies.sparse_regions.steering_runs import steering_run
from sparselet.tasks.task import Task
from sparselet.workflows.graft import GraftSettings, graft_curve, measured_rows
from sparselet.workflows.probing import demonstrated_rows, probe_rows, random_rows, shuffled_rows
from sparselet.workflows.routing import answer_prompts, answering_experts, route_prompts

Numbers = dict[str, float]


@dataclass(frozen=True)
class AnalysisContext:
    """What an analysis works on. model: the base model. progress: called with the fraction that is done."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    experts: Sequence[Expert]
    tasks: Sequence[Task]
    progress: Callable[[float], None]


def run_analysis(name: str, context: AnalysisContext, settings: Mapping[str, Any]) -> Numbers:
    """The numbers of one of ANALYSES by name. Raises ConfigError for an unknown one."""
    if name not in ANALYSES:
        raise ConfigError(f"there is no analysis {name!r}; there are {', '.join(ANALYSES)}.")
    return ANALYSES[name](context, **settings)


def locate(context: AnalysisContext) -> Numbers:
    """How an expert's change is concentrated, in percent of its entries, beside the closed forms of Gaussian and Laplace draws.

    within …: of the entries that its masks select.
    """
    (expert,) = context.experts
    location = locate_expert(expert)
    numbers: Numbers = {}
    parts = {"": location.whole, "within ": location.selected, "Gaussian ": location.gaussian, "Laplace ": location.laplace}
    for prefix, part in parts.items():
        numbers |= {f"{prefix}{name}": value for name, value in _concentration(part).items()}
    small = 100 * location.unchanged.small
    return numbers | {"unchanged": 100 * location.unchanged.zero, "below 1e-5": small, "above 1e-5": 100 - small}


def compare(context: AnalysisContext, density: float = 0.01) -> Numbers:
    """Where two experts' largest entries meet, beside chance, in percent: Jaccard index, signs, cosine, directions."""
    first, second = context.experts
    both = compare_experts(first, second, density=density)
    largest = both.largest
    return {
        "jaccard": 100 * largest.jaccard,
        "chance": 100 * largest.chance,
        "beyond chance": 100 * (largest.jaccard - largest.chance),
        "signs": 100 * largest.sign_agreement,
        "signs by chance": 50.0,
        "cosine": 100 * both.masks.cosine,
        "directions": 100 * both.directions[0],
        "directions by chance": 100 * both.directions[1],
    }


def graft(
    context: AnalysisContext, rows: int, fractions: Sequence[float], parts: Sequence[str], max_new_tokens: int
) -> Numbers:
    """Rouge-L × 100 with parts of a change in the base model: `top 0.01`, `random_rescaled 0.01`, …; `base`, `whole`, and
    `advantage 0.01`, how much better the largest entries are than as many random ones, rescaled."""
    (expert,), (task,) = context.experts, context.tasks
    settings = GraftSettings(fractions=tuple(fractions), parts=tuple(parts))
    total, answered = measured_rows(len(task.rows("test", rows)), settings), 0.0

    def progress(count: float) -> None:
        nonlocal answered
        answered += count
        context.progress(answered / total)

    eval_settings = EvalSettings(rows=rows, chat_template=False, max_new_tokens=max_new_tokens)
    curve = graft_curve(context.model, context.tokenizer, expert, task, settings, eval_settings, progress)
    numbers = {"base": curve.base.mean, "whole": curve.whole.mean}
    numbers |= {f"{point.part} {point.fraction:g}": point.score.mean for point in curve.points}
    return numbers | {f"advantage {fraction:g}": interval.mean for fraction, interval in curve.advantage.items()}


def probe_task(context: AnalysisContext, rows: int, layer: int = -1, demonstrations: int = 0) -> Numbers:
    """Sparsity of hidden states at the last prompt token of a task's rows, in percent, raw and without outliers (`rest`).

    natural, shuffled, random: of the rows, of the same tokens in random order, and of random tokens in their stead.
    difference: of shuffled and natural, row by row. loss: Spearman's correlation of sparsity and loss over the natural rows.
    Gaussian: of as many channels. demonstrations: put before each row.
    """
    (task,) = context.tasks
    chosen = task.rows("test", rows)
    if demonstrations:
        chosen = demonstrated_rows(chosen, task.rows("train"), demonstrations)
    natural = probe_rows(context.model, context.tokenizer, chosen)
    sets: dict[str, Sequence[ProbeRow]] = {"natural": natural, "shuffled": shuffled_rows(natural)}
    sets["random"] = random_rows(natural, len(context.tokenizer))
    probed = {name: probe(context.model, own, [layer]) for name, own in sets.items()}
    outliers = outlier_channels(probed["natural"].states[0, :, 0])
    numbers: Numbers = {}
    for view in ("raw", "rest"):
        states = {name: p.states[0, :, 0] for name, p in probed.items()}
        if view == "rest":
            states = {name: without_channels(state, outliers) for name, state in states.items()}
        measured = {name: sparsity(state) for name, state in states.items()}
        for statistic in ("hoyer", "gini", "top5", "effective_rank", "channel"):
            values = {name: vars(s)[statistic] for name, s in measured.items()}
            numbers |= {f"{view} {statistic} {name}": 100 * float(v.mean()) for name, v in values.items()}
            numbers[f"{view} {statistic} difference"] = 100 * float((values["shuffled"] - values["natural"]).mean())
        loss = spearman(measured["natural"].hoyer.numpy(), probed["natural"].losses.numpy())
        numbers[f"{view} hoyer loss"] = 100 * loss.rho
    null = gaussian_sparsity(probed["natural"].states.shape[-1])
    gaussian = {f"Gaussian {name}": 100 * null[name] for name in ("hoyer", "gini", "top5", "effective_rank", "channel")}
    return numbers | gaussian | {"no correlation": 0.0}


def _concentration(part: Concentration | Null) -> Numbers:
    """In percent: the fewest entries with 50, 90 and 99 % of the energy, the energy of the largest entries, and indices."""
    numbers = {f"{100 * energy:g} %": 100 * entries for energy, entries in part.carrying.items()}
    numbers |= {f"top {100 * entries:g} %": 100 * energy for entries, energy in part.top.items()}
    return numbers | {"Gini": 100 * part.gini, "Hoyer": 100 * part.hoyer}


def routed(
    context: AnalysisContext,
    rows: int,
    max_input_length: int,
    max_new_tokens: int,
    groups: int = 0,
    by: Literal["prompts", "change"] = "prompts",
    method: str = "regmean",
    fallback: str = "nearest",
) -> Numbers:
    """Rouge-L × 100 of a task's rows, each answered by the expert that it is routed to; `right` and `unsure` in percent.

    groups: into how many merges by `method` the experts are grouped; 0 leaves them apart. by: what makes experts alike, as in
    `merge_groups`. right: of the rows, those routed to the task's own expert or its group; 0 where no expert is of the task.
    fallback: as of RouteSettings.
    """
    (task,) = context.tasks
    experts, chosen = context.experts, task.rows("test", rows)
    profiles = [require_profile(expert, str(i), "experts are routed by profiles") for i, expert in enumerate(experts)]
    members = [[i] for i in range(len(experts))]
    if groups:
        alike = change_cosines(MergePlan(experts, method, None, None)) if by == "change" else prompt_similarity(profiles)
        members = greedy_groups(alike, groups)
    by_name = {str(number): group for number, group in enumerate(members)}
    router = Router({name: pool_profiles([profiles[i] for i in group]) for name, group in by_name.items()})
    prompts = [row.input for row in chosen]
    routes = route_prompts(router, context.model, context.tokenizer, prompts, False, max_input_length)
    at: dict[tuple[str, ...], list[int]] = defaultdict(list)  # rows by who answers
    for i, route in enumerate(routes):
        at[answering_experts(route, fallback)].append(i)
    settings = EvalSettings(chat_template=False, max_input_length=max_input_length, max_new_tokens=max_new_tokens)
    answers: dict[int, str] = {}
    for who, places in at.items():
        parts = [experts[i] for name in who for i in by_name[name]]
        adapter = None if not parts else parts[0] if len(parts) == 1 else merge(parts, method)
        texts = answer_prompts(context.model, context.tokenizer, adapter, [prompts[i] for i in places], settings, False)
        answers |= dict(zip(places, texts, strict=True))
        context.progress(len(answers) / len(chosen))
    scores = rouge_l_of_each([answers[i] for i in range(len(chosen))], [row.target for row in chosen])
    own = {name for name, group in by_name.items() if any(profiles[i].task == task.name for i in group)}
    right = [route.expert in own for route in routes]
    unsure = [route.unsure for route in routes]
    percent = {"rougeL": scores, "right": right, "unsure": unsure}
    return {name: 100 * sum(values) / len(chosen) for name, values in percent.items()}


ANALYSES: dict[str, Callable[..., Numbers]] = {
    "locate": locate,
    "compare": compare,
    "graft": graft,
    "probe": probe_task,
    "routed": routed,
    "frontier": lambda context, **settings: frontier(context.model, context.tokenizer, **settings, progress=context.progress),
    "fast_slow": lambda context, **settings: fast_slow_run(
        (context.model, context.tokenizer), *context.tasks, **settings, progress=context.progress
    ),
    "isolation": lambda context, **settings: isolation_run(
        (context.model, context.tokenizer), context.tasks, **settings, progress=context.progress
    ),
    "steering": lambda context, **settings: steering_run(
        (context.model, context.tokenizer), **settings, progress=context.progress
    ),
    "scaling": lambda context, **settings: scaling_run(**settings, progress=context.progress),
    "pretrain": lambda context, **settings: pretrain(**settings, progress=context.progress),
}
