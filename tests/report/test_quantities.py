import pytest

from sparselet.report.quantities import format_bytes, format_duration, format_number


@pytest.mark.parametrize(
    ("number", "measure", "sign", "like", "text"),
    [
        (None, "rougeL", False, None, "–"),
        (67.94, "rougeL", False, None, "67.9"),
        (-3.26, "rougeL", False, None, "−3.3"),
        (3.0, "rougeL", True, None, "+3.0"),
        (-0.04, "rougeL", True, None, "0.0"),
        (9.994, "percent", False, None, "9.99"),
        (9.996, "percent", False, None, "10.0"),
        (0.25, "percent", False, 71.0, "0.2"),
        (26542080.0, "parameters", False, None, "26,542,080"),
    ],
)
def test_a_number(number, measure, sign, like, text):
    assert format_number(number, measure, sign, like) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (99.4, "99 s"),
        (99.6, "2 min"),
        (5240.0, "87 min"),
        (5969.0, "99 min"),
        (5971.0, "1 h 40 min"),
        (11100.0, "3 h 05 min"),
    ],
)
def test_a_time(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (310, "0.3 kB"),
        (9949, "9.9 kB"),
        (9951, "10 kB"),
        (999_400, "999 kB"),
        (999_600, "1.0 MB"),
        (2.31e9, "2.3 GB"),
        (1.2e12, "1200 GB"),
    ],
)
def test_a_size(count, text):
    assert format_bytes(count) == text
