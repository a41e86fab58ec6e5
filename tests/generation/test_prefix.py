"""A shared beginning that is computed once, against the same rows in full."""

from dataclasses import replace

import pytest
import torch
from helpers.paper import paper_config
from helpers.tiny import make_gpt2, make_model, make_t5, make_tokenizer
from peft import LoraConfig, get_peft_model

import sparselet
from sparselet.generation.prefix import PREFIX_KEY, batch_loss, can_share_prefix, model_inputs
from sparselet.generation.prompts import prompt_format
from sparselet.training import collate

BEGINNING = [7, 8, 9, 10, 11]


def collator(model, tokenizer, share=False):
    return collate.collator(model, prompt_format(model, tokenizer, False), share)


def rows(beginning=BEGINNING, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def some(low, high):
        return torch.randint(2, 258, (int(torch.randint(low, high, (), generator=generator)),), generator=generator).tolist()

    return [{"prompt": [*beginning, *some(1, 9)], "target": [*some(1, 5), 1]} for _ in range(5)]


@pytest.fixture(autouse=True)
def share_always(monkeypatch):
    monkeypatch.setattr(collate, "LEAST_SAVED", 1)


def without_dropout():
    model = make_gpt2()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.update({"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0})
    return model


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("make", [make_model, without_dropout], ids=["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["full", "sparse", "lora"])
def test_loss_and_gradients_are_those_of_the_whole_rows(make, kind):
    torch.manual_seed(0)
    model = base = make()
    if kind == "sparse":
        model = get_peft_model(base, paper_config(initial_mask="random", density=0.3, task_type="CAUSAL_LM"))
        sparselet.freeze_masks(model)
    elif kind == "lora":
        targets = ["q_proj"] if base.config.model_type == "llama" else ["c_attn"]
        model = get_peft_model(base, LoraConfig(init_lora_weights=False, target_modules=targets))
    share, whole = (collator(base, make_tokenizer(), share) for share in (True, False))
    batch = share(rows())
    assert batch[PREFIX_KEY].tolist() == [BEGINNING]
    assert PREFIX_KEY not in whole(rows())
    assert batch["input_ids"].shape[1] + len(BEGINNING) == whole(rows())["input_ids"].shape[1]
    model.train()
    expected_loss = model(**whole(rows())).loss
    expected_loss.backward()
    expected = gradients(model)
    model.zero_grad()
    loss = batch_loss(model, batch)
    loss.backward()
    found = gradients(model)
    torch.testing.assert_close(loss, expected_loss)
    assert found.keys() == expected.keys()
    assert len(expected) > 1
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_selection_scores_whole_rows():
    masks = []
    for share in (True, False):
        model = get_peft_model(make_model(), paper_config(initial_mask="gradient", density=0.3, score="gm"))
        batch = collator(model.get_base_model(), make_tokenizer(), share)(rows())
        assert (PREFIX_KEY in batch) == share
        sparselet.reselect(model, [batch], loss=batch_loss)
        masks.append({name: t.clone() for name, t in model.named_buffers() if "sparse_indices" in name})
    assert masks[0]
    for name, mask in masks[0].items():
        assert torch.equal(mask, masks[1][name])


def test_a_batch_without_a_shared_beginning_is_as_before():
    model, tokenizer = make_model(), make_tokenizer()
    apart = [*rows(), *rows([99])]
    batch = collator(model, tokenizer, share=True)(apart)
    assert PREFIX_KEY not in batch
    whole = collator(model, tokenizer)(apart)
    assert batch.keys() == whole.keys()
    assert all(torch.equal(torch.as_tensor(batch[key]), torch.as_tensor(whole[key])) for key in whole)
    assert model_inputs(model, batch) == batch


def test_little_is_not_shared(monkeypatch):
    share = collator(make_model(), make_tokenizer(), share=True)
    saved = len(BEGINNING) * 4
    monkeypatch.setattr(collate, "LEAST_SAVED", saved)
    assert PREFIX_KEY in share(rows())
    monkeypatch.setattr(collate, "LEAST_SAVED", saved + 1)
    assert PREFIX_KEY not in share(rows())
    monkeypatch.setattr(collate, "LEAST_SAVED", 1)
    assert PREFIX_KEY not in share(rows()[:1])


def test_models_that_cannot_share_do_not():
    assert can_share_prefix(make_model())
    assert can_share_prefix(without_dropout())
    assert not can_share_prefix(make_gpt2()), "dropout"
    assert not can_share_prefix(make_model(attention_dropout=0.1))
    assert not can_share_prefix(make_t5())
    assert not collator(make_gpt2(), make_tokenizer(), share=True).shares
    assert replace(collator(make_model(), make_tokenizer(), share=True), shares=False) == collator(
        make_model(), make_tokenizer()
    )
