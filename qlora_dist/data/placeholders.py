"""Conversations in which marks take the place of what is said, to see what a chat template does with each part."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from qlora_dist.data.formats import Conversation

MARK = re.compile(r"(zQ\d{5}Qz)")
"""Nine letters and digits, which some templates want ids to be, and no template changes."""


@dataclass(frozen=True)
class MarkedConversation:
    """A conversation in which marks stand for what is said, or after it."""

    content: Conversation
    said: dict[str, str]
    """What each mark stands for; nothing for one that stands after it."""
    marks: list[str | None]
    """The last one of each message; None: nothing is said there."""
    words: list[list[str]]
    """The marks within each message's `content`, where they stand for what is said there."""
    shape: str = ""
    """All but what the marks stand for."""

    def other(self, index: int) -> list[str]:
        """Marks at the ends of other messages than this one."""
        return [mark for number, mark in enumerate(self.marks) if mark and number != index]


_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""Where conversations have thoughts besides in `content`."""
_TAG = re.compile(r"(</?think>)")
"""Templates look for these in `content` to cut thoughts out, so they stay what they are."""
OPEN_THOUGHTS = re.compile(r"(</?think>\s*)+$")
"""At the end of a generation prompt."""


class _Marks:
    """Those of one conversation, and what each stands for."""

    def __init__(self) -> None:
        self.said: dict[str, str] = {}
        self._ids: dict[str, str] = {}

    def new(self, said: str) -> str:
        mark = f"zQ{len(self.said):05d}Qz"
        self.said[mark] = said
        return mark

    def of_id(self, said: str) -> str:
        """The same mark for the same id: answers of tools refer to calls."""
        if said not in self._ids:
            self._ids[said] = self.new(said)
        return self._ids[said]

    def of_text(self, said: str) -> str:
        """Text with marks instead of all that is not a tag or white space."""
        if "</think>" not in said:
            return self.new(said) if said.strip() else said
        return "".join(
            part if number % 2 or not part.strip() else self.new(part)
            for number, part in enumerate(_TAG.split(said))
        )

    def of_values(self, value: Any) -> Any:
        """Data with marks instead of all texts."""
        if isinstance(value, str):
            return self.of_text(value)
        if isinstance(value, dict):
            return {name: self.of_values(item) for name, item in value.items()}
        return [self.of_values(item) for item in value] if isinstance(value, list) else value


def mark_conversation(content: Conversation) -> MarkedConversation:
    """The conversation with a mark instead of each text."""
    marks = _Marks()
    messages, ends, words = [], [], []
    for message in content.messages:
        first = len(marks.said)
        sketched = {**message, "content": marks.of_text(message["content"])}
        own = list(marks.said)[first:]
        for name in _THOUGHTS:
            if isinstance(message.get(name), str):
                sketched[name] = marks.of_text(message[name])
        if isinstance(message.get("tool_call_id"), str):
            sketched["tool_call_id"] = marks.of_id(message["tool_call_id"])
        end = own[-1] if own and sketched["content"].rstrip().endswith(own[-1]) else None
        if "tool_calls" in message:
            calls = [_marked_call(call, marks) for call in message["tool_calls"]]
            sketched["tool_calls"], end = _with_last_name_marked(calls, marks)
        messages.append(sketched)
        ends.append(end)
        words.append(own)
    shape = json.dumps([messages, content.tools, content.num_given], default=repr)
    sketched_content = Conversation(messages, content.tools, content.num_given)
    return MarkedConversation(sketched_content, marks.said, ends, words, shape)


def _marked_call(call: dict[str, Any], marks: _Marks) -> dict[str, Any]:
    ids = {"id": marks.of_id(call["id"])} if isinstance(call.get("id"), str) else {}
    function = call["function"]
    return {
        **call,
        **ids,
        "function": {**function, "arguments": marks.of_values(function["arguments"])},
    }


def _with_last_name_marked(
    calls: list[dict[str, Any]], marks: _Marks
) -> tuple[list[dict[str, Any]], str]:
    """A turn ends soon after its last call, whose name is always there and always text."""
    mark = marks.new("")
    last = calls[-1]
    return [
        *calls[:-1],
        {**last, "function": {**last["function"], "name": last["function"]["name"] + mark}},
    ], mark


def marked(content: Conversation) -> MarkedConversation:
    """The conversation as it is, with a mark after each message."""
    marks = _Marks()
    messages, ends = [], []
    for message in content.messages:
        said, end = dict(message), None
        if "tool_calls" in message:
            said["tool_calls"], end = _with_last_name_marked(message["tool_calls"], marks)
        elif text := message["content"].rstrip():
            end = marks.new("")
            said["content"] = text + end + message["content"][len(text) :]
        messages.append(said)
        ends.append(end)
    return MarkedConversation(
        Conversation(messages, content.tools, content.num_given),
        marks.said,
        ends,
        [[] for _ in messages],
    )


def unmarked(content: Conversation) -> MarkedConversation:
    """The conversation as it is."""
    return MarkedConversation(
        content, {}, [None for _ in content.messages], [[] for _ in content.messages]
    )
