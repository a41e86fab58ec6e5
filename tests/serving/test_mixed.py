"""Several experts in one batch: each row's product and tokens are those of its expert alone, in either way."""

import random

import pytest
import torch
from helpers.tiny import make_adapter, make_gpt2, make_model
from serving.test_engine import BASE, alone, answer, ask, draw_prompt, engine, experts, parts, tiny  # noqa: F401

from sparselet.adapter import SparseAdapter
from sparselet.apply import apply_temporarily
from sparselet.delta import SparseDelta
from sparselet.errors import ModelError
from sparselet.serving.mixed_products import MixedProducts, compressed_rows, layers_by_input
from sparselet.serving.row_batch import RowBatch
from sparselet.serving.served_expert import ServedExpert, serve_expert
from sparselet.serving.step_costs import StepCosts


@pytest.fixture
def choose_way(monkeypatch):
    """Replace the choice by measured costs."""

    def use(decision):
        monkeypatch.setattr(StepCosts, "mixed_is_cheaper", lambda *_: decision())

    return use


@pytest.mark.parametrize("block", [1, 4, "row", "column"])
def test_compressed_rows_are_the_dense_change(block):
    for delta in make_adapter(tiny(), block, seed=3).values():
        assert torch.equal(compressed_rows([delta]).to_dense(), delta.to_dense())
        above = SparseDelta.empty((3, delta.shape[1]))
        expected = torch.cat([delta.to_dense(), above.to_dense(), delta.to_dense()])
        assert torch.equal(compressed_rows([delta, above, delta]).to_dense(), expected)


def test_layers_that_read_one_input_are_found():
    model = tiny()
    groups = [{name.rsplit(".")[-1] for name in group} for group in MixedProducts(model)._groups]
    for expected in ({"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}):
        assert groups.count(expected) == 2  # of two layers
    assert not any(module._forward_pre_hooks for module in model.modules())


def by_width(model, linear):
    """Layers that do not read one input, only as wide ones."""
    widths = {module.in_features for module in linear.values()}
    return [tuple(name for name in linear if linear[name].in_features == width) for width in widths]


@pytest.mark.parametrize("groups", [layers_by_input, by_width])
@pytest.mark.parametrize("length", [1, 7])
def test_each_row_gets_its_own_experts_product(monkeypatch, length, groups):
    monkeypatch.setattr("sparselet.serving.mixed_products.layers_by_input", groups)
    model = tiny()
    adapters = [make_adapter(model, block, seed=i) for i, block in enumerate((1, 4, "row", "column"))]
    served = [serve_expert(adapter, lambda expert: None) for adapter in adapters]
    rows = [served[0], BASE, served[1], served[0], served[3], BASE, served[2], served[0]]
    tokens = torch.randint(2, 258, (len(rows), length), generator=torch.Generator().manual_seed(0))
    products = MixedProducts(model)
    assert all(products.can_mix(expert) for expert in rows)
    with torch.inference_mode(), products.adding(rows):
        mixed = model(input_ids=tokens).logits
    for row, expert in enumerate(rows):
        with torch.inference_mode():
            if expert.adapter is None:
                expected = model(input_ids=tokens[row : row + 1]).logits
            else:
                with apply_temporarily(model, expert.adapter):
                    expected = model(input_ids=tokens[row : row + 1]).logits
        torch.testing.assert_close(mixed[row : row + 1], expected, rtol=1e-4, atol=1e-4)
    with torch.inference_mode(), products.adding(rows), pytest.raises(ModelError, match="are lost"):
        model(input_ids=tokens[:3])
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("limits", [{}, {"max_rows": 3}, {"cache_tokens": 60}, {"max_wait": 0.0}])
@pytest.mark.parametrize("way", ["mixed", "both"])
def test_every_answer_is_its_experts_alone(engine, choose_way, way, limits):  # noqa: F811
    source = random.Random(1)
    choose_way(lambda: way == "mixed" or random.random() < 0.5)
    model = tiny()
    served = [BASE, *experts(model, 4)]
    asked = [(source.choice(served), draw_prompt(source), source.randrange(1, 20)) for _ in range(60)]
    expected = [alone(model, expert, prompt, tokens) for expert, prompt, tokens in asked]
    before = [parameter.clone() for parameter in model.parameters()]
    running = engine(model, **{"max_wait": 0.001, **limits})
    outputs = [ask(running, *each)[1] for each in asked[:40]]
    first = [answer(each) for each in outputs[:10]]
    outputs += [ask(running, *each)[1] for each in asked[40:]]
    assert first + [answer(each) for each in outputs[10:]] == expected
    running.stop()
    assert running.counts.mixed_steps > 0
    assert way == "mixed" or running.counts.mixed_steps < running.counts.steps
    assert running.scheduler.cache_tokens == 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_cancelled_rows_leave_a_mixed_batch(engine, choose_way):  # noqa: F811
    choose_way(lambda: True)
    model = tiny()
    first, second = experts(model, 2)
    running = engine(model, max_rows=3)
    cancelled = [ask(running, expert, [5, 6], 1000, stream=True) for expert in (first, second)]
    for _, outputs in cancelled:
        outputs.get(timeout=30)
    asked = [(expert, [7, n]) for n in range(2, 8) for expert in (first, second)]
    others = [ask(running, *each)[1] for each in asked]
    for request, _ in cancelled:
        request.cancelled = True
    answers = [answer(each) for each in others]
    running.stop()
    assert answers == [alone(model, *each) for each in asked]
    assert running.scheduler.cache_tokens == 0


def test_what_cannot_be_mixed_is_swapped(engine, choose_way):  # noqa: F811
    choose_way(lambda: True)
    full = {name: SparseDelta.from_dense(torch.randn(d.shape)) for name, d in make_adapter(tiny()).items()}
    for model, expert in (
        (tiny(torch.bfloat16), experts(tiny(torch.bfloat16), 1)[0]),  # 16 bits round the sum
        (make_gpt2(), BASE),
        (tiny(), ServedExpert("full", SparseAdapter(full))),
    ):
        asked = [(each, [5, n]) for n in range(2, 5) for each in (BASE, expert)]
        expected = [alone(model, *each) for each in asked]
        running = engine(model, max_rows=1, max_wait=0.0)
        assert [answer(each) for each in [ask(running, *each)[1] for each in asked]] == expected
        running.stop()
        assert running.counts.mixed_steps == 0
    wide = ServedExpert("wide", make_adapter(make_model(hidden_size=32)))
    assert not MixedProducts(tiny()).can_mix(wide)


def test_mixing_can_be_switched_off(engine, choose_way):  # noqa: F811
    choose_way(lambda: True)
    model = tiny()
    running = engine(model, mixed=False, max_wait=0.0)
    assert all(answer(ask(running, each, [5, 6])[1]) for each in experts(model, 3))
    assert running.counts.mixed_steps == 0


def test_a_failure_while_experts_are_mixed_ends_mixing_not_the_engine(engine, choose_way, monkeypatch):  # noqa: F811
    choose_way(lambda: True)
    model = tiny()
    first, second = experts(model, 2)
    expected = alone(model, first, [5, 6])
    step = RowBatch.step

    def fail(batch):
        if batch.products is not None:
            raise RuntimeError("out of memory")
        return step(batch)

    monkeypatch.setattr(RowBatch, "step", fail)
    running = engine(model)
    outputs = [ask(running, each, [5, n])[1] for n in range(2, 6) for each in (first, second)]
    assert any(parts(each)[-1].error is not None for each in outputs)
    again = [ask(running, each, [5, 6])[1] for each in (first, second)]
    assert answer(again[0]) == expected
    assert answer(again[1])
    running.stop()
    assert running.running == running.scheduler.cache_tokens == 0


# The choice


def costs(plain=lambda rows: 0.08 + 0.005 * rows, added=None):
    measured = StepCosts()
    for rows in (1, 2, 4, 8, 1, 16):
        measured.measure_plain(rows, plain(rows))
    if added is not None:
        work = {"a": (1000, 2), "b": (1000, 2)}
        measured.measure_mixed(work, plain(4) + added)
    return measured


def test_steps_are_estimated_from_those_measured():
    measured = costs()
    assert [measured.plain(rows) for rows in (1, 5, 32)] == pytest.approx([0.085, 0.105, 0.24])
    one_size = StepCosts()
    assert one_size.plain(3) == 0.0
    for seconds in (0.1, 0.3):
        one_size.measure_plain(4, seconds)
    assert one_size.plain(4) == one_size.plain(1) == pytest.approx(0.2, rel=0.02)


def test_the_cheaper_way_is_chosen():
    work = dict.fromkeys("abcdefgh", (1000, 2))
    assert not StepCosts().mixed_is_cheaper(work, 32, 0.1, False)  # nothing is measured
    assert costs().mixed_is_cheaper(work, 32, 0.1, False)
    assert costs(added=0.01).mixed_is_cheaper(work, 32, 0.1, False)
    assert not costs(added=0.5).mixed_is_cheaper(work, 32, 0.1, False)
    # 8 swapped steps cost 0.72 s, a mixed one 0.16 s and four times what two experts add
    assert costs(added=0.135).mixed_is_cheaper(work, 32, 0.0, True)
    for mixes in (True, False):  # near the bound whichever way is in use goes on
        assert costs(added=0.14).mixed_is_cheaper(work, 32, 0.0, mixes) is mixes
    assert costs(added=0.14).mixed_is_cheaper(work, 32, 0.5, False)  # swaps are dear


def test_a_slow_mixed_step_is_forgotten():
    work = dict.fromkeys("abcdefgh", (1000, 2))
    measured = costs(added=30.0)
    assert not measured.mixed_is_cheaper(work, 32, 0.1, False)
    averaged = costs(added=0.4)
    for _ in range(8):
        averaged.measure_mixed({"a": (1000, 2), "b": (1000, 2)}, 0.1 + 0.01)
    assert averaged.mixed_is_cheaper(work, 32, 0.1, False)
    steps = 0
    while not measured.mixed_is_cheaper(work, 32, 0.1, False):
        measured.measure_plain(2, 0.09)
        steps += 1
    assert 100 < steps < 1000


def test_a_busy_machine_changes_both_estimates():
    measured = costs(added=0.01)
    for _ in range(200):
        measured.measure_plain(4, 0.2)
        measured.measure_plain(8, 0.24)
    for _ in range(30):
        measured.measure_mixed({"a": (1000, 4), "b": (1000, 4)}, 0.24 + 0.07)
    assert measured.plain(8) == pytest.approx(0.24, rel=0.02)
    assert measured._added == pytest.approx(0.07 / 2800, rel=0.05)
