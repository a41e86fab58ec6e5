"""Uploading adapters to the hub, with a model card."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sparselet.adapter import CONFIG_FILE, AdapterFile
from sparselet.errors import MissingFile, ModelError
from sparselet.hub.card import model_card, peft_card
from sparselet.hub.client import hub_api, hub_error_text, hub_library
from sparselet.hub.contents import ADAPTER_FILES, CARD_FILE, check_directory
from sparselet.hub.sources import parse_name
from sparselet.io.json_files import read_object
from sparselet.io.paths import check_inside


@dataclass(frozen=True)
class Upload:
    """What `push` uploads: repository and branch, the kind of adapter, its files, and a card if it has no README.md."""

    repository: str
    branch: str
    kind: str
    files: Mapping[str, Path]
    card: str | None


def push(path: str | Path, name: str, *, private: bool = False, revision: str | None = None, message: str | None = None) -> str:
    """Upload an adapter to the hub in one commit, and return that commit's address.

    path: a sparse or merged adapter, or one of another PEFT method such as LoRA; it is checked in full first, and nothing is
    sent if the check fails. name: `org/name`; a missing repository is created. private: for a new repository; an existing
    public one is refused. revision: the branch to commit to; a missing one is created. message: of the commit.

    Only the adapter's own files are sent. Its README.md is the model card; without one a card is made from the metadata and
    replaces an earlier one on the hub. Files of an earlier adapter that this one lacks are deleted there.

    Raises FormatError, ModelError, MissingExtra.
    """
    return send(prepare(path, name, revision), private, message)


def prepare(path: str | Path, name: str, revision: str | None = None) -> Upload:
    """Check the adapter directory `path` in full and return what `push` would upload. Nothing is sent or written.

    Raises ModelError for a bad name, and FormatError.
    """
    path, (repository, branch) = Path(path), parse_name(f"{name}@{revision}" if revision else name)
    if "/" not in repository:
        raise ModelError(f"{name!r} is not a hub name to push to; expected org/name or org/name@revision.")
    if path.is_dir() and not (path / CONFIG_FILE).exists() and (path / "config.json").is_file():
        raise MissingFile(f"{path} is a checkpoint; only adapters are pushed, which have {CONFIG_FILE}.")
    kind = check_directory(path)
    files = {file: check_inside(path, file) for file in ADAPTER_FILES if (path / file).is_file()}
    if CARD_FILE in files:
        return Upload(repository, branch, kind, files, None)
    size = sum(file.stat().st_size for file in files.values())
    config = read_object(check_inside(path, CONFIG_FILE))
    base = config.get("base_model_name_or_path")
    if isinstance(base, str) and Path(base).exists():  # models/llama would be read as a name on the hub
        config["base_model_name_or_path"] = str(Path(base).absolute())
    if kind == "sparse adapter":
        file = AdapterFile(path)
        card = model_card(repository, config, file.shapes, file.fingerprints, file.nnz, size)
    else:
        card = peft_card(repository, config, size)
    return Upload(repository, branch, kind, files, card)


def send(upload: Upload, private: bool = False, message: str | None = None) -> str:
    """Upload what `prepare` returned, as `push` does."""
    hub, api = hub_library(), hub_api()
    operations = [hub.CommitOperationAdd(name, str(place)) for name, place in upload.files.items()]
    if upload.card is not None:
        operations.append(hub.CommitOperationAdd(CARD_FILE, upload.card.encode()))
    try:
        api.create_repo(upload.repository, private=private or None, exist_ok=True)
        if private and not api.model_info(upload.repository).private:
            raise ModelError(f"{upload.repository} is there and public; make it private on its page, or take another name.")
        if upload.branch != "main" and not upload.branch.startswith("refs/"):
            api.create_branch(upload.repository, branch=upload.branch, exist_ok=True)
        present = {sibling.rfilename for sibling in api.model_info(upload.repository, revision=upload.branch).siblings or []}
        stale = sorted(present & set(ADAPTER_FILES) - {operation.path_in_repo for operation in operations})
        commit = api.create_commit(
            upload.repository,
            [*operations, *(hub.CommitOperationDelete(name) for name in stale)],
            commit_message=message or f"Upload {upload.kind}",
            revision=upload.branch,
        )
    except ModelError:
        raise
    except Exception as error:  # as in `fetch`
        raise ModelError(f"cannot push to {upload.repository}: {hub_error_text(error)}") from error
    return str(commit.commit_url)
