"""Rooms of the package, read from its source: imports, names of backends, and printing."""

import ast
import importlib
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import qlora_dist

ROOT = Path(qlora_dist.__file__).parent
FILES = {
    ".".join(("qlora_dist", *path.relative_to(ROOT).with_suffix("").parts)): path
    for path in ROOT.rglob("*.py")
}
MODULES = [name for name, path in FILES.items() if path.name != "__init__.py"]
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}

ROOMS = {
    "errors": (),
    "atomic": ("errors",),
    "config": ("errors", "atomic"),
    "runtime": ("errors",),
    "metrics": ("config", "runtime"),
    "model": ("errors", "config", "runtime"),
    "data": ("errors", "atomic", "config", "metrics"),
    "weights": ("errors", "atomic", "config", "runtime", "metrics", "model"),
    "run": ("errors", "atomic", "config", "runtime", "metrics", "model", "data"),
    "optim": ("errors", "config", "runtime", "metrics", "run"),
    "memory": ("errors", "config", "runtime", "model", "data", "optim"),
    "inspection": ("config", "data"),
    "evaluate": ("config", "runtime", "metrics", "model", "data"),
    "parallel": ("errors", "atomic", "config", "runtime", "model", "weights", "optim", "memory"),
    "build": (
        "config",
        "runtime",
        "metrics",
        "model",
        "data",
        "weights",
        "run",
        "memory",
        "parallel",
    ),
    "generation": ("errors", "runtime", "metrics", "data", "run", "build"),
    "prepare": (
        "config",
        "runtime",
        "model",
        "data",
        "weights",
        "run",
        "optim",
        "memory",
        "parallel",
        "build",
    ),
    "train": (
        "errors",
        "config",
        "runtime",
        "metrics",
        "model",
        "data",
        "run",
        "optim",
        "memory",
        "evaluate",
        "parallel",
        "prepare",
    ),
    "commands": (
        "errors",
        "atomic",
        "config",
        "runtime",
        "metrics",
        "model",
        "data",
        "weights",
        "run",
        "inspection",
        "build",
        "generation",
        "train",
    ),
    "cli": ("errors", "metrics", "run"),
    "__main__": ("cli",),
}
"""The rooms of the package from the bottom to the top, and which rooms below each one imports."""
KNOWS_BACKENDS = {
    "qlora_dist.parallel.choice",
    "qlora_dist.config.schema",
    "qlora_dist.commands.demo_run",
}


def imports(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Yield each import of this package below `tree`, and whether it is inside a function."""
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
            names += [
                f"{node.module}.{alias.name}"
                for alias in node.names
                if f"{node.module}.{alias.name}" in FILES
            ]
        else:
            continue
        for name in names:
            if name.partition(".")[0] == "qlora_dist":
                yield name, id(node) in inside


def imported(module: str) -> set[str]:
    """The modules of this package that a module imports anywhere."""
    return {name for name, _ in imports(TREES[module])} - {"qlora_dist"}


def room_of(module: str) -> str:
    """The file or folder at the top of the package that holds a module."""
    return module.split(".")[1]


def test_the_source_is_found() -> None:
    """The other tests here would pass on an empty list of files, or if imports were not seen."""
    assert {"qlora_dist.train", "qlora_dist.weights.loading", "qlora_dist.data.encode"} <= set(
        FILES
    )
    assert "qlora_dist.prepare" in imported("qlora_dist.train")
    assert list(imports(ast.parse("def f():\n    from qlora_dist import train"))) == [
        ("qlora_dist", True),
        ("qlora_dist.train", True),
    ]


def test_rooms_import_what_the_table_says(capsys: pytest.CaptureFixture[str]) -> None:
    """Each room imports the rooms of its line, all of which stand before it; prints the table."""
    found: dict[str, set[str]] = {room: set() for room in ROOMS}
    num_files = Counter(room_of(module) for module in MODULES)
    for module in MODULES:
        found[room_of(module)] |= {room_of(name) for name in imported(module)} - {room_of(module)}
    lines = [
        f"  {room:<11}{num_files[room]:>3} files -> {', '.join(sorted(below))}"
        for room, below in found.items()
    ]
    with capsys.disabled():
        sys.stdout.write("\n" + "\n".join(lines))
    assert found == {room: set(below) for room, below in ROOMS.items()}
    order = list(ROOMS)
    upward = [
        (room, name)
        for room, below in ROOMS.items()
        for name in below
        if order.index(name) >= order.index(room)
    ]
    assert not upward


def test_the_package_has_few_rooms() -> None:
    """Files and folders at the top: what a person who enters has to look at."""
    assert (
        len({path.name for path in ROOT.iterdir()} - {"__init__.py", "__pycache__", "py.typed"})
        <= 22
    )


def test_only_the_command_imports_the_loop_and_only_when_it_runs_it() -> None:
    """`train` is the top: nothing is built on it, and `--help` does not wait for it."""
    users = {
        (module, lazy)
        for module in FILES
        for name, lazy in imports(TREES[module])
        if name == "qlora_dist.train"
    }
    assert users == {("qlora_dist.commands.train", True)}


def test_what_only_a_cpu_needs_is_reached_through_few_lines() -> None:
    """A reader of the GPU's path need not enter `model/cpu`: one to three modules import each."""
    inside = "qlora_dist.model.cpu."
    for module in (module for module in MODULES if module.startswith(inside)):
        users = {
            user for user in MODULES if module in imported(user) and not user.startswith(inside)
        }
        assert 1 <= len(users) <= 3, f"{module} is imported by {users}"


def test_the_batch_script_imports_what_is_there() -> None:
    """Its few lines of Python are seen by no linter."""
    script = (ROOT.parent / "slurm" / "train.sbatch").read_text()
    imported_names = re.findall(r"^from (qlora_dist\S+) import (\w+)$", script, re.MULTILINE)
    assert len(imported_names) == 2
    for module, name in imported_names:
        assert hasattr(importlib.import_module(module), name)


def test_imports_form_no_circle() -> None:
    """Modules have an order in which each imports only earlier ones, but for types alone."""
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
    """Only `parallel/choice.py` decides by a backend's name.

    The configuration lists the names, and the demo writes one. A message may name one as a remedy:
    what counts is a string that is a name, as in a comparison.
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
    """All output goes through the reporter, which is silent on all ranks but one."""
    calls = [
        f"{module}:{node.lineno}"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert not calls
