"""The Dockerfile's paths exist, and its command has flags of `sparselet serve`."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "deploy" / "Dockerfile").read_text()


def test_what_is_copied_exists_and_is_not_ignored():
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    sources = [source for line in re.findall(r"^COPY (.+)$", TEXT, re.M) for source in line.split()[:-1]]
    assert sources
    assert all((ROOT / source).exists() for source in sources)
    assert set(sources) == kept


def test_the_command_is_one_of_the_command_line(cli):
    program, verb, *flags = json.loads(re.search(r"^ENTRYPOINT (.+)$", TEXT, re.M)[1])
    assert (program, verb) == ("sparselet", "serve")
    _, out, _ = cli("serve", "--help")
    assert all(flag in out for flag in flags if flag.startswith("--"))
