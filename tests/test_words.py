"""The language of the source: one name for one thing, no vague names, small files and functions.

A public class or constant that exists twice makes its readers look up which one is meant, and an import of the wrong one
passes. A name such as `told` or `made` does not say what it holds.
"""

import ast
import re
from collections import Counter, defaultdict
from pathlib import Path

from helpers.every_file import for_every

import sparselet

SOURCE = Path(sparselet.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
TREES = {str(file.relative_to(SOURCE)): ast.parse(file.read_text()) for file in FILES}
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)

VAGUE = {"told", "tell", "found", "asked", "known", "made", "about", "every", "given", "ready", "seldom", "wanted", "begun"}
VAGUE |= {"here", "there", "one"}
LONGEST_FILE, LONGEST_FUNCTION, MOST_GETATTR = 400, 60, 15

# Packages without which deltas, adapters and merges work, and a module that Windows lacks.
OPTIONAL = {"gepa", "gguf", "openai", "regex", "resource", "tomli_w", "transformers", "trl"}


def public_names(tree: ast.Module) -> set[str]:
    """The public classes and UPPER_CASE constants that a module defines."""
    names = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        for target in targets:
            names |= {part.id for part in ast.walk(target) if isinstance(part, ast.Name) and part.id.isupper()}
    return {name for name in names if not name.startswith("_")}


def test_no_public_class_or_constant_name_exists_twice():
    places = defaultdict(list)
    for name, tree in TREES.items():
        for public in public_names(tree):
            places[public].append(name)
    assert not {public: files for public, files in places.items() if len(files) > 1}


def identifiers(tree: ast.AST) -> Counter[str]:
    """The functions, classes, arguments and assigned names of a module, without leading and trailing underscores."""
    names: Counter[str] = Counter()
    for node in ast.walk(tree):
        if isinstance(node, (*FUNCTION, ast.ClassDef)):
            names[node.name] += 1
        elif isinstance(node, ast.arg):
            names[node.arg] += 1
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names[node.id] += 1
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names[node.attr] += 1
    return Counter({name.strip("_"): count for name, count in names.items()})


@for_every(TREES)
def test_no_name_is_vague(name):
    assert not {word for word in identifiers(TREES[name]) if word.lower() in VAGUE}


@for_every(TREES)
def test_no_file_is_long(name):
    assert len((SOURCE / name).read_text().splitlines()) <= LONGEST_FILE


def is_exempt(name: str, function: ast.AST) -> bool:
    """Whether a function may be long: a verb's signature and help in cli/, and kernels in Triton."""
    decorators = " ".join(map(ast.unparse, function.decorator_list))
    return "triton.jit" in decorators or (name.startswith("cli/") and bool(re.fullmatch(r"[a-z]+_", function.name)))


@for_every(TREES)
def test_no_function_is_long(name):
    functions = [node for node in ast.walk(TREES[name]) if isinstance(node, FUNCTION)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno + 1 > LONGEST_FUNCTION}
    assert not {f.name: long[f.name] for f in functions if f.name in long and not is_exempt(name, f)}


def test_getattr_and_hasattr_are_rare():
    calls = {
        name: count
        for name, tree in TREES.items()
        if (count := sum(isinstance(n, ast.Name) and n.id in ("getattr", "hasattr") for n in ast.walk(tree)))
    }
    assert sum(calls.values()) <= MOST_GETATTR, calls


@for_every(TREES)
def test_only_optional_packages_are_imported_in_a_function(name):
    functions = [node for node in ast.walk(TREES[name]) if isinstance(node, FUNCTION)]
    imports = [n for f in functions for n in ast.walk(f) if isinstance(n, ast.Import | ast.ImportFrom)]
    packages = {alias.name for n in imports if isinstance(n, ast.Import) for alias in n.names}
    packages |= {str(n.module) for n in imports if isinstance(n, ast.ImportFrom)}
    assert {package.partition(".")[0] for package in packages} <= OPTIONAL


@for_every(TREES)
def test_library_errors_name_no_flags(name):
    """Flags belong to the command line, which writes them for fields in backquotes. Those of other programs may be named."""
    if name.startswith(("cli/", "hub/card.py")):
        return
    programs = (
        r"sparselet eval|torchrun|--nproc-per-node|--mixed_precision|pip|--quiet|--no-deps|--dest|--to checkpoint|--dry-run"
    )
    texts = [n.value for n in ast.walk(TREES[name]) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    assert not [text for text in texts if re.search(r"(^|[\s(`])--[a-z]", text) and not re.search(programs, text)]
