"""The command `sparselet`: verbs, one error line instead of a traceback, exit codes."""

import errno
import sys
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import App, Parameter
from cyclopts.config import Toml

from sparselet.errors import SparseletError

HELP = """Sparse experts for language models: train one for each task, merge them into one model, measure it.

Start with `sparselet demo`, which does all of this in a few minutes on a laptop. Every verb explains itself with --help,
takes its settings from --config FILE.toml as well, and prints machine-readable output with --json.
"""

# Verbs are imported when they are used, since most of them need torch and transformers.
VERBS = {
    "train": "Train a sparse expert on one task.",
    "merge": "Merge experts into one adapter or checkpoint.",
    "eval": "Measure a base model, adapters or checkpoints on tasks.",
    "inspect": "Show what is in an adapter.",
    "demo": "Train, merge and compare three experts on built-in tasks.",
}

app = App(name="sparselet", help=HELP, version_flags=["--version"], help_flags=["--help", "-h"])
for _verb in VERBS:
    app.command(f"sparselet.cli.{_verb}:{_verb}_", name=_verb)


@app.meta.default
def _launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[Path | None, Parameter(help="Settings as TOML; flags win over them.")] = None,
    debug: Annotated[bool, Parameter(negative="", help="Show the traceback of an error.")] = False,
) -> Any:
    if config is not None:
        app.config = Toml(config, must_exist=True, use_commands_as_keys=False)
    return app(tokens, exit_on_error=False, print_error=False, result_action="return_value")


def run(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 an error, 2 wrong usage, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments:
        arguments = ["--help"]
    debug = "--debug" in arguments
    try:
        app.meta(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except cyclopts.CycloptsError as error:
        _fail(f"{error} See `sparselet --help`.", 2, debug)
    except SparseletError as error:
        _fail(str(error), 1, debug)
    except KeyboardInterrupt:
        _fail("interrupted. A training run that has saved a checkpoint goes on with --resume.", 130, debug)
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        _fail(f"{reason}{f' ({error.filename})' if error.filename else ''}", 1, debug)
    except ModuleNotFoundError as error:
        _fail(f"{error.name} is not installed: pip install 'sparselet[all]'.", 1, debug)
    except Exception as error:
        _fail(f"unexpected {type(error).__name__}: {error}. Run again with --debug to see where.", 1, debug)
    sys.exit(0)


def _fail(message: str, code: int, debug: bool) -> None:
    if debug:
        raise  # only called while an exception is handled
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
