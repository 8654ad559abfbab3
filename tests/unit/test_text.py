"""Rules of the source text: width, docstrings, comments, sizes, and a test for each module."""

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import qlora_dist

ROOT = Path(qlora_dist.__file__).parents[1]
PACKAGE = sorted(Path(qlora_dist.__file__).parent.rglob("*.py"))
SOURCES = [
    *PACKAGE,
    *sorted((ROOT / "tests").rglob("*.py")),
    *sorted((ROOT / "benchmarks").rglob("*.py")),
]
WIDTH = 100
WEAK_BEGINNINGS = {"What", "Of", "How", "Where", "Whether"}
"""Words with which a docstring would begin that cannot be understood by itself."""
Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(paths: list[Path]) -> Iterator[tuple[str, Function]]:
    """All functions of some files, each with its place."""
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, Function):
                yield f"{name_of(path)}:{node.lineno} {node.name}", node


def num_parameters(function: Function) -> int:
    """Parameters that a caller gives."""
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return len([argument for argument in every if argument.arg not in ("self", "cls")])


def code_and_comments(path: Path) -> tuple[int, int]:
    """Lines with code (no docstrings, comments, blanks), and comments."""
    text = path.read_text(encoding="utf-8")
    documented = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for line in range(node.lineno, (node.end_lineno or 0) + 1)
    }  # docstrings, those of fields included
    blank = {
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
        tokenize.COMMENT,
    }
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    lines = {
        line
        for token in tokens
        if token.type not in blank
        for line in range(token.start[0], token.end[0] + 1)
    }
    return len(lines - documented), sum(token.type == tokenize.COMMENT for token in tokens)


def test_lines_are_not_wide() -> None:
    """Lines of Python have at most 100 columns, strings and docstrings included."""
    wide = [
        f"{name_of(path)}:{number}"
        for path in SOURCES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if len(line) > WIDTH
    ]
    assert not wide


def test_the_formatter_is_switched_off_nowhere() -> None:
    """All code looks as the formatter writes it."""
    switch = re.compile(r"#\s*" + r"fmt:\s*(skip|off)")
    assert not [
        name_of(path) for path in SOURCES if switch.search(path.read_text(encoding="utf-8"))
    ]


def test_docstrings_stand_alone() -> None:
    """A docstring begins with a verb or a noun phrase that can be understood by itself."""
    weak = [
        f"{name_of(path)}:{getattr(node, 'lineno', 1)}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and re.split(r"\W", (ast.get_docstring(node) or "-").lstrip())[0] in WEAK_BEGINNINGS
    ]
    assert not weak


def test_functions_and_files_are_short() -> None:
    """Functions have at most 65 lines and, but for one, eight parameters; files 450 lines."""
    every = dict(functions([*PACKAGE, *sorted((ROOT / "benchmarks").rglob("*.py"))]))
    assert not [name for name, node in every.items() if (node.end_lineno or 0) - node.lineno >= 65]
    assert len([name for name, node in every.items() if num_parameters(node) > 8]) <= 1
    assert not [
        name_of(path) for path in PACKAGE if len(path.read_text("utf-8").splitlines()) > 450
    ]


def test_hard_lines_have_comments(capsys: pytest.CaptureFixture[str]) -> None:
    """Five comments for 100 lines of code; prints both numbers."""
    counts = [code_and_comments(path) for path in PACKAGE]
    code, comments = (sum(column) for column in zip(*counts, strict=True))
    with capsys.disabled():  # for whoever runs it by hand
        print(f"\n  {code:,} lines of code, {comments} comments", end="")  # noqa: T201
    assert comments >= 0.05 * code


def test_each_module_has_a_test() -> None:
    """At the same place below tests/unit, or under the name that a line of the module gives."""
    without = []
    for path in PACKAGE:
        if path.name in ("__init__.py", "__main__.py"):
            continue
        inside = path.relative_to(ROOT / "qlora_dist")
        mirror = ROOT / "tests" / "unit" / inside.with_name(f"test_{inside.name}")
        named = re.findall(r"tests/\w+(?:/\w+)*\.py", path.read_text(encoding="utf-8"))
        if not mirror.is_file() and not any((ROOT / name).is_file() for name in named):
            without.append(name_of(path))
    assert not without


def test_no_named_test_is_missing() -> None:
    """Tests that sources and pages name are there."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    texts = [ROOT / name for name in listed.stdout.splitlines() if name.endswith((".py", ".md"))]
    missing = [
        f"{name_of(path)}: {name}"
        for path in texts or SOURCES
        if path.name not in ("CHANGELOG.md", "test_gpu.py", "test_demo_data.py") and path.is_file()
        for name in re.findall(r"(?<!\")tests/\w+(?:/\w+)*\.py", path.read_text(encoding="utf-8"))
        if not (ROOT / name).is_file()
    ]
    assert not missing
