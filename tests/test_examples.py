"""The examples run, and the README's commands exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_example_runs(script: Path) -> None:
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_readme_names_only_make_targets_that_exist() -> None:
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    named = set(re.findall(r"\bmake (\w+)", readme))
    assert {"demo", "test"} <= named
    assert named <= set(re.findall(r"^(\w+):", makefile, flags=re.MULTILINE))


def test_the_readme_quotes_measured_figures() -> None:
    readme = (ROOT / "README.md").read_text()
    table = readme[readme.index("<!-- evidence -->") : readme.index("<!-- /evidence -->")]
    pages = [ROOT / "docs/results.md", ROOT / "docs/performance.md", *(ROOT / "benchmarks/results").glob("*.md")]
    measured = "".join(page.read_text() for page in pages)
    figures = re.findall(r"\| (\d[\d.]*)", table)
    assert len(figures) == 10
    for figure in figures:
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.])", measured), figure


def test_the_tree_in_contributing_names_every_module_and_no_other() -> None:
    tree = re.search(r"```\n(src/sparselet/.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.DOTALL)
    assert tree is not None
    named = set(re.findall(r"([\w]+\.py)", tree.group(1))) - {"__init__.py"}
    there = {path.name for path in (ROOT / "src/sparselet").rglob("*.py")} - {"__init__.py"}
    assert named == there


def test_the_measured_tables_are_what_the_results_say() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/tables.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
