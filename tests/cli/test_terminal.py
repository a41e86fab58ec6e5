"""Showing: text from files and paths as it is, on any stream, and never an error after the work is done."""

import io
import json
import logging
import os
import sys
import unicodedata
import warnings

import pytest
from helpers.tiny import make_adapter, make_model
from hypothesis import given
from hypothesis import strategies as st

from sparselet import SparseAdapter
from sparselet.cli.main import run
from sparselet.cli.terminal import note, print_json, progress, quiet_libraries
from sparselet.io.printable import printable, reason

pytestmark = pytest.mark.usefixtures("loud_again")

# What terminals and the library that draws tables would obey.
HOSTILE = [
    "[/red]",
    "[bold]x[/bold] [link=file:///etc/passwd]y[/link]",
    ":smile: [dim]",
    "\x1b]0;owned\x07\x1bc\x1b[2J",
    "\x1b]8;;http://evil\x1b\\click\x1b]8;;\x1b\\",
    "a\rb\bc\nd\te\x7f\x9b2J",
    "\u202egnp.exe\u2066\u200b\ufeff\u2028",
    "\ud83d alone",
]


def shown_safely(text):
    return all(character.isprintable() or character in "\n\u3000" for character in text)


@given(st.text())
def test_printable_text_is_one_line_without_control_characters(text):
    shown = printable(text)
    assert all(character.isprintable() or unicodedata.category(character) == "Zs" for character in shown)
    assert shown == text or not text.isprintable()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2J", "a\\x1b[2J"),
        ("line\nline", "line\\nline"),
        ("\u202e", "\\u202e"),
        ("\udce9", "\\udce9"),
        ("数\u3000据 é [x]", "数\u3000据 é [x]"),
    ],
)
def test_only_what_is_not_visible_is_escaped(text, shown):
    assert printable(text) == shown


def test_a_reason_is_one_line_and_never_empty():
    assert reason(ValueError("a\n  b\n")) == "a b"
    assert reason(ValueError()) == "ValueError"


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def expert(tmp_path, model):
    def save(name, **metadata):
        make_adapter(model, seed=len(name), **metadata).save(tmp_path / name)
        return tmp_path / name

    return save


@pytest.mark.parametrize("words", HOSTILE, ids=ascii)
def test_what_an_adapter_says_is_shown_and_not_obeyed(cli, expert, tmp_path, words):
    about = {"task": words, "base_model_name_or_path": words, "metrics": {words: words}, "score": words}
    one, two = expert("one", **about), expert("two")
    for line in (["inspect", one], ["merge", one, two, "--out", tmp_path / "m"], ["push", one, "a/b", "--dry-run"]):
        code, out, err = cli(*line)
        assert code == 0, err
        assert shown_safely(out + err)
        assert printable(words) in out or line[0] == "push"  # whose card is Markdown
    assert SparseAdapter.load(tmp_path / "m").metadata.merge["experts"][0]["task"] == words


@pytest.mark.parametrize("name", [*HOSTILE[:-1], "caf\udce9 [v2]", "'quoted' $(x)"], ids=ascii)
def test_paths_are_shown_as_they_are(cli, expert, tmp_path, name):
    name = name.replace("/", "-")
    path, other = expert(name), expert("other")
    for line in (
        ["inspect", path],
        ["merge", path, other, "--out", tmp_path / f"m{name}"],
        ["inspect", tmp_path / f"no{name}"],
    ):
        code, out, err = cli(*line)
        assert code == ("no" in line[1].name[:2]), err
        assert shown_safely(out + err)
        assert printable(name) in (out + err).replace("'\"'\"'", "'")


def test_names_are_whole_off_a_terminal(cli, expert, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    path = expert("a-name-that-is-longer-than-the-line", task="words " * 20 + "to the end")
    _, out, _ = cli("inspect", path)
    assert "words " * 20 + "to the end" in out
    assert path.name in out


def test_json_has_no_control_characters(cli, expert):
    words = "".join(HOSTILE)
    _, out, _ = cli("inspect", expert("one", task=words), "--json")
    assert shown_safely(out)
    assert json.loads(out)["metadata"]["task"] == words


def test_logs_and_warnings_are_shown_safely(capsys):
    quiet_libraries()
    logging.getLogger("sparselet").warning("read %s", "\x1b[2J[/red]")
    sys.stderr.write(warnings.formatwarning("\x1b[2J[/red]", UserWarning, "file", 1))
    note("\x1b[2J[/red]")
    with progress("\x1b[2J[/red]") as callback:
        callback(1, 1)
    assert shown_safely(capsys.readouterr().err)


# Streams


def run_on(monkeypatch, stream, *arguments, error=None):
    """The exit code of a command line whose standard output is `stream`."""
    monkeypatch.setattr(sys, "stdout", stream)
    if error is not None:
        monkeypatch.setattr(sys, "stderr", error)
    with pytest.raises(SystemExit) as exit_:
        run([str(argument) for argument in arguments])
    monkeypatch.undo()
    return exit_.value.code


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "cp437", "utf-8"])
def test_any_encoding_will_do(monkeypatch, expert, tmp_path, encoding):
    one, two = expert("数据 [x]", task="é 😀 \ud83d"), expert("two")
    for line in (["inspect", one], ["merge", one, two, "--out", tmp_path / "m"], ["inspect", tmp_path / "nö"]):
        raw, errors = io.BytesIO(), io.BytesIO()
        out, err = (io.TextIOWrapper(stream, encoding=encoding) for stream in (raw, errors))
        code = run_on(monkeypatch, out, *line, error=err)
        out.flush()
        err.flush()
        assert code == (line[1].name == "nö"), errors.getvalue()
        assert b"error" not in errors.getvalue() or code
        text = (raw.getvalue() + errors.getvalue()).decode(encoding)
        assert "Traceback" not in text
        assert ("数据" in text) == (encoding == "utf-8" and not code)
        assert out.errors == "strict"


@pytest.mark.parametrize("json_", [[], ["--json"]], ids=["text", "json"])
def test_a_reader_that_has_gone_away_stops_nothing(monkeypatch, expert, tmp_path, json_):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stream:
        assert run_on(monkeypatch, stream, "merge", expert("one"), expert("two"), "--out", tmp_path / "m", *json_) == 0
    assert len(SparseAdapter.load(tmp_path / "m")) == 6


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_result_that_cannot_be_written_is_an_error_for_machines_only(monkeypatch, expert, tmp_path, capfd):
    one = expert("one")
    for line, code in ((["inspect", one], 0), (["inspect", one, "--json"], 1)):
        with open("/dev/full", "w") as stream:
            assert run_on(monkeypatch, stream, *line) == code
    assert "error: cannot write the result to standard output: No space left on device." in capfd.readouterr().err


@pytest.mark.parametrize("closed", [None, "closed"])
def test_no_standard_output_at_all(monkeypatch, expert, tmp_path, closed):
    stream = io.StringIO() if closed else None
    if stream is not None:
        stream.close()
    assert run_on(monkeypatch, stream, "merge", expert("one"), expert("two"), "--out", tmp_path / "m") == 0
    assert len(SparseAdapter.load(tmp_path / "m")) == 6


def test_json_has_null_for_what_it_has_no_number_for(capsys):
    print_json({"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": (float("-inf"), True, None, "NaN")}})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "a": None,
        "b": [1.5, None],
        "c": {"d": [None, True, None, "NaN"]},
    }
