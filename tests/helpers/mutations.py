"""Damaged copies of files, and wrong values for settings, drawn from a seed."""

import copy
import json
import random
from pathlib import Path

# What a JSON or TOML field may hold instead of what it should.
WRONG = [None, True, False, -1, 0, 1, 2, 3.5, -2.5, 1e-300, 2**31, 2**40, -(2**63), 10**30, 10**400, 1e308]
WRONG += [float("nan"), float("inf"), "", " ", "x", "\x1b[2J[/red]", "\ud83d", "\0", "a" * 5000, "../..", "float32", "auto"]
WRONG += ["(a|aa)+$", [], {}, [[]], [None], [1, 2], ["x"], {"a": 1}, {"": {}}, {"x": None}, [{"a": []}]]


def damage(file: Path, draw: random.Random) -> str:
    """Damage a file in one way; what was done."""
    raw = file.read_bytes()
    if file.suffix == ".json" and draw.random() < 0.75:
        content = json.loads(raw)
        done = _change(content, draw)
        file.write_text(json.dumps(content))
        return done
    at = draw.randrange(max(1, len(raw)))
    kind = draw.choice(["flip", "cut", "insert", "remove", "empty", "double", "zeros"])
    raw = {
        "flip": raw[:at] + bytes([raw[at] ^ 1 << draw.randrange(8)]) + raw[at + 1 :],
        "cut": raw[:at],
        "insert": raw[:at] + draw.randbytes(draw.randrange(1, 9)) + raw[at:],
        "remove": raw[:at] + raw[at + draw.randrange(1, 9) :],
        "empty": b"",
        "double": raw + raw,
        "zeros": raw[:at] + b"\0" * min(8, len(raw) - at) + raw[at + 8 :],
    }[kind]
    file.write_bytes(raw)
    return f"{kind} at {at}"


def damage_header(file: Path, draw: random.Random) -> str:
    """Change the header of a safetensors file in one way, its length fitting."""
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    done = _change(header, draw)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    return f"header: {done}"


def _change(content: object, draw: random.Random) -> str:
    """Give one place in a tree of dicts and lists another value, remove it, or rename it."""
    places = [(tree, key) for tree in _trees(content) for key in (tree if isinstance(tree, dict) else range(len(tree)))]
    tree, key = draw.choice(places)
    kind = draw.choice(["value", "value", "value", "value", "remove", "rename", "swap", "deep"])
    if kind == "remove":
        del tree[key]
    elif kind == "rename" and isinstance(tree, dict):
        tree[draw.choice(["", "x", key + "x", key.upper(), "\0"])] = tree.pop(key)
    elif kind == "swap":
        other, place = draw.choice(places)
        tree[key] = copy.deepcopy(other[place]) if place in other or isinstance(other, list) else None
    elif kind == "deep":
        deep: object = 1
        for _ in range(draw.choice([3, 200, 900])):
            deep = [deep]
        tree[key] = deep
    else:
        tree[key] = copy.deepcopy(draw.choice(WRONG))
    return f"{kind} of {key!r} now {str(tree.get(key) if isinstance(tree, dict) else '')[:40]!r}"


def _trees(content: object):
    if isinstance(content, (dict, list)) and content:
        yield content
        for value in content.values() if isinstance(content, dict) else content:
            yield from _trees(value)
