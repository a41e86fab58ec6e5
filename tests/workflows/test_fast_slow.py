"""Fast–slow training end to end on a tiny model: the pool, the adapter with its prompt, and what is refused."""

import json
import math

import pytest
import torch
from helpers.tiny import WORDS, make_model, make_tokenizer

from sparselet import EvalSettings, FastSlowSettings, SparseAdapter, TrainSettings, evaluate, export, inspect, train
from sparselet.errors import ConfigError, OutputExists, TaskError
from sparselet.evaluation.rewards import Reward, choose_reward
from sparselet.generation.prompts import in_prompt
from sparselet.tasks.rows import Message, Row
from sparselet.workflows.prompt_pool import PromptPool, PromptTrials, pareto_prompts

pytestmark = pytest.mark.trl

HOW = {"fast_rows": 3, "fast_calls": 16, "fast_every": 2, "generations": 4, "pool": 2, "max_new_tokens": 6}
RUN = {"method": "fast-slow", "epochs": 1, "batch_size": 4, "chat_template": False, "learning_rate": 2e-2}


def letters(answers, targets):
    """A reward: the fraction of small letters."""
    return sum("a" <= letter <= "z" for letter in answers[0]) / max(1, len(answers[0]))


@pytest.fixture(scope="module")
def run(tmp_path_factory, task_dir, base_dir):
    """An expert, the base model and tokenizer after the run, and the output."""
    base, out = (make_model(), make_tokenizer()), tmp_path_factory.mktemp("fast-slow") / "expert"
    settings = FastSlowSettings(**HOW)
    expert = train(task_dir, model=base_dir, out=out, base=base, fast_slow=settings, reward=letters, **RUN)
    return expert, base, out


def test_an_adapter_with_its_prompt_and_a_record(run, task_dir, base_dir):
    expert, _, out = run
    loaded, record = SparseAdapter.load(out), json.loads((out / "run.json").read_text())
    assert loaded.metadata == expert.metadata
    assert loaded.metadata.prompt.count("{input}") == 1
    assert [each["step"] for each in record["rounds"]] == [0, 2, 3]
    assert record["rounds"][-1]["pool"][0]["prompt"] == loaded.metadata.prompt
    figures = loaded.metadata.metrics
    assert figures["reward_tuned_evolved"] == pytest.approx(record["rounds"][-1]["pool"][0]["reward"])
    assert figures["steps"] == 3
    assert len(record["history"]) >= 3
    assert loaded.metadata.training == {"method": "fast-slow", "slow": "grpo", "reward": "letters"}
    again = train(task_dir, model=base_dir, fast_slow=FastSlowSettings(**HOW), reward=letters, **RUN)
    assert again.metadata == loaded.metadata
    assert all(torch.equal(again[name].values, loaded[name].values) for name in loaded)


def test_the_base_model_is_as_it_was(run):
    model, tokenizer = run[1]
    for (name, after), before in zip(model.named_parameters(), make_model().parameters(), strict=True):
        assert torch.equal(after, before), name
        assert after.requires_grad
    assert not model.training
    assert tokenizer.pad_token == make_tokenizer().pad_token
    assert model.generation_config.to_dict() == make_model().generation_config.to_dict()


def test_eval_puts_the_prompt_around_inputs(run, task_dir, base_dir):
    expert, _, out = run
    own = evaluate(str(out), task_dir, model=base_dir, metrics=[letters])
    given = EvalSettings(prompt=expert.metadata.prompt, split="validation", rows=3, max_new_tokens=6, chat_template=False)
    by_hand = evaluate(str(out), task_dir, model=base_dir, metrics=[letters], settings=given, include_base=True)
    scores = {name: of["backwards"]["letters"] for name, of in by_hand.scores.items()}
    means = {name: sum(letters([a], [r.target]) for r, a in of[0].predictions) / 3 for name, of in by_hand.results.items()}
    assert means[str(out)] == pytest.approx(expert.metadata.metrics["reward_tuned_evolved"])
    assert means[base_dir] == pytest.approx(expert.metadata.metrics["reward_base_evolved"])
    assert set(scores) == {base_dir, str(out)}
    plain = evaluate(str(out), task_dir, model=base_dir, metrics=[letters], settings=EvalSettings(prompt="{input}"))
    answers = [[answer for _, answer in each.results[str(out)][0].predictions] for each in (own, plain)]
    assert answers[0] != answers[1]
    with pytest.raises(ConfigError, match=r"prompt must have \{input\} in it once"):
        EvalSettings(prompt="no place")


def test_other_formats_lose_the_prompt_and_say_so(run, base_dir, tmp_path, caplog):
    expert, _, out = run
    export(str(out), "shira", tmp_path / "shira", base=base_dir)
    assert "format shira holds no prompt" in caplog.text
    assert ("prompt", expert.metadata.prompt) in inspect(out).table().rows


def test_the_supervised_variant(task_dir, base_dir):
    how = FastSlowSettings(**{**HOW, "slow": "sft"}, prompts=("{input}", "Say: {input}"))
    expert = train(task_dir, model=base_dir, fast_slow=how, **RUN)
    assert expert.metadata.training == {"method": "fast-slow", "slow": "sft", "reward": "rougeL"}
    assert expert.metadata.prompt.count("{input}") == 1
    assert expert.metadata.task == "backwards"
    assert expert.nnz
    assert expert.metadata.metrics["steps"] == 3


def test_without_calls_the_prompts_stay(task_dir, base_dir, caplog):
    how = FastSlowSettings(**{**HOW, "fast_calls": 0}, prompts=("Say: {input}",))
    expert = train(task_dir, model=base_dir, fast_slow=how, reward=letters, **RUN)
    assert expert.metadata.prompt == "Say: {input}"
    figures = expert.metadata.metrics
    assert figures["reward_tuned_seed"] == figures["reward_tuned_evolved"]
    assert "equal rewards" not in caplog.text


def test_rewards_that_are_always_equal_are_said_to_teach_nothing(task_dir, base_dir, caplog):
    how = FastSlowSettings(**{**HOW, "fast_calls": 0})
    expert = train(task_dir, model=base_dir, fast_slow=how, reward=lambda answers, targets: 0.5, **RUN)
    assert "all rollouts of each row had equal rewards" in caplog.text
    assert not any(delta.values.any() for delta in expert.values())


def test_the_pool_is_the_pareto_front():
    rewards = {"a": [0.5, 0.5, 0.5], "b": [1, 0, 0], "c": [0, 0.4, 0], "d": [0, 0.5, 0.9], "e": [1, 0, 0]}
    assert pareto_prompts(rewards, 9) == ["a", "d", "b", "e"]  # c is surpassed on every row
    assert pareto_prompts(rewards, 2) == ["a", "d"]
    assert pareto_prompts({"worse": [0.2], "better": [0.3]}, 1) == ["better"]


def pool_of(answer, propose, reward="exact_match", **changes):
    rows = {(split, i): Row(f"{word}?", word) for split in ("train", "validation") for i, word in enumerate(WORDS[:6])}
    trials = PromptTrials(answer, choose_reward(reward), rows, propose)
    return PromptPool(("{input}",), trials, **{"size": 2, "calls": 30, "seed": 0, **changes})


def test_gepa_keeps_what_is_better_and_answers_nothing_twice():
    asked = []

    def answer(prompts):
        asked.extend(prompts)
        return [text.removeprefix("Name it. ").rstrip("?") if text.startswith("Name it.") else "?" for text in prompts]

    proposed = iter(["Shout. {input}", "Name it. {input}"] + ["{input}"] * 99)
    pool = pool_of(answer, lambda prompt, trials: next(proposed))
    assert [vars(score) for score in pool.improve(0)] == [{"prompt": "Name it. {input}", "reward": 1.0}]
    assert max(asked.count(text) for text in asked) <= 2  # once as a training row, once as a validation row


def test_failures_of_what_is_plugged_in_are_named():
    def broken(prompt, trials):
        raise ValueError("no idea")

    with pytest.raises(ConfigError, match=r"the proposer fails on '\{input\}': ValueError: no idea"):
        pool_of(lambda prompts: ["?"] * len(prompts), broken).improve(0)
    with pytest.raises(ConfigError, match=r"the proposer must keep \{input\} in a prompt once; it gave 'x'"):
        pool_of(lambda prompts: ["?"] * len(prompts), lambda prompt, trials: "x").improve(0)
    for value, message in ((math.nan, "reward of is nan for the answer '!'"), (math.inf, "is inf")):
        with pytest.raises(ConfigError, match=message):
            Reward("of", lambda answers, targets, value=value: value)(["!"], ["x"])
    with pytest.raises(ConfigError, match="reward of fails on the answer '!' to a row with the target 'x': ZeroDivisionError"):
        Reward("of", lambda answers, targets: 1 / 0)(["!"], ["x"])
    assert choose_reward("rougeL")(["a b", "c"], ["a b", "d"]) == [1.0, 0.0]
    with pytest.raises(ConfigError, match="reward: 'bleu' is unknown"):
        choose_reward("bleu")


def failing_later(answers, targets):
    """A reward that is right for targets alone."""
    return 1.0 if answers == targets else math.nan


def test_nothing_is_written_after_a_failure(task_dir, tmp_path, base_dir):
    with pytest.raises(ConfigError, match="reward failing_later is nan for the answer"):
        train(task_dir, model=base_dir, out=tmp_path / "out", fast_slow=FastSlowSettings(**HOW), reward=failing_later, **RUN)
    assert not list(tmp_path.iterdir())


def test_bad_input_is_refused_before_any_work(task_dir, tmp_path):
    def refused(error, match, how=None, task=task_dir, reward=None, **changes):
        def attempt():
            settings = TrainSettings(**{"task": task, "model": "nowhere", **RUN, **changes})
            return train(settings, out=tmp_path / "out", fast_slow=FastSlowSettings(**(how or {})), reward=reward)

        with pytest.raises(error, match=match):
            attempt()
        assert not list(tmp_path.iterdir())

    refused(ConfigError, "prompts must have {input} in it once, .* got 'no place'", {"prompts": ("no place",)})
    refused(ConfigError, "prompts must have {input} in it once", {"prompts": ("{input} {input}",)})
    refused(ConfigError, "prompts is empty", {"prompts": ()})
    refused(ConfigError, "pool must be at most generations, 8, got 9", {"pool": 9})
    refused(ConfigError, "fast_calls must be above fast_rows, 16, or 0; got 16", {"fast_calls": 16})
    refused(ConfigError, "proposer must be offline, or a URL with `proposer_model`", {"proposer": "http://there"})
    refused(ConfigError, "reward: 'bleu' is unknown", {"reward": "bleu"})
    refused(ConfigError, "reward: cannot import 'no_module:f'", {"reward": "no_module:f"})
    refused(ConfigError, "reward <lambda> is nan", reward=lambda answers, targets: math.nan)
    refused(ConfigError, "reward <lambda> fails on the answer .* KeyError", reward=lambda answers, targets: {}["x"])
    refused(ConfigError, "prompts of one task; task names 2", task=(task_dir, task_dir))
    refused(ConfigError, "batch_size must be at most the 12 training rows, got 16", batch_size=16)
    refused(ConfigError, "learning_rate auto", learning_rate="auto")
    refused(ConfigError, "patience does not apply to method fast-slow with slow=grpo", patience=2)
    refused(TaskError, "is not a directory", task="./nowhere")
    with pytest.raises(ConfigError, match="init_from does not go with method fast-slow"):
        TrainSettings(task=task_dir, method="fast-slow", init_from="expert")
    with pytest.raises(ConfigError, match="resume does not apply"):
        train(TrainSettings(task=task_dir, model="nowhere", **RUN), out=tmp_path / "out", resume=True)
    with pytest.raises(ConfigError, match="prompts, rewards and proposers are of method fast-slow"):
        train(task_dir, model="nowhere", reward=letters)
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputExists):
        train(TrainSettings(task=task_dir, model="nowhere", **RUN), out=tmp_path / "out")


def test_the_verb(cli, refused, task_dir, base_dir, tmp_path):
    flags = ["--fast-rows", 2, "--fast-calls", 8, "--generations", 2, "--pool", 2, "--max-new-tokens", 4, "--batch-size", 4]
    command = ["train", "--task", task_dir, "--model", base_dir, "--method", "fast-slow", "--epochs", 0.3, "--no-chat-template"]
    code, out, err = cli(*command, *flags, "--prompts", "{input}", "Say: {input}", "--out", tmp_path / "out")
    assert code == 0, err
    assert "Mean reward of 2 validation rows" in out
    assert f"Written to {tmp_path / 'out'}" in out
    assert SparseAdapter.load(tmp_path / "out").metadata.prompt in out
    code, out, err = cli(*command, *flags, "--slow", "sft", "--out", tmp_path / "sft", "--json")
    assert code == 0, err
    assert "reward_tuned_evolved" in json.loads(out)
    assert "--prompts must have {input} in it once" in refused(*command, "--prompts", "x", "--out", tmp_path / "other")
    plain = ["train", "--task", task_dir, "--model", base_dir, "--out", tmp_path / "other"]
    assert "of method fast-slow" in refused(*plain, "--generations", 4)


def test_of_a_conversation_the_last_message_is_the_input():
    talk = (Message("system", "s"), Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    assert in_prompt("Q: {input}!", talk) == (*talk[:3], Message("user", "Q: c!"))
    assert in_prompt("Q: {input}!", "c {input}") == "Q: c {input}!"
    assert in_prompt(None, talk) is talk
    with pytest.raises(TaskError, match="no user's message"):
        in_prompt("{input}", talk[:1])
