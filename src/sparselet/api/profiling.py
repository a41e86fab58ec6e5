"""`profile`: what an expert's own rows look like to the model, for merging by `regmean` and for routing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparselet.api.opening import base_of, chat_template_of, name_of, open_experts, read_checked
from sparselet.api.progress import ProgressCallback, StepCounter
from sparselet.apply import apply_temporarily
from sparselet.errors import ConfigError, TaskError
from sparselet.generation.prompts import prompt_format
from sparselet.io.paths import check_output
from sparselet.merging.engine.plan import ExpertSource
from sparselet.models import PACKAGED, load_model, load_tokenizer
from sparselet.profiles.file import PROFILE_FILE, write_profile
from sparselet.profiles.profile import RANK, Profile
from sparselet.result_table import ResultTable, ShownAsTable
from sparselet.tasks.task import Task, load_task
from sparselet.training.collate import encode
from sparselet.training.profiling import TOKENS, choose_rows, profile_base, profile_expert


@dataclass(frozen=True)
class ProfileSettings:
    """How a profile is made."""

    tokens: int = TOKENS
    """Tokens of prompts and targets that are read, at most."""
    rank: int = RANK
    """Rank of the stored moments, beside their diagonal."""
    full: bool = False
    """Store the moments in full: larger files, and merges that are a little better."""
    rows: int | None = None
    """Use only the first rows of each task's training split."""
    max_input_length: int = 2048
    """Tokens of a prompt; longer ones are cut from the left."""
    chat_template: bool | None = None
    """Use the tokenizer's chat template, where it has one; by default as the expert was trained, or else yes."""


@dataclass(frozen=True)
class ProfileResult(ShownAsTable):
    """A profile, and the file that it was written to, None for one in memory."""

    name: str
    profile: Profile
    path: Path | None

    def table(self) -> ResultTable:
        """What was profiled."""
        profile = self.profile
        size = None if self.path is None else f"{self.path.stat().st_size / 2**20:.1f} MiB"
        rows = (
            ("task", profile.task),
            ("rows", f"{profile.rows:,}, {profile.tokens:,} tokens; {profile.prompts.count} prompts"),
            ("targets", f"{len(profile.inputs)}, with {len(profile.moments)} different inputs"),
            ("rank", max(len(moment.factor) for moment in profile.moments.values())),
            ("size", size),
        )
        return ResultTable(f"Profile of {self.name}", (), tuple((key, value) for key, value in rows if value is not None))


def profile(
    expert: ExpertSource,
    tasks: str | Path | Task | Sequence[str | Path | Task],
    *,
    out: str | Path | None = None,
    base: str | None = None,
    settings: ProfileSettings | None = None,
    columns: Mapping[str, str] | None = None,
    dtype: str = "float32",
    progress: ProgressCallback | None = None,
) -> ProfileResult:
    """Profile an expert of any kind on training rows of its own task or tasks.

        sl.profile("their/lora-directory", "my-task")

    expert: in memory, which keeps the profile as its `profile`; a directory, which gets `profile.safetensors`; or a hub name.
    out: the file to write instead. A merge reads the profile in an expert's directory: pull one from the hub first.
    base: the base model; by default the one that the expert records. dtype: to load it in.
    columns: the names of `input` and `target` in rows. progress: reports rows.
    Raises ConfigError, TaskError, ModelError, OutputExists, WriteFailed, and what opening and applying the expert raise.
    """
    settings = settings or ProfileSettings()
    file = _output(expert, out)
    model_name = base or base_of(open_experts([expert])) or PACKAGED
    opened = read_checked(open_experts([expert], model_name)[0])
    template = chat_template_of([opened]) if settings.chat_template is None else settings.chat_template
    sources = [tasks] if isinstance(tasks, str | Path | Task) else list(tasks)
    loaded = [task if isinstance(task, Task) else load_task(str(task), ("train",), columns) for task in sources]
    model, tokenizer = load_model(model_name, dtype), load_tokenizer(model_name)
    form = prompt_format(model, tokenizer, template)
    rows = [
        row
        for task in loaded
        for row in encode(task.rows("train", settings.rows), form, settings.max_input_length, f"task {task.name}, split train")
    ]
    if not rows:
        raise TaskError("the training split has no rows, so there is nothing to profile.")
    counter = StepCounter(len(choose_rows(rows, settings.tokens)), progress)
    base_side = profile_base(model, rows, opened)
    with apply_temporarily(model, opened):
        profiled = profile_expert(
            model,
            form,
            rows,
            base_side,
            tokens=settings.tokens,
            rank=None if settings.full else settings.rank,
            task="+".join(task.name for task in loaded),
            progress=counter.step,
        )
    if file is not None:
        write_profile(profiled, file)
    else:
        opened.profile = profiled
    return ProfileResult(name_of(expert), profiled, file)


def _output(expert: ExpertSource, out: str | Path | None) -> Path | None:
    """The file to write, None for an expert in memory. Raises ConfigError, OutputExists, WriteFailed."""
    if out is None and not isinstance(expert, str | Path):
        return None
    if out is None and not Path(str(expert)).is_dir():
        raise ConfigError(f"{expert} is not a directory here; pull it first, or set `out` to a file for its profile.")
    file = Path(str(expert)) / PROFILE_FILE if out is None else Path(out)
    check_output(file, directory=False)
    return file
