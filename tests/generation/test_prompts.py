"""Prompts and targets as tokens, against what transformers' tokenizers and templates give."""

import pytest
import torch
from helpers.tiny import END, PAD, TEMPLATE, make_gpt2, make_model, make_t5, make_tokenizer
from tokenizers import normalizers
from tokenizers.processors import TemplateProcessing

from sparselet.errors import ModelError, TaskError
from sparselet.generation.generate import generate
from sparselet.generation.prompts import chat_tokens, padding_token, prompt_format, prompt_tokens, target_tokens
from sparselet.tasks.task import Row
from sparselet.training.collate import encode

CHATML = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
)
STRICT_PARTS = "{% for m in messages %}{{ m.content[0].text + m.content[0]['type'] }}{% endfor %}"


def tokenizer_with(template=None, *special, post=None, **changes):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    if post:
        ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (END, "<s>")}
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=post, special_tokens=list(ids.items()))
    tokenizer.chat_template = template
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def large(**changes):
    model = make_model(**changes)
    model.resize_token_embeddings(264)
    return model


def form_of(tokenizer, chat=True, model=None, own=1):
    model = model or large()
    model.generation_config.eos_token_id = own
    return prompt_format(model, tokenizer, chat)


# Where an answer ends


@pytest.mark.parametrize(
    ("own", "chat", "end", "ends"),
    [
        (1, False, 1, {1}),
        (None, False, 1, {1}),
        (7, False, 1, {1, 7}),
        ([7, 1], False, 1, {1, 7}),
        ([1, "stop"], True, "stop", {1, "stop"}),
        ("stop", True, "stop", {"stop"}),
        (
            1,
            True,
            1,
            {1},
        ),  # a base model with a template: it knows its own end token, and that alone ends its answers elsewhere
        (7, True, "stop", {7, "stop"}),
    ],
)
def test_targets_end_with_a_token_that_ends_answers(own, chat, end, ends):
    tokenizer = tokenizer_with(CHATML, "<|start|>", "<|stop|>")
    stop = tokenizer.convert_tokens_to_ids("<|stop|>")
    own, end, *ends = (
        [stop if t == "stop" else t for t in x] if isinstance(x, list) else stop if x == "stop" else x
        for x in (own, end, *ends)
    )
    form = form_of(tokenizer, chat, own=own)
    assert form.end == target_tokens(form, "a")[-1] == end
    assert form.ends == set(ends)


def test_a_tokenizer_without_an_end_token_takes_the_models_own():
    tokenizer = tokenizer_with(eos_token=None)
    assert target_tokens(form_of(tokenizer, own=[7, 9]), "a")[-1] == 7
    nowhere = form_of(tokenizer, own=None)
    assert nowhere.ends == set()
    with pytest.raises(ModelError, match="end token"):
        target_tokens(nowhere, "a")


def test_a_template_that_ends_answers_with_text_leaves_it_to_the_tokenizer():
    assert form_of(tokenizer_with(TEMPLATE)).end == 1


def test_the_filling_is_a_token_that_the_model_knows():
    assert padding_token(form_of(make_tokenizer())) == 0
    tokenizer = tokenizer_with(None, "<fill>", pad_token="<fill>")
    assert padding_token(form_of(tokenizer)) == tokenizer.pad_token_id
    assert padding_token(form_of(tokenizer, model=make_model())) == 1
    assert padding_token(form_of(tokenizer_with(pad_token=None, eos_token=None), own=None)) == 0


# Templates


@pytest.mark.parametrize("template", [PARTS, STRICT_PARTS])
def test_a_template_of_parts_is_given_parts(template):
    tokenizer = tokenizer_with(template)
    message = [{"role": "user", "content": [{"type": "text", "text": "ant?"}]}]
    expected = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    assert prompt_tokens(form_of(tokenizer), "ant?") == expected
    assert "ant?" in tokenizer.decode(expected)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}",
        "{{ raise_exception('only with a system message') }}",
        "{% for m in messages %}{{ m.content.text }}{% endfor %}",
        "nothing",
        "{{ messages[1].content }}",
        "{% for",
    ],
)
def test_a_template_that_drops_or_refuses_the_question_is_refused(template):
    with pytest.raises(ModelError, match="chat template"):
        form_of(tokenizer_with(template))
    assert prompt_tokens(form_of(tokenizer_with(template), chat=False), "ant?") == make_tokenizer()("ant?")["input_ids"]


def test_conversations_are_those_of_the_template():
    tokenizer = tokenizer_with(CHATML, "<|start|>", "<|stop|>")
    messages = [{"role": r, "content": f"{r}!"} for r in ("system", "user", "assistant")]
    expected = tokenizer.apply_chat_template(messages, return_dict=False)
    assert chat_tokens(form_of(tokenizer), messages, generation_prompt=False) == expected


# Control tokens


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("text", ["a<|stop|>b", "<end>", "x<|start|>assistant\n<end><|stop|>", "<pad>"])
def test_what_a_text_spells_out_is_no_control_token(chat, text):
    tokenizer = tokenizer_with(CHATML, "<|start|>", "<|stop|>")
    form = form_of(tokenizer, chat)
    plain = prompt_tokens(form, "owl")
    control = set(tokenizer.convert_tokens_to_ids(["<|start|>", "<|stop|>", PAD, END]))
    prompt, target = prompt_tokens(form, text), target_tokens(form, text)
    assert [t for t in prompt if t in control] == [t for t in plain if t in control]
    assert tokenizer.decode(prompt) == tokenizer.decode(plain).replace("owl", text)
    assert not control & set(target[:-1])
    assert tokenizer.decode(target[:-1]).strip() == text
    # Nor in what is encoded next.
    assert prompt_tokens(form, "owl") == plain


def test_a_text_that_cannot_be_told_from_a_control_token_is_refused():
    tokenizer = tokenizer_with()
    tokenizer.add_special_tokens({"additional_special_tokens": ["a"]})  # a byte that is in the vocabulary too
    with pytest.raises(TaskError, match=r"task t, row 2: spells out 'a'"):
        encode([Row("b", "c"), Row("a", "c")], form_of(tokenizer), 99, "task t")


# What a tokenizer adds


def test_an_end_token_that_the_tokenizer_appends_is_not_between_prompt_and_target():
    tokenizer = tokenizer_with(None, "<s>", post="<s> $A <end>")
    start = tokenizer.convert_tokens_to_ids("<s>")
    text = make_tokenizer()("ant")["input_ids"]
    form = form_of(tokenizer)
    assert prompt_tokens(form, "ant") == [start, *text]
    assert prompt_tokens(form, "ant<end>")[:4] == [start, *text]
    assert target_tokens(form, "ant") == [*make_tokenizer()(" ant")["input_ids"], 1]
    t5 = make_t5()
    t5.resize_token_embeddings(264)
    seq2seq = form_of(tokenizer, model=t5)
    assert prompt_tokens(seq2seq, "ant") == [start, *text, 1]
    assert target_tokens(seq2seq, "ant") == [*text, 1]


def test_a_template_that_writes_the_start_token_has_it_once():
    tokenizer = tokenizer_with("<s>" + TEMPLATE, "<s>", post="<s> $A <end>", bos_token="<s>")
    prompt = prompt_tokens(form_of(tokenizer), "ant")
    assert prompt.count(tokenizer.bos_token_id) == 1
    assert prompt == tokenizer.apply_chat_template(
        [{"role": "user", "content": "ant"}], add_generation_prompt=True, return_dict=False
    )


def test_targets_begin_with_the_token_that_generate_forces():
    model = make_t5()
    model.generation_config.forced_bos_token_id = 9
    assert target_tokens(form_of(make_tokenizer(), model=model), "a")[0] == 9
    causal = make_model()
    causal.generation_config.forced_bos_token_id = 9
    assert target_tokens(form_of(make_tokenizer(), model=causal), "a")[0] != 9


# Limits


def test_tokens_that_the_model_does_not_know_are_refused_by_row():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["owl"])
    form = form_of(tokenizer, model=make_model())
    with pytest.raises(TaskError, match=r"task t, row 2: has token 258 \('owl'\), but the model has tokens up to 257"):
        encode([Row("a", "b"), Row("b", "owl")], form, 99, "task t")
    with pytest.raises(TaskError, match="prompt 1: has token 258"):
        generate(make_model(), tokenizer, ["owl"])


def test_rows_are_cut_to_the_models_positions_or_refused():
    form = form_of(make_tokenizer(), model=make_gpt2())
    rows = [Row("x" * 40, "yes"), Row("ab", "no"), Row("y" * 9, "z" * 20)]
    encoded = encode(rows, form, 2048, "task t")
    assert [len(row["prompt"]) + len(row["target"]) for row in encoded] == [32, 6, 31]
    with pytest.raises(TaskError, match=r"task t, row 4: the target has 33 tokens, but the model has 32 positions"):
        encode([*rows, Row("a", "b" * 31)], form, 2048, "task t")


def test_answers_are_given_within_the_models_positions():
    model, tokenizer = make_gpt2(), make_tokenizer()
    model.generation_config.eos_token_id = None
    form = prompt_format(model, tokenizer, False)

    def alone(prompt, new):
        ids = torch.tensor([prompt_tokens(form, prompt)])
        settings = {"max_new_tokens": new, "do_sample": False, "eos_token_id": 1, "pad_token_id": 0}
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :].tolist()
        return tokenizer.decode(found[: found.index(1)] if 1 in found else found).strip()

    # 32 positions: all that an answer reads must fit, and a prompt loses no more than half of them.
    prompts = ["ant", "bee", "x" * 20, "y" * 30, "z" * 60]
    assert generate(model, tokenizer, prompts, max_new_tokens=8) == [alone(p[-25:], 8) for p in prompts]
    rooms = {"ant": 30, "bee": 30, "x" * 20: 17, "y" * 30: 17, "z" * 60: 17}
    assert generate(model, tokenizer, prompts, max_new_tokens=99) == [alone(p[-16:], rooms[p]) for p in prompts]


def test_a_row_without_tokens_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("ü", "")
    with pytest.raises(TaskError, match="row 1: has no tokens"):
        encode([Row("ü", "b")], form_of(tokenizer), 99, "task t")
