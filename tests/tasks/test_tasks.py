"""Rows from files, the hub and built-in tasks; every wrong one is named by file and line."""

import json
import re
from pathlib import Path

import pytest
from datasets import Dataset
from helpers.tiny import save_task, write_rows

from sparselet.errors import SparseletError, TaskError
from sparselet.tasks.builtin import BUILTIN, SIZES, spell
from sparselet.tasks.rows import Message
from sparselet.tasks.task import SPLITS, Row, Task, load_task, write_task

GOOD = {"input": "a", "target": "b"}


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "task").mkdir()
    return tmp_path / "task"


def read(directory, **kwargs):
    return load_task(directory, ("train",), **kwargs)


def refused(directory, message, **kwargs):
    with pytest.raises(TaskError, match=message) as caught:
        read(directory, **kwargs)
    assert isinstance(caught.value, SparseletError)


# Files


def write_parquet(file, rows):
    Dataset.from_list(rows).to_parquet(str(file))


@pytest.mark.parametrize(("suffix", "write"), [("jsonl", write_rows), ("parquet", write_parquet)], ids=["jsonl", "parquet"])
def test_rows_come_in_order_and_as_they_are(directory, suffix, write):
    rows = [("a b ", " x\ny"), ("é\u2028ß", "日本"), ('"quoted"\t', "0")]
    for split in SPLITS:
        write(directory / f"{split}.{suffix}", [{"input": i, "target": t, "other": split} for i, t in rows])
    task = load_task(directory)
    assert task.name == "task"
    assert list(task.splits) == list(SPLITS)
    assert all(task.rows(split) == tuple(Row(*row) for row in rows) for split in SPLITS)
    assert task.rows("test", 2) == task.rows("test")[:2]
    assert task.rows("test", 99) == task.rows("test")


def test_both_kinds_of_file_hold_the_same_task(tmp_path):
    rows = [{"input": str(i), "target": str(-i)} for i in range(5)]
    for name, write in (("jsonl", write_rows), ("parquet", write_parquet)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / f"train.{name}", rows)
    assert read(tmp_path / "jsonl").fingerprint() == read(tmp_path / "parquet").fingerprint()


def test_a_parquet_file_that_was_replaced_is_read_anew(directory):
    write_parquet(directory / "train.parquet", [GOOD])
    assert read(directory).rows("train") == (Row("a", "b"),)
    write_parquet(directory / "train.parquet", [{"input": "other", "target": "rows"}])
    assert read(directory).rows("train") == (Row("other", "rows"),)


def test_only_the_splits_asked_for_are_read(directory):
    write_rows(directory / "train.jsonl", [GOOD])
    (directory / "test.jsonl").write_text("rubbish")
    task = read(directory)
    assert list(task.splits) == ["train"]
    with pytest.raises(TaskError, match="has no split 'test'; it has train"):
        task.rows("test")


def test_columns_may_have_other_names(directory):
    write_rows(directory / "train.jsonl", [{"question": "q", "target": "t", "input": 5}])
    assert read(directory, columns={"input": "question"}).rows("train") == (Row("q", "t"),)
    write_parquet(directory / "test.parquet", [{"q": "x", "a": "y"}])
    assert load_task(directory, ("test",), {"input": "q", "target": "a"}).rows("test") == (Row("x", "y"),)
    other = {"input": "question", "target": "answer"}
    refused(directory, "line 1: no field 'answer'; the row has question, target, input", columns=other)
    refused(directory, "line 1: 'input' is a number, expected text")
    refused(directory, r"columns maps 'input' and 'target', got \['output'\]", columns={"output": "x"})


def test_blank_lines_and_a_missing_last_line_end_are_passed_over(directory):
    (directory / "train.jsonl").write_text(f"\n{json.dumps(GOOD)}\n  \n{json.dumps(GOOD)}")
    assert len(read(directory).rows("train")) == 2


BAD = {
    "not JSON": ('{"input": "a", ', "not JSON"),
    "two on a line": ('{"input": "a", "target": "b"} {}', "not JSON"),
    "a list": ('["a", "b"]', "expected an object, got a list"),
    "a number": ("7", "expected an object, got a number"),
    "null": ("null", "expected an object, got null"),
    "no target": ('{"input": "a"}', "no field 'target'; the row has input"),
    "no input": ('{"target": "a"}', "no field 'input'; the row has target"),
    "nothing": ("{}", "no field 'input'; the row has none"),
    "a number for text": ('{"input": "a", "target": 1}', "'target' is a number, expected text"),
    "true for text": ('{"input": true, "target": "b"}', "'input' is true or false, expected text"),
    "an object for text": ('{"input": {}, "target": "b"}', "'input' is an object, expected text"),
    "a list for text": (
        '{"input": ["a"], "target": "b"}',
        "'input', message 1 is text, expected an object with role and content",
    ),
    "an empty list": ('{"input": [], "target": "b"}', "'input' is empty, expected a list of messages"),
    "null for text": ('{"input": "a", "target": null}', "'target' is null, expected text"),
    "NaN for text": ('{"input": "a", "target": NaN}', "'target' is a number, expected text"),
    "a long number": (f'{{"input": "a", "target": {"1" * 5000}}}', "'target' is a number, expected text"),
    "a field twice": ('{"input": "a", "target": "b", "input": "c"}', "'input' occurs twice"),
    "half an emoji": (
        '{"input": "caf\\ud83d", "target": "b"}',
        "'input' holds half of a surrogate pair, \\ud83d, at character 4",
    ),
    "the other half": (
        '{"input": "a", "target": "\\udf89 b"}',
        "'target' holds half of a surrogate pair, \\udf89, at character 1",
    ),
    "depth": (f'{{"input": "a", "target": "b", "x": {"[" * 100_000}{"]" * 100_000}}}', "nested too deeply"),
    "half an emoji as a name": ('{"\\ud83d": "a"}', "no field 'input'; the row has \\ud83d"),
    "empty target": ('{"input": "a", "target": ""}', "'target' is empty"),
    "blank target": ('{"input": "a", "target": " \\n\\t"}', "'target' is empty"),
    "empty input": ('{"input": "", "target": "b"}', "'input' is empty"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_named_by_file_and_line(directory, kind):
    line, message = BAD[kind]
    file = directory / "train.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n\n{line}\n{json.dumps(GOOD)}\n")
    refused(directory, f"^{re.escape(str(file))}, line 3: {re.escape(message)}")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input": "a", "target": 3}, "'target' is a number"),
        ({"input": "a", "target": " "}, "'target' is empty"),
        ({"input": "a", "target": None}, "'target' is null"),
        ({"input": "a"}, "no field 'target'; the row has input"),
    ],
)
def test_a_bad_row_of_a_parquet_file_is_named_by_its_number(directory, row, message):
    first = {key: type(value)() if value is not None else "b" for key, value in row.items()}
    good = {key: value or {str: "x", int: 1}[type(value)] for key, value in first.items()}
    write_parquet(directory / "train.parquet", [{**good, "input": "ok"}, row])
    place = "" if "no field" in message else f", row {1 if 'number' in message else 2}"
    refused(directory, f"train.parquet{place}: {message}")


@pytest.mark.parametrize("content", ["", "\n\n  \n"], ids=["empty", "blank"])
def test_a_file_without_rows_is_refused(directory, content):
    (directory / "train.jsonl").write_text(content)
    refused(directory, r"train\.jsonl: no rows")


def test_a_file_that_is_not_utf_8_is_named(directory):
    good = json.dumps(GOOD).encode()
    (directory / "train.jsonl").write_bytes(good + b'\n{"input": "caf\xe9", "target": "b"}\n')
    refused(directory, r"train\.jsonl, line 2: not UTF-8: invalid continuation byte, b'\\xe9'")
    (directory / "train.jsonl").write_text(json.dumps(GOOD), encoding="utf-16")
    refused(directory, r"train\.jsonl, line 1: not UTF-8: invalid start byte")


@pytest.mark.parametrize("content", [b"", b"no parquet", b"PAR1" * 10], ids=["empty", "text", "marks"])
def test_a_file_that_is_not_parquet_is_named(directory, content):
    (directory / "train.parquet").write_bytes(content)
    refused(directory, r"train\.parquet: not a Parquet file")


def test_a_missing_split_is_named_with_what_is_there(directory):
    refused(directory, r"task has no split 'train': expected train\.jsonl \(or \.json, .*\.parquet\), found nothing")
    write_rows(directory / "test.jsonl", [GOOD])
    (directory / "notes.txt").write_text("")
    refused(directory, r"has no split 'train'.*, found notes\.txt, test\.jsonl\.")


def test_a_file_is_not_a_task(directory):
    write_rows(directory / "train.jsonl", [GOOD])
    refused(directory / "train.jsonl", r"train\.jsonl is not a directory; a task is a directory with train, validation, test")


@pytest.mark.parametrize("source", ["./nothing", "/nothing/here", "a/b/c"])
def test_a_path_that_leads_nowhere_is_refused_without_asking_the_hub(source, monkeypatch):
    monkeypatch.setattr("sparselet.tasks.task.load_dataset", lambda *args, **kwargs: pytest.fail("asked the hub"))
    refused(source, "is not a directory")


@pytest.mark.parametrize("name", ["nothing-of-this-name", "nobody/nothing"])
def test_a_hub_name_without_a_network_is_a_task_error(name):
    refused(name, f"{name} is neither a directory here nor a data set on the hub with split 'train'")


def test_rows_of_a_hub_data_set_are_checked_like_others(monkeypatch):
    table = Dataset.from_list([{"q": "a", "a": "b", "n": 1}, {"q": "c", "a": "", "n": 2}])
    monkeypatch.setattr("sparselet.tasks.task.load_dataset", lambda name, split: table.take(1) if split == "train" else table)
    columns = {"input": "q", "target": "a"}
    task = load_task("owner/data", ("train",), columns)
    assert (task.name, task.rows("train")) == ("data", (Row("a", "b"),))
    with pytest.raises(TaskError, match=r"owner/data \(test\), row 2: 'a' is empty"):
        load_task("owner/data", ("test",), columns)


# Fingerprints


def test_equal_rows_have_equal_fingerprints_and_all_others_differ():
    base = {"train": (Row("a", "b"), Row("c", "d")), "test": (Row("e", "f"),)}
    variants = {
        "as it is": base,
        "a row changed": {**base, "train": (Row("a", "b"), Row("c", "x"))},
        "rows swapped": {**base, "train": base["train"][::-1]},
        "input and target swapped": {**base, "test": (Row("f", "e"),)},
        "a row less": {**base, "train": base["train"][:1]},
        "a split less": {"train": base["train"]},
        "splits exchanged": {"train": base["test"], "test": base["train"]},
        "text moved over": {**base, "train": (Row("ab", ""), Row("c", "d"))},
    }
    prints = {name: Task("t", splits).fingerprint() for name, splits in variants.items()}
    assert len(set(prints.values())) == len(variants)
    assert all(re.fullmatch("[0-9a-f]{16}", value) for value in prints.values())
    assert Task("another name", dict(reversed(base.items()))).fingerprint() == prints["as it is"]


def test_a_fingerprint_does_not_depend_on_where_the_rows_lie(tmp_path):
    assert load_task(save_task(tmp_path / "a")).fingerprint() == load_task(save_task(tmp_path / "b" / "c")).fingerprint()


# Built in


@pytest.mark.parametrize("name", BUILTIN)
class TestBuiltin:
    def test_has_enough_rows(self, name):
        task = load_task(f"builtin:{name}")
        assert task.name == name
        assert {split: len(rows) for split, rows in task.splits.items()} == SIZES
        assert SIZES["train"] >= 200
        assert SIZES["test"] >= 60

    def test_is_the_same_each_time(self, name):
        assert load_task(f"builtin:{name}").fingerprint() == load_task(f"builtin:{name}").fingerprint()

    def test_has_no_input_twice_or_in_two_splits(self, name):
        inputs = [row.input for rows in load_task(f"builtin:{name}").splits.values() for row in rows]
        assert len(set(inputs)) == len(inputs)

    def test_has_whole_rows(self, name):
        for rows in load_task(f"builtin:{name}").splits.values():
            for row in rows:
                assert row.input == row.input.strip()
                assert row.target == row.target.strip()
                assert row.target

    def test_gives_the_splits_asked_for(self, name):
        assert list(load_task(f"builtin:{name}", ("test",)).splits) == ["test"]


FINGERPRINTS = {
    "number_words": "04799a207b16bd73",
    "animal_class": "a9eae570785cc0e4",
    "table_order": "573ffc301888049b",
}


@pytest.mark.parametrize("name", BUILTIN)
def test_rows_of_built_in_tasks_do_not_change_unnoticed(name):
    """Results name these rows, so that a change of them needs a new name."""
    assert load_task(f"builtin:{name}").fingerprint() == FINGERPRINTS[name]


def test_an_unknown_built_in_task_lists_those_there_are():
    refused("builtin:nothing", f"no built-in task is called 'nothing'; there are {', '.join(BUILTIN)}")


def test_an_unknown_split_of_a_built_in_task_is_a_task_error():
    with pytest.raises(TaskError, match="number_words has no split 'dev'; it has train, validation, test"):
        load_task("builtin:number_words", ("dev",))


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (7, "seven"),
        (10, "ten"),
        (12, "twelve"),
        (19, "nineteen"),
        (20, "twenty"),
        (40, "forty"),
        (21, "twenty-one"),
        (99, "ninety-nine"),
        (100, "one hundred"),
        (101, "one hundred and one"),
        (115, "one hundred and fifteen"),
        (680, "six hundred and eighty"),
        (999, "nine hundred and ninety-nine"),
        (1000, "one thousand"),
        (1001, "one thousand and one"),
        (1099, "one thousand and ninety-nine"),
        (1100, "one thousand one hundred"),
        (3144, "three thousand one hundred and forty-four"),
        (5020, "five thousand and twenty"),
        (8008, "eight thousand and eight"),
        (9999, "nine thousand nine hundred and ninety-nine"),
    ],
)
def test_spell(number, words):
    assert spell(number) == words


def test_spelled_numbers_read_back_as_themselves():
    """A reader written the other way round: each word has a value, `hundred` and `thousand` multiply."""
    ones = (
        *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
        *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
    )
    tens = {"twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90}
    values = {word: i for i, word in enumerate(ones)} | tens
    for number in range(10_000):
        total = part = 0
        for word in spell(number).replace("-", " ").replace(" and ", " ").split():
            if word == "thousand":
                total, part = total + part * 1000, 0
            elif word == "hundred":
                part *= 100
            else:
                part += values[word]
        assert total + part == number
    assert len({spell(number) for number in range(10_000)}) == 10_000


def test_targets_of_number_words_are_their_numbers():
    for rows in load_task("builtin:number_words").splits.values():
        for row in rows:
            (number,) = re.findall(r"\d+", row.input)
            assert row.target == spell(int(number))


def test_targets_of_table_order_are_what_was_ordered():
    counts = dict(zip(["two", "three", "four", "five", "six", "seven", "eight", "nine"], range(2, 10), strict=True))
    for rows in load_task("builtin:table_order").splits.values():
        for row in rows:
            table, count, item = re.fullmatch(r"table (\d+) \| (\d) x (.+)", row.target).groups()
            order = row.input.lower()
            assert re.search(rf"\b{table}\b", order)
            assert item in order
            assert [counts[word] for word in re.findall(r"[a-z]+", order) if word in counts] == [int(count)]


def test_each_animal_has_one_class():
    rows = [row for split in load_task("builtin:animal_class").splits.values() for row in split]
    names = [re.search(r"does the (.+) belong", row.input).group(1) for row in rows]
    assert len(set(names)) == len(names)
    classes = {"mammal", "bird", "fish", "reptile", "insect", "amphibian", "mollusc", "arachnid", "crustacean"}
    assert {row.target for row in rows} == classes


def test_readme_of_a_task_directory_does_not_disturb(tmp_path):
    directory = Path(save_task(tmp_path / "task"))
    (directory / "README.md").write_text("# rows")
    assert len(load_task(directory).rows("train")) == 12


def test_a_written_task_is_read_as_it_was(tmp_path):
    talk = Row((Message("system", "s"), Message("user", "a")), "b")
    task = Task("own", {"train": (Row("x\n{y}?", "é"), Row("z", "w")), "test": (talk,)})
    path = write_task(task, tmp_path)
    assert path == tmp_path / "own"
    again = load_task(path, ("train", "test"))
    assert again.splits["train"] == task.splits["train"]
    assert (again.splits["test"][0].input, again.splits["test"][0].target) == (talk.input, "b")
