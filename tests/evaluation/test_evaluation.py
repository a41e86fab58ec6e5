"""Scores against their library, batched answers against one prompt at a time, and the base model left as it was."""

import re
import sys
import unicodedata

import pytest
import sacrebleu
import torch
from helpers.strategies import few
from helpers.tiny import make_adapter, make_model, make_t5, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from sparselet.apply import apply_temporarily
from sparselet.errors import ConfigError, TaskError, WrongBase
from sparselet.evaluation import EvalSettings, chrf, evaluate, exact_match, rouge_l
from sparselet.generation.generate import _batches, generate
from sparselet.tasks.task import Row, Task

SHORT = ("ant", "bee", "cat-and-dog", "e", "fox", "gnu", "heron", "ib", "jaybird", "kite")
PROMPTS = [f"{word}{'!' * (i % 5)}" for i, word in enumerate(SHORT * 2)]

PAIRS = [
    ("the cat sat", "the cat sat"),
    ("the cat sat on the mat", "a cat on a mat"),
    ("nothing", "something else"),
    ("", "something"),
    ("The CAT!", "the cat"),
    ("running dogs", "run dog"),
    ("one two three", "three two one"),
    ("über straße", "uber strasse"),
]


def test_rouge_l_is_rouge_scores_f_measure_without_stemming():
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    for answer, target in PAIRS:
        assert rouge_l([answer], [target]) == pytest.approx(100 * scorer.score(target, answer)["rougeL"].fmeasure)
    single = [rouge_l([answer], [target]) for answer, target in PAIRS]
    assert rouge_l(*zip(*PAIRS, strict=True)) == pytest.approx(sum(single) / len(single))
    assert single[0] == 100
    assert single[2] == single[3] == 0
    assert single[4] == 100
    assert single[5] == 0


@few
@given(*[st.text(st.characters(codec="latin-1") | st.sampled_from("aB1 éñŁ„’½"), max_size=12)] * 2)
def test_rouge_l_of_latin_script_is_that_of_rouge_score(answer, target):
    expected = RougeScorer(["rougeL"]).score(target, answer)["rougeL"].fmeasure
    if all(re.search("[a-z0-9]", text.lower()) for text in (answer, target)):
        assert rouge_l([answer], [target]) == 100 * expected


OTHER_SCRIPTS = {
    "Chinese": ("天地玄黄", "天地玄"),
    "Japanese": ("ラーメンが好き", "ラーメン"),
    "Korean": ("한국어 문장", "한국어"),
    "Russian": ("привет мир", "мир"),
    "Greek": ("καλημέρα κόσμε", "κόσμε"),
    "Arabic": ("مرحبا بالعالم", "بالعالم"),
    "Hebrew": ("שלום עולם", "שלום"),
    "Hindi": ("नमस्ते दुनिया", "दुनिया"),
    "Bengali": ("ওহে বিশ্ব", "বিশ্ব"),
    "Tamil": ("வணக்கம் உலகம்", "உலகம்"),
    "Thai": ("สวัสดีครับ", "ครับ"),
    "Armenian": ("բարեւ աշխարհ", "աշխարհ"),
    "Georgian": ("გამარჯობა მსოფლიო", "მსოფლიო"),
    "Amharic": ("ሰላም ልዑል", "ልዑል"),
    "digits": ("١٢٣ ٤٥٦", "١٢٣"),
    "signs": ("+-", "+"),
}


@pytest.mark.parametrize("script", OTHER_SCRIPTS)
def test_rouge_l_measures_all_scripts(script):
    text, part = OTHER_SCRIPTS[script]
    assert rouge_l([text], [text]) == 100
    assert 0 < rouge_l([part], [text]) < 100
    assert rouge_l(["another"], [text]) == rouge_l([""], [text]) == rouge_l(["*"], [text]) == 0


def test_tokens_of_other_scripts():
    # Words of one letter more or less are other words; where no spaces part words, letters count.
    assert rouge_l(["привет миру"], ["привет мир"]) == pytest.approx(50)
    assert rouge_l(["天地黄"], ["天地玄黄"]) == pytest.approx(100 * 2 * 3 / 7)
    assert rouge_l(["ПРИВЕТ, «Мир»!"], ["привет мир"]) == 100
    assert rouge_l(["GPT天 2"], ["gpt 天2"]) == 100
    assert rouge_l([unicodedata.normalize("NFD", "한국어 ёж が")], ["한국어 ёж が"]) == 100


@few
@given(st.text(min_size=1).filter(str.strip))
def test_a_text_that_equals_its_target_has_rouge_l_100(text):
    assert rouge_l([text], [text]) == 100


def test_chrf_is_sacrebleus():
    answers, targets = (list(texts) for texts in zip(*[*PAIRS, ("天地玄", "天地玄黄")], strict=True))
    assert chrf(answers, targets) == sacrebleu.corpus_chrf(answers, [targets]).score
    assert chrf(targets, targets) == pytest.approx(100)
    assert 0 < chrf(answers, targets) < 100


def lengths(answers, targets):
    return sum(map(len, answers)) / len(targets)


def test_metrics_are_chosen_by_name_or_given_as_functions(model):
    tasks, asked = [task("t", PROMPTS, PROMPTS)], EvalSettings(max_new_tokens=4)
    (result,) = evaluate(model, make_tokenizer(), tasks, settings=asked, metrics=["chrf", lengths])
    answers = [answer for _, answer in result.predictions]
    assert dict(result.scores) == {"chrf": chrf(answers, PROMPTS), "lengths": lengths(answers, PROMPTS)}
    (result,) = evaluate(model, make_tokenizer(), tasks, settings=asked)
    assert dict(result.scores) == {"rougeL": rouge_l(answers, PROMPTS), "exact_match": exact_match(answers, PROMPTS)}


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (["rouge"], "metric: 'rouge' is unknown; expected rougeL, exact_match, chrf or MODULE:FUNCTION"),
        (["chrf", "chrf"], "metric: 'chrf' is there twice"),
        ([], "metric: expected at least one of rougeL"),
        (["no_such_module:f"], "metric: cannot import 'no_such_module:f': ModuleNotFoundError"),
        (["math:no_such_function"], "metric: cannot import 'math:no_such_function': AttributeError"),
        (["math:pi"], "metric: 'math:pi' is float, which cannot be called"),
        ([":f"], "metric: ':f' is unknown"),
    ],
)
def test_a_metric_that_is_none_is_refused_before_anything_is_answered(model, metrics, message, monkeypatch):
    monkeypatch.setattr("sparselet.evaluation.harness.generate", lambda *args, **kwargs: pytest.fail("answered"))
    with pytest.raises(ConfigError, match=message):
        evaluate(model, make_tokenizer(), [task("t", ["a"], ["b"])], metrics=metrics)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "is nan on task t"),
        (float("inf"), "is inf on task t"),
        ("x", "fails on task t: ValueError"),
        (None, "TypeError"),
    ],
)
def test_a_metric_gives_a_finite_number(model, value, message):
    def odd(answers, targets):
        return value

    with pytest.raises(ConfigError, match=f"metric odd {message}" if value is not None else message):
        evaluate(model, make_tokenizer(), [task("t", ["a"], ["b"])], settings=EvalSettings(max_new_tokens=1), metrics=[odd])


def test_rouge_l_by_hand():
    # The longest common subsequence of "a b c d" and "a c e" is "a c": precision 2/4, recall 2/3.
    assert rouge_l(["a b c d"], ["a c e"]) == pytest.approx(100 * 2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3))


@pytest.mark.parametrize(
    ("answer", "target", "same"),
    [
        ("yes", "yes", True),
        ("  Yes\n", "yes", True),
        ("two  words", "Two\twords", True),
        ("STRASSE", "straße", True),
        ("yes.", "yes", False),
        ("", "yes", False),
        ("twowords", "two words", False),
    ],
)
def test_exact_match_is_up_to_white_space_and_case(answer, target, same):
    assert exact_match([answer], [target]) == 100 * same
    assert exact_match([answer, "x"], [target, "x"]) == 50 * same + 50


@pytest.mark.parametrize("measure", [rouge_l, exact_match, chrf])
def test_answers_and_targets_must_be_as_many(measure):
    with pytest.raises(ValueError):
        measure(["a"], ["a", "b"])


# Answers


@torch.inference_mode()
def alone(model, tokenizer, prompt, **kwargs):
    """One prompt through the model's own `generate`, without padding."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **kwargs)
    new = output if model.config.is_encoder_decoder else output[:, ids.shape[1] :]
    return tokenizer.decode(new[0], skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def model():
    return make_model(initializer_range=0.5)


@pytest.mark.parametrize("batch_size", [1, 3, 64, None])
def test_batched_answers_are_those_of_one_prompt_at_a_time_in_order(model, batch_size):
    tokenizer = make_tokenizer()
    expected = [alone(model, tokenizer, prompt, max_new_tokens=8) for prompt in PROMPTS]
    assert len(set(expected)) > 5
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=8, batch_size=batch_size) == expected


def test_the_chat_template_is_used_where_there_is_one_and_it_is_wanted(model):
    tokenizer = make_tokenizer(template=True)
    asked = [f"[user]{prompt}\n[assistant]" for prompt in PROMPTS]
    chat = [alone(model, tokenizer, prompt, max_new_tokens=8) for prompt in asked]
    bare = [alone(model, tokenizer, prompt, max_new_tokens=8) for prompt in PROMPTS]
    assert chat != bare
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=8) == chat
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=8, chat_template=False) == bare
    assert generate(model, make_tokenizer(), PROMPTS, max_new_tokens=8) == bare


def test_prompts_are_cut_from_the_left(model):
    tokenizer = make_tokenizer()
    expected = [alone(model, tokenizer, prompt[-3:], max_new_tokens=5) for prompt in PROMPTS]
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=5, max_input_length=3) == expected


def test_an_encoder_decoder_answers_too():
    model, tokenizer = make_t5(), make_tokenizer()
    prompts = PROMPTS[:6]
    expected = [alone(model, tokenizer, prompt, max_new_tokens=6) for prompt in prompts]
    assert generate(model, tokenizer, prompts, max_new_tokens=6, batch_size=4) == expected


def test_an_answer_ends_at_the_end_token_and_has_no_more_tokens_than_allowed(model):
    tokenizer = make_tokenizer()
    allowed = [generate(model, tokenizer, ["ant"], max_new_tokens=count)[0] for count in (1, 4, 12)]
    assert allowed == [alone(model, tokenizer, "ant", max_new_tokens=count) for count in (1, 4, 12)]
    assert len(set(allowed)) == 3
    ids = torch.tensor([tokenizer("ant")["input_ids"]])
    first = int(model(input_ids=ids).logits[0, -1].argmax())
    stopping = make_model(initializer_range=0.5)
    stopping.generation_config.eos_token_id = first
    assert generate(stopping, tokenizer, ["ant"], max_new_tokens=12) == [""]


@pytest.mark.parametrize(
    ("lengths", "size", "sizes"),
    [
        ([3, 3, 3, 3, 3], 2, [2, 2, 1]),
        ([3, 3, 3, 3], 4, [4]),
        ([1, 2, 3, 4, 5], None, [3, 2]),
        ([10, 10, 10], None, [1, 1, 1]),
        ([50, 60], None, [1, 1]),
        ([], None, []),
    ],
)
def test_batches_hold_so_many_rows_or_tokens(monkeypatch, lengths, size, sizes):
    monkeypatch.setattr(sys.modules[_batches.__module__], "BATCH_TOKENS", 10)
    found = list(_batches(range(len(lengths)), lengths, size))
    assert [len(batch) for batch in found] == sizes
    assert [row for batch in found for row in batch] == list(range(len(lengths)))


def test_no_prompts_give_no_answers(model):
    assert generate(model, make_tokenizer(), []) == []


def test_progress_counts_every_prompt_once(model):
    counted = []
    generate(model, make_tokenizer(), PROMPTS, max_new_tokens=1, batch_size=7, progress=counted.append)
    assert counted == [7, 7, 6]


# Tasks


def task(name, prompts, answers):
    return Task(name, {"test": tuple(Row(p, a) for p, a in zip(prompts, answers, strict=True))})


def test_a_model_that_answers_as_the_targets_say_scores_100(model):
    tokenizer = make_tokenizer()
    prompts = [p for p in PROMPTS if any(c.isalnum() for c in alone(model, tokenizer, p, max_new_tokens=6))]
    answers = generate(model, tokenizer, prompts, max_new_tokens=6)
    first, second = evaluate(
        model,
        tokenizer,
        [task("same", prompts, answers), task("other", prompts, ["@"] * len(prompts))],
        settings=EvalSettings(max_new_tokens=6),
    )
    assert (first.task, second.task) == ("same", "other")
    assert first.scores["exact_match"] == 100
    assert second.scores == {"rougeL": 0, "exact_match": 0}
    assert first.rows == len(prompts)
    assert [row.input for row, _ in first.predictions] == prompts
    assert [answer for _, answer in first.predictions] == answers


def test_limit_takes_the_first_rows(model):
    asked = EvalSettings(rows=3, max_new_tokens=2)
    (result,) = evaluate(model, make_tokenizer(), [task("t", PROMPTS, PROMPTS)], settings=asked)
    assert result.rows == 3
    assert [row.input for row, _ in result.predictions] == PROMPTS[:3]


@pytest.mark.parametrize("name", ["rows", "max_input_length", "max_new_tokens", "batch_size"])
def test_numbers_below_one_are_refused(name):
    assert getattr(EvalSettings(**{name: 1}), name) == 1
    with pytest.raises(ConfigError, match=f"{name} must be at least 1, got 0"):
        EvalSettings(**{name: 0})


def test_another_split_may_be_asked(model):
    rows = {"test": (Row("a", "b"),), "validation": (Row("c", "d"), Row("e", "f"))}
    (result,) = evaluate(
        model, make_tokenizer(), [Task("t", rows)], settings=EvalSettings(max_new_tokens=1, split="validation")
    )
    assert [row.input for row, _ in result.predictions] == ["c", "e"]


def test_tasks_of_one_name_are_refused(model, monkeypatch):
    monkeypatch.setattr("sparselet.evaluation.harness.generate", lambda *args, **kwargs: pytest.fail("answered"))
    with pytest.raises(TaskError, match="two tasks are called t, so their results could not be distinguished"):
        evaluate(model, make_tokenizer(), [task(name, ["a"], ["b"]) for name in ("s", "t", "t")])


def test_a_task_without_a_test_split_is_refused(model):
    with pytest.raises(TaskError, match="has no split 'test'"):
        evaluate(model, make_tokenizer(), [Task("t", {"train": (Row("a", "b"),)})])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_an_adapter_is_measured_and_the_base_is_left_bit_for_bit(dtype):
    model, tokenizer = make_model(dtype), make_tokenizer()
    adapter = make_adapter(model, 4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tasks = [task("t", PROMPTS, PROMPTS)]
    (base,) = evaluate(model, tokenizer, tasks, settings=EvalSettings(max_new_tokens=6))
    (expert,) = evaluate(model, tokenizer, tasks, adapter, EvalSettings(max_new_tokens=6))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert [a for _, a in expert.predictions] != [a for _, a in base.predictions]
    with apply_temporarily(model, adapter):
        expected = generate(model, tokenizer, PROMPTS, max_new_tokens=6)
    assert [a for _, a in expert.predictions] == expected
    (again,) = evaluate(model, tokenizer, tasks, settings=EvalSettings(max_new_tokens=6))
    assert again == base


def test_the_base_comes_back_when_measuring_fails():
    model = make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(TaskError):
        evaluate(model, make_tokenizer(), [Task("t", {})], make_adapter(model))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_an_adapter_of_another_base_is_refused(model):
    with pytest.raises(WrongBase):
        evaluate(model, make_tokenizer(), [task("t", ["a"], ["b"])], make_adapter(make_model(seed=9)))
