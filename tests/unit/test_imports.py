"""The layers of the package, read from its source: who may import whom, who knows a backend, who may print."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import qlora_dist

ROOT = Path(qlora_dist.__file__).parent
FILES = {".".join(("qlora_dist", *path.relative_to(ROOT).with_suffix("").parts)): path for path in ROOT.rglob("*.py")}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}

FOUNDATION = {"qlora_dist.config.schema", "qlora_dist.config.saved_adapter", "qlora_dist.errors", "qlora_dist.atomic"}
KNOWS_BACKENDS = {
    "qlora_dist.parallel.choice",
    "qlora_dist.parallel.zero",
    "qlora_dist.config.schema",
    "qlora_dist.config.rules",
    "qlora_dist.commands.demo_run",
}


def imports(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """(module of this package, whether it is imported inside a function) for each import below `tree`."""
    inside = {
        id(node)
        for scope in ast.walk(tree)
        if isinstance(scope, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(scope)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports would escape this test"
            names = [str(node.module)]
            names += [f"{node.module}.{alias.name}" for alias in node.names if f"{node.module}.{alias.name}" in FILES]
        else:
            continue
        for name in names:
            if name.partition(".")[0] == "qlora_dist":
                yield name, id(node) in inside


def imported(module: str) -> set[str]:
    """The modules of this package that a module imports anywhere."""
    return {name for name, _ in imports(TREES[module])} - {"qlora_dist"}


def test_the_source_is_found() -> None:
    """The other tests here would pass on an empty list of files, or if imports were not seen."""
    assert {"qlora_dist.train", "qlora_dist.weights.loading", "qlora_dist.data.tokenization"} <= set(FILES)
    assert "qlora_dist.parallel.choice" in imported("qlora_dist.train")
    assert list(imports(ast.parse("def f():\n    from qlora_dist import train"))) == [
        ("qlora_dist", True), ("qlora_dist.train", True),
    ]  # fmt: skip


def test_only_the_command_line_imports_the_loop_and_only_when_it_runs_it() -> None:
    """`train` is the top: nothing is built on it, and `--help` does not wait for it."""
    users = {(module, lazy) for module in FILES for name, lazy in imports(TREES[module]) if name == "qlora_dist.train"}
    assert users == {("qlora_dist.cli", True)}


@pytest.mark.parametrize("layer", ["model", "data"])
def test_model_and_data_stand_on_the_foundation_only(layer: str) -> None:
    """Neither knows the other, nor anything above: they can be read, and tested, on their own."""
    modules = [module for module in FILES if module.startswith(f"qlora_dist.{layer}.")]
    assert len(modules) > 3
    for module in modules:
        above = {name for name in imported(module) - FOUNDATION if not name.startswith(f"qlora_dist.{layer}.")}
        assert not above, f"{module} imports {above}"


def test_config_and_errors_stand_on_nothing() -> None:
    """The bottom of the package; what a saved adapter says of itself belongs to the rules of a configuration."""
    assert imported("qlora_dist.config.schema") == set()
    rules = {"qlora_dist.config.schema", "qlora_dist.errors", "qlora_dist.config.saved_adapter"}
    assert imported("qlora_dist.config.rules") == rules
    assert imported("qlora_dist.config.load") == rules | {"qlora_dist.config.rules", "qlora_dist.config.typed"}
    assert imported("qlora_dist.config.saved_adapter") == {"qlora_dist.errors"}
    assert imported("qlora_dist.config.typed") == set()
    assert imported("qlora_dist.errors") == set()
    assert imported("qlora_dist.atomic") == set()


def test_the_batch_script_imports_what_is_there() -> None:
    """Its few lines of Python are seen by no linter."""
    script = (ROOT.parent / "slurm" / "train.sbatch").read_text()
    imported_names = re.findall(r"^from (qlora_dist\S+) import (\w+)$", script, re.MULTILINE)
    assert len(imported_names) == 2
    for module, name in imported_names:
        assert hasattr(importlib.import_module(module), name)


def test_imports_form_no_circle() -> None:
    """Modules can be put in an order in which each imports only earlier ones; imports for types alone do not count."""
    graph = {}
    for module, tree in TREES.items():
        for_types = {
            name
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for name, _ in imports(node)
        }
        graph[module] = imported(module) - for_types - {module}
    while graph:
        free = {module for module, needs in graph.items() if not needs & set(graph)}
        assert free, f"a circle among {sorted(graph)}"
        graph = {module: needs for module, needs in graph.items() if module not in free}


def string_literals(tree: ast.Module) -> Iterator[str]:
    """The strings of a module, annotations included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.mark.parametrize("backend", ["fsdp", "ddp", "deepspeed", "zero2", "zero3"])
def test_backends_are_named_in_one_place(backend: str) -> None:
    """Only `parallel` decides by a backend's name; the config lists the names, the demo writes one into a config,
    and `zero` is one of them.

    A message may name one as a remedy: what counts is a string that is a name, as in a comparison.
    """
    users = {module for module, tree in TREES.items() if backend in string_literals(tree)}
    assert users <= KNOWS_BACKENDS
    if backend != "deepspeed":
        assert {"qlora_dist.parallel.choice", "qlora_dist.config.schema"} <= users


def test_no_module_is_a_drawer_for_everything() -> None:
    """One noun per file: a reader who knows the field guesses the file from the task."""
    drawers = {"utils", "util", "helpers", "helper", "misc", "common", "manager", "managers"}
    assert not {module for module in FILES if drawers & set(module.split("."))}


def test_nothing_prints() -> None:
    """What a person sees goes through the reporter, which is silent on all ranks but one."""
    calls = [
        f"{module}:{node.lineno}"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not calls
