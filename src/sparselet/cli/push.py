"""`sparselet push`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from sparselet.cli.terminal import print_json, quiet_libraries, say, table
from sparselet.hub.client import show_progress
from sparselet.hub.contents import CARD_FILE
from sparselet.hub.publish import Upload, prepare, send


def push_(
    adapter: Path,
    name: str,
    /,
    *,
    private: Annotated[bool, Parameter(negative="")] = False,
    message: str | None = None,
    revision: str | None = None,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    json: bool = False,
) -> None:
    """Upload an adapter to the hub, with a model card.

    The adapter is checked in full first. Trained, merged and LoRA adapters can be pushed; only the adapter's own files are
    sent. A README.md in the directory is the model card; without one a card is made from what the adapter records. Log in
    with `hf auth login`, or set HF_TOKEN.

        sparselet push my-expert my-name/my-expert --private
        sparselet push merged my-name/merged --dry-run

    Parameters
    ----------
    adapter
        Adapter directory.
    name
        Repository on the hub, ORG/NAME; it is made if need be.
    private
        Make a new repository private; one that is there and public is refused.
    message
        Message of the commit.
    revision
        Branch to commit to, main by default; it is made if need be.
    dry_run
        Upload nothing; show the files and the model card.
    json
        Print the result as JSON.
    """
    quiet_libraries()
    upload, address = prepare(adapter, name, revision), None
    if not dry_run:
        show_progress(not json)
        address = send(upload, private, message)
    sizes = _sizes(upload)
    if json:
        print_json({"url": address, "kind": upload.kind, "files": sizes, "card": upload.card})
        return
    table(f"{upload.kind} {adapter}", ["file", "bytes"], [(file, f"{size:,}") for file, size in sizes.items()])
    if address is None:
        say(*(["The card:", "", *upload.card.splitlines()] if upload.card is not None else []), "Nothing was uploaded.")
        return
    if upload.card is not None:
        say(f"The card was made from the metadata; put a {CARD_FILE} into {adapter} to write your own.")
    say(f"Pushed: {address}", f"Next: sparselet pull {upload.repository}@{upload.branch} --out DIRECTORY")


def _sizes(upload: Upload) -> dict[str, int]:
    """Bytes of each file."""
    sizes = {name: path.stat().st_size for name, path in upload.files.items()}
    return sizes if upload.card is None else {**sizes, CARD_FILE: len(upload.card.encode())}
