"""Text from files, paths and other libraries, safe to show: no character moves a cursor or hides others."""

import unicodedata


def printable(text: object) -> str:
    r"""`text` on one line, every character that is neither visible nor a space written as Python's escape of it.

    Escaped are control characters (ESC, BEL, backspace, line ends), those that reorder or join text without being seen (U+202E,
    U+200B), halves of surrogate pairs (bytes of a path that are not UTF-8), and what Unicode does not assign.

        printable("a\x1b[2Jb\n")     # 'a\\x1b[2Jb\\n'
    """
    text = str(text)
    return text if text.isprintable() else "".join(map(_shown, text))


def reason(error: BaseException) -> str:
    """The message of another library's exception, on one line; its class if there is no message."""
    return " ".join(str(error).split()) or type(error).__name__


def _shown(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) == "Zs":  # spaces of other scripts than ours
        return character
    return character.encode("unicode_escape").decode()
