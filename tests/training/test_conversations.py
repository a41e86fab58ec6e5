"""Conversations: what is learned of them against TRL and transformers, and asked and measured at the last answer."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers.tiny import make_model, make_t5, make_tokenizer, save_base
from tokenizers import AddedToken

from sparselet.errors import TaskError
from sparselet.evaluation import EvalSettings, evaluate
from sparselet.generation.generate import generate
from sparselet.generation.prefix import batch_loss
from sparselet.generation.prompts import prompt_format
from sparselet.tasks.rows import Message, Row
from sparselet.tasks.task import Task
from sparselet.training.collate import IGNORED, collator, encode

SYSTEM, FIRST, SECOND = ("system", "Be brief."), ("user", "ant?"), ("user", "bee?")
CHAT = (SYSTEM, FIRST, ("assistant", "tna"), SECOND, ("assistant", "eeb yes"))
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# An answer that another follows loses what the last one begins with.
THINKING = CHATML.replace("{{ m.content }}", "{{ '~' if loop.last and m.role == 'assistant' }}{{ m.content }}").replace(
    "assistant\n{% endif", "assistant\n~{% endif"
)


def conversation(turns=CHAT, first_learned=0):
    messages = tuple(Message(*turn) for turn in turns)
    return Row(messages[:-1], messages[-1].content, first_learned)


def as_dicts(turns):
    return [{"role": role, "content": content} for role, content in turns]


def tokenizer_of(template):
    """One token a byte, and one for each control token that the template spells out."""
    tokenizer = make_tokenizer()
    control = sorted({*re.findall(r"<\|\w+\|>|<(?:start|end)_of_turn>", template)})
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(token) for token in control]})
    tokenizer.bos_token, tokenizer.chat_template = "<end>", template
    return tokenizer


def model_of(tokenizer, **changes):
    """A model that knows the tokenizer's control tokens, and no end token of its own."""
    model = make_model(eos_token_id=None, **changes)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return model


def form_of(template, **changes):
    tokenizer = tokenizer_of(template)
    return prompt_format(model_of(tokenizer, **changes), tokenizer, True)


def whole(row):
    """A sequence's tokens and labels."""
    return row["prompt"] + row["target"], [IGNORED] * len(row["prompt"]) + row.get("labels", row["target"])


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_instruct_2507", "llama3", "gemma3", "phi3", "cohere", "lfm2_v2"])
@pytest.mark.parametrize("turns", [CHAT, CHAT[1:], CHAT[:3]], ids=["several", "no-system", "one"])
def test_what_is_learned_is_what_trl_learns_but_for_the_white_space_of_the_template(name, turns):
    templates = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    marked = (templates / f"{name}_training.jinja").read_text()  # as the model's own, with {% generation %}
    form = form_of((templates / f"{name}.jinja").read_text())
    theirs = form.tokenizer.apply_chat_template(
        as_dicts(turns), chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
    )
    (row,) = encode([conversation(turns)], form, 2048, "t")
    tokens, labels = whole(row)
    assert theirs["input_ids"][: len(tokens)] == tokens
    assert not form.tokenizer.decode(theirs["input_ids"][len(tokens) :]).replace("<end>", "").strip()
    newline = form.tokenizer("\n")["input_ids"][0]
    learned = [mask and token != newline for token, mask in zip(tokens, theirs["assistant_masks"], strict=False)]
    assert [label != IGNORED for label in labels] == learned
    assert all(label in (IGNORED, token) for label, token in zip(labels, tokens, strict=True))


@pytest.mark.parametrize("template", [CHATML, THINKING], ids=["joined", "apart"])
@pytest.mark.parametrize("first_learned", [0, 4])
def test_each_answer_follows_what_the_model_is_asked_with(template, first_learned):
    form = form_of(template)
    sequences = encode([conversation(CHAT, first_learned)], form, 2048, "t")
    answers = [i for i, (role, _) in enumerate(CHAT) if role == "assistant" and i >= first_learned]
    assert len(sequences) == (1 if template == CHATML else len(answers))
    expected = []
    for i in answers:
        asked = form.tokenizer.apply_chat_template(as_dicts(CHAT[:i]), add_generation_prompt=True, return_dict=False)
        expected.append((asked, [*form.tokenizer(CHAT[i][1])["input_ids"], form.end]))
    found = []
    for tokens, labels in map(whole, sequences):
        starts = [i for i in range(1, len(labels)) if labels[i] != IGNORED and labels[i - 1] == IGNORED]
        for start in starts:
            end = next((i for i in range(start, len(labels)) if labels[i] == IGNORED), len(labels))
            found.append((tokens[:start], labels[start:end]))
    assert found == expected


def test_one_turn_is_the_row_of_its_texts():
    form = form_of(CHATML)
    assert encode([conversation(CHAT[1:3])], form, 2048, "t") == encode([Row("ant?", "tna")], form, 2048, "t")


def test_the_loss_of_a_conversation_is_that_of_its_answers_apart():
    tokenizer = tokenizer_of(CHATML)
    model = model_of(tokenizer)
    form = prompt_format(model, tokenizer, True)
    other = (("user", "a longer question, cat?"), ("assistant", "tac"))
    rows = [conversation(), conversation(other)]
    apart = [conversation(CHAT[:3]), conversation(CHAT, 4), conversation(other)]
    for share in (False, True):
        collate = collator(model, form, share)
        losses = [batch_loss(model, collate(encode(chosen, form, 2048, "t"))) for chosen in (rows, apart)]
        torch.testing.assert_close(*losses)
        gradients = [torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) for loss in losses]
        torch.testing.assert_close(*gradients)


def test_what_goes_before_the_last_answer_is_cut_from_the_left():
    form = form_of(CHATML)
    (uncut,) = map(whole, encode([conversation()], form, 2048, "t"))
    answer = len("eeb yes") + 1
    for length in (1, 5, 30, 60, 70):
        (row,) = encode([conversation()], form, length, "t")
        tokens, labels = whole(row)
        assert tokens == uncut[0][-length - answer :]
        assert labels[1:] == uncut[1][-length - answer :][1:]
        assert len(row.get("labels", row["target"])) == len(row["target"])
        assert row["prompt"]
    positions = form_of(CHATML, max_position_embeddings=50)
    (row,) = encode([conversation()], positions, 2048, "t")
    assert whole(row)[0] == uncut[0][-50:]


def test_an_encoder_decoder_learns_each_answer_by_itself():
    tokenizer = tokenizer_of(CHATML)
    model = make_t5()
    model.generation_config.eos_token_id = None
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    form = prompt_format(model, tokenizer, True)
    rows = encode([conversation()], form, 2048, "t")
    assert [tokenizer.decode(row["target"]) for row in rows] == ["tna<|im_end|>", "eeb yes<|im_end|>"]
    assert all("labels" not in row for row in rows)


def test_the_last_answer_is_asked_for_and_measured():
    tokenizer = tokenizer_of(CHATML)
    model = model_of(tokenizer, initializer_range=0.5)
    row, single = conversation(), Row("ant?", "tna")
    asked = [as_dicts(CHAT[:4]), as_dicts(CHAT[1:2])]
    expected = []
    for messages in asked:
        ids = torch.tensor([tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)])
        ends = [*tokenizer("<|im_end|>")["input_ids"]]
        output = model.generate(input_ids=ids, do_sample=False, max_new_tokens=8, eos_token_id=ends, pad_token_id=0)
        expected.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip())
    (result,) = evaluate(model, tokenizer, [Task("t", {"test": (row, single)})], settings=EvalSettings(max_new_tokens=8))
    assert result.predictions == ((row, expected[0]), (single, expected[1]))
    assert len(set(expected)) == 2
    with pytest.raises(TaskError, match="prompt 2: is a conversation, which only a chat template makes a prompt of"):
        generate(model, tokenizer, ["ant?", row.input], chat_template=False)


REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
DROPPING = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (REFUSING, "row 2: cannot go through the tokenizer's chat template: no system role"),
        (DROPPING, "row 2: the chat template leaves out message 1, the system's"),
        (None, "row 2: is a conversation, which only a chat template makes a prompt of"),
    ],
    ids=["refused", "left-out", "no-template"],
)
def test_a_conversation_that_a_template_does_not_take_is_named(template, message):
    form = form_of(template or CHATML) if template else prompt_format(make_model(), make_tokenizer(), True)
    with pytest.raises(TaskError, match=f"task t, split train, {message}"):
        encode([Row("ant?", "tna"), conversation()], form, 2048, "task t, split train")


def test_conversations_are_trained_and_measured_from_the_command_line(cli, tmp_path):
    base, task = save_base(tmp_path / "base", template=True), tmp_path / "task"
    task.mkdir()
    for split in ("train", "validation", "test"):
        rows = [{"messages": as_dicts(CHAT), "id": 1}, {"messages": as_dicts(CHAT[1:3]), "id": 2}]
        (task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = ["train", "--task", task, "--model", base, "--epochs", "1", "--batch-size", "2", "--out"]
    code, _, err = cli(*line, tmp_path / "bare", "--no-chat-template")
    assert (code, "task task, split train, row 1: is a conversation" in err) == (1, True)
    assert cli(*line, tmp_path / "expert")[0] == 0
    measure = ["eval", "--task", task, "--model", base, "--adapter", tmp_path / "expert", "--max-new-tokens", "2"]
    code, out, _ = cli(*measure, "--metric", "chrf", "exact_match", "--predictions", tmp_path / "answers", "--json")
    assert code == 0
    assert json.loads(out)[str(tmp_path / "expert")]["task"].keys() == {"chrf", "exact_match", "rows"}
    first, second = (json.loads(answer) for answer in (tmp_path / "answers").read_text().splitlines())
    assert (first["messages"], first["target"]) == (as_dicts(CHAT[:4]), "eeb yes")
    assert (second["messages"], second["target"]) == (as_dicts(CHAT[1:2]), "tna")
    code, out, _ = cli(*measure, "--metric", "chrf", "builtins:max")
    assert code == 1
    code, out, _ = cli(*measure, "--metric", "chrf", "exact_match", "rougeL")
    assert "chrF (exact match, Rouge-L)" in out
