"""The directories of a training run: its output, and the work directory beside it, which holds checkpoints while it runs."""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparselet.errors import ConfigError, OutputExists
from sparselet.io.atomic import atomic_directory
from sparselet.io.json_files import read_object, write_json
from sparselet.io.paths import check_output, parents_of
from sparselet.io.temporaries import fitting_name, held, remove_directory, remove_left

logger = logging.getLogger("sparselet")

RUN_FILE = "run.json"  # in the work directory the run's identity, in the output its record
COMPLETE = "complete"  # marks a checkpoint that was written to its end
DATA, INITIAL, FROZEN = "data_fingerprint", "init_from_sha256", "freeze_sha256"  # of the identity, beside the settings


def work_directory(output: Path) -> Path:
    """Where a run keeps its checkpoints until it has finished."""
    if output.name in ("", ".."):
        output = Path(os.path.realpath(output))
    return output.with_name(fitting_name(output.parent, output.name, ".partial"))


def is_finished(output: Path, work: Path) -> bool:
    """Whether the output was written by a run that was killed before it had removed its work directory."""
    return os.path.isfile(output / RUN_FILE) and os.path.isdir(work)


def check_directories(output: Path, work: Path, resume: bool) -> None:
    """Raise OutputExists or WriteFailed for directories that a run cannot use, before anything is loaded."""
    remove_left(work)
    check_output(output)
    _check_work(work, resume)


@contextlib.contextmanager
def claimed(work: Path, identity: Mapping[str, Any], resume: bool) -> Iterator[Path | None]:
    """Within the block no other process uses the work directory. Yields the checkpoint to resume from, None to start.

    identity: the settings of the run and hashes of what they refer to. Without `resume` a run continues only where no
    checkpoint was saved, which is to start again. Raises OutputExists, ConfigError, WriteFailed.
    """
    with parents_of(work):
        remove_left(work)
        if work.exists() and _has_no_record(work):
            remove_directory(work)
        if not work.exists():
            with atomic_directory(work) as directory:
                write_json(directory / RUN_FILE, identity)
        with held(work) as acquired:
            if not acquired:
                raise OutputExists(f"another process trains in {work}. Wait for it, or choose another output.")
            _check_work(work, resume)
            _check_identity(work, identity)
            yield last_checkpoint(work)


def remove_finished(output: Path, work: Path, identity: Mapping[str, Any]) -> None:
    """Remove the work directory of a finished run. Raises OutputExists unless its identity is this one."""
    run = read_object(output / RUN_FILE)
    settings = {key: value for key, value in identity.items() if key not in (DATA, INITIAL, FROZEN)}
    if run.get(DATA) != identity[DATA] or run.get("settings") != settings:
        raise OutputExists(f"{output} exists already. Choose another output, or remove it first.")
    with held(work) as acquired:
        if acquired:
            remove_directory(work)
    logger.info("%s is complete: the run that wrote it was killed after that.", output)


def last_checkpoint(work: Path) -> Path | None:
    """The last complete checkpoint; incomplete ones are removed."""
    for path in work.glob("checkpoint-*"):
        if not (path / COMPLETE).is_file():
            shutil.rmtree(path, ignore_errors=True)
    return max(work.glob("checkpoint-*"), key=checkpoint_step, default=None)


def checkpoint_step(checkpoint: Path) -> int:
    """The optimizer steps done when a checkpoint was written, by its name."""
    return int(checkpoint.name.rpartition("-")[2])


def _check_work(work: Path, resume: bool) -> None:
    """Raise OutputExists for a work directory that this run must not use."""
    if os.path.lexists(work) and not work.is_dir():
        raise OutputExists(f"{work}, where checkpoints are kept, exists and is no directory. Choose another output.")
    if not resume and any(work.glob(f"checkpoint-*/{COMPLETE}")):
        raise OutputExists(f"{work} holds an unfinished run. Set `resume=True` to continue it, or remove it first.")
    if resume and not work.exists():
        logger.warning("there is nothing to resume at %s; training starts from the beginning.", work)


def _has_no_record(work: Path) -> bool:
    """Whether a work directory is that of a run that was killed before its identity was written."""
    return all(name.startswith(f".{RUN_FILE}.") and name.endswith(".tmp") for name in os.listdir(work))


def _check_identity(work: Path, identity: Mapping[str, Any]) -> None:
    """Raise ConfigError unless the run in the work directory has this identity."""
    try:
        previous = dict(json.loads((work / RUN_FILE).read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(f"{work / RUN_FILE} cannot be read, so the run cannot be resumed: {error}. Remove {work}.") from error
    changed = sorted(key for key in identity if previous.get(key) != identity[key])
    contents = {
        DATA: f"other rows in {identity['task']}",
        INITIAL: f"another adapter at {identity['init_from']}",
        FROZEN: f"other adapters at {identity['freeze']}",
    }
    if changed and set(changed) <= set(contents):
        raise ConfigError(f"the run at {work} was started with {contents[changed[0]]}. Remove it to start again.")
    if changed:
        key = changed[0]
        raise ConfigError(
            f"the run at {work} was started with {key} = {previous.get(key)!r}, not {identity[key]!r}. "
            "Resume with the settings it was started with, or remove it first."
        )
