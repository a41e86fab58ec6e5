"""Batches for completion-only training, against the same rows one by one through the model's plain forward."""

import pytest
import torch
from helpers.tiny import TEMPLATE, make_model, make_t5, make_tokenizer
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from sparselet.generation.padding import forward_parameters
from sparselet.generation.prefix import batch_loss
from sparselet.generation.prompts import prompt_format
from sparselet.tasks.task import Row
from sparselet.training import collate
from sparselet.training.collate import IGNORED, CompletionCollator, Seq2SeqCollator, encode

ROWS = (
    Row("ant?", "tna"),
    Row("a longer prompt, of a lark?", "kral"),
    Row("x", "a target longer than its prompt"),
    Row("é?", "ß"),
)


def encoded(tokenizer, rows=ROWS, chat_template=True, length=2048, model=None):
    return encode(rows, prompt_format(model or make_model(), tokenizer, chat_template), length, "rows")


def collator(model, tokenizer):
    return collate.collator(model, prompt_format(model, tokenizer, True))


def row_by_row(model, rows):
    """The mean loss over all target tokens, from unpadded rows with labels and the logits of every position."""
    total, count = torch.zeros(()), 0
    for row in rows:
        ids = torch.tensor([row["prompt"] + row["target"]])
        labels = torch.tensor([[IGNORED] * len(row["prompt"]) + row["target"]])
        total = total + model(input_ids=ids, labels=labels).loss * len(row["target"])
        count += len(row["target"])
    return total / count


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chat_template", [True, False], ids=["chat", "bare"])
@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], ROWS[2:3], ROWS[::-1]], ids=["four", "one", "long-target", "reversed"])
def test_loss_and_gradients_are_those_of_unpadded_rows_with_full_logits(chat_template, rows):
    model, tokenizer = make_model(), make_tokenizer(template=True)
    data = encoded(tokenizer, rows, chat_template)
    batch = collator(model, tokenizer)(data)
    expected_loss = row_by_row(model, data)
    expected = gradients(model, expected_loss)
    loss = batch_loss(model, batch)
    torch.testing.assert_close(loss, expected_loss)
    found = gradients(model, loss)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("without", ["logits_to_keep", "position_ids", "both"])
def test_models_that_accept_less_get_less(without):
    model, tokenizer = make_model(), make_tokenizer()
    all_names = forward_parameters(model)
    assert {"logits_to_keep", "position_ids"} <= all_names
    left_out = {"logits_to_keep", "position_ids"} if without == "both" else {without}
    data = encoded(tokenizer)
    batch = CompletionCollator(tokenizer.pad_token_id, all_names - left_out)(data)
    assert not left_out & batch.keys()
    if "logits_to_keep" in left_out:
        assert batch["labels"].shape == batch["input_ids"].shape
    if "position_ids" not in left_out:
        torch.testing.assert_close(batch_loss(model, batch), row_by_row(model, data))


def test_absolute_positions_count_from_a_rows_first_token():
    """GPT-2 learns a vector for each position, so that a wrong one shows in the loss."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=258, n_embd=16, n_layer=1, n_head=2, n_positions=64, initializer_range=0.5))
    model.eval()
    tokenizer = make_tokenizer()
    data = encoded(tokenizer)
    batch = collator(model, tokenizer)(data)
    torch.testing.assert_close(batch_loss(model, batch), row_by_row(model, data))
    shifted = {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])}
    assert not torch.allclose(batch_loss(model, shifted), row_by_row(model, data))


def test_rows_are_padded_on_the_left_and_only_targets_are_labelled():
    model, tokenizer = make_model(), make_tokenizer()
    data = [{"prompt": [5, 6, 7], "target": [8, 1]}, {"prompt": [9], "target": [10, 11, 1]}, {"prompt": [4], "target": [1]}]
    batch = CompletionCollator(0, frozenset({"position_ids"}))(data)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 1], [0, 9, 10, 11, 1], [0, 0, 0, 4, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 0, 1, 2, 3], [0, 0, 0, 0, 1]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 8, 1], [-100, -100, 10, 11, 1], [-100, -100, -100, -100, 1]]
    kept = collator(model, tokenizer)(data)
    assert kept["logits_to_keep"] == 4
    assert kept["labels"].tolist() == [row[-4:] for row in batch["labels"].tolist()]


def test_the_logits_that_are_kept_are_just_those_with_a_label():
    model, tokenizer = make_model(), make_tokenizer()
    data = encoded(tokenizer, chat_template=False)
    batch = collator(model, tokenizer)(data)
    longest = max(len(row["target"]) for row in data)
    assert batch["logits_to_keep"] == longest + 1
    assert model(**batch).logits.shape[1] == longest + 1
    full = torch.tensor([[IGNORED] * (batch["input_ids"].shape[1] - len(r["target"])) + r["target"] for r in data])
    assert torch.equal(full[:, -(longest + 1) :], batch["labels"])


def test_an_empty_prompt_does_not_ask_for_more_logits_than_there_are():
    model, tokenizer = make_model(), make_tokenizer()
    batch = collator(model, tokenizer)([{"prompt": [], "target": [8, 1]}, {"prompt": [], "target": [9, 10, 1]}])
    assert batch["logits_to_keep"] == 3
    assert torch.isfinite(batch_loss(model, batch))


# Tokens


def text(tokenizer, tokens):
    return tokenizer.decode(tokens)


def test_a_bare_row_is_prompt_space_target_end():
    tokenizer = make_tokenizer(template=True)
    (row,) = encoded(tokenizer, ROWS[:1], chat_template=False)
    assert text(tokenizer, row["prompt"]) == "ant?"
    assert text(tokenizer, row["target"]) == " tna<end>"


def test_a_chat_row_is_the_template_with_the_answer_opened():
    tokenizer = make_tokenizer(template=True)
    assert tokenizer.chat_template == TEMPLATE
    (row,) = encoded(tokenizer, ROWS[:1])
    assert text(tokenizer, row["prompt"]) == "[user]ant?\n[assistant]"
    assert text(tokenizer, row["target"]) == "tna<end>"


def test_a_tokenizer_without_a_template_is_asked_bare():
    assert encoded(make_tokenizer()) == encoded(make_tokenizer(template=True), chat_template=False)


@pytest.mark.parametrize("chat_template", [True, False], ids=["chat", "bare"])
@pytest.mark.parametrize("length", [1, 5, 17, 2048])
def test_prompts_are_cut_from_the_left_and_targets_never(chat_template, length):
    tokenizer = make_tokenizer(template=True)
    for row, whole in zip(
        encoded(tokenizer, ROWS, chat_template, length), encoded(tokenizer, ROWS, chat_template), strict=True
    ):
        assert row["prompt"] == whole["prompt"][-length:]
        assert row["target"] == whole["target"]
        assert row["target"][-1] == tokenizer.eos_token_id


# Encoder and decoder


def test_an_encoder_decoder_gets_prompts_to_encode_and_targets_as_labels():
    model, tokenizer = make_t5(), make_tokenizer()
    made = collator(model, tokenizer)
    assert isinstance(made, Seq2SeqCollator)
    data = encoded(tokenizer, model=model)
    batch = made(data)
    assert set(batch) == {"input_ids", "attention_mask", "decoder_input_ids", "labels"}
    assert batch["input_ids"][0].tolist()[:4] == data[0]["prompt"]
    assert batch["input_ids"][0].tolist()[4:] == [0] * (batch["input_ids"].shape[1] - 4)
    assert batch["attention_mask"].sum(1).tolist() == [len(row["prompt"]) for row in data]
    assert [row[row != IGNORED].tolist() for row in batch["labels"]] == [row["target"] for row in data]
    assert text(tokenizer, data[0]["target"]) == "tna<end>"


def test_the_loss_of_an_encoder_decoder_is_that_of_unpadded_rows():
    model, tokenizer = make_t5(), make_tokenizer()
    data = encoded(tokenizer, model=model)
    total = sum(
        model(input_ids=torch.tensor([row["prompt"]]), labels=torch.tensor([row["target"]])).loss * len(row["target"])
        for row in data
    )
    expected_loss = total / sum(len(row["target"]) for row in data)
    expected = gradients(model, expected_loss)
    loss = batch_loss(model, collator(model, tokenizer)(data))
    torch.testing.assert_close(loss, expected_loss)
    for name, gradient in gradients(model, loss).items():
        torch.testing.assert_close(gradient, expected[name])


def test_the_accepted_names_are_those_of_forward():
    class Model(nn.Module):
        def forward(self, input_ids, position_ids=None, **kwargs): ...

    assert forward_parameters(Model()) == {"input_ids", "position_ids", "kwargs"}
