"""Adapters and checkpoints on the hub: `fetch` and `pull` them by name, `push` an adapter.

A name is `org/name`, or `org/name@revision` with a branch, tag or commit. What is fetched lies in the hub library's cache, one
snapshot a commit; what others fetched there is used as well. Only the files that an adapter or a checkpoint consists of are
ever fetched, none that could run code.
"""

import contextlib
import fnmatch
import glob
import importlib
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparselet.adapter import CONFIG_FILE, WEIGHTS_FILE, AdapterFile, require_finite
from sparselet.errors import BadConfig, FormatError, MissingExtra, MissingFile, ModelError
from sparselet.hub.card import model_card, peft_card
from sparselet.io.atomic import atomic_directory, write_text
from sparselet.io.json_files import read_object
from sparselet.io.paths import check_inside, check_output
from sparselet.io.tensor_files import TensorFile
from sparselet.io.write_errors import convert_write_errors

CARD_FILE = "README.md"
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, "run.json", "merge_counts.safetensors", CARD_FILE)
CHECKPOINT_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "run.json",
    CARD_FILE,
)

_SHAPE = re.compile(r"[\w.-]+/[\w.-]+(@.+)?", re.ASCII)
_NAME = re.compile(r"(\w[\w.-]{0,95}/)?\w[\w.-]{0,95}", re.ASCII)  # the oldest models have no organisation
_REVISION = re.compile(r"\w[\w.+/-]{0,199}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


class CachedCopyWarning(UserWarning):
    """The hub could not be asked, so what was fetched earlier is used."""


@dataclass(frozen=True)
class Upload:
    """What `push` uploads where: the kind of adapter, its files, and a card where it has no README.md of its own."""

    repository: str
    branch: str
    kind: str
    files: Mapping[str, Path]
    card: str | None


def parse_name(name: str) -> tuple[str, str]:
    """`org/name[@revision]` as repository and revision; the revision is `main` when none is given. Raises ModelError."""
    repository, at, revision = name.partition("@")
    revision = revision if at else "main"
    if not _NAME.fullmatch(repository) or ".." in repository or "--" in repository:
        raise ModelError(f"{name!r} is not a hub name; expected org/name or org/name@revision.")
    if not _REVISION.fullmatch(revision) or ".." in revision:
        raise ModelError(f"{name!r}: {revision!r} is not a revision; expected a branch, tag or commit.")
    return repository, revision


def is_hub_name(name: str | Path, bare: bool = False) -> bool:
    """Whether a name that is not on the disk can be one of the hub. bare: without an organisation, such as gpt2, too."""
    shaped = _SHAPE.fullmatch(str(name) if not bare or "/" in str(name) else f"org/{name}")
    return bool(shaped) and not str(name).startswith(".") and not Path(name).exists()


def directory_of(name: str | Path) -> Path | None:
    """The directory of a path or hub name, which is fetched; None where a name is neither. Raises what `fetch` raises."""
    if Path(name).is_dir():
        return Path(name)
    return fetch(str(name)) if is_hub_name(name) else None


def fetch(name: str) -> Path:
    """The directory of an adapter or checkpoint on the hub, fetched unless this commit is in the hub library's cache already.

    name: `org/name` or `org/name@revision`. The directory is a snapshot of that cache (HF_HOME, HF_HUB_CACHE), whose files are
    links to its blobs; what was found whole and checked is in it, and maybe more that others fetched. An interrupted fetch
    goes on when called again. A branch is looked up each time; where the hub cannot be asked, the snapshot that the cache
    has is used, whoever fetched it, with a CachedCopyWarning unless HF_HUB_OFFLINE asks for it.

    Raises ModelError (not a hub name, no such repository or revision, no access, no network and not in the cache, not an
    adapter or checkpoint in safetensors), FormatError for damaged files, MissingExtra, WriteFailed.
    """
    repository, revision = parse_name(name)
    api = _api()
    if _COMMIT.fullmatch(revision):
        with contextlib.suppress(ModelError, FormatError):  # not whole, so it is fetched
            return _cached(name, f"cannot fetch {name}")
    try:
        info = api.model_info(repository, revision=revision)
    except Exception as error:  # the hub library's own kinds, and those of the HTTP library below it
        return _fetched_before(name, error)
    commit = info.sha or ""
    if not _COMMIT.fullmatch(commit):
        raise ModelError(f"cannot fetch {name}: the hub calls its commit {commit!r:.80}.")
    directory = _download(name, commit, _choose(name, [sibling.rfilename for sibling in info.siblings or []]))
    try:
        check(directory)
    except FormatError as error:
        raise type(error)(f"{name} is damaged, on the hub or in its cache: {error}") from error
    return directory


def pull(name: str, output: str | Path) -> Path:
    """Fetch an adapter or checkpoint into the directory `output`, which appears when it is whole and checked.

    Raises OutputExists, and what `fetch` raises.
    """
    check_output(output)
    source = fetch(name)
    with atomic_directory(output) as directory:
        for file in _choose(name, [path.name for path in source.iterdir()]):
            shutil.copyfile(source / file, directory / file)
        check(directory)
    return Path(output)


def prepare(path: str | Path, name: str, revision: str | None = None) -> Upload:
    """Check the adapter directory `path` in full and say what `push` would upload. Nothing is sent or written.

    Raises ModelError for a bad name, and FormatError.
    """
    path, (repository, branch) = Path(path), parse_name(f"{name}@{revision}" if revision else name)
    if "/" not in repository:
        raise ModelError(f"{name!r} is not a hub name to push to; expected org/name or org/name@revision.")
    if path.is_dir() and not (path / CONFIG_FILE).exists() and (path / "config.json").is_file():
        raise MissingFile(f"{path} is a checkpoint; only adapters are pushed, which have {CONFIG_FILE}.")
    kind = check(path)
    files = {file: check_inside(path, file) for file in ADAPTER_FILES if (path / file).is_file()}
    if CARD_FILE in files:
        return Upload(repository, branch, kind, files, None)
    size = sum(file.stat().st_size for file in files.values())
    config = read_object(check_inside(path, CONFIG_FILE))
    base = config.get("base_model_name_or_path")
    if isinstance(base, str) and Path(base).exists():  # or models/llama would be taken for a name on the hub
        config["base_model_name_or_path"] = str(Path(base).absolute())
    if kind == "sparse adapter":
        file = AdapterFile(path)
        card = model_card(repository, config, file.shapes, file.fingerprints, file.nnz, size)
    else:
        card = peft_card(repository, config, size)
    return Upload(repository, branch, kind, files, card)


def push(path: str | Path, name: str, *, private: bool = False, revision: str | None = None, message: str | None = None) -> str:
    """Upload an adapter to the hub in one commit, and return that commit's address.

    path: a sparse or merged adapter, or one of another PEFT method such as LoRA; it is checked in full first, and nothing is
    sent when the check fails. name: `org/name`; the repository is made if need be. private: for a new repository; one that
    is there and public is refused. revision: the branch to commit to, made if need be. message: of the commit.

    Only the adapter's own files are sent. Its README.md is the model card; without one a card is made from the metadata,
    which takes the place of an earlier one on the hub. Files of an earlier adapter that this one lacks are deleted there.

    Raises FormatError, ModelError, MissingExtra.
    """
    return send(prepare(path, name, revision), private, message)


def send(upload: Upload, private: bool = False, message: str | None = None) -> str:
    """Upload what was prepared, as `push` does."""
    hub, api = _hub(), _api()
    operations = [hub.CommitOperationAdd(name, str(place)) for name, place in upload.files.items()]
    if upload.card is not None:
        operations.append(hub.CommitOperationAdd(CARD_FILE, upload.card.encode()))
    try:
        api.create_repo(upload.repository, private=private or None, exist_ok=True)
        if private and not api.model_info(upload.repository).private:
            raise ModelError(f"{upload.repository} is there and public; make it private on its page, or take another name.")
        if upload.branch != "main" and not upload.branch.startswith("refs/"):
            api.create_branch(upload.repository, branch=upload.branch, exist_ok=True)
        there = {sibling.rfilename for sibling in api.model_info(upload.repository, revision=upload.branch).siblings or []}
        stale = sorted(there & set(ADAPTER_FILES) - {operation.path_in_repo for operation in operations})
        commit = api.create_commit(
            upload.repository,
            [*operations, *(hub.CommitOperationDelete(name) for name in stale)],
            commit_message=message or f"Upload {upload.kind}",
            revision=upload.branch,
        )
    except ModelError:
        raise
    except Exception as error:  # as in `fetch`
        raise ModelError(f"cannot push to {upload.repository}: {_reason(error)}") from error
    return str(commit.commit_url)


def check(path: str | Path) -> str:
    """Read a directory as far as needed to know that it is whole, and say what it is.

    "sparse adapter": read in full. "LORA adapter", or another PEFT method: configuration and all tensors. "checkpoint":
    configuration, headers and sizes of the weights, which must all be there. Raises FormatError.
    """
    path = Path(path)
    if (path / CONFIG_FILE).exists() or not (path / "config.json").is_file():
        kind = _peft_type(path)
        if kind != "SPARSELET":
            file = TensorFile(check_inside(path, WEIGHTS_FILE))
            for name in file.shapes:
                require_finite(file.read(name), f"{file.path}: {name}")
            return f"{kind} adapter"
        adapter = AdapterFile(path)
        for name in adapter:
            adapter[name]
        for name, tensor in adapter.read_modules().items():
            require_finite(tensor, f"{path / WEIGHTS_FILE}: {name}")
        return "sparse adapter"
    read_object(check_inside(path, "config.json"))
    parts = {file.name for file in path.glob("*.safetensors")}
    for index in sorted(path.glob("*.safetensors.index.json")):
        listed = read_object(check_inside(path, index.name)).get("weight_map")
        if not isinstance(listed, dict):
            raise BadConfig(f"{index}: weight_map is {type(listed).__name__}; expected an object.")
        parts |= {str(part) for part in listed.values()}
    for part in sorted(parts) or ["model.safetensors"]:
        TensorFile(check_inside(path, part))
    return "checkpoint"


def show_progress(shown: bool) -> None:
    """Whether transfers show bars on standard error. HF_HUB_DISABLE_PROGRESS_BARS, where it is set, wins."""
    utils = _hub().utils
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the variable wins
        (utils.enable_progress_bars if shown else utils.disable_progress_bars)()


def _fetched_before(name: str, error: Exception) -> Path:
    """What the cache has under this name, where the hub did not answer. Raises ModelError if it did, or nothing is there."""
    errors, status = _hub().errors, _status(error)
    no = 400 <= status < 500 and status != 429  # too many requests
    if no or not isinstance(error, (OSError, errors.HTTPError)):
        raise ModelError(f"cannot fetch {name}: {_reason(error)}") from error
    try:
        directory = _cached(name, f"cannot fetch {name}, and it was not fetched before: {_reason(error)}")
    except FormatError as damage:
        raise type(damage)(f"{name} is in the hub's cache, but not whole ({_reason(error)}): {damage}") from damage
    if not isinstance(error, errors.OfflineModeIsEnabled):
        message = f"the hub does not answer ({_reason(error)}); using {name} as fetched before, commit {directory.name}."
        warnings.warn(message, CachedCopyWarning, stacklevel=3)
    return directory


def _cached(name: str, absent: str) -> Path:
    """The snapshot that the cache has of a name, checked. Raises ModelError, in the words of `absent`, and FormatError."""
    repository, revision = parse_name(name)
    for file in (CONFIG_FILE, "config.json"):
        found = _hub().try_to_load_from_cache(repository, file, revision=revision)
        if isinstance(found, str):
            directory = Path(found).parent
            _choose(name, [path.name for path in directory.iterdir()])
            check(directory)
            return directory
    raise ModelError(absent)


def _download(name: str, commit: str, files: list[str]) -> Path:
    """The snapshot of a commit in the hub library's cache, with all the files in it. Raises ModelError, WriteFailed."""
    hub, (repository, revision) = _hub(), parse_name(name)
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
            if isinstance(error, OSError) and error.errno is not None:  # of the disk
                raise
            raise ModelError(f"cannot fetch {name} whole: {_reason(error)} Run again to go on.") from error
        absent = [file for file in files if not (directory / file).is_file()]
        if absent:  # the hub library goes on with what is there when it loses the hub
            raise ModelError(f"cannot fetch {name} whole: {absent[0]} did not come. Run again to go on.")
        reference = directory.parent.parent / "refs" / revision
        if revision != commit and not (reference.is_file() and reference.read_text() == commit):
            write_text(reference, commit)  # as the library does where it looks a branch up itself
    return directory


def _choose(name: str, present: list[str]) -> list[str]:
    """Of a repository's files those that the adapter, or else the checkpoint, consists of. Raises ModelError."""
    patterns = ADAPTER_FILES if CONFIG_FILE in present else CHECKPOINT_FILES
    needed = (CONFIG_FILE, WEIGHTS_FILE) if CONFIG_FILE in present else ("config.json", "*.safetensors")
    chosen = sorted(f for f in present if "/" not in f and any(fnmatch.fnmatchcase(f, pattern) for pattern in patterns))
    absent = [pattern for pattern in needed if not fnmatch.filter(chosen, pattern)]
    if absent:
        raise ModelError(
            f"{name} has no {absent[0]}, so it is neither an adapter ({CONFIG_FILE}, {WEIGHTS_FILE}) nor a checkpoint in "
            "safetensors; no other kind of file is read."
        )
    return chosen


def _peft_type(path: Path) -> str:
    """What kind of adapter a directory says it is; SPARSELET where it says nothing, for `AdapterFile` to complain of."""
    file = check_inside(path, CONFIG_FILE)
    kind = read_object(file).get("peft_type") if file.is_file() else None
    return kind if isinstance(kind, str) and kind.isidentifier() else "SPARSELET"


def _reason(error: Exception) -> str:
    """What went wrong and what to do, as one line."""
    errors = _hub().errors
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return _reason(error.__cause__)
    if isinstance(error, errors.GatedRepoError):
        return "access is granted on request; ask on its page, and log in with `hf auth login`."
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repository, or you may not see it; check the name, or log in with `hf auth login`."
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such revision; give a branch, tag or commit that it has."
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to reach the hub."
    if _status(error) in (401, 403):
        return f"access is refused ({_status(error)}); log in with `hf auth login` and a token that may do this."
    lines = [line.strip(" .") for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}{': ' if lines else ''}{' '.join(lines)}."


def _status(error: Exception) -> int:
    """What the hub answered with, as HTTP counts; 0 where it did not answer."""
    response: Any = getattr(error, "response", None)
    return response.status_code if isinstance(error, _hub().errors.HfHubHTTPError) else 0


def _api() -> Any:
    return _hub().HfApi(library_name="sparselet")


def _hub() -> Any:
    return _optional("huggingface_hub")


def _optional(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtra(f"the hub needs {module}: pip install 'sparselet[hub]'.") from error
