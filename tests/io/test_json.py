"""JSON that is written is JSON."""

import json

import pytest

from sparselet import SparseAdapter
from sparselet.errors import NonFiniteValue
from sparselet.io.json_files import json_bytes, write_json


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_what_json_has_no_number_for_is_named_and_not_written(tmp_path, number):
    with pytest.raises(NonFiniteValue, match=r"metrics\.losses\.1 is NaN or infinite"):
        write_json(tmp_path / "x.json", {"metrics": {"steps": 3, "losses": [1.0, number]}})
    with pytest.raises(NonFiniteValue, match=r"metrics\.loss is NaN"):
        SparseAdapter({}, {"metrics": {"loss": number}}).save(tmp_path / "adapter")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_other_content_is_written_as_it_is():
    content = {"b": 1e300, "a": [True, None, "NaN", -0.0]}
    assert json.loads(json_bytes(content), parse_constant=pytest.fail) == content
