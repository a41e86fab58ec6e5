"""Units: the same work is one unit, whoever asks for it, and all that determines it is in its key."""

import json
from dataclasses import fields, replace

import pytest
from helpers.plans import SETTINGS, made

from sparselet.errors import ConfigError, SparseletError, UnknownMethod, UnknownScore
from sparselet.evaluation import EvalSettings
from sparselet.studies.engine.unit import closure, units_from_json, units_to_json
from sparselet.studies.study import BASE
from sparselet.studies.tables import OF_ARMS, OF_REGIONS, TABLES, make_tables
from sparselet.training.settings import TrainSettings


def keys(experts):
    return [unit.key for own in experts for unit in own.values()]


def test_an_expert_is_told_apart_by_what_it_is_trained_with():
    study = made()
    plain = study.experts()
    assert list(plain[0]) == list(SETTINGS.held_in)
    assert keys(plain) == keys(study.experts(density=0.1)) == keys(study.experts(score="mcs", learning_rate=1e-3, epochs=2.0))
    others = [
        study.experts(density=0.2),
        study.experts(block_size=16),
        study.experts(method="lora"),
        study.experts(method="full"),
        study.dense(),
        study.experts(reselect_every=0),
        made(seeds=(1,)).experts(),
        made(threads=2).experts(),
        made(model="other").experts(),
        made(dtype="bfloat16").experts(),
        made(train_rows=11).experts(),
        replace(study, base="other").experts(),
        replace(study, data={**study.data, "one": {"train": "x", "test": "y"}}).experts(("one",)),
    ]
    every = [key for experts in (plain, *others) for key in keys(experts)]
    assert len(set(every)) == len(every)


def test_what_does_not_change_an_expert_is_not_in_its_key():
    places = made(
        tasks_directory="/somewhere", name="other", tables=("scores",), budget_hours=1.0, test_rows=3, held_out=("five",)
    )
    assert keys(made().experts()) == keys(places.experts())
    assert "/somewhere" not in json.dumps([unit.to_json() for unit in places.experts()[0].values()])


def test_the_settings_of_a_training_are_those_of_the_study():
    study = made(patience=2, gradient_accumulation=2)
    told = {name: study.experts(**changes)[0]["one"].to_json()["train"] for name, changes in METHODS.items()}
    common = {"epochs": 2.0, "train_rows": 10, "patience": 2, "gradient_accumulation": 2}
    assert told["sparse"] == {**common, "learning_rate": 1e-3}
    assert told["block"] == {**common, "learning_rate": 2e-3, "block_size": 16}
    assert told["lora"] == {**common, "learning_rate": 3e-4, "method": "lora", "lora_rank": 21}
    assert told["full"] == {**common, "learning_rate": 1e-5, "method": "full"}
    assert study.dense()[0]["one"].to_json()["train"] == {**common, "learning_rate": 1e-3, "method": "full-qkv"}
    assert study.multitask()[0].to_json()["train"] == {**common, "learning_rate": 2e-5, "method": "multitask"}
    assert study.multitask()[0].to_json()["task"] == list(SETTINGS.held_in)
    other = made(density=0.3, score="gm").experts()[0]["one"].to_json()["train"]
    assert (other["density"], other["score"]) == (0.3, "gm")


METHODS = {"sparse": {}, "block": {"block_size": 16}, "lora": {"method": "lora"}, "full": {"method": "full"}}


def test_every_unit_holds_settings_that_can_be_run():
    known = {f.name for f in fields(TrainSettings)}
    for unit in closure(unit for table in make_tables(made()).values() for unit in table.units()).values():
        content = unit.to_json()
        assert json.loads(json.dumps(content)) == content
        if unit.kind == "train":
            settings = units_from_json(units_to_json([unit]))[unit.key].settings
            assert all(name in known - {"model", "task", "init_from"} for name in content["train"])
            assert len(settings.tasks) == len(content["data"])
        elif unit.kind == "evaluate":
            assert EvalSettings(**content["eval"]).rows == 5
            assert len(unit.inputs) == (2 if content["mask"] else unit.label.count("base") == 0)


def test_a_wrong_change_is_refused_when_it_is_planned():
    with pytest.raises(TypeError, match="densty"):
        made().experts(densty=0.1)
    with pytest.raises(UnknownScore):
        made().experts(score="best")
    with pytest.raises(ConfigError, match="lora_rank does not apply to method sparse"):
        made().experts(lora_rank=3)
    with pytest.raises(UnknownMethod):
        made().merge(made().experts(), "mean")


def test_a_merge_depends_on_its_experts_method_and_parameters_and_not_on_their_order():
    study = made()
    experts = study.experts()
    whole = study.merge(experts, "overlap")[0]
    assert whole.inputs == tuple(experts[0].values())
    assert (
        study.merge(experts, "overlap", tasks=("two", "one"))[0].key
        == study.merge(experts, "overlap", tasks=("one", "two"))[0].key
    )
    assert study.merge(experts, "overlap", tasks=SETTINGS.held_in[::-1])[0].key == whole.key
    assert study.merge(experts, "ties")[0].key == study.merge(experts, "ties", {"scale": 1.0})[0].key
    others = [study.merge(experts, "uniform"), study.merge(experts, "ties"), study.merge(experts, "ties", {"scale": 0.5})]
    assert len({whole.key, *(other[0].key for other in others)}) == 4


def test_a_second_stage_starts_from_the_merge():
    study = made(second_stage_rows=3)
    merged = study.merge(study.experts(), "overlap")
    sparse, full = (study.second_stage(merged, 5, all_weights=every)[0] for every in (False, True))
    assert sparse.inputs == full.inputs == merged
    assert sparse.to_json()["train"] == {"learning_rate": 1e-3, "train_rows": 3}
    assert full.to_json()["train"] == {"learning_rate": 2e-5, "train_rows": 3, "method": "multitask"}
    own = made(first_stage_epochs=1.0, tables=("second_stage",))
    first = {unit.settings.epochs for unit in own.experts(epochs=1.0)[0].values()}
    planned = closure(make_tables(own)["second_stage"].units()).values()
    assert {unit.settings.epochs for unit in planned if unit.kind == "train" and len(unit.settings.tasks) == 1} == first


def test_every_seed_is_a_draw():
    study = made(seeds=(0, 3))
    experts = study.experts()
    assert [unit.settings.seed for own in experts for unit in own.values()] == [0] * 4 + [3] * 4
    merged = study.merge(experts, "overlap")
    for cell in (study.individual(experts), study.held_in(merged), study.own_masks(merged, experts), study.parameters(experts)):
        assert [len(draw) for draw in cell.draws] == [4, 4]
    second = study.second_stage(merged, 1, all_weights=False)
    assert [unit.inputs[0].key for unit in second] == [unit.key for unit in merged]
    assert len(study.held_in(BASE).draws) == 1


def test_an_evaluation_is_of_one_model_on_one_task():
    study = made()
    experts = study.experts()
    merged = study.merge(experts, "overlap")
    (alone,) = study.individual(experts).draws
    assert [unit.task for unit in alone] == list(SETTINGS.held_in)
    assert [unit.inputs for unit in alone] == [(unit,) for unit in experts[0].values()]
    (own,) = study.own_masks(merged, experts).draws
    assert [unit.inputs for unit in own] == [(merged[0], unit) for unit in experts[0].values()]
    assert {unit.to_json()["mask"] for unit in own} == {True}
    (outside,) = study.held_out(merged).draws
    assert [unit.data for unit in outside] == ["test five", "test six", "test seven"]
    (base,) = study.held_in(BASE).draws
    assert {unit.inputs for unit in base} == {()}


def test_draws_are_sets_that_differ_and_are_always_the_same():
    study = made(draws=10)
    assert list(study.draws(4)) == [SETTINGS.held_in]
    pairs = list(study.draws(2))
    assert len(set(pairs)) == len(pairs) == 6  # all there are
    assert list(made(draws=2).draws(2)) == pairs[:2]
    assert pairs[:2] == [("three", "four"), ("one", "four")]
    assert all(list(pair) == sorted(pair, key=SETTINGS.held_in.index) for pair in pairs)


def test_tables_share_what_they_have_in_common():
    tables = make_tables(made())
    trained = {name: {u.key for u in closure(table.units()).values() if u.kind == "train"} for name, table in tables.items()}
    plain = set(keys(made().experts()))
    for name in ("density", "merging", "scores", "layer_drop", "second_stage", "interference", "number_of_experts", "targets"):
        assert plain <= trained[name], name
    sweep = set(keys(made().experts(SETTINGS.sweep_tasks)))
    assert sweep < plain
    for name in ("selection", "learning_rates"):
        assert sweep <= trained[name], name
    assert not trained["interference"] - trained["merging"]
    assert not trained["number_of_experts"] - trained["merging"]
    of_full = set(keys(made().experts(method="full")))
    assert of_full <= trained["density"] & trained["merging"]
    # The merge of all experts in the table of numbers is that of the other table.
    subjects = [
        {u.key for u in closure(tables[name].units()).values() if u.kind == "merge"}
        for name in ("merging", "number_of_experts")
    ]
    assert subjects[0] < subjects[1]


def test_every_table_has_a_cell_for_each_column_and_a_chart_that_fits():
    for name, make in TABLES.items():
        table = make(made())
        for row, cells in table.rows.items():
            assert len(cells) == len(table.columns), (name, row)
        for chart in table.charts:
            assert set(chart.columns) <= set(table.columns)
            if chart.kind == "lines":
                assert len(chart.x) == len(chart.series) == len(table.rows)


def test_tables_are_those_the_settings_name():
    assert list(make_tables(made())) == [name for name in TABLES if name not in (*OF_ARMS, *OF_REGIONS)]
    with_arms = made(arms={"a": {"learning_rate": 1e-3}}, finalists=("a",))
    assert list(make_tables(with_arms)) == [name for name in TABLES if name not in OF_REGIONS]
    assert list(make_tables(made(tables=("scores", "density")))) == ["scores", "density"]
    with pytest.raises(ConfigError, match="tables names 'score'; there are density,"):
        make_tables(made(tables=("score",)))


def test_an_arm_is_trained_by_its_own_settings_and_a_sweep_at_each_of_its_rates():
    arms = {
        "rows": {"when": "static", "score": "random", "target_modules": ["all"], "entries": 900, "learning_rate": 3e-3},
        "LoRA": {"method": "lora", "lora_rank": 5, "learning_rate": 2e-3, "learning_rates": [1e-3, 2e-3]},
    }
    study = made(arms=arms, finalists=("rows",), seeds=(0, 1))
    tables = make_tables(study)
    assert list(tables["sweep"].rows) == ["rows, 0.003", "LoRA, 0.001", "LoRA, 0.002"]
    assert len(tables["sweep"].rows["LoRA, 0.001"][0].draws) == 2
    own = study.arm("rows")[0]["one"].settings
    assert (own.when, own.score, own.entries, own.target_modules, own.learning_rate) == (
        "static",
        "random",
        900,
        ("all",),
        3e-3,
    )
    assert {unit.settings.learning_rate for unit in tables["sweep"].units()} == {1e-3, 2e-3, 3e-3}
    assert list(tables["recipes"].rows) == ["base", "rows"]
    assert {
        unit.subject.method
        for unit in tables["recipes"].units()
        if unit.kind == "evaluate" and unit.subject and unit.subject.kind == "merge"
    } == {"overlap", "uniform", "ties", "regmean"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"a": {}}}, r"arms.a: an arm has learning_rate"),
        ({"arms": {"a": {"learning_rate": 1e-3, "speed": 3}}}, "arms.a: an arm has"),
        ({"arms": {"a": {"learning_rate": 1e-3, "density": 3}}}, "arms.a: density"),
        ({"arms": {"a": {"learning_rate": 1e-3, "learning_rates": [-1.0]}}}, "arms.a: learning_rate"),
        ({"finalists": ("b",)}, "finalists names 'b'"),
    ],
)
def test_wrong_arms_are_refused_by_name(changes, message):
    with pytest.raises(SparseletError, match=message):
        made(**changes)
