"""From pairs to a vector and its effect: the fit against block outputs, the verb, and what is refused."""

import json

import pytest
import torch
from helpers.tiny import make_adapter, make_model, make_tokenizer, save_task, write_rows

from sparselet import EvalSettings, SteeringVector, SteerSettings, evaluate, evaluate_steering, fit_steering, steered
from sparselet.apply import apply_temporarily
from sparselet.errors import ArgumentError, ConfigError, OutputExists, ShapeMismatch, TaskError
from sparselet.steering.strength import Divergence, calibrate
from sparselet.steering.switch import block_outputs
from sparselet.workflows.steering import Pair, favours, read_pairs

PAIRS = [{"prompt": f"{i}+1?", "concise": f"{i + 1}", "verbose": f"we add one to {i}: {i + 1}"} for i in range(5)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    write_rows(file, PAIRS)
    return file


@pytest.fixture(scope="module")
def fitted(pairs, base_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("vectors") / "vector"
    return fit_steering(pairs, base_dir, out, SteerSettings(layer=1, kl=0.05)), out


def test_the_vector_is_the_mean_difference_at_the_last_token_of_concise_less_verbose(fitted, base_dir):
    vector, out = fitted
    model, tokenizer = make_model(), make_tokenizer()

    def last(text):
        return block_outputs(model, tokenizer(text)["input_ids"])[1]

    expected = [last(f"{p['prompt']} {p['concise']}") - last(f"{p['prompt']} {p['verbose']}") for p in PAIRS]
    torch.testing.assert_close(vector.values, torch.stack(expected).mean(0), rtol=1e-5, atol=1e-6)
    loaded = SteeringVector.load(out)
    assert torch.equal(loaded.values, vector.values)
    assert (loaded.layer, loaded.base, loaded.record["pairs"]) == (1, base_dir, 5)
    assert loaded.record["kl"] == pytest.approx(0.05, rel=0.1)
    assert loaded.strength > 0


def test_of_prompts_that_ask_for_the_sides_it_is_the_mean_difference_at_their_ends(pairs, base_dir, tmp_path):
    prompts = [{"concise_prompt": f"short: {pair['prompt']}", "verbose_prompt": f"long: {pair['prompt']}"} for pair in PAIRS]
    asking = [pair | own for pair, own in zip(PAIRS, prompts, strict=True)]
    write_rows(tmp_path / "pairs.jsonl", asking)
    vector = fit_steering(tmp_path / "pairs.jsonl", base_dir, settings=SteerSettings(kl=0.1))
    model, tokenizer = make_model(), make_tokenizer()
    ends = [
        [block_outputs(model, tokenizer(pair[side])["input_ids"]) for side in ("concise_prompt", "verbose_prompt")]
        for pair in asking
    ]
    differences = torch.stack([concise - verbose for concise, verbose in ends])
    torch.testing.assert_close(vector.values, differences[:, vector.layer].mean(0), rtol=1e-5, atol=1e-6)

    def answered(pair, side):
        return tokenizer(f"{pair['prompt']} {pair[side]}")["input_ids"], len(tokenizer(pair["prompt"])["input_ids"]) - 1

    answers = [[answered(pair, side) for side in ("concise", "verbose")] for pair in PAIRS]
    expected = favours(model, answers, differences, tokenizer.eos_token_id, 0.1)
    torch.testing.assert_close(torch.tensor(vector.record["favour"]), expected.float())
    divergence = Divergence(model, vector, [verbose for _, verbose in answers])
    assert divergence(vector.strength) == pytest.approx(0.1, rel=0.02)


def test_it_is_fitted_to_the_model_with_an_expert(pairs, base_dir):
    model = make_model()
    expert = make_adapter(model, task="arithmetic")
    vector = fit_steering(pairs, base_dir, None, SteerSettings(layer=0), expert=expert)
    plain = fit_steering(pairs, base_dir, None, SteerSettings(layer=0))
    assert not torch.equal(vector.values, plain.values)
    assert vector.record["expert"] == "arithmetic"
    with apply_temporarily(model, expert), steered(model, vector):
        pass


def test_auto_takes_the_layer_that_favours_concise_answers_most_at_the_bound(pairs, base_dir):
    model, bound = make_model(), 0.02
    encoded = [(([5, 9, 20, 31], 1), ([5, 9, 40, 41, 42], 1)), (([8, 7, 60], 1), ([8, 7, 33], 1)), (([4, 3], 0), ([4, 6], 0))]
    differences = torch.stack([block_outputs(model, c[0]) - block_outputs(model, v[0]) for c, v in encoded])

    def log_p(tokens, start, vector, strength):
        tokens = [*tokens, 1]  # the end token
        with torch.no_grad(), steered(model, vector, strength) as steering:
            steering.start = start
            logits = model(input_ids=torch.tensor([tokens])).logits.double().log_softmax(-1)
        return sum(float(logits[0, i, tokens[i + 1]]) for i in range(start, len(tokens) - 1)) / (len(tokens) - 1 - start)

    begin = 1.0
    for layer, favour in enumerate(favours(model, encoded, differences, 1, bound).tolist()):
        mean = SteeringVector(differences[:, layer].mean(0), layer, 1.0)
        divergence = Divergence(model, mean, [verbose for _, verbose in encoded])
        strength = calibrate(divergence, bound, tolerance=0.1, begin=begin).strength
        begin = strength / 5
        rise = 0.0
        for i, sides in enumerate(encoded):
            other = SteeringVector(differences[[k for k in range(3) if k != i], layer].mean(0), layer, 1.0)
            after, before = ([log_p(*side, other, gamma) for side in sides] for gamma in (strength, 0.0))
            rise += ((after[0] - after[1]) - (before[0] - before[1])) / 3
        assert favour == pytest.approx(rise, rel=1e-3)
    vector = fit_steering(pairs, base_dir)
    assert vector.layer == int(torch.tensor(vector.record["favour"]).argmax())


def test_texts_without_a_prompt_and_a_template(chat_dir):
    plain = [Pair("short", "a long text"), Pair("brief", "many words of no use")]
    assert fit_steering(plain, chat_dir).record["chat_template"]
    templated = [Pair(**pair) for pair in PAIRS]
    first, second = (fit_steering(templated, chat_dir, chat_template=choice) for choice in (True, False))
    assert not torch.equal(first.values, second.values)


def test_eval_measures_all_arms_and_evaluate_takes_a_vector(fitted, base_dir, task_dir):
    report = evaluate_steering(fitted[1], task_dir, settings=EvalSettings(rows=3, max_new_tokens=4), draws=2)
    assert [arm.arm for arm in report.arms] == ["none", "steered", "reversed", "random", "random"]
    assert report.arms[1].strength == -report.arms[2].strength > 0
    assert "answer tokens" in str(report)
    settings = EvalSettings(rows=3, max_new_tokens=4)
    for vector, arm in ((None, 0), (fitted[0], 1), (fitted[1], 1)):
        (found,) = evaluate(None, task_dir, model=base_dir, settings=settings, steer=vector).results.values()
        assert found[0].predictions == report.arms[arm].results[0].predictions


def test_the_verb(cli, refused, pairs, base_dir, experts, tmp_path, task_dir):
    fit = ("steer", "fit", "--pairs", pairs, "--model", base_dir, "--out", tmp_path / "vector")
    code, out, err = cli(*fit, "--layer", "auto", "--kl", 0.2)
    assert code == 0, err
    assert f"Next: sparselet steer eval {tmp_path / 'vector'} --task TASK" in out
    code, out, err = cli(*fit[:-1], tmp_path / "second", "--layer", 1, "--adapter", experts[0], "--json")
    assert code == 0, err
    assert json.loads(out)["layer"] == 1
    short = ("--rows", 2, "--max-new-tokens", 3)
    measure = ("steer", "eval", tmp_path / "vector", "--task", task_dir, *short)
    code, out, err = cli(*measure)
    assert code == 0, err
    assert "reversed" in out
    code, out, err = cli(*measure, "--adapter", experts[0], "--draws", 2, "--json")
    assert code == 0, err
    assert len(json.loads(out)["arms"]) == 5
    code, out, err = cli("eval", "--task", task_dir, "--adapter", experts[0], "--steer", tmp_path / "vector", *short, "--json")
    assert code == 0, err
    assert "steer fit needs --pairs, --out, --model; --out is missing" in refused(*fit[:-2])
    assert "VECTOR does not go with steer fit" in refused("steer", "fit", "vector", *fit[2:])
    assert "steer eval needs VECTOR, --task" in refused("steer", "eval", "--task", task_dir)
    assert "--layer must be a block of the model, 0 to 1, or auto" in refused(*fit[:-1], tmp_path / "third", "--layer", 7)
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"concise": "", "verbose": "b"}, "line 2: concise must be a text that is not empty, got ''"),
        ({"concise": "a", "verbose": "  "}, "verbose must be a text that is not empty"),
        ({"concise": "a"}, "verbose must be a text that is not empty, got None"),
        ({"concise": "a", "verbose": 3}, "verbose must be a text"),
        ({"concise": "a", "verbose": "b", "prompt": 3}, "prompt must be a text"),
        ({"concise": "a", "verbose": "b", "prompt": "p", "concise_prompt": 3}, "concise_prompt must be a text"),
        ({"concise": "a", "verbose": "b", "prompt": "p", "concise_prompt": "q"}, "concise_prompt and verbose_prompt go"),
        ({"concise": "a", "verbose": "b", "concise_prompt": "q", "verbose_prompt": "r"}, "go together, and with prompt"),
        ([1], "expected an object"),
    ],
)
def test_a_wrong_pair_is_named_with_its_line(row, message, tmp_path, base_dir):
    write_rows(tmp_path / "pairs.jsonl", [{"concise": "a", "verbose": "b"}, row])
    with pytest.raises(TaskError, match=message):
        fit_steering(tmp_path / "pairs.jsonl", base_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_fitted_is_refused(tmp_path, base_dir, pairs, fitted, task_dir):
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(TaskError, match=r"none\.jsonl"):
        read_pairs(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="layer auto compares pairs"):
        fit_steering([Pair("ab", "bc")], base_dir)
    with pytest.raises(TaskError, match="pair 1: a side has one token only"):
        fit_steering([Pair("a", "bc")], base_dir, settings=SteerSettings(layer=1))
    with pytest.raises(ConfigError, match="do not differ at layer 1"):
        fit_steering([Pair("ab", "ab")], base_dir, settings=SteerSettings(layer=1))
    with pytest.raises(ArgumentError, match="layer must be a block of the model, 0 to 1, or auto; got 5"):
        fit_steering(pairs, base_dir, settings=SteerSettings(layer=5))
    with pytest.raises(ConfigError, match="kl must be above 0"):
        SteerSettings(kl=0.0)
    with pytest.raises(ConfigError, match="layer"):
        SteerSettings(layer="middle")
    with pytest.raises(OutputExists):
        fit_steering(pairs, base_dir, fitted[1])
    with pytest.raises(TaskError, match="pair 1: the answer has"):
        fit_steering([Pair("a", "b" * 50, "p")], base_dir, settings=SteerSettings(layer=1, max_length=8))
    wide = SteeringVector(torch.ones(8), 0, 1.0)
    with pytest.raises(ShapeMismatch, match="width 8, the model 16"):
        evaluate(None, task_dir, model=base_dir, steer=wide)
    with pytest.raises(ConfigError, match="records no base model"):
        evaluate_steering(wide, save_task(tmp_path / "task"))
