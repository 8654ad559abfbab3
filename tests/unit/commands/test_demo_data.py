"""The demo's instruction set: functions and their docstrings, split by module."""

import ast
import json
import sysconfig
from pathlib import Path

import pytest

from qlora_dist.commands.demo_data import NUM_EVAL, PROMPT, docstring_pairs, write_docstring_rows

BODY = """\
    total = 0
    for number in range(limit):
        if number % 2 == 0:
            total += number
    return total, 'a constant to make it long enough to be of interest'
"""

MODULE = f'''\
"""A module."""

def first(limit):
    """Add up the even numbers
    below the limit.

    A second paragraph, which is no answer.
    """
{BODY}

def undocumented(limit):
{BODY}

def short():
    """Return the number one, always."""
    return 1

def no_sentence(limit):
    """what this does is anyone's guess"""
{BODY}

class Thing:
    async def method(self, limit):
        """Add up the even numbers, later."""
{"".join("    " + line for line in BODY.splitlines(keepends=True))}
'''


def library(root: Path, modules: dict[str, str]) -> Path:
    """Write source files below `root`."""
    for name, source in modules.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source)
    return root


def function(name: str) -> str:
    """Source of a function whose docstring names it."""
    docstring = f'"""Add up the even numbers below the limit in {name}."""'
    return f"def {name}(limit):\n    {docstring}\n{BODY}\n"


def pairs_of(file: Path) -> list[tuple[str, str]]:
    """Question and answer of each row of a file of chat messages."""
    rows = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    assert all([turn["role"] for turn in row] == ["user", "assistant"] for row in rows)
    return [(row[0]["content"], row[1]["content"]) for row in rows]


def test_pairs_are_functions_and_their_first_paragraph(tmp_path: Path) -> None:
    """Pairs come from functions and methods of any module, if the docstring is a sentence and the
    code is long enough to be of interest."""
    root = library(tmp_path, {"a.py": MODULE, "package/b.py": function("second")})
    pairs = list(docstring_pairs(root))
    assert [(module, answer) for module, _, answer in pairs] == [
        ("a.py", "Add up the even numbers below the limit."),
        ("a.py", "Add up the even numbers, later."),
        ("package/b.py", "Add up the even numbers below the limit in second."),
    ]
    assert [type(ast.parse(code).body[0]).__name__ for _, code, _ in pairs] == [
        "FunctionDef",
        "AsyncFunctionDef",
        "FunctionDef",
    ]


def test_the_answer_is_not_in_the_question(tmp_path: Path) -> None:
    """The docstring is cut from the code, and the rest of the function stays."""
    for _, code, answer in docstring_pairs(library(tmp_path, {"a.py": MODULE})):
        [node] = ast.parse(code).body
        assert ast.get_docstring(node) is None
        assert answer.split(",")[0] not in code
        assert "second paragraph" not in code
        assert "total += number" in code


def test_tests_and_broken_files_are_passed_over(tmp_path: Path) -> None:
    """Test suites, which hold no documentation worth learning, and files that are broken on purpose
    give no pairs."""
    modules = {
        "test/a.py": function("a"),
        "x/tests/b.py": function("b"),
        "site-packages/c.py": function("c"),
    }
    root = library(tmp_path, {**modules, "broken.py": "def (:\n", "good.py": function("good")})
    (root / "latin.py").write_bytes(b"# \xe9\n")
    assert [module for module, _, _ in docstring_pairs(root)] == ["good.py"]


@pytest.fixture
def standard_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of 120 modules with three functions each, in the place of Python's own."""
    modules = {f"m{i}.py": "".join(function(f"f{i}_{j}") for j in range(3)) for i in range(120)}
    root = library(tmp_path / "lib", modules)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(root))
    return root


def test_modules_are_split_not_functions(tmp_path: Path, standard_library: Path) -> None:
    """No module has functions on both sides: the evaluation is on code that training never saw."""
    train_file, eval_file = write_docstring_rows(tmp_path / "cache")

    def modules(file: Path) -> set[str]:
        return {answer.split(" in f")[1].partition("_")[0] for _, answer in pairs_of(file)}

    train, held_out = modules(train_file), modules(eval_file)
    assert train.isdisjoint(held_out)
    assert len(held_out) > 5
    assert len(pairs_of(eval_file)) == NUM_EVAL
    assert len(pairs_of(train_file)) == 3 * len(train)


def test_rows_ask_for_a_docstring(tmp_path: Path, standard_library: Path) -> None:
    """The question is the prompt with the code in a fence; the answer is the docstring."""
    for file in write_docstring_rows(tmp_path / "cache"):
        for question, answer in pairs_of(file):
            assert question.startswith(PROMPT + "```python\ndef f")
            assert question.endswith("\n```")
            assert answer.startswith("Add up the even numbers below the limit in f")


def test_rows_are_shuffled_by_the_seed_alone(tmp_path: Path, standard_library: Path) -> None:
    """On one version of Python every demo trains on the same rows in the same order."""
    files = [
        write_docstring_rows(tmp_path / name, seed)[0]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    first, again, other = (pairs_of(file) for file in files)
    assert first == again
    assert first != other
    assert first != sorted(first)
    assert sorted(first) == sorted(other)


def test_a_second_call_reuses_the_files(tmp_path: Path, standard_library: Path) -> None:
    """Existing files are kept, byte for byte, even when the library has changed; no half-written
    file is left."""
    files = write_docstring_rows(tmp_path / "cache")
    before = [(file.read_bytes(), file.stat().st_mtime_ns) for file in files]
    for module in standard_library.iterdir():
        module.write_text("")
    assert write_docstring_rows(tmp_path / "cache") == files
    assert [(file.read_bytes(), file.stat().st_mtime_ns) for file in files] == before
    assert sorted(path.name for path in files[0].parent.iterdir()) == ["eval.jsonl", "train.jsonl"]


def test_pythons_own_library_is_enough(tmp_path: Path) -> None:
    """The Python that runs this test gives a full evaluation set, and well over the 160 rows that
    40 steps of 4 rows take."""
    train_file, eval_file = write_docstring_rows(tmp_path)
    assert len(pairs_of(eval_file)) == NUM_EVAL
    assert len(pairs_of(train_file)) > 1000
