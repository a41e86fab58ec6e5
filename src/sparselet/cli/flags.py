"""Field names in library errors as flags of a verb, and flags that have moved to another verb."""

import re
from collections.abc import Iterable, Mapping

from sparselet.errors import SparseletError

UPDATE = "sparselet update MERGED --add EXPERT --remove EXPERT --out DIR"
SEARCH = "sparselet search EXPERTS --choose weights --validation TASK --model MODEL --out DIR"
EXPORT = "sparselet export MERGED --to checkpoint --model MODEL --out DIR"
SPLIT = "sparselet split EXPERTS --method emr --out DIR"
# By verb, the flags that it had, and the command that replaces each.
MOVED = {
    "merge": {
        **dict.fromkeys(("--add", "--remove"), UPDATE),
        **dict.fromkeys(("--search", "--seed"), SEARCH),
        **dict.fromkeys(("--as", "--dtype"), EXPORT),
        "--per-task": SPLIT,
    }
}
SYNONYMS = {"base": "model"}  # arguments of the library that have another name as a flag


class MovedFlag(SparseletError):
    """A flag that the verb no longer has."""


def refuse_moved_flags(verb: str, arguments: Iterable[str]) -> None:
    """Raise MovedFlag, which names the new command, if an argument is a flag that `verb` no longer has."""
    for argument in arguments:
        flag = argument.partition("=")[0]
        if flag in MOVED.get(verb, {}):
            raise MovedFlag(f"sparselet {verb} has no {flag} any more. Use: {MOVED[verb][flag]}")


def translate_fields(message: str, names: Iterable[str]) -> str:
    """A library error with flags for the fields of this verb.

    names: the verb's flags, such as --block-size. Translated are the first word, as in "density must be …", and names in
    backquotes, with a value or without: `` `base` ``, `` `resume=True` ``.
    """
    flags = {name.strip("-").replace("-", "_"): name for name in names if name.startswith("--")}

    def in_backquotes(match: re.Match[str]) -> str:
        name, value = match.groups()
        flag = _flag(name, flags)
        if flag is None:
            return match[0]
        if value == "False":
            return flags.get(f"no_{name}", match[0])
        return flag if value in (None, "True") else f"{flag} {value}"

    message = re.sub(r"`(\w+)(?:=([^`]*))?`", in_backquotes, message)
    first = re.match(r"\w+(?=[: ])", message)
    flag = _flag(first[0], flags) if first else None
    return f"{flag}{message[first.end() :]}" if first and flag else message


def _flag(name: str, flags: Mapping[str, str]) -> str | None:
    return flags.get(SYNONYMS.get(name, name))
