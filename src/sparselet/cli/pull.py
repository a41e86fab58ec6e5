"""`sparselet pull`."""

from pathlib import Path

from sparselet.api.hub import pull
from sparselet.cli.terminal import facts, print_json, quiet_libraries, say, word
from sparselet.hub.client import show_progress


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
    pulled = pull(name, out)
    if json:
        print_json({"output": str(out), "kind": pulled.kind, "files": pulled.files})
        return
    facts(f"{name}: {pulled.kind}", [(file, f"{size:,} bytes") for file, size in pulled.files.items()])
    commands = {
        "sparse adapter": f"sparselet inspect {word(out)}",
        "checkpoint": f"sparselet eval --task TASK --model {word(out)}",
    }
    say(f"Written to {out}", f"Next: {commands.get(pulled.kind, f'sparselet merge {word(out)} OTHER --out merged')}")
