"""An adapter as LoRA: exact where few rows or columns change, else the best of its rank, with the error told."""

import pytest
import torch
from helpers.exported import FIRST, SECOND, config_of, rows_only
from helpers.tiny import make_adapter, make_model
from safetensors.torch import load_file

from sparselet import SparseDelta
from sparselet.errors import ArgumentError, ExportError
from sparselet.formats import open_expert
from sparselet.formats.lora.write import EXACT, export_lora, factorise


@pytest.mark.parametrize(
    ("shape", "rows", "columns", "rank"), [((12, 20), 3, 20, 3), ((12, 20), 12, 2, 2), ((12, 20), 5, 4, 4), ((9, 9), 9, 9, 9)]
)
def test_few_rows_or_columns_factorise_to_the_last_bit(shape, rows, columns, rank):
    dense = torch.zeros(shape)
    dense[torch.randperm(shape[0])[:rows, None], torch.randperm(shape[1])[None, :columns]] = torch.randn(rows, columns)
    for allowed in (None, rank, rank + 1):
        b, a, error = factorise(dense, allowed)
        assert (b.shape, a.shape, error) == ((shape[0], rank), (rank, shape[1]), 0.0)
        assert torch.equal(b @ a, dense)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
@pytest.mark.parametrize("rank", [1, 5, 20])
def test_a_cut_decomposition_is_the_best_of_its_rank(shape, rank):
    torch.manual_seed(0)
    dense = torch.randn(shape)
    b, a, error = factorise(dense, rank)
    assert (b.shape, a.shape) == ((shape[0], rank), (rank, shape[1]))
    singular = torch.linalg.svdvals(dense.double())
    assert error == pytest.approx(float(singular[rank:].norm() / singular.norm()), rel=1e-4)
    assert error == pytest.approx(float((dense - b @ a).norm() / dense.norm()), rel=1e-4)


def test_a_large_target_loses_hardly_more_than_the_best(monkeypatch):
    monkeypatch.setattr("sparselet.formats.lora.write.WHOLE", 50)
    torch.manual_seed(0)
    dense = torch.randn(300, 400)  # of singular values that hardly fall, the hardest there is
    b, a, error = factorise(dense, 20)
    singular = torch.linalg.svdvals(dense.double())
    assert error <= 1.001 * float(singular[20:].norm() / singular.norm())
    assert b.shape[1] == a.shape[0] == 20
    again = factorise(dense, 20)
    assert torch.equal(b, again[0])
    assert torch.equal(a, again[1])


@pytest.mark.parametrize("whole", [16, 1024])
def test_the_rank_of_a_lora_is_found_again(monkeypatch, whole):
    monkeypatch.setattr("sparselet.formats.lora.write.WHOLE", whole)
    monkeypatch.setattr("sparselet.formats.lora.write.PROBE", 10)
    torch.manual_seed(0)
    dense = 0.01 * (torch.randn(120, 7) @ torch.randn(7, 90))
    b, a, error = factorise(dense, None)
    assert b.shape[1] == a.shape[0] == 7
    assert error <= EXACT
    assert float((b @ a - dense).norm() / dense.norm()) <= EXACT
    assert factorise(torch.randn(60, 50), None)[0].shape[1] == 50


@pytest.mark.parametrize("rank", [1, 9, 10, 11, 40, 60, 89, 90])
@pytest.mark.parametrize("tall", [False, True])
def test_the_smallest_rank_is_found_whatever_it_is(monkeypatch, rank, tall):
    """Below the first probe, between two, beyond the last, and just short of the sides."""
    monkeypatch.setattr("sparselet.formats.lora.write.WHOLE", 16)
    monkeypatch.setattr("sparselet.formats.lora.write.PROBE", 10)
    generator = torch.Generator().manual_seed(rank)
    dense = torch.randn(120, rank, generator=generator) @ torch.randn(rank, 90, generator=generator)
    dense = dense if tall else dense.t().contiguous()
    b, a, error = factorise(dense, None)
    assert b.shape[1] == a.shape[0] == torch.linalg.matrix_rank(dense.double(), rtol=1e-5) == rank
    assert error <= EXACT


def test_a_row_and_a_column_are_of_rank_two():
    dense = torch.zeros(80, 60)
    dense[3], dense[:, 5] = torch.randn(60), torch.randn(80)
    assert factorise(dense, None)[0].shape[1] == 2


def test_zeros_factorise_to_nothing():
    b, a, error = factorise(torch.zeros(4, 6), None)
    assert (b.shape, a.shape, error) == ((4, 0), (0, 6), 0.0)


def test_a_rank_that_is_asked_for_is_that_of_every_target(tmp_path):
    """For engines that know no patterns: zeros fill what is not needed."""
    adapter, done = rows_only(make_model()), []
    assert export_lora(adapter, tmp_path / "out", rank=5, progress=done.append) == dict.fromkeys([FIRST, SECOND], 0.0)
    assert done == [FIRST, SECOND]
    config = config_of(tmp_path / "out")
    assert config["r"] == config["lora_alpha"] == 5
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.shape[0 if "lora_A" in name else 1] for name, tensor in stored.items()} == {5}
    expert = open_expert(tmp_path / "out")
    assert all(torch.equal(expert[name].to_dense(), adapter[name].to_dense()) for name in expert)


def test_errors_are_returned_and_refused_above_the_bound(tmp_path):
    adapter = rows_only(make_model())
    errors = export_lora(adapter, tmp_path / "cut", rank=2, max_error=0.9)
    assert errors.keys() == {FIRST, SECOND}
    assert errors[SECOND] == 0 < errors[FIRST] < 0.9
    dense = adapter[FIRST].to_dense()
    found = open_expert(tmp_path / "cut")[FIRST].to_dense()
    assert float((found - dense).norm() / dense.norm()) == pytest.approx(errors[FIRST], rel=1e-4)
    with pytest.raises(ExportError, match=rf"1 of 2 targets lose more than the relative error 0\.01 allowed: {FIRST} 0\."):
        export_lora(adapter, tmp_path / "refused", rank=2)
    with pytest.raises(ExportError, match=r"6 of 6 targets .*, …\. Raise the rank"):
        export_lora(make_adapter(make_model()), tmp_path / "refused", rank=1)
    assert [path.name for path in tmp_path.iterdir()] == ["cut"]


def test_lora_of_values_that_are_all_zero_or_of_a_wrong_rank(tmp_path):
    zero = {FIRST: SparseDelta((16, 16), torch.tensor([3], dtype=torch.int32), torch.zeros(1))}
    with pytest.raises(ExportError, match="all of the adapter's values are 0"):
        export_lora(zero, tmp_path / "out")
    for rank in (0, -1, True, 2.0):
        with pytest.raises(ArgumentError, match="rank must be a positive integer"):
            export_lora(zero, tmp_path / "out", rank=rank)
    for bound in (-1, float("nan")):
        with pytest.raises(ArgumentError, match="max_error must be a number of at least 0"):
            export_lora(zero, tmp_path / "out", max_error=bound)
    assert not list(tmp_path.iterdir())
