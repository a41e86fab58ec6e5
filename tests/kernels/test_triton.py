"""The Triton kernels: by Triton's interpreter on the CPU, and compiled, which needs a GPU to run but none to compile.

What triton.jit returns is settled when a module is imported, so the cases (triton_cases.py) run in processes of their own.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).parents[1] / "helpers/triton_cases.py"
ALGORITHM = Path(__file__).parents[1] / "tuner/test_algorithm1.py"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run_cases(cache: Path, *options: str, cases: Path = CASES, **environment: str) -> str:
    """Pytest's last line. The variables of an outer pytest do not reach it."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(cases), "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", *options],
        env={**inherited, **environment, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


@needs_triton
def test_interpreted_kernels_equal_the_reference(tmp_path):
    last = run_cases(tmp_path, TRITON_INTERPRET="1")
    assert re.search(r"\d+ passed", last), last


@needs_triton
def test_training_through_the_kernels_is_the_papers_algorithm(tmp_path):
    assert "4 passed" in run_cases(tmp_path, "-k", "triton", cases=ALGORITHM, TRITON_INTERPRET="1")


@needs_triton
def test_kernels_compile_and_on_a_gpu_equal_the_reference(tmp_path):
    last = run_cases(tmp_path)
    assert re.search(r"\d+ passed", last), last
    assert "skipped" not in last or not torch.cuda.is_available(), last


def test_without_triton_the_kernels_are_refused_by_name():
    code = """
import sys
sys.modules["triton"] = None
from sparselet import MissingExtra, kernels
try:
    from sparselet.kernels import triton
except MissingExtra as error:
    assert "pip install triton" in str(error), error
else:
    raise AssertionError
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
