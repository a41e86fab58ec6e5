"""A steering vector as a directory: written whole, read back the same, and refused by name where it is damaged."""

import json

import pytest
import safetensors.torch
import torch
from helpers.tiny import make_model

from sparselet import SteeringVector
from sparselet.errors import (
    BadConfig,
    BadContainer,
    BadDtype,
    BadShape,
    FormatError,
    MissingFile,
    MissingTensor,
    NonFiniteValue,
    OutputExists,
    UnknownTensor,
    UnsupportedVersion,
)
from sparselet.fingerprint import fingerprint_weight

VALUES = torch.linspace(-1, 1, 16)


@pytest.fixture
def saved(tmp_path):
    fingerprint = fingerprint_weight(make_model().get_input_embeddings().weight)
    return SteeringVector(VALUES, 1, 0.25, "org/base", fingerprint, {"pairs": 3, "kl": 0.1}).save(tmp_path / "vector")


def test_it_is_read_as_it_was_written(saved, tmp_path):
    loaded = SteeringVector.load(saved)
    assert torch.equal(loaded.values, VALUES)
    assert (loaded.layer, loaded.strength, loaded.base, loaded.record["pairs"]) == (1, 0.25, "org/base", 3)
    again = loaded.save(tmp_path / "again")
    assert all((saved / name).read_bytes() == (again / name).read_bytes() for name in ("steering.json", "steering.safetensors"))
    with pytest.raises(OutputExists):
        loaded.save(saved)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("version", 2, UnsupportedVersion),
        ("version", "1", BadConfig),
        ("layer", -1, BadConfig),
        ("layer", 1.5, BadConfig),
        ("layer", True, BadConfig),
        ("width", 15, BadShape),
        ("width", None, BadConfig),
        ("strength", "much", BadConfig),
        ("strength", 1e300, BadConfig),
        ("strength", True, BadConfig),
        ("base_model_name_or_path", 3, BadConfig),
        ("fingerprint", {"dtype": "float32"}, BadConfig),
        ("record", [], BadConfig),
    ],
)
def test_a_wrong_field_is_named(saved, field, value, error):
    card = json.loads((saved / "steering.json").read_text())
    (saved / "steering.json").write_text(json.dumps({**card, field: value}))
    with pytest.raises(error, match=field):
        SteeringVector.load(saved)
    if error is BadConfig:
        del card[field]
        (saved / "steering.json").write_text(json.dumps(card))
        with pytest.raises(BadConfig, match=f"{field} is None"):
            SteeringVector.load(saved)


@pytest.mark.parametrize(
    ("tensors", "error"),
    [
        ({"other": VALUES}, MissingTensor),
        ({"vector": VALUES, "other": VALUES}, UnknownTensor),
        ({"vector": VALUES.half()}, BadDtype),
        ({"vector": VALUES[None]}, BadShape),
        ({"vector": VALUES[:15]}, BadShape),
        ({"vector": VALUES * float("nan")}, NonFiniteValue),
    ],
)
def test_wrong_tensors_are_named(saved, tensors, error):
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    (saved / "steering.safetensors").write_bytes(safetensors.torch.save(tensors))
    with pytest.raises(error, match=r"steering\.safetensors"):
        SteeringVector.load(saved)


def test_damaged_and_missing_files_are_refused(saved, tmp_path):
    whole = (saved / "steering.safetensors").read_bytes()
    (saved / "steering.safetensors").write_bytes(whole[:-3])
    with pytest.raises(BadContainer):
        SteeringVector.load(saved)
    (saved / "steering.safetensors").unlink()
    with pytest.raises(FormatError):
        SteeringVector.load(saved)
    (saved / "steering.json").write_text("{")
    with pytest.raises(BadConfig):
        SteeringVector.load(saved)
    with pytest.raises(MissingFile):
        SteeringVector.load(tmp_path / "nothing")


def test_a_vector_in_memory_is_checked_too():
    with pytest.raises(NonFiniteValue, match="1 of 16"):
        SteeringVector(VALUES.clone().index_fill(0, torch.tensor([3]), float("inf")), 0, 1.0)
    with pytest.raises(BadShape):
        SteeringVector(VALUES.double(), 0, 1.0)
