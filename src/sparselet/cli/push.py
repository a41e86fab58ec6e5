"""`sparselet push`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from sparselet.api.hub import push
from sparselet.cli.terminal import print_json, quiet_libraries, say, show
from sparselet.hub.client import show_progress
from sparselet.hub.contents import CARD_FILE


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
        Repository on the hub, ORG/NAME; it is created if it does not exist.
    private
        Make a new repository private; an existing public one is refused.
    message
        Message of the commit.
    revision
        Branch to commit to, main by default; it is created if it does not exist.
    dry_run
        Upload nothing; show the files and the model card.
    json
        Print the result as JSON.
    """
    quiet_libraries()
    show_progress(not json)
    pushed = push(adapter, name, private=private, message=message, revision=revision, dry_run=dry_run)
    if json:
        print_json({"url": pushed.place, "kind": pushed.kind, "files": pushed.files, "card": pushed.card})
        return
    show(pushed.table())
    if pushed.place is None:
        say(*(["The card:", "", *pushed.card.splitlines()] if pushed.card is not None else []), "Nothing was uploaded.")
        return
    if pushed.card is not None:
        say(f"The card was made from the metadata; put a {CARD_FILE} into {adapter} to write your own.")
    say(f"Pushed: {pushed.place}", f"Next: sparselet pull {pushed.name} --out DIRECTORY")
