"""The command `sparselet`: verbs, one error line instead of a traceback, exit codes."""

import contextlib
import errno
import inspect
import keyword
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import App, Parameter
from cyclopts.config import Dict

from sparselet.cli.flags import MovedFlag, refuse_moved_flags, translate_fields
from sparselet.cli.streams import lenient_streams
from sparselet.errors import ConfigError, SparseletError
from sparselet.io.printable import printable, reason
from sparselet.io.toml_settings import read_toml
from sparselet.training_recipes import RECIPES, with_recipe

HELP = """Sparse experts for language models: train one for each task, merge them into one model, measure it.

Start with `sparselet demo`, which does all of this in a few minutes on a laptop. Every verb explains itself with --help,
takes its settings from --config FILE.toml as well, and prints machine-readable output with --json.
"""

RECIPE_HELP = f"Settings of train by name ({', '.join(RECIPES)}); flags and --config win over them."

# Each is the function VERB_ of the module of this name. It is imported when it is used, since most need torch and transformers.
VERBS = {
    "train": "Train a sparse expert, or a baseline to compare it with.",
    "isolate": "Train one expert on several tasks, each task's core kept apart.",
    "merge": "Merge experts into one adapter.",
    "update": "Add experts to a merge, or remove experts from it.",
    "search": "Choose weights or a parameter of a merge by score on validation rows.",
    "split": "Write what a merge leaves of each expert.",
    "profile": "Profile an expert on its own training rows, for merging and routing.",
    "eval": "Measure a base model, adapters or checkpoints on tasks.",
    "inspect": "Show what is in an adapter.",
    "locate": "Measure where an expert's change lies, and where two meet.",
    "graft": "Measure which part of an expert's change is enough.",
    "probe": "Measure how sparse a model's hidden states are.",
    "steer": "Make answers shorter by a vector, and measure what it does.",
    "import": "Turn a LoRA, SHiRA or Super-Tuning adapter or a checkpoint into a sparse adapter.",
    "export": "Write an adapter for PEFT, for llama.cpp, or as a checkpoint.",
    "push": "Upload an adapter to the hub, with a model card.",
    "pull": "Download an adapter or checkpoint from the hub.",
    "serve": "Serve many experts of one base model over OpenAI's API.",
    "study": "Run a whole study: train, merge and evaluate what its tables need, and draw a report.",
    "demo": "Train, merge and compare three experts on built-in tasks.",
}


def _app(verb: str | None) -> App:
    """The command line. Only the module of `verb` is imported; the help of the others is their line in VERBS."""
    app = App(
        name="sparselet",
        help=_description(HELP),
        help_format="plaintext",
        version_flags=["--version"],
        help_flags=["--help", "-h"],
    )
    app.suppress_keyboard_interrupt = app.meta.suppress_keyboard_interrupt = False  # `run` reports it
    for place, (name, line) in enumerate(VERBS.items()):
        module = f"{name}_" if keyword.iskeyword(name) else name
        app.command(f"sparselet.cli.{module}:{name}_", name=name, help=line, sort_key=place)
    if verb is not None:
        function = app[verb].default_command
        app[verb].help = _description((function and function.__doc__) or "")

    @app.meta.default
    def launch(
        *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        config: Annotated[Path | None, Parameter(help="Settings as TOML; flags win over them.")] = None,
        recipe: Annotated[str | None, Parameter(show=verb == "train", help=RECIPE_HELP)] = None,
        debug: Annotated[bool, Parameter(negative="", help="Show the traceback of an error.")] = False,
    ) -> Any:
        sources = [] if config is None else [_settings(config)]
        if recipe is not None:
            if verb != "train":
                raise ConfigError(f"`recipe` is a setting of train, not of {verb}.")
            sources.append(Dict(with_recipe(recipe, {}), use_commands_as_keys=False, source=f"recipe {recipe}"))
        app.config = sources
        return app(tokens, exit_on_error=False, print_error=False, result_action="return_value")

    return app


def _settings(file: Path) -> Dict:
    """A TOML file's settings, for cyclopts to check. Raises ConfigError."""
    content = read_toml(file)
    tables = [key for key in content if key in VERBS]
    if tables:  # cyclopts would ignore it
        raise ConfigError(f"{file}: unknown key {tables[0]!r}; settings stand at the top level, not in a table.")
    return Dict(content, use_commands_as_keys=False, source=str(file))


def _description(text: str) -> str:
    """A docstring without its parameters, each paragraph as one line, indented lines as they are."""
    paragraphs = inspect.cleandoc(text).partition("\n\nParameters\n")[0].split("\n\n")
    return "\n\n".join(p if p.startswith(" ") else p.replace("\n", " ") for p in paragraphs)


def run(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 an error, 2 wrong usage, 130 interrupted, 143 terminated."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments:
        arguments = ["--help"]
    with contextlib.suppress(ValueError):  # of a thread that may not listen to signals
        signal.signal(signal.SIGTERM, _terminate)
    with lenient_streams():
        code = _run(arguments, "--debug" in arguments)
    sys.exit(code)


class Terminated(KeyboardInterrupt):
    """The process received SIGTERM; its unfinished output is removed as the exception unwinds."""


def _terminate(number: int, frame: object) -> None:
    raise Terminated


def _run(arguments: list[str], debug: bool) -> int:
    """Run the command line and return its exit code. debug: raise the error."""
    verb = next((argument for argument in arguments if argument in VERBS), None)
    app = None
    try:
        if verb is not None:
            refuse_moved_flags(verb, arguments)
        app = _app(verb)
        app.meta(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except cyclopts.CycloptsError as error:
        return _fail(f"{reason(error)} See `sparselet --help`.", 2, debug)
    except MovedFlag as error:
        return _fail(str(error), 2, debug)
    except SparseletError as error:
        return _fail(translate_fields(str(error), _flags(app, verb)), 1, debug)
    except Terminated:
        return _fail("terminated. A training run that has saved a checkpoint continues with --resume.", 143, debug)
    except KeyboardInterrupt:
        return _fail("interrupted. A training run that has saved a checkpoint continues with --resume.", 130, debug)
    except OSError as error:
        problem = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or reason(error)
        return _fail(f"{problem}{f' ({error.filename})' if error.filename else ''}", 1, debug)
    except ModuleNotFoundError as error:
        return _fail(f"{error.name} is not installed: pip install 'sparselet[all]'.", 1, debug)
    except Exception as error:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error):
            return _fail(f"there is not enough memory for this: {reason(error)}", 1, debug)
        return _fail(f"unexpected {type(error).__name__}: {reason(error)}. Run again with --debug to see where.", 1, debug)
    return 0


def _flags(app: App | None, verb: str | None) -> list[str]:
    """The flags of a verb."""
    if app is None or verb is None:
        return []
    return [name for argument in app[verb].assemble_argument_collection() for name in argument.names]


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        raise  # only called while an exception is handled
    print(f"error: {printable(message)}", file=sys.stderr)
    return code
