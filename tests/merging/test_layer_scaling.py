"""LiNeS: factors of layers by name, and any merge times them against a dense oracle."""

import pytest
import torch
from helpers.made_experts import contents, expert, saved
from helpers.strategies import few, spelt_out
from hypothesis import given
from hypothesis import strategies as st

import sparselet as sl
from sparselet.errors import ArgumentError, ConfigError
from sparselet.merging import METHODS, MergeRecipe, merge, merge_to, read_recipe, recipe_text
from sparselet.merging.layer_scaling import layer_factors

NAMES = tuple(f"model.layers.{i}.self_attn.{part}_proj" for i in (0, 1, 2, 10) for part in "qv")
numbers = st.sampled_from([-1.0, 0.0, 0.3, 1.0, 2.0])


def test_factors_rise_with_the_depth():
    factors = layer_factors((*NAMES, "model.embed_tokens", "lm_head"), (0.2, 0.5))
    by_layer = {0: 0.2, 1: 0.25, 2: 0.3, 10: 0.7}
    expected = {f"model.layers.{i}.self_attn.{part}_proj": value for i, value in by_layer.items() for part in "qv"}
    assert factors == pytest.approx({**expected, "model.embed_tokens": 0.2, "lm_head": 0.2})


def test_the_first_number_counts_and_each_stack_has_its_own_depth():
    names = [
        "encoder.block.0.layer.1.wi",
        "encoder.block.2.layer.0.q",
        "decoder.block.0.q",
        "decoder.block.1.q",
        "h.5.attn",
        "3",
    ]
    assert list(layer_factors(names, (1.0, 2.0)).values()) == [1.0, 3.0, 1.0, 3.0, 3.0, 3.0]
    assert layer_factors(["layers.0.q"], (0.5, 2.0)) == {"layers.0.q": 0.5}


@few
@given(numbers, numbers, st.sampled_from(sorted(METHODS)))
def test_every_method_is_its_merge_times_the_factor(alpha, beta, method):
    experts = [expert(seed, names=NAMES) for seed in (1, 40)]
    plain, scaled = merge(experts, method), merge(experts, method, layer_scaling=(alpha, beta))
    for name in NAMES:
        factor = alpha + beta * int(name.split(".")[2]) / 10
        dense, mask = spelt_out(plain[name])
        result, same = spelt_out(scaled[name])
        assert torch.equal(mask, same)
        torch.testing.assert_close(result, dense * factor, rtol=1e-6, atol=0)


def test_one_and_zero_change_no_bit_and_blocks_stay():
    experts = [expert(1, "row", NAMES), expert(40, "row", NAMES)]
    plain, scaled = merge(experts), merge(experts, layer_scaling=(1, 0))
    assert all(torch.equal(plain[n].values, scaled[n].values) and plain[n].block == scaled[n].block for n in NAMES)
    assert "layer_scaling" not in plain.metadata.merge
    assert scaled.metadata.merge["layer_scaling"] == [1.0, 0.0]


def test_files_recipes_and_memory_agree(tmp_path):
    paths = saved(tmp_path, [expert(seed, names=NAMES) for seed in (1, 40)])
    merge_to(tmp_path / "streamed", paths, "ties", layer_scaling=(0.5, 1))
    merge(paths, "ties", layer_scaling=(0.5, 1)).save(tmp_path / "memory")
    assert contents(tmp_path / "streamed") == contents(tmp_path / "memory")
    written = sl.merge(paths, "ties", layer_scaling=(0.5, 1), out=tmp_path / "written")
    assert read_recipe(tmp_path / "written" / "recipe.toml").layer_scaling == (0.5, 1.0)
    sl.merge_recipe(tmp_path / "written" / "recipe.toml", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "written")
    assert all(torch.equal(written[n].values, sl.merge(paths, "ties", layer_scaling=(0.5, 1))[n].values) for n in NAMES)
    text = recipe_text(MergeRecipe(("a", "b"), layer_scaling=(1, 0.5)), tmp_path)
    assert "layer_scaling = [" in text


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ((1.0,), "layer_scaling must be two numbers, alpha and beta"),
        ("12", "layer_scaling must be two numbers"),
        (0.5, "layer_scaling must be two numbers"),
        ((1.0, float("nan")), "layer_scaling must be a finite number, got nan"),
        ((True, 1.0), "layer_scaling must be a finite number, got True"),
    ],
)
def test_what_is_no_scaling_is_refused(tmp_path, scaling, message):
    for attempt in (
        lambda: merge([expert(1)], layer_scaling=scaling),
        lambda: merge_to(tmp_path / "out", [expert(1)], layer_scaling=scaling),
        lambda: MergeRecipe(("a",), layer_scaling=scaling),
    ):
        with pytest.raises(ArgumentError, match=message):
            attempt()
    assert not list(tmp_path.iterdir())


def test_it_does_not_go_with_counts(tmp_path):
    with pytest.raises(ConfigError, match="keep_counts and layer_scaling do not go together"):
        MergeRecipe(("a", "b"), keep_counts=True, layer_scaling=(1, 0))
    with pytest.raises(ConfigError, match="keep_counts and layer_scaling"):
        sl.merge([expert(1)], layer_scaling=(1, 0), keep_counts=True, out=tmp_path / "x")


def test_on_the_command_line(cli, refused, experts, tmp_path):
    code, out, err = cli("merge", *experts, "--layer-scaling", 0.5, 1, "--out", tmp_path / "x")
    assert code == 0, err
    assert "Layers scaled by alpha = 0.5, beta = 1" in out
    expected = merge(experts, "regmean", layer_scaling=(0.5, 1))
    assert all(torch.equal(sl.load(tmp_path / "x")[name].values, expected[name].values) for name in expected)
    again = ("merge", "--recipe", tmp_path / "x" / "recipe.toml", "--out", tmp_path / "y")
    assert cli(*again)[0] == 0
    assert contents(tmp_path / "x") == contents(tmp_path / "y")
    assert "--recipe and --layer-scaling do not go together" in refused(*again[:-1], tmp_path / "z", "--layer-scaling", 1, 0)
