"""`push` and `pull`: adapters and checkpoints on the hub."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sparselet.adapter import SparseAdapter
from sparselet.hub.contents import CARD_FILE, check_directory
from sparselet.hub.publish import prepare, send
from sparselet.hub.sources import pull as pull_directory
from sparselet.result_table import ResultTable, ShownAsTable


@dataclass(frozen=True)
class HubFiles(ShownAsTable):
    """An adapter or checkpoint that was sent to the hub or fetched from it.

    name: `org/name@revision`. kind: such as "sparse adapter". files: bytes of each. card: the model card that was made, if the
    directory had none. place: the address of the commit, or the local directory; None if nothing was sent.
    """

    name: str
    kind: str
    files: Mapping[str, int]
    card: str | None
    place: str | None

    def table(self) -> ResultTable:
        """A file a row."""
        rows = tuple((file, f"{size:,}") for file, size in self.files.items())
        return ResultTable(f"{self.kind} {self.name}", ("file", "bytes"), rows)


def push(
    adapter: str | Path | SparseAdapter,
    name: str,
    *,
    private: bool = False,
    message: str | None = None,
    revision: str | None = None,
    dry_run: bool = False,
) -> HubFiles:
    """Upload an adapter to the hub as `org/name`, in one commit, with a model card.

    adapter: a directory, or an adapter in memory. private: for a new repository; a public one is refused. message: of the
    commit. revision: the branch. dry_run: check all and send nothing.
    Raises FormatError, ModelError, MissingExtra.
    """
    if isinstance(adapter, SparseAdapter):
        with tempfile.TemporaryDirectory() as directory:
            path = adapter.save(Path(directory) / "adapter")
            return push(path, name, private=private, message=message, revision=revision, dry_run=dry_run)
    upload = prepare(adapter, name, revision)
    files = {file: path.stat().st_size for file, path in upload.files.items()}
    if upload.card is not None:
        files[CARD_FILE] = len(upload.card.encode())
    address = None if dry_run else send(upload, private, message)
    return HubFiles(f"{upload.repository}@{upload.branch}", upload.kind, files, upload.card, address)


def pull(name: str, out: str | Path) -> HubFiles:
    """Download an adapter or checkpoint, `org/name` or `org/name@revision`, into the directory `out`, and check it.

    Raises ModelError, FormatError, MissingExtra, OutputExists, WriteFailed.
    """
    directory = pull_directory(name, out)
    files = {file.name: file.stat().st_size for file in sorted(directory.iterdir())}
    return HubFiles(name, check_directory(directory), files, None, str(directory))
