"""The soak script finds nothing wrong with a server, and says what it has asked."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny import save_base

pytest.importorskip("fastapi")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "soak_serve.py"


def test_a_short_soak(tmp_path):
    model = save_base(tmp_path / "model", template=True, initializer_range=0.5)
    options = [
        "--model",
        model,
        "--experts",
        "8",
        "--density",
        "0.3",
        "--requests",
        "60",
        "--clients",
        "6",
        "--growth",
        "0.5",
    ]
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["wrong"] == []
    assert sum(n for kind, n in report["counts"].items() if not kind.startswith(("load", "unload", "429"))) == 60
