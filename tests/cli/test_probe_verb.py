"""`sparselet probe` and `sl.probe`: statistics against those of states read by hand; page, JSON, and what is refused."""

import json

import pytest
import torch
from helpers.tiny import make_t5, save_base

import sparselet as sl
from sparselet.activations.statistics import sparsity
from sparselet.api.probing import ProbeSettings
from sparselet.apply import apply_temporarily
from sparselet.errors import ConfigError, TaskError
from sparselet.models import load_model, load_tokenizer
from sparselet.tasks.task import load_task
from sparselet.workflows.probing import probe_rows

pytestmark = pytest.mark.usefixtures("loud_again")


def states_of(model, rows, layer=-1):
    with torch.no_grad():
        outputs = [model(input_ids=torch.tensor([row.tokens]), output_hidden_states=True).hidden_states[layer] for row in rows]
    return torch.stack([output[0, len(row.tokens) - row.scored - 1] for output, row in zip(outputs, rows, strict=True)])


def test_means_are_those_of_the_states_with_and_without_an_expert(base_dir, task_dir, experts):
    model, tokenizer = load_model(base_dir), load_tokenizer(base_dir)
    rows = probe_rows(model, tokenizer, load_task(task_dir, ("test",)).rows("test"))
    plain = sl.probe(base_dir, task_dir)
    assert plain.layers[0].groups[0].means["hoyer"].mean == pytest.approx(sparsity(states_of(model, rows)).means()["hoyer"])
    with apply_temporarily(model, sl.load(experts[0])):
        expected = sparsity(states_of(model, rows)).means()["hoyer"]
    changed = sl.probe(base_dir, task_dir, expert=experts[0]).layers[0].groups[0].means["hoyer"]
    assert changed.mean == pytest.approx(expected)
    assert changed.count == len(rows)


def test_other_forms_of_the_rows_are_compared_pair_by_pair(base_dir, task_dir):
    settings = ProbeSettings(layers=(1, 2), positions=(-1, 0), shuffled=True, demonstrations=2)
    probed = sl.probe(base_dir, task_dir, settings=settings)
    assert [(g.name, g.pair) for g in probed.groups] == [
        ("backwards", None),
        ("backwards, shuffled", "backwards"),
        ("backwards, 2 demonstrations", "backwards"),
    ]
    assert [(layer.layer, len(layer.removed)) for layer in probed.layers] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    for layer in probed.layers:
        for k, group in enumerate(layer.groups[1:], 1):
            rows = layer.by_row["gini"]
            assert group.difference["gini"].mean == pytest.approx(float((rows[5 * k : 5 * k + 5] - rows[:5]).mean()))
    assert "minus backwards" in str(probed)


def test_the_verb_shows_tables_a_page_and_json(cli, base_dir, task_dir, tmp_path):
    page, texts = tmp_path / "page.html", tmp_path / "lines.txt"
    texts.write_text("a line of text\n\nanother line of it\nand a third one\n")
    common = ("probe", "--model", base_dir, "--task", task_dir, "--texts", texts, "--rows", "4")
    code, out, err = cli(*common, "--out", page)
    assert code == 0, err
    for text in ("Layer 2, raw", "without 1 outlier channels", "lines.txt", "a Gaussian", "within groups", "written to"):
        assert text in out
    assert page.read_text().count('class="wide"') == 2
    code, out, _ = cli(*common, "--layers", "0", "-1", "--json")
    content = json.loads(out)
    assert code == 0
    assert [group["count"] for group in content["groups"]] == [4, 3]
    assert len(content["losses"]) == len(content["layers"][0]["by_row"]["hoyer"]) == 7
    assert [layer["layer"] for layer in content["layers"]] == [0, 0, 2, 2]


def test_what_cannot_be_probed_is_refused(refused, base_dir, task_dir, tmp_path):
    assert "set --task or --texts" in refused("probe", "--model", base_dir)
    assert "there is no layer 9" in refused("probe", "--model", base_dir, "--task", task_dir, "--layers", "9")
    assert "demonstrations must be at most 12" in refused(
        "probe", "--model", base_dir, "--task", task_dir, "--demonstrations", "13"
    ).replace("--demonstrations", "demonstrations")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    with pytest.raises(TaskError, match="no texts"):
        sl.probe(base_dir, texts=[empty])
    with pytest.raises(ConfigError, match="outliers must be above 0"):
        ProbeSettings(outliers=0.5)
    t5 = save_base(tmp_path / "t5", model=make_t5())
    assert "must be a causal language model" in refused("probe", "--model", t5, "--task", task_dir)


def test_rows_of_json_are_texts_too(base_dir, tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "some words"}\n{"text": "other words"}\n{"text": "more"}\n')
    probed = sl.probe(base_dir, texts=[file])
    assert probed.groups[0].count == 3
    file.write_text('{"words": "some"}\n')
    with pytest.raises(TaskError, match="expected an object with the field 'text'"):
        sl.probe(base_dir, texts=[file])
