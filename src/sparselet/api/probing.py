"""`probe`: how sparse a model's hidden states are over rows of tasks and texts."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparselet.activations.correlation import Correlation
from sparselet.activations.probe import ProbeRow
from sparselet.activations.probe import probe as probe_model
from sparselet.activations.summary import STATISTICS, LayerSparsity, ProbeGroup, summarize
from sparselet.api.opening import open_experts, read_checked
from sparselet.api.progress import ProgressCallback, StepCounter
from sparselet.apply import apply_temporarily
from sparselet.errors import ConfigError
from sparselet.intervals import MeanInterval
from sparselet.merging.engine.plan import ExpertSource
from sparselet.models import load_model, load_tokenizer
from sparselet.report.analysis_page import Picture, Section, write_page
from sparselet.report.diagrams import cloud
from sparselet.result_table import ResultTable, ShownAsTables
from sparselet.setting_checks import check_at_least, check_seed, check_settings
from sparselet.tasks.task import Task, load_task
from sparselet.workflows.probing import demonstrated_rows, probe_rows, read_texts, shuffled_rows, text_rows

SPARSITY = (
    "Of each hidden state h: Hoyer and Gini of |h|, the share of the energy in the largest 5 and 10 % of the channels, "
    "the effective rank (small where few channels hold the energy), the kurtosis (3 of a Gaussian), the share of channels"
    " above mean + standard deviation, and the largest channel's share. A few channels are large in every state of a "
    "trained model and lead all of these; what is left without them stands beside. A Gaussian vector of the same width "
    "shows the last line. Intervals are 95 % bootstraps over rows; differences are paired, of the same rows in another "
    "form."
)
SPARSITY_AND_LOSS = (
    "Spearman's rank correlation of a row's sparsity with its loss: over all rows, where groups that differ in both make "
    "one, and within groups, where they cannot."
)


@dataclass(frozen=True)
class ProbeSettings:
    """What is probed. Raises ConfigError."""

    layers: tuple[int, ...] = (-1,)
    """Numbers of the hidden states: 0 is the embedding, k the output of block k; negative ones count from the last."""
    positions: tuple[int, ...] = (-1,)
    """Tokens of the prompt, negative ones from its last; a row's statistics are the means over them."""
    rows: int | None = 200
    """Use only the first rows of each task or file."""
    split: str = "test"
    """The split of the tasks."""
    shuffled: bool = False
    """Probe the same rows with the prompt's tokens in random order too."""
    demonstrations: int = 0
    """Probe the same rows after so many demonstrations from the training split too."""
    chat_template: bool = False
    """Put prompts through the tokenizer's chat template."""
    max_input_length: int = 1024
    """Tokens of a prompt; longer ones are cut from the left."""
    outliers: float = 0.01
    """Fraction of the channels that count as outliers."""
    seed: int = 0
    """Of shuffles, demonstrations and bootstraps."""

    def __post_init__(self) -> None:
        check_settings(self)
        check_at_least(self, 1, "rows", "max_input_length")
        check_at_least(self, 0, "demonstrations")
        check_seed(self.seed)
        if not self.layers or not self.positions:
            raise ConfigError("layers and positions must name at least one each.")
        if not 0 < self.outliers < 0.5:
            raise ConfigError(f"outliers must be above 0 and below 0.5, got {self.outliers}.")


@dataclass(frozen=True)
class Probed(ShownAsTables):
    """Sparsity of a model's hidden states by group of rows. losses: [rows], NaN where nothing was scored."""

    model: str
    groups: tuple[ProbeGroup, ...]
    layers: tuple[LayerSparsity, ...]
    losses: tuple[float, ...]

    def tables(self) -> tuple[ResultTable, ...]:
        """A table of statistics for each layer, raw and without outliers; one of correlations with the loss."""
        tables = [self._statistics(layer) for layer in self.layers]
        return (*tables, self._correlations()) if self.layers[0].pooled else tuple(tables)

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        layers = [{**asdict(layer), "by_row": {k: v.tolist() for k, v in layer.by_row.items()}} for layer in self.layers]
        return {"model": self.model, "groups": [asdict(g) for g in self.groups], "layers": layers, "losses": list(self.losses)}

    def write_page(self, file: str | Path) -> Path:
        """Write pictures and tables as one HTML page. Raises WriteFailed."""
        *statistics, last = self.tables()
        statistics = statistics if self.layers[0].pooled else [*statistics, last]
        sections = [Section(table.title, "" if i else SPARSITY, [], table) for i, table in enumerate(statistics)]
        if self.layers[0].pooled:
            clouds = [self._cloud(layer) for layer in self.layers]
            sections.append(Section("Sparsity and loss", SPARSITY_AND_LOSS, clouds, last))
        return write_page(file, "How sparse hidden states are", f"{self.model}, {len(self.losses)} rows.", sections)

    def _statistics(self, layer: LayerSparsity) -> ResultTable:
        rows: list[tuple[object, ...]] = []
        for group in layer.groups:
            rows.append((group.name, *(_interval(mean) for mean in group.means.values())))
            if group.difference is not None:
                pair = next(g.pair for g in self.groups if g.name == group.name)
                rows.append((f"  minus {pair}", *(_interval(mean, sign=True) for mean in group.difference.values())))
        rows.append(("a Gaussian", *(f"{layer.null[name]:.3f}" for name in STATISTICS)))
        columns = ("", *(name.replace("_", " ") for name in STATISTICS))
        return ResultTable(_title(layer), columns, tuple(rows))

    def _correlations(self) -> ResultTable:
        rows = []
        for layer in self.layers:
            for name, pooled in layer.pooled.items():
                within = layer.within[name]
                rows.append((f"{_title(layer)}: {name.replace('_', ' ')}", _rho(pooled), _rho(within)))
        return ResultTable("Spearman's ρ with the row's loss", ("", "all rows", "within groups"), tuple(rows))

    def _cloud(self, layer: LayerSparsity) -> Picture:
        series, start = {}, 0
        for group in self.groups:
            chosen = slice(start, start + group.count)
            start += group.count
            pairs = zip(layer.by_row["hoyer"][chosen].tolist(), self.losses[chosen], strict=True)
            series[group.name] = [(x, y) for x, y in pairs if y == y]
        label = f"{_title(layer)}: Hoyer sparsity of a row's state and the loss of what follows it"
        return Picture(lambda width: cloud(series, width, x_label="Hoyer sparsity", y_label="loss, nats per token"), label)


def probe(
    model: str,
    tasks: str | Path | Task | Sequence[str | Path | Task] = (),
    *,
    texts: Sequence[str | Path] = (),
    expert: ExpertSource | None = None,
    settings: ProbeSettings | None = None,
    columns: Mapping[str, str] | None = None,
    dtype: str = "float32",
    progress: ProgressCallback | None = None,
) -> Probed:
    """Measure how sparse hidden states are, raw and without outlier channels, and what that goes with.

        sl.probe("packaged:smollm2-135m", "my-task", settings=sl.ProbeSettings(shuffled=True))

    model: a causal model by hub name or directory. tasks: one or several; the state is that of the prompt, the loss that of
        the target. texts: files, .txt with a text a line or rows with a field `text`; the state is that of the first half of a
        text, the loss that of the second. expert: of any kind, written into the model meanwhile.
    settings: layers, positions, rows, and other forms of the same rows. columns: the names of `input` and `target` in rows.
    progress: reports rows.
    Raises ConfigError (nothing to probe, an encoder-decoder model), TaskError, ModelError, ArgumentError (no such layer), and
    what opening and applying the expert raise.
    """
    settings = settings or ProbeSettings()
    sources = [tasks] if isinstance(tasks, str | Path | Task) else list(tasks)
    if not sources and not texts:
        raise ConfigError("there is nothing to probe; set `task` or `texts`.")
    splits = (settings.split, *(("train",) if settings.demonstrations and settings.split != "train" else ()))
    loaded = [task if isinstance(task, Task) else load_task(str(task), splits, columns) for task in sources]
    written = {Path(file).name: read_texts(file, settings.rows) for file in texts}
    opened = None if expert is None else read_checked(open_experts([expert], model)[0])
    base, tokenizer = load_model(model, dtype), load_tokenizer(model)
    groups, rows = [], []

    def add(name: str, own: list[ProbeRow], pair: str | None = None) -> None:
        groups.append(ProbeGroup(name, len(own), pair))
        rows.extend(own)
        if settings.shuffled and pair is None:
            add(f"{name}, shuffled", shuffled_rows(own, settings.seed), name)

    form: dict[str, Any] = {"chat_template": settings.chat_template, "max_length": settings.max_input_length}
    for task in loaded:
        plain = task.rows(settings.split, settings.rows)
        add(task.name, probe_rows(base, tokenizer, plain, **form))
        if settings.demonstrations:
            shown = demonstrated_rows(plain, task.rows("train"), settings.demonstrations, settings.seed)
            add(f"{task.name}, {settings.demonstrations} demonstrations", probe_rows(base, tokenizer, shown, **form), task.name)
    for name, lines in written.items():
        add(name, text_rows(base, tokenizer, lines, max_length=settings.max_input_length))
    counter = StepCounter(len(rows), progress)
    with apply_temporarily(base, opened) if opened is not None else contextlib.nullcontext():
        probed = probe_model(base, rows, settings.layers, positions=settings.positions, progress=counter.advance)
    layers = summarize(probed, groups, settings.outliers, settings.seed)
    return Probed(model, tuple(groups), tuple(layers), tuple(probed.losses.tolist()))


def _title(layer: LayerSparsity) -> str:
    return f"Layer {layer.layer}, {f'without {len(layer.removed)} outlier channels' if layer.removed else 'raw'}"


def _interval(mean: MeanInterval, sign: bool = False) -> str:
    digits = 3 if abs(mean.mean) < 10 else 1
    half = (mean.high - mean.low) / 2
    return f"{mean.mean:{'+' if sign else ''}.{digits}f} ± {half:.{digits}f}"


def _rho(correlation: Correlation) -> str:
    return f"{correlation.rho:+.2f} ({correlation.low:+.2f} to {correlation.high:+.2f})"
