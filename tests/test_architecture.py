"""The rules of the layout, checked on the syntax tree of every file and in a fresh interpreter."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.every_file import for_every

import sparselet

SOURCE = Path(sparselet.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
ROOT = "sparselet"

GROUND = {"errors", "setting_checks", "io", "kernels"}
CORE = GROUND | {"adapter_format", "adapter_metadata", "delta", "fingerprint", "masks", "names", "scores", "selection_settings"}
CORE |= {"result_table", "adapter", "adapter_stream", "apply", "expert", "intervals", "model_config", "training_recipes"}
CORE |= {"evaluation_mode"}
CORE |= {"profiles"}
INPUTS = CORE | {"hub", "models", "tasks"}
APART = ("tuner", "formats", "analysis", "activations", "attention")
USERS = ("training", "evaluation", "serving")
LIBRARY = INPUTS | {*APART, *USERS, "merging", "generation", "steering"}
NEEDS_TRITON = {"sparselet.kernels.triton"}

# What each module or room may import beside itself; lowest first. Files of one row must not form a circle. Rooms that do not
# exist yet have their place already.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    **{name: {"errors"} for name in GROUND - {"errors"}},
    **dict.fromkeys(CORE - GROUND, CORE),
    "hub": CORE,
    "tasks": CORE | {"hub"},
    "models": CORE | {"hub"},
    **dict.fromkeys(APART, CORE | {"hub"}),
    "merging": CORE | {"formats"},
    "generation": INPUTS,
    "steering": INPUTS | {"generation"},
    "training": INPUTS | {"generation", "tuner"},
    "evaluation": INPUTS | {"generation", "tuner"},
    "serving": INPUTS | {"generation", "tuner", "formats", "merging", "analysis", "steering"},
    "workflows": LIBRARY,
    "studies": LIBRARY | {"workflows"},
    "report": CORE,
    "api": LIBRARY | {"workflows", "studies", "report"},
    "cli": LIBRARY | {"workflows", "studies", "report", "api", ROOT},
    ROOT: LIBRARY | {"workflows", "api"},  # the names of `import sparselet`, each loaded when it is first used
}


def module_of(file: Path) -> str:
    """The dotted name of a file."""
    parts = file.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def owner(module: str) -> str:
    """The row of the table that a dotted name falls under."""
    return module.split(".")[1] if "." in module else ROOT


MODULES = {module_of(file) for file in FILES}
TREES = {file: ast.parse(file.read_text(), str(file)) for file in FILES}


def own_imports(tree: ast.AST, file: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each module of ours that the tree imports."""
    package = module_of(file) if file.name == "__init__.py" else module_of(file).rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
            found = [name if name in MODULES else base for name in names]
        else:
            continue
        yield from ((node.lineno, name) for name in found if name.split(".")[0] == ROOT)


@for_every(FILES)
def test_imports_run_one_way(file):
    me = owner(module_of(file))
    assert me in MAY_IMPORT, f"{me} is not in MAY_IMPORT of {Path(__file__).name}: add it, with what it may import."
    allowed = MAY_IMPORT[me] | ({me} if me != ROOT else set())
    wrong = [f"line {line} imports {name}" for line, name in own_imports(TREES[file], file) if owner(name) not in allowed]
    assert not wrong, f"{me} may import {sorted(allowed)}, but {wrong}."


def test_no_files_import_each_other_in_a_circle():
    graph = {module_of(file): {name for _, name in own_imports(TREES[file], file)} for file in FILES}
    graph[ROOT] = set()  # of its names, those of upper layers are loaded when first used
    list(graphlib.TopologicalSorter(graph).static_order())


def test_the_table_keeps_the_rules_of_the_house():
    for rooms in (APART, USERS):
        for room in rooms:
            assert not MAY_IMPORT[room] & (set(rooms) - {room})
    assert not [name for name, allowed in MAY_IMPORT.items() if "cli" in allowed]
    assert not set().union(*MAY_IMPORT.values()) - MAY_IMPORT.keys()


@for_every(FILES)
def test_no_import_is_hidden_in_a_function(file):
    functions = [n for n in ast.walk(TREES[file]) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    hidden = {line for function in functions for line, _ in own_imports(function, file)}
    by_name = {
        node.lineno
        for node in ast.walk(TREES[file])
        if isinstance(node, ast.Call) and called(node).split(".")[-1] in ("import_module", "__import__")
        for argument in node.args[:1]
        if isinstance(argument, ast.Constant) and str(argument.value).split(".")[0] == ROOT
    }
    assert not hidden | by_name, f"lines {sorted(hidden | by_name)}"


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


@for_every(FILES)
def test_nothing_is_pickled(file):
    modules = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & modules
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in modules
            assert node.module != "torch" or not {alias.name for alias in node.names} & {"load", "save"}
        elif isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in ("torch.load", "torch.save")
            assert ast.unparse(node.value) not in modules
        elif isinstance(node, ast.keyword):
            assert node.arg != "allow_pickle"


@for_every(FILES)
def test_only_the_command_line_prints(file):
    if owner(module_of(file)) != "cli":
        lines = [n.lineno for n in ast.walk(TREES[file]) if isinstance(n, ast.Call) and called(n) == "print"]
        assert not lines, f"lines {lines}"


def test_all_lists_exactly_the_public_names():
    imported, used, defined = set(), set(), set()
    for node in ast.walk(TREES[SOURCE / "__init__.py"]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == ROOT:
            imported |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name):
            (defined if isinstance(node.ctx, ast.Store) else used).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
    public = {name for name in (imported - used) | defined if not name.startswith("_")}
    assert public == set(sparselet.__all__)
    assert len(sparselet.__all__) == len(public)
    assert set(sparselet._LAZY) <= public


@pytest.mark.parametrize("name", sparselet.__all__)
def test_every_public_name_resolves(name):
    if name in sparselet._LAZY:
        pytest.importorskip("peft")
    assert getattr(sparselet, name) is not None


def test_a_name_that_is_not_public_is_an_attribute_error():
    assert not hasattr(sparselet, "nothing_of_this_name")


def in_a_fresh_interpreter(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_core_needs_torch_safetensors_and_numpy_alone():
    core = sorted(module for module in MODULES - NEEDS_TRITON if owner(module) in CORE | {"merging", ROOT})
    code = f"""
import sys, importlib, numpy, torch, safetensors.torch
def tops(): return {{name.split(".")[0] for name in sys.modules}}
before = tops()
import sparselet
heavy = "peft transformers datasets matplotlib rich cyclopts accelerate huggingface_hub tokenizers"
assert not tops() & set(heavy.split()), tops() & set(heavy.split())
for module in {core!r}:
    importlib.import_module(module)
new = tops() - before - set(sys.stdlib_module_names) - {{"sparselet"}}
assert not new, new
"""
    in_a_fresh_interpreter(code)


LOADERS = ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "pipeline", "auto")


@for_every(FILES)
def test_no_code_of_a_repository_is_trusted(file):
    calls = [n for n in ast.walk(TREES[file]) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
    for call in (call for call in calls if call.func.attr in ("from_pretrained", "from_config")):
        if any(name in ast.unparse(call.func.value) for name in LOADERS):
            said = {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert said.get("trust_remote_code") == "False", f"line {call.lineno}: say trust_remote_code=False."
