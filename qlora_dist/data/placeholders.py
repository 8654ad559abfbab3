"""Conversations with marks in place of words, which show where a chat template puts each part."""

# Tested by tests/unit/data/test_chat_template.py.

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from qlora_dist.data.messages import Conversation

# Nine letters and digits: some templates want ids of that form, and no template changes it.
MARK = re.compile(r"(zQ\d{5}Qz)")


LostKind = Literal["text", "thoughts", "tool_calls", "tools"]
"""Kinds of parts that a template may leave out."""


@dataclass(frozen=True)
class MarkedConversation:
    """A conversation in which marks stand for its words, or follow them."""

    content: Conversation
    said: dict[str, str]
    """Words that each mark stands for; empty for a mark that follows them."""
    marks: list[str | None]
    """The last mark of each message; None: the message has no words."""
    words: list[list[str]]
    """The marks that stand for words of each message's `content`."""
    shape: str = ""
    """The conversation but for the words that marks stand for."""

    def other(self, index: int) -> list[str]:
        """Return the last marks of all messages but this one."""
        return [mark for number, mark in enumerate(self.marks) if mark and number != index]


# Fields of messages with thoughts, which may stand in `content`, too.
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
# Templates search `content` for these to cut thoughts out, so no mark replaces them.
_TAG = re.compile(r"(</?think>)")
OPEN_THOUGHTS = re.compile(r"(</?think>\s*)+$")
"""Tags at the end of a generation prompt."""


class _Marks:
    """The marks of one conversation, and the words that each stands for."""

    def __init__(self) -> None:
        self.said: dict[str, str] = {}
        self._ids: dict[str, str] = {}

    def new(self, said: str) -> str:
        mark = f"zQ{len(self.said):05d}Qz"
        self.said[mark] = said
        return mark

    def of_id(self, said: str) -> str:
        """Return an id's mark, always the same: a tool's answer refers to its call by the id."""
        if said not in self._ids:
            self._ids[said] = self.new(said)
        return self._ids[said]

    def of_text(self, said: str) -> str:
        """Return a text with marks instead of all that is not a tag or white space."""
        # Without a closing tag, templates do not look for thoughts.
        parts = _TAG.split(said) if "</think>" in said else [said]
        return "".join(  # every second part is a tag
            part if number % 2 or not part.strip() else self.new(part)
            for number, part in enumerate(parts)
        )

    def of_values(self, value: Any) -> Any:
        """Return data with marks instead of all texts."""
        if isinstance(value, str):
            return self.of_text(value)
        if isinstance(value, dict):
            return {name: self.of_values(item) for name, item in value.items()}
        return [self.of_values(item) for item in value] if isinstance(value, list) else value

    def of_call(self, call: dict[str, Any]) -> dict[str, Any]:
        """Return a tool call with marks instead of its id and the texts of its arguments."""
        ids = {"id": self.of_id(call["id"])} if isinstance(call.get("id"), str) else {}
        arguments = self.of_values(call["function"]["arguments"])
        return {**call, **ids, "function": {**call["function"], "arguments": arguments}}

    def of_tool(self, tool: Any) -> Any:
        """Return the description of a tool with a mark after its name."""
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return tool
        marked_function = {**function, "name": function["name"] + self.new("")}
        return {**tool, "function": marked_function} if "function" in tool else marked_function

    def after_last_name(self, calls: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
        """Return tool calls with a mark after the last function's name, and the mark."""
        # A turn ends soon after its last call, whose name is always there and always text.
        mark = self.new("")
        *others, last = calls
        function = {**last["function"], "name": last["function"]["name"] + mark}
        return [*others, {**last, "function": function}], mark


def mark_conversation(content: Conversation) -> MarkedConversation:
    """Return the conversation with a mark instead of each text."""
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
            calls = list(map(marks.of_call, message["tool_calls"]))
            sketched["tool_calls"], end = marks.after_last_name(calls)
        messages.append(sketched)
        ends.append(end)
        words.append(own)
    muted = sorted(content.muted)
    shape = json.dumps([messages, content.tools, content.num_given, muted], default=repr)
    sketch = replace(content, messages=messages)
    return MarkedConversation(sketch, marks.said, ends, words, shape)


def marked(content: Conversation) -> MarkedConversation:
    """Return the conversation as it is, with a mark after each message."""
    marks = _Marks()
    messages, ends = [], []
    for message in content.messages:
        said, end = dict(message), None
        if "tool_calls" in message:
            said["tool_calls"], end = marks.after_last_name(message["tool_calls"])
        elif text := message["content"].rstrip():
            end = marks.new("")
            said["content"] = text + end + message["content"][len(text) :]
        messages.append(said)
        ends.append(end)
    sketch = replace(content, messages=messages)
    return MarkedConversation(sketch, marks.said, ends, [[] for _ in messages])


def unmarked(content: Conversation) -> MarkedConversation:
    """Return the conversation as it is."""
    num = len(content.messages)
    return MarkedConversation(content, {}, [None] * num, [[] for _ in range(num)])


def probe_of(content: Conversation) -> tuple[Conversation, dict[str, tuple[LostKind, int]]]:
    """Return a conversation with a mark in or after each of its parts, and the part of each mark.

    A part whose mark is not in the rendered text is left out by the template: text of a message, a
    thought, a tool call or its arguments, or a tool of the list.

    Returns:
        the conversation, and (kind of the part, number of its message from 1; 0 for tools).
    """
    marks = _Marks()
    parts: dict[str, tuple[LostKind, int]] = {}
    messages = []

    def note(kind: LostKind, number: int) -> None:
        for mark in list(marks.said)[len(parts) :]:
            parts[mark] = kind, number

    for number, message in enumerate(content.messages, start=1):
        marked_message = {**message, "content": marks.of_text(message["content"])}
        note("text", number)
        if "</think>" in message["content"]:
            # Thoughts may be written into the content: everything before the tag that ends them.
            before = marked_message["content"].rpartition("</think>")[0]
            for mark in MARK.findall(before):
                parts[mark] = "thoughts", number
        for name in _THOUGHTS:
            if isinstance(message.get(name), str):
                marked_message[name] = marks.of_text(message[name])
        note("thoughts", number)
        if "tool_calls" in message:
            calls = []
            for call in message["tool_calls"]:
                function = call["function"]
                arguments = marks.of_values(function["arguments"])
                name = function["name"] + marks.new("")
                calls.append(
                    {**call, "function": {**function, "name": name, "arguments": arguments}}
                )
            marked_message["tool_calls"] = calls
        note("tool_calls", number)
        messages.append(marked_message)
    tools = content.tools and [marks.of_tool(tool) for tool in content.tools]
    note("tools", 0)
    return replace(content, messages=messages, tools=tools), parts
