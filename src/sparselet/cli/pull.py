"""`sparselet pull`."""

from pathlib import Path

from sparselet.cli.terminal import facts, print_json, quiet_libraries, say, word
from sparselet.hub.client import show_progress
from sparselet.hub.contents import check_directory
from sparselet.hub.sources import pull


def pull_(name: str, /, *, out: Path, json: bool = False) -> None:
    """Download an adapter or checkpoint from the hub.

    Only safetensors, configuration and tokenizer are fetched. The directory appears when all files are there and checked.
    What was fetched stays in the hub library's cache (HF_HUB_CACHE), so that the same commit is never fetched twice.

        sparselet pull my-name/my-expert --out my-expert
        sparselet pull my-name/my-expert@v1 --out my-expert

    Parameters
    ----------
    name
        Repository on the hub, ORG/NAME, or ORG/NAME@REVISION with a branch, tag or commit.
    out
        Directory to write to; it must not exist.
    json
        Print the result as JSON.
    """
    quiet_libraries()
    show_progress(not json)
    pull(name, out)
    kind, files = check_directory(out), {file.name: file.stat().st_size for file in sorted(out.iterdir())}
    if json:
        print_json({"output": str(out), "kind": kind, "files": files})
        return
    facts(f"{name}: {kind}", [(file, f"{size:,} bytes") for file, size in files.items()])
    following = {
        "sparse adapter": f"sparselet inspect {word(out)}",
        "checkpoint": f"sparselet eval --task TASK --model {word(out)}",
    }
    say(f"Written to {out}", f"Next: {following.get(kind, f'sparselet merge {word(out)} OTHER --out merged')}")
