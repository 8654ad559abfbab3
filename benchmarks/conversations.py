"""Rows for the benchmarks, made of the text of the demo's data."""

from __future__ import annotations

import json
import random
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).parents[1]
PREPARED = ROOT / "runs" / "prepared"
MODEL = PREPARED / "SmolLM2-135M-Instruct"
TEXT = PREPARED / "stdlib-docstrings" / "train.jsonl"


def check_prepared() -> None:
    """Check that `make demo` has prepared the model and the text.

    Raises:
        SystemExit: the model or the text is missing; the message names the remedy.
    """
    if not MODEL.is_dir() or not TEXT.is_file():
        raise SystemExit(f"{MODEL} or {TEXT} is missing. Run `make demo` first.")


def words() -> list[str]:
    """Words of all messages in the demo's data."""
    rows = map(json.loads, TEXT.read_text(encoding="utf-8").splitlines())
    return " ".join(message["content"] for row in rows for message in row["messages"]).split()


def write_long_conversations(file: Path) -> None:
    """Write conversations of one exchange, each longer than any row of the benchmarks."""
    said = words()
    with file.open("w", encoding="utf-8") as out:
        for start in range(0, len(said) - 700, 100):
            asked, answered = (
                " ".join(said[start : start + 60]),
                " ".join(said[start + 60 : start + 700]),
            )
            out.write(json.dumps({"messages": _turns(asked, answered)}) + "\n")


def write_conversations(file: Path, num_rows: int, median_words: int, sigma: float) -> None:
    """Write conversations of one to four exchanges.

    Args:
        median_words: median length of an answer; a question is a third as long.
        sigma: standard deviation of the logarithm of both lengths.
    """
    pool = words()
    rng = random.Random(0)

    def said(median: float) -> str:
        count = max(1, round(rng.lognormvariate(0, sigma) * median))
        start = rng.randrange(len(pool) - 1)
        return " ".join((pool[start:] + pool)[:count])

    with file.open("w", encoding="utf-8") as out:
        for _ in range(num_rows):
            exchanges = rng.choices([1, 2, 3, 4], weights=[70, 15, 10, 5])[0]
            turns = [_turns(said(median_words / 3), said(median_words)) for _ in range(exchanges)]
            out.write(json.dumps({"messages": list(chain.from_iterable(turns))}) + "\n")


def _turns(asked: str, answered: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
