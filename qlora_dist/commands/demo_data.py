"""Training data that every machine has: functions of Python's own library and their docstrings."""

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

# No documentation worth learning, and packages that are not Python's own.
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}
_SKIPPED |= {"site-packages", "dist-packages"}
_CODE_CHARS = range(120, 900)
_ANSWER_CHARS = range(20, 160)


def write_docstring_rows(prepared: Path, seed: int = 0) -> tuple[Path, Path]:
    """Write train.jsonl and eval.jsonl (chat messages) below `prepared`, unless both exist."""
    folder = prepared / "stdlib-docstrings"
    train_file, eval_file = folder / "train.jsonl", folder / "eval.jsonl"
    if train_file.is_file() and eval_file.is_file():
        return train_file, eval_file
    train: list[Row] = []
    held_out: list[Row] = []
    for module, code, answer in docstring_pairs(Path(sysconfig.get_path("stdlib"))):
        question = {"role": "user", "content": f"{PROMPT}```python\n{code}\n```"}
        row = {"messages": [question, {"role": "assistant", "content": answer}]}
        # One module in six is held out, by a hash of its name. Splitting functions instead would
        # evaluate on neighbors of the functions that the model was trained on.
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
        if not _SKIPPED.isdisjoint(module.parts):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError, UnicodeDecodeError):
            continue  # a few files exist to be broken
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (pair := _pair(node)):
                yield str(module), *pair


def _pair(node: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[str, str] | None:
    """Return (source without docstring, first paragraph of the docstring) if both suit training."""
    docstring = ast.get_docstring(node)
    if not docstring or len(node.body) < 2:
        return None
    answer = " ".join(docstring.split("\n\n")[0].split())
    node.body = node.body[1:]  # the docstring is its first statement
    code = ast.unparse(node)
    if len(code) not in _CODE_CHARS or len(answer) not in _ANSWER_CHARS or not answer.endswith("."):
        return None
    return code, answer
