"""A small real instruction set that every machine has: functions of Python's standard library, and their docstrings."""

from __future__ import annotations

import ast
import json
import random
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

from qlora_dist.atomic import write_text

PROMPT = "Write a one-sentence docstring for this Python function.\n\n"
NUM_EVAL = 40

Row = dict[str, list[dict[str, str]]]
"""One line of the file: {"messages": [{"role": ..., "content": ...}, ...]}."""

_SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "site-packages",
    "dist-packages",
    "lib2to3",
    "turtledemo",
    "__pycache__",
}
_CODE_CHARS = range(120, 900)
_ANSWER_CHARS = range(20, 160)


def write_docstring_rows(prepared: Path, seed: int = 0) -> tuple[Path, Path]:
    """Write train.jsonl and eval.jsonl (chat messages) below `prepared`, unless they are there.

    Modules, not functions, are split: one in six is held out, chosen by a hash of its name.
    """
    folder = prepared / "stdlib-docstrings"
    train_file, eval_file = folder / "train.jsonl", folder / "eval.jsonl"
    if train_file.is_file() and eval_file.is_file():
        return train_file, eval_file
    train: list[Row] = []
    held_out: list[Row] = []
    for module, code, answer in docstring_pairs(Path(sysconfig.get_path("stdlib"))):
        question = f"{PROMPT}```python\n{code}\n```"
        row: Row = {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        }
        (held_out if zlib.crc32(module.encode()) % 6 == 0 else train).append(row)
    shuffle = random.Random(seed).shuffle
    shuffle(train)
    shuffle(held_out)
    folder.mkdir(parents=True, exist_ok=True)
    for file, rows in ((eval_file, held_out[:NUM_EVAL]), (train_file, train)):
        write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
    return train_file, eval_file


def docstring_pairs(root: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (module, function source without its docstring, first paragraph of the docstring)."""
    for file in sorted(root.rglob("*.py")):
        module = file.relative_to(root)
        if _SKIPPED.intersection(module.parts):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError, UnicodeDecodeError):
            continue  # a few files exist to be broken
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                pair = _pair(node)
                if pair is not None:
                    yield str(module), *pair


def _pair(node: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[str, str] | None:
    docstring = ast.get_docstring(node)
    if not docstring or len(node.body) < 2:
        return None
    answer = " ".join(docstring.split("\n\n")[0].split())
    node.body = node.body[1:]
    code = ast.unparse(node)
    if len(code) not in _CODE_CHARS or len(answer) not in _ANSWER_CHARS or not answer.endswith("."):
        return None
    return code, answer
