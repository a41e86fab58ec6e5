"""The slow half's gradient: that of dense autograd on a two-armed bandit, with advantages by hand, under several prompts."""

import pytest
import torch
from helpers.tiny import make_model, make_tokenizer

from sparselet import FastSlowSettings, SparseletConfig, TrainSettings, to_adapter
from sparselet.evaluation.rewards import Reward
from sparselet.generation.prompts import prompt_format, prompt_tokens
from sparselet.tasks.rows import Row
from sparselet.workflows.rollouts import make_rollout_trainer

pytestmark = pytest.mark.trl

PULLS = "abbbaabb"  # the arms that the rollouts of two rows pull
ROWS = [Row("ant?", "a"), Row("bee?", "a")]
PROMPTS = ("{input}", "Pull: {input}")


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    base, how = (make_model(), make_tokenizer()), FastSlowSettings(generations=4, max_new_tokens=1, clip=5.0)
    pays = Reward("pays", lambda answers, targets: float(answers[0] == targets[0]))
    settings = TrainSettings(task="bandit", learning_rate=1e-2, batch_size=2, method="fast-slow")
    form = prompt_format(*base, chat_template=False)
    config = SparseletConfig(density=0.2, task_type="CAUSAL_LM")
    made = make_rollout_trainer(base, form, ROWS, lambda: PROMPTS, pays, settings, how, config, [], tmp_path)
    arms = [[prompt_tokens(form, arm)[0]] for arm in PULLS]
    monkeypatch.setattr(made, "_generate_single_turn", lambda *_: (arms, None))
    made.current_gradient_accumulation_steps = 1
    made.model.train()
    return made


def test_the_gradient_is_that_of_autograd_on_a_two_armed_bandit(trainer):
    inputs = trainer._generate_and_score_completions([{"prompt": "", "row": i // 4} for i in range(8)])
    rewards = torch.tensor([[float(arm == "a") for arm in PULLS[:4]], [float(arm == "a") for arm in PULLS[4:]]])
    by_hand = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    assert by_hand[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-3)
    torch.testing.assert_close(inputs["advantages"], by_hand.flatten())

    trainer.compute_loss(trainer.model, inputs).backward()
    dense, tokenizer = make_model(), make_tokenizer()
    loss = torch.zeros(())
    for i, (arm, advantage) in enumerate(zip(PULLS, by_hand.flatten(), strict=True)):
        text = PROMPTS[i % 2].replace("{input}", ROWS[i // 4].input)
        row = torch.tensor([tokenizer(text)["input_ids"]])
        token = tokenizer(arm)["input_ids"][0]
        loss = loss - advantage * dense(input_ids=row).logits[0, -1].log_softmax(-1)[token] / len(PULLS)
    loss.backward()
    for name, delta in to_adapter(trainer.model).items():
        layer = trainer.model.get_submodule(f"base_model.model.{name}")
        expected = dense.get_submodule(name).weight.grad.flatten()[delta.indices]
        torch.testing.assert_close(layer.sparse_values["default"].grad, expected, rtol=1e-4, atol=1e-6)
        assert expected.abs().max() > 1e-4


def test_rewards_that_are_equal_give_no_gradient(trainer, monkeypatch):
    monkeypatch.setattr(trainer, "reward_funcs", [lambda completions, **_: [0.3] * len(completions)])
    inputs = trainer._generate_and_score_completions([{"prompt": "", "row": i // 4} for i in range(8)])
    assert not inputs["advantages"].any()


def test_the_paying_arm_is_pulled_more(trainer):
    def chance():
        with torch.no_grad():
            row = torch.tensor([make_tokenizer()("Pull: ant?")["input_ids"]])
            return float(trainer.model(input_ids=row).logits[0, -1].softmax(-1)[make_tokenizer()("a")["input_ids"][0]])

    before = chance()
    trainer.train()
    assert chance() > 1.02 * before
