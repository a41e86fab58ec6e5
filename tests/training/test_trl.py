"""TRL's trainers for some steps: the adapter is selected by the trainer's own loss, learns, and is saved as it answers."""

import copy

import pytest
import torch
from datasets import Dataset
from helpers.paper import paper_config
from helpers.tiny import WORDS, logits, make_model, make_tokenizer
from helpers.training_runs import QUIET
from peft import PeftModel, get_peft_model
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from sparselet import MaskSchedule, to_adapter
from sparselet.training.scoring import collated, draw_rows
from sparselet.tuner.adapted import sparselet_layers

pytestmark = pytest.mark.trl

BETA = 0.5
PROMPTS = [{"prompt": f"{word}?", "completion": word[::-1]} for word in WORDS]
PAIRS = [{"prompt": f"{word}?", "chosen": word[::-1], "rejected": word} for word in WORDS]
JUDGED = [
    {"prompt": f"{word}?", "completion": word[::-1] if i % 2 else word, "label": bool(i % 2)} for i, word in enumerate(WORDS)
]


def letters(completions, **columns):
    """A reward: the fraction of small letters."""
    return [sum("a" <= letter <= "z" for letter in text) / max(1, len(text)) for text in completions]


GENERATING = {"num_generations": 4, "max_completion_length": 6}
# Trainer, its arguments' class, rows, more arguments, more of the Trainer.
KINDS = {
    "sft": (SFTTrainer, SFTConfig, PROMPTS, {}, {}),
    "dpo": (DPOTrainer, DPOConfig, PAIRS, {"beta": BETA}, {}),
    "dpo-checkpointing": (DPOTrainer, DPOConfig, PAIRS, {"beta": BETA, "gradient_checkpointing": True}, {}),
    "kto": (KTOTrainer, KTOConfig, JUDGED, {"beta": BETA}, {}),
    "grpo": (GRPOTrainer, GRPOConfig, PROMPTS, GENERATING, {"reward_funcs": letters}),
    # With a reference, and each generation trained on twice.
    "grpo-reference": (
        GRPOTrainer,
        GRPOConfig,
        PROMPTS,
        {**GENERATING, "beta": 0.1, "num_iterations": 2, "gradient_accumulation_steps": 2},
        {"reward_funcs": letters},
    ),
}


@pytest.fixture
def make_trainer(tmp_path):
    """A trainer of a kind over 4 rows a step."""

    def make(kind, model, callbacks=(), arguments=None, **more):
        trainer_class, config_class, rows, own, others = KINDS[kind]
        settled = {**QUIET, "output_dir": str(tmp_path / "trainer"), "per_device_train_batch_size": 4, "max_steps": 8}
        return trainer_class(
            model=model,
            args=config_class(**{**settled, "learning_rate": 2e-2, "bf16": False, **own, **(arguments or {})}),
            train_dataset=Dataset.from_list(rows),
            processing_class=make_tokenizer(),
            callbacks=list(callbacks),
            **others,
            **more,
        )

    return make


class Losses(TrainerCallback):
    """Notes how good the trained rows are to begin with and in the end, by the trainer's own loss of the first four."""

    trainer = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.first = self.loss()

    def on_train_end(self, args, state, control, **kwargs):
        self.last = self.loss()

    @torch.no_grad()
    def loss(self):
        trainer = self.trainer
        rows = [trainer.train_dataset[i] for i in range(8)]
        return float(trainer.compute_loss(trainer.model, trainer.data_collator(rows)))


@pytest.mark.parametrize(("wrapped", "mask"), [(False, "dense"), (True, "gradient")], ids=["config", "wrapped"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_is_selected_learns_and_is_saved_as_it_answers(make_trainer, tmp_path, kind, wrapped, mask):
    config = paper_config(density=0.2, score="mcs_neg" if mask == "dense" else "gm", initial_mask=mask, reselect_every=2)
    losses = Losses()
    given = {"model": get_peft_model(make_model(), config)} if wrapped else {"model": make_model(), "peft_config": config}
    trainer = make_trainer(kind, callbacks=[MaskSchedule(), *([] if "grpo" in kind else [losses])], **given)
    losses.trainer = trainer
    trainer.train()
    for layer in sparselet_layers(trainer.model, "default").values():
        assert not layer.sparse_mask["default"].selecting
        assert layer.sparse_values["default"].numel() == round(0.2 * layer.base_weight.numel())
    values = torch.cat([delta.values for delta in to_adapter(trainer.model).values()])
    assert values.ne(0).float().mean() > 0.1
    if "grpo" not in kind:
        assert losses.last < losses.first - 0.01
    trainer.save_model(tmp_path / "saved")
    expected = logits(trainer.model.eval())
    assert not torch.allclose(expected, logits(make_model()), atol=1e-2)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(make_model(), tmp_path / "saved")), expected)
    torch.testing.assert_close(logits(trainer.model.unload()), logits(make_model()), rtol=0, atol=0)


def log_probabilities(model, batch):
    """The summed log probability of each row's completion."""
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
    of_labels = output.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    return (of_labels * batch["completion_mask"][:, 1:]).sum(-1)


class SelectByHand(TrainerCallback):
    """Before the schedule's first selection: the masks that dense autograd gives on copies, with a reference model apart."""

    def __init__(self, score, step):
        self.score, self.step, self.masks = score, step, {}

    def on_step_end(self, args, state, control, model, train_dataloader, **kwargs):
        if state.global_step != self.step:
            return
        policy, reference = make_model(), make_model()
        changes = to_adapter(model)
        for name, delta in changes.items():
            policy.get_submodule(name).weight.data += delta.to_dense()
        rows = draw_rows(len(PAIRS), args, model.peft_config["default"], state.global_step, None)
        ((batch,),) = collated(train_dataloader, rows, args)
        with torch.no_grad():
            reference_chosen, reference_rejected = log_probabilities(reference, batch).chunk(2)
        chosen, rejected = log_probabilities(policy, batch).chunk(2)
        margin = (chosen - reference_chosen) - (rejected - reference_rejected)
        (-torch.nn.functional.logsigmoid(BETA * margin)).mean().backward()
        for name, delta in changes.items():
            gradient = policy.get_submodule(name).weight.grad
            scores = gradient.abs() if self.score == "gm" else -delta.to_dense() * gradient
            self.masks[name] = scores.flatten().topk(round(0.2 * gradient.numel())).indices.sort().values


@pytest.mark.parametrize(("wrapped", "score"), [(False, "gm"), (True, "mcs_neg")], ids=["config", "wrapped"])
@pytest.mark.parametrize("kind", ["dpo", "dpo-checkpointing"])
def test_the_masks_of_dpo_are_those_of_a_reference_model_apart(make_trainer, kind, wrapped, score):
    config = paper_config(density=0.2, score=score, reselect_every=0, selection_epochs=0.75)
    given = {"model": get_peft_model(make_model(), config)} if wrapped else {"model": make_model(), "peft_config": config}
    by_hand = SelectByHand(score, step=3)
    trainer = make_trainer(kind, callbacks=[by_hand, MaskSchedule()], **given)
    trainer.train()
    assert by_hand.masks
    for name, delta in to_adapter(trainer.model).items():
        assert torch.equal(delta.indices.long(), by_hand.masks[name]), name


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_trained_adapter_is_its_own_reference(make_trainer, tmp_path, kind):
    """Whether it was trained in this process or loaded: the loss starts where policy and reference are equal."""
    model = get_peft_model(make_model(), paper_config(density=0.2, initial_mask="random", score="gm"))
    trainer = make_trainer("sft", model, [MaskSchedule()])
    trainer.train()
    trainer.save_model(tmp_path / "sft")
    loaded = PeftModel.from_pretrained(make_model(), tmp_path / "sft", is_trainable=True)
    for start in (trainer.model, loaded):
        before, losses = copy.deepcopy(to_adapter(start)), Losses()
        second = make_trainer(kind, start, [losses], {"max_steps": 2})
        losses.trainer = second
        second.train()
        assert losses.first == pytest.approx(0.6931 if "dpo" in kind else 0.5, abs=1e-3)
        assert losses.last < losses.first
        reference = to_adapter(second.model, "ref")
        for name, delta in before.items():
            assert torch.equal(reference[name].indices, delta.indices)
            assert torch.equal(reference[name].values, delta.values)
