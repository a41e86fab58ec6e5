"""Files of rows, written by json, gzip and pyarrow; what cannot be read is named by file and line."""

import contextlib
import gzip
import json
import os

import pyarrow
import pytest
from helpers.strategies import few
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from sparselet.errors import TaskError
from sparselet.tasks.row_files import ENDINGS, LONGEST_LINE
from sparselet.tasks.rows import Row
from sparselet.tasks.task import load_task

GOOD = [{"input": "a", "target": "b"}, {"input": "é 日本", "target": "x\ny"}]
ROWS = tuple(Row(**row) for row in GOOD)


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(file, rows):
    """Rows as the file's ending says."""
    name = file.name.lower()
    if name.endswith(".parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        return
    content = lines(rows) if ".jsonl" in name else json.dumps(rows, indent=1).encode()
    file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)


def read(directory, split="train"):
    return load_task(directory, (split,)).rows(split)


def refused(directory, message):
    with pytest.raises(TaskError, match=message):
        read(directory)


@pytest.mark.parametrize("ending", [*ENDINGS, *(ending.upper() for ending in ENDINGS)])
def test_all_endings_hold_the_same_rows(tmp_path, ending):
    write(tmp_path / f"train{ending}", GOOD)
    assert read(tmp_path) == ROWS


@pytest.mark.parametrize("ending", [ending for ending in ENDINGS if "json" in ending])
def test_a_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path, ending):
    content = b"\xef\xbb\xbf" + (lines(GOOD) if "jsonl" in ending else json.dumps(GOOD, indent=2).encode()).replace(
        b"\n", b"\r\n"
    )
    (tmp_path / f"train{ending}").write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    assert read(tmp_path) == ROWS


@pytest.mark.parametrize(
    "content",
    [lines(GOOD), lines(GOOD).rstrip(), "".join(json.dumps(row, indent=2) for row in GOOD).encode(), json.dumps(GOOD).encode()],
    ids=["lines", "no-last-end", "objects-over-lines", "array"],
)
def test_a_json_file_is_an_array_or_values_one_after_another(tmp_path, content):
    (tmp_path / "train.json").write_bytes(b" \n" + content + b"\n ")
    assert read(tmp_path) == ROWS


row = '{"input": "a", "target": "b"}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "line 1: not JSON: the array has no end"),
        (f"[{row},\n{row}", "line 2: not JSON: expected a comma or the array's end"),
        (f"[{row},\n", "line 2: not JSON: the array has no end"),
        (f"[{row},\n]", "line 2: not JSON: Expecting value"),
        (f"[{row}]\n{row}", "line 2: not JSON: more after the array's end"),
        (f"[{row}\n{row}]", "line 1: not JSON: expected a comma"),
        (f"[{row},\n{{]", "line 2: not JSON: Expecting property name"),
        (f"{row}\n{row},", "line 2: not JSON: Expecting value"),
        (f"[\n{row},\n7]", "line 3: expected an object, got a number"),
        (f'[\n{row},\n\n{{"input": "a",\n"target": 1}}]', "line 4: 'target' is a number"),
        (f'[\n{row},\n{{"input":\n"a", "target": }}]', "line 4: not JSON"),
        (f"[{row},\n{'[' * 100_000}", "line 2: nested too deeply"),
        ("[]", ": no rows"),
        ("", ": no rows"),
        (
            '{"train": []}',
            "no field 'input'; the row has train. Rows have input and target or prompt and completion or messages",
        ),
    ],
)
def test_a_json_file_that_is_wrong_is_named_with_the_line(tmp_path, content, message):
    (tmp_path / "train.json").write_text(content)
    refused(tmp_path, f"train.json.*{message}")


def test_bytes_that_are_no_utf_8_are_named_with_the_line(tmp_path):
    (tmp_path / "train.json").write_bytes(f"[{row},\n\n".encode() + b'{"input": "\xe9", "target": "b"}]')
    refused(tmp_path, r"train\.json, line 3: not UTF-8")
    os.rename(tmp_path / "train.json", tmp_path / "train.jsonl.gz")
    refused(tmp_path, r"train\.jsonl\.gz: not a complete gzip file: Not a gzipped file")
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(lines(GOOD) * 200)[:-20])
    refused(tmp_path, r"train\.jsonl\.gz: not a complete gzip file")


def test_a_line_without_end_takes_no_memory_without_end(tmp_path):
    with gzip.open(tmp_path / "train.jsonl.gz", "wb", compresslevel=1) as file:
        file.write(lines(GOOD))
        for _ in range(LONGEST_LINE // 2**20 + 2):
            file.write(b" " * 2**20)
    refused(tmp_path, r"train\.jsonl\.gz, line 3: longer than 67,108,864 bytes")


# Columns that are not used


def test_columns_that_are_not_used_are_not_looked_at(tmp_path):
    unused = {"x": float("nan"), "n": None, "deep": [[[{}]]], "odd": "\ud83d", "long": 10**400}
    twice = b'{"other": 1, "other": {"a": 1, "a": 2}, "input": "a", "target": "b", "int": ' + b"9" * 5000 + b"}\n"
    (tmp_path / "train.jsonl").write_bytes(lines([{**GOOD[0], **unused}]) + twice)
    assert read(tmp_path) == (ROWS[0], ROWS[0])


UNUSED = {
    "map": pyarrow.array([[("k", 1)], None], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
    "struct": pyarrow.array([{"x": None}, None], pyarrow.struct([("x", pyarrow.null())])),
    "duration": pyarrow.array([1, 2], pyarrow.duration("ns")),
    "decimal": pyarrow.array([None, None], pyarrow.decimal256(70, 2)),
    "bytes": pyarrow.array([b"\xff", None]),
    "input.x": pyarrow.array(["nested by name", "only"]),
}


@pytest.mark.parametrize("kind", UNUSED)
def test_columns_of_parquet_that_are_not_used_are_not_looked_at(tmp_path, kind):
    names = {name: pyarrow.array([row[name] for row in GOOD]) for name in ("input", "target")}
    parquet.write_table(pyarrow.table({kind: UNUSED[kind], **names}), tmp_path / "train.parquet")
    assert read(tmp_path) == ROWS


TEXTS = [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.dictionary(pyarrow.int8(), pyarrow.string())]


@pytest.mark.parametrize("kind", TEXTS, ids=str)
def test_text_of_any_parquet_type_is_text(tmp_path, kind):
    columns = {name: pyarrow.array([row[name] for row in GOOD], kind) for name in ("input", "target")}
    parquet.write_table(pyarrow.table(columns), tmp_path / "train.parquet", row_group_size=1)
    assert read(tmp_path) == ROWS


ODD = {
    "bytes": (pyarrow.array([b"a"]), "is bytes"),
    "null": (pyarrow.array([None], pyarrow.string()), "is null"),
    "bool": (pyarrow.array([True]), "is true or false"),
    "struct": (pyarrow.array([{"x": 1}]), "is an object"),
    "map": (pyarrow.array([[("k", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())), "message 1 is tuple"),
    "timestamp": (pyarrow.array([1], pyarrow.timestamp("s")), "is datetime"),
    "duration": (pyarrow.array([1], pyarrow.duration("ns")), "is "),
    "no UTF-8": (pyarrow.StringArray.from_buffers(1, *pyarrow.array([b"\xff"]).buffers()[1:]), "is not UTF-8"),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_column_of_parquet_that_is_no_text_is_named_with_the_row(tmp_path, kind):
    column, message = ODD[kind]
    parquet.write_table(pyarrow.table({"input": pyarrow.array(["a"]), "target": column}), tmp_path / "train.parquet")
    refused(tmp_path, rf"train\.parquet, row 1: 'target'.*{message}")


def test_a_column_that_parquet_has_twice_is_refused(tmp_path):
    twice = pyarrow.table([pyarrow.array(["a"])] * 3, names=["input", "target", "input"])
    parquet.write_table(twice, tmp_path / "train.parquet")
    refused(tmp_path, r"train\.parquet: the column 'input' occurs twice")


def test_a_parquet_file_that_is_damaged_within_is_named(tmp_path):
    file = tmp_path / "train.parquet"
    write(file, [{"input": f"row {i} " * 9, "target": "b"} for i in range(500)])
    content = bytearray(file.read_bytes())
    content[4:600] = bytes(596)
    file.write_bytes(content)
    refused(tmp_path, r"train\.parquet: not a Parquet file that can be read")


@pytest.mark.parametrize("ending", [".parquet", ".jsonl", ".json"])
def test_rows_are_those_of_the_file_whatever_its_time(tmp_path, ending):
    for text in ("old rows", "new rows"):
        write(tmp_path / f"train{ending}", [{"input": text, "target": text}])
        os.utime(tmp_path / f"train{ending}", (1700000000, 1700000000))
        assert read(tmp_path) == (Row(text, text),)


# Which file


def test_a_split_in_parts_is_read_in_order(tmp_path):
    rows = [{"input": str(i), "target": "b"} for i in range(11)]
    for i in reversed(range(11)):
        write(tmp_path / f"train-{i:05}-of-00011.parquet", rows[i : i + 1])
    write(tmp_path / "test-00000-of-00001.parquet", GOOD)
    assert [row.input for row in read(tmp_path)] == [row["input"] for row in rows]
    assert read(tmp_path, "test") == ROWS
    (tmp_path / "train-00003-of-00011.parquet").unlink()
    refused(tmp_path, "has no part 3 of 11 of the split 'train'")


@pytest.mark.parametrize(
    "names",
    [("train.jsonl", "train.parquet"), ("train.json", "train.JSON"), ("train.jsonl", "train-00000-of-00001.jsonl")],
    ids=" ".join,
)
def test_two_files_of_one_split_are_refused(tmp_path, names):
    for name in names:
        write(tmp_path / name, GOOD)
    if len(list(tmp_path.iterdir())) == 2:  # else the disk does not tell capitals
        refused(tmp_path, "has several files for the split 'train': .*Keep one of them")


@pytest.mark.parametrize(
    "name", ["train.csv", "train.jsonl.zst", "train.txt", "train", "Train.jsonl", "train.jsonl~", "data.json"]
)
def test_an_ending_that_is_not_read_is_named_with_those_that_are(tmp_path, name):
    (tmp_path / name).write_text("")
    refused(
        tmp_path,
        rf"no split 'train': expected train\.jsonl \(or \.json, \.jsonl\.gz, \.json\.gz, \.parquet\), found {name}\.",
    )


def test_what_is_not_a_file_is_named(tmp_path):
    place = tmp_path / "train.jsonl"
    place.mkdir()
    refused(tmp_path, r"train\.jsonl is not a file")
    place.rmdir()
    os.mkfifo(place)
    refused(tmp_path, r"train\.jsonl is not a file")
    place.unlink()
    place.symlink_to(tmp_path / "nowhere")
    refused(tmp_path, r"cannot read .*train\.jsonl: No such file")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "caf\udce9"])
def test_a_name_that_cannot_be_a_directory_is_a_task_error(name):
    with pytest.raises(TaskError, match="cannot be a task's directory"):
        load_task(f"./{name}")


@few
@given(st.binary(max_size=60), st.sampled_from(ENDINGS), st.booleans())
def test_any_bytes_are_read_or_refused(tmp_path_factory, content, ending, begun):
    directory = tmp_path_factory.mktemp("rows")
    content = (lines(GOOD) if begun else b"") + content
    (directory / f"train{ending}").write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    with contextlib.suppress(TaskError):
        assert all(isinstance(row, Row) for row in read(directory))
