"""Token ids from the cache against those made anew, and every file that is not one of ours."""

import logging
import os

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import END, make_model, make_tokenizer

from sparselet import token_cache
from sparselet.errors import ConfigError
from sparselet.evaluation import generate
from sparselet.prompts import prompt_tokens, target_tokens
from sparselet.tasks import Row
from sparselet.training.collate import encode

TEXTS = ["an ant", "ß and é", "  two  spaces ", f"one {END} token", "a longer text, " * 9]


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The files of a cache that takes any number of texts."""
    monkeypatch.setenv("SPARSELET_CACHE", str(tmp_path))
    monkeypatch.delenv(token_cache.BOUND, raising=False)
    monkeypatch.setattr(token_cache, "FEWEST", 1)
    return lambda: sorted((tmp_path / "tokens").glob("*"))


@pytest.fixture
def asked(monkeypatch):
    """The texts that were tokenised, but for those that only the key is made of."""
    found = []

    def listening(tokenizer, text, **options):
        if not text.startswith("Ab 1"):
            found.append(text)
        return prompt_tokens(tokenizer, text, **options)

    monkeypatch.setattr(token_cache, "prompt_tokens", listening)
    return found


@pytest.mark.parametrize("template", [False, True])
def test_rows_from_the_cache_are_those_made_anew(kept, asked, template):
    tokenizer = make_tokenizer(template)
    expected = [prompt_tokens(tokenizer, text, True, 20) for text in TEXTS]
    assert token_cache.prompts(tokenizer, TEXTS, True, 20) == expected
    assert asked == TEXTS
    assert len(kept()) == 1
    again = token_cache.prompts(make_tokenizer(template), TEXTS, True, 20)
    assert again == expected
    assert all(type(token) is int for row in again for token in row)
    assert asked == TEXTS
    targets = [target_tokens(tokenizer, text, True, False) for text in TEXTS]
    assert token_cache.targets(tokenizer, TEXTS, True, False) == token_cache.targets(tokenizer, TEXTS, True, False) == targets
    assert len(kept()) == 2


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=6), length=st.integers(1, 9))
def test_any_texts_come_back(kept, texts, length):
    tokenizer = make_tokenizer()
    expected = [prompt_tokens(tokenizer, text, False, length) for text in texts]
    for _ in range(2):
        assert token_cache.prompts(tokenizer, texts, False, length) == expected


def other_template():
    tokenizer = make_tokenizer(template=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("[assistant]", "[answer]")
    return tokenizer


def other_vocabulary():
    tokenizer = make_tokenizer(template=True)
    tokenizer.add_tokens(["tw"])
    return tokenizer


@pytest.mark.parametrize(
    "other",
    [
        (other_template(), TEXTS, True, 98),
        (other_vocabulary(), TEXTS, True, 98),
        (make_tokenizer(template=True), TEXTS, False, 98),
        (make_tokenizer(template=True), TEXTS, True, 99),
        (make_tokenizer(template=True), TEXTS[::-1], True, 98),
        (make_tokenizer(template=True), [*TEXTS[:-1], TEXTS[-1] + "s"], True, 98),
        (make_tokenizer(template=True), ["".join(TEXTS[:2]), *TEXTS[2:]], True, 98),
    ],
    ids=["template", "vocabulary", "no-template", "length", "order", "text", "joined"],
)
def test_what_the_ids_depend_on_is_in_the_key(kept, other):
    token_cache.prompts(make_tokenizer(template=True), TEXTS, True, 98)
    tokenizer, texts, *options = other
    assert token_cache.prompts(tokenizer, texts, *options) == [prompt_tokens(tokenizer, text, *options) for text in texts]
    assert len(kept()) == 2


def test_targets_know_their_end_token_and_their_kind_of_model(kept):
    tokenizer = make_tokenizer()
    found = [token_cache.targets(tokenizer, TEXTS, True, seq2seq) for seq2seq in (False, True)]
    tokenizer.eos_token = "<pad>"
    found.append(token_cache.targets(tokenizer, TEXTS, True, False))
    assert [row[-1] for rows in found for row in rows[:1]] == [1, 1, 0]
    assert [len(rows[0]) for rows in found] == [8, 7, 8]
    assert len(kept()) == 3


def test_a_template_that_tells_the_date_is_not_taken_from_yesterday(kept, monkeypatch):
    tokenizer = make_tokenizer(template=True)
    token_cache.prompts(tokenizer, TEXTS, True, 99)
    monkeypatch.setattr(
        token_cache, "prompt_tokens", lambda _, text, **options: [7, *prompt_tokens(tokenizer, text, **options)]
    )
    assert token_cache.prompts(tokenizer, TEXTS, True, 99)[0][0] == 7


def test_training_and_evaluation_share_a_file(kept, asked):
    model, tokenizer = make_model(), make_tokenizer()
    encode([Row(text, "x") for text in TEXTS], tokenizer, True, 50, False)
    assert asked == TEXTS
    generate(model, tokenizer, TEXTS, max_input_length=50, max_new_tokens=1)
    assert asked == TEXTS


def saved(**tensors):
    return safetensors.numpy.save(tensors)


GOOD = {"ids": np.arange(5, dtype=np.int32), "offsets": np.arange(6)}
FOREIGN = {
    "empty": b"",
    "text": b"not a container at all",
    "truncated": saved(**GOOD)[:-3],
    "other-tensors": saved(values=np.zeros(3)),
    "other-dtype": saved(**{**GOOD, "ids": np.arange(5)}),
    "float-offsets": saved(**{**GOOD, "offsets": np.arange(6.0)}),
    "two-dimensions": saved(**{**GOOD, "ids": np.zeros((5, 1), np.int32)}),
    "fewer-rows": saved(**{**GOOD, "offsets": np.array([0, 5])}),
    "first-offset": saved(**{**GOOD, "offsets": np.array([1, 1, 2, 3, 4, 5])}),
    "last-offset": saved(**{**GOOD, "offsets": np.array([0, 1, 2, 3, 4, 6])}),
    "descending": saved(**{**GOOD, "offsets": np.array([0, 4, 2, 3, 4, 5])}),
    "negative-id": saved(**{**GOOD, "ids": np.arange(5, dtype=np.int32) - 1}),
    "beyond-the-vocabulary": saved(**{**GOOD, "ids": np.arange(5, dtype=np.int32) + 254}),
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_foreign_file_is_told_of_and_made_anew(kept, caplog, content):
    tokenizer = make_tokenizer()
    expected = token_cache.prompts(tokenizer, TEXTS, False, 20)
    (file,) = kept()
    good = file.read_bytes()
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING, "sparselet"):
        assert token_cache.prompts(tokenizer, TEXTS, False, 20) == expected
    assert f"{file} is not a file of token ids, so it is made anew: " in caplog.text
    assert file.read_bytes() == good


def test_the_longest_unused_files_go_first(kept, monkeypatch):
    tokenizer = make_tokenizer()
    long = [[letter * 100_000] for letter in "abc"]  # 0.4 MB each
    monkeypatch.setenv(token_cache.BOUND, "1")
    for day, texts in enumerate(long[:2], 1):
        before = set(kept())
        token_cache.prompts(tokenizer, texts, False, 10**6)
        (file,) = set(kept()) - before
        os.utime(file, (day, day))
    first, second = sorted(kept(), key=lambda file: file.stat().st_mtime)
    token_cache.prompts(tokenizer, long[0], False, 10**6)  # used again
    token_cache.prompts(tokenizer, long[2], False, 10**6)
    assert first.exists()
    assert not second.exists()
    assert len(kept()) == 2
    token_cache.prompts(tokenizer, ["d" * 300_000], False, 10**6)  # larger than all may be together
    assert len(kept()) == 2


def test_few_texts_and_a_bound_of_nothing_keep_no_file(kept, monkeypatch):
    tokenizer = make_tokenizer()
    monkeypatch.setattr(token_cache, "FEWEST", len(TEXTS) + 1)
    token_cache.prompts(tokenizer, TEXTS, False, 20)
    assert not kept()
    monkeypatch.setattr(token_cache, "FEWEST", 1)
    monkeypatch.setenv(token_cache.BOUND, "0")
    assert token_cache.prompts(tokenizer, TEXTS, False, 20)[0] == prompt_tokens(tokenizer, TEXTS[0], False, 20)
    assert not kept()


@pytest.mark.parametrize("told", ["-1", "1.5", "no"])
def test_a_bound_that_is_no_number_is_refused(kept, monkeypatch, told):
    monkeypatch.setenv(token_cache.BOUND, told)
    with pytest.raises(ConfigError, match=f"SPARSELET_TOKEN_CACHE_MB must be a whole number of megabytes.*; got '{told}'"):
        token_cache.prompts(make_tokenizer(), TEXTS, False, 20)


def test_a_cache_that_cannot_be_written_stops_nothing(kept, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPARSELET_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, "sparselet"):
        found = token_cache.prompts(make_tokenizer(), TEXTS, False, 20)
    assert found == [prompt_tokens(make_tokenizer(), text, False, 20) for text in TEXTS]
    assert "token ids are not kept: cannot write " in caplog.text
