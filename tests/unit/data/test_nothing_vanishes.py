"""Rows of every shape under real templates: what they say is shown, counted as lost, or refused."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_dist.config.schema import DataConfig
from qlora_dist.data.encode import encode_rows
from qlora_dist.data.report import Report
from qlora_dist.data.samples import Sample
from qlora_dist.data.sources import Row
from tests.support.rows import targets
from tests.unit.data.test_chat_template import FAMILIES, tokenizer_of

REFUSALS = {
    "refused by the chat template",
    "earlier turns rewritten by the template",
    "tool turn left out by the template",
}
"""Reasons for which a template may refuse a sound row although every loss is allowed."""
LOSSES = ("text", "thoughts", "tool_calls", "tools")


@dataclass
class Written:
    """A row, and each word that it says: by what it is part of, and whether it is to be learned."""

    row: dict[str, Any]
    words: list[tuple[str, str, bool]] = field(default_factory=list)

    def word(self, kind: str, is_learned: bool = False) -> str:
        """Return a word that occurs nowhere else."""
        word = f"q{len(self.words):03d}q"
        self.words.append((kind, word, is_learned))
        return word


@st.composite
def rows(draw: Callable[[st.SearchStrategy], Any]) -> Written:
    """Write a row of one to four rounds, with or without all that rows may have."""
    written = Written({})
    messages: list[dict[str, Any]] = []
    number = 0

    def choose(*options: Any) -> Any:
        return draw(st.sampled_from(options))

    def content(is_learned: bool = False) -> Any:
        """Return words as text, as text of several lines, or as parts."""
        first = written.word("text", is_learned)
        form = choose("word", "lines", "spaces", "parts")
        if form == "word":
            return first
        second = written.word("text", is_learned)
        if form == "lines":
            return f"{first}\n\n{second}"
        if form == "spaces":
            return f" {first} {second}\n"
        return [
            {"type": "text", "text": first, "image": None},
            None,
            {"type": "text", "text": None},
            {"type": choose("text", "output_text"), choose("text", "value", "content"): second},
        ]

    def nulls() -> dict[str, None]:
        names = ("tool_calls", "tool_call_id", "name", "reasoning_content", "function_call")
        return dict.fromkeys(names) if choose(False, True) else {}

    def answer() -> dict[str, Any]:
        said = {**nulls(), "role": "assistant", "content": content(is_learned=True)}
        form = choose("plain", "plain", "field", "tags")
        if form == "field":
            name = choose("reasoning_content", "thinking", "reasoning")
            said[name] = written.word("thoughts", is_learned=True)
        if form == "tags" and isinstance(said["content"], str):
            thought = written.word("thoughts", is_learned=True)
            said["content"] = f"<think>\n{thought}\n</think>\n\n{said['content']}"
        return said

    def call() -> dict[str, Any]:
        nonlocal number
        number += 1
        arguments: Any = {
            written.word("tool_calls", True): written.word("tool_calls", True),
            "deep": {"list": [written.word("tool_calls", True), 3, True]},
        }
        form = choose("object", "text", "nulls")
        if form == "text":
            arguments = json.dumps(arguments)
        if form == "nulls":
            arguments |= {"other": None}
        name = written.word("tool_calls", True)
        function = {"name": name, "arguments": arguments}
        return {"id": f"call{number:05d}", "type": "function", "function": function}

    if choose(False, True):
        messages.append({"role": choose("system", "system", "developer"), "content": content()})
    if choose(False, False, False, False, True):
        messages.append(answer())
    for _ in range(draw(st.integers(1, 4))):
        messages.append({**nulls(), "role": "user", "content": content()})
        for _ in range(choose(0, 0, 1, 2)):
            calls = [call() for _ in range(choose(1, 1, 2))]
            beside = choose("", None, "text")
            said = {"role": "assistant", "tool_calls": calls}
            said["content"] = content(is_learned=True) if beside == "text" else beside
            if choose(False, False, True):
                said["reasoning_content"] = written.word("thoughts", is_learned=True)
            messages.append(said)
            for one in calls:
                result = {"tool_call_id": one["id"], "name": one["function"]["name"]}
                messages.append({**result, "role": "tool", "content": content()})
        messages.append(answer())
    written.row["messages"] = messages
    if choose(False, True):
        tools = [
            {"type": "function", "function": {"name": written.word("tools"), "parameters": {}}}
            for _ in range(choose(1, 2))
        ]
        written.row["tools"] = choose(tools, json.dumps(tools))
    return written


@cache
def outcomes(family: str) -> list[str]:
    """Return the list of what became of the rows under a template, to be filled."""
    return []


def encoded(written: Written, family: str, allow_lost: Any) -> tuple[Report, list[Sample]]:
    """Return the account of a row alone, and its sample unless it is refused."""
    config = DataConfig(train="rows.jsonl", allow_lost=allow_lost, max_seq_len=100_000)
    samples: list[Sample] = []
    numbered = [Row("rows.jsonl, row 1", written.row)]
    tokenizer = tokenizer_of(family)
    return encode_rows(numbered, tokenizer, config, "rows.jsonl", samples.append), samples


def check(written: Written, family: str) -> None:
    """Encode a row, and look for each of its words."""
    strict, _ = encoded(written, family, None)
    assert strict.faulty.num_rows or set(strict.lost) <= {"thoughts"}, "what is lost is refused"
    report, samples = encoded(written, family, LOSSES)
    if report.faulty.num_rows:
        outcomes(family).append("refused")
        [reason] = report.faulty.reasons
        assert reason in REFUSALS, report.faulty.first_message
        assert report.faulty.first_message.endswith(".")
        return
    outcomes(family).append("lost" if report.lost else "whole")
    [sample] = samples
    tokenizer = tokenizer_of(family)
    shown, learned = tokenizer.decode(sample.input_ids), targets(sample, tokenizer)
    for kind, word, is_learned in written.words:
        assert word in shown or kind in report.lost, f"{word} ({kind}) is neither shown nor lost"
        assert (word in learned) is (word in shown and is_learned), f"{word} ({kind}): the targets"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_word_is_shown_or_counted(family: str) -> None:
    """Each word of a row is in the text, or a loss of its kind is counted, or the row is refused.

    Each word of the assistant that is in the text is a target, and no other's. Without
    `data.allow_lost` nothing but thoughts is lost. Rows are made at random, the same ones each
    time.
    """

    @settings(
        derandomize=True,
        max_examples=100,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(rows())
    def holds(written: Written) -> None:
        check(written, family)

    outcomes(family).clear()
    holds()
    assert outcomes(family).count("refused") < len(outcomes(family)), "some rows are accepted"
