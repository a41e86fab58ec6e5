"""What a name means: a directory here, or an adapter or checkpoint on the hub.

A hub name is `org/name`, or `org/name@revision` with a branch, tag or commit. Fetched files lie in the hub library's cache, one
snapshot per commit; files that other programs fetched there are used as well. Only the files that an adapter or a checkpoint
consists of are fetched, none that could run code.
"""

import contextlib
import glob
import re
import shutil
import warnings
from pathlib import Path

from sparselet.adapter import CONFIG_FILE
from sparselet.errors import FormatError, ModelError
from sparselet.hub.client import http_status, hub_api, hub_error_text, hub_library
from sparselet.hub.contents import check_directory, choose_files
from sparselet.io.atomic import atomic_directory, write_text
from sparselet.io.paths import check_output
from sparselet.io.write_errors import convert_write_errors

_SHAPE = re.compile(r"[\w.-]+/[\w.-]+(@.+)?", re.ASCII)
_NAME = re.compile(r"(\w[\w.-]{0,95}/)?\w[\w.-]{0,95}", re.ASCII)  # the oldest models have no organisation
_REVISION = re.compile(r"\w[\w.+/-]{0,199}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


class CachedCopyWarning(UserWarning):
    """The hub does not answer, so files that were fetched earlier are used."""


def local_directory(name: str | Path, bare: bool = False) -> Path | None:
    """The directory that a name means: itself, or the snapshot of a hub name, which is fetched; None for any other name.

    bare: names without an organisation, such as gpt2, are hub names too. Raises what `fetch` raises.
    """
    if Path(name).is_dir():
        return Path(name)
    return fetch(str(name)) if is_hub_name(name, bare) else None


def is_hub_name(name: str | Path, bare: bool = False) -> bool:
    """Whether a name that is not on the disk can be one of the hub. bare: without an organisation, such as gpt2, too."""
    shaped = _SHAPE.fullmatch(str(name) if not bare or "/" in str(name) else f"org/{name}")
    return bool(shaped) and not str(name).startswith(".") and not Path(name).exists()


def parse_name(name: str) -> tuple[str, str]:
    """`org/name[@revision]` as repository and revision; the revision is `main` when none is given. Raises ModelError."""
    repository, at, revision = name.partition("@")
    revision = revision if at else "main"
    if not _NAME.fullmatch(repository) or ".." in repository or "--" in repository:
        raise ModelError(f"{name!r} is not a hub name; expected org/name or org/name@revision.")
    if not _REVISION.fullmatch(revision) or ".." in revision:
        raise ModelError(f"{name!r}: {revision!r} is not a revision; expected a branch, tag or commit.")
    return repository, revision


def fetch(name: str) -> Path:
    """The directory of an adapter or checkpoint on the hub, fetched unless this commit is in the hub library's cache already.

    name: `org/name` or `org/name@revision`. The directory is a snapshot of that cache (HF_HOME, HF_HUB_CACHE), whose files are
    links to its blobs: the files that were checked, and any that other programs fetched. A second call resumes an interrupted
    fetch. A branch is looked up each time; if the hub does not answer, the snapshot in the cache is used, with a
    CachedCopyWarning unless HF_HUB_OFFLINE is set.

    Raises ModelError (not a hub name, no such repository or revision, no access, no network and not in the cache, not an
    adapter or checkpoint in safetensors), FormatError for damaged files, MissingExtra, WriteFailed.
    """
    repository, revision = parse_name(name)
    api = hub_api()
    if _COMMIT.fullmatch(revision):
        with contextlib.suppress(ModelError, FormatError):  # incomplete, so it is fetched
            return _cached(name, f"cannot fetch {name}")
    try:
        info = api.model_info(repository, revision=revision)
    except Exception as error:  # the hub library's errors, and those of its HTTP library
        return _fetched_before(name, error)
    commit = info.sha or ""
    if not _COMMIT.fullmatch(commit):
        raise ModelError(f"cannot fetch {name}: the hub calls its commit {commit!r:.80}.")
    directory = _download(name, commit, choose_files(name, [sibling.rfilename for sibling in info.siblings or []]))
    try:
        check_directory(directory)
    except FormatError as error:
        raise type(error)(f"{name} is damaged, on the hub or in its cache: {error}") from error
    return directory


def pull(name: str, output: str | Path) -> Path:
    """Fetch an adapter or checkpoint into the directory `output`, which appears once it is complete and checked.

    Raises OutputExists, and what `fetch` raises.
    """
    check_output(output)
    source = fetch(name)
    with atomic_directory(output) as directory:
        for file in choose_files(name, [path.name for path in source.iterdir()]):
            shutil.copyfile(source / file, directory / file)
        check_directory(directory)
    return Path(output)


def _fetched_before(name: str, error: Exception) -> Path:
    """The cache's snapshot of a name, after `error`. Raises ModelError if the hub answered, or the cache has none."""
    errors, status = hub_library().errors, http_status(error)
    refused = 400 <= status < 500 and status != 429  # too many requests
    if refused or not isinstance(error, (OSError, errors.HTTPError)):
        raise ModelError(f"cannot fetch {name}: {hub_error_text(error)}") from error
    try:
        directory = _cached(name, f"cannot fetch {name}, and it was not fetched before: {hub_error_text(error)}")
    except FormatError as damage:
        raise type(damage)(f"{name} is in the hub's cache, but not whole ({hub_error_text(error)}): {damage}") from damage
    if not isinstance(error, errors.OfflineModeIsEnabled):
        message = f"the hub does not answer ({hub_error_text(error)}); using {name} as fetched before, commit {directory.name}."
        warnings.warn(message, CachedCopyWarning, stacklevel=3)
    return directory


def _cached(name: str, absent: str) -> Path:
    """The cache's snapshot of a name, checked. Raises ModelError with the message `absent`, and FormatError."""
    repository, revision = parse_name(name)
    for file in (CONFIG_FILE, "config.json"):
        path = hub_library().try_to_load_from_cache(repository, file, revision=revision)
        if isinstance(path, str):
            directory = Path(path).parent
            choose_files(name, [path.name for path in directory.iterdir()])
            check_directory(directory)
            return directory
    raise ModelError(absent)


def _download(name: str, commit: str, files: list[str]) -> Path:
    """The snapshot of a commit in the hub library's cache, with all `files`. Raises ModelError, WriteFailed."""
    hub, (repository, revision) = hub_library(), parse_name(name)
    with convert_write_errors(hub.constants.HF_HUB_CACHE):
        try:
            directory = Path(
                hub.snapshot_download(
                    repository,
                    revision=commit,
                    allow_patterns=[glob.escape(file) for file in files],
                    library_name="sparselet",
                )
            )
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:  # an error of the disk
                raise
            raise ModelError(f"cannot fetch {name} whole: {hub_error_text(error)} Run again to go on.") from error
        absent = [file for file in files if not (directory / file).is_file()]
        if absent:  # the hub library returns an incomplete snapshot when the connection is lost
            raise ModelError(f"cannot fetch {name} whole: {absent[0]} did not come. Run again to go on.")
        reference = directory.parent.parent / "refs" / revision
        if revision != commit and not (reference.is_file() and reference.read_text() == commit):
            write_text(reference, commit)  # as the library does when it looks up a branch itself
    return directory
