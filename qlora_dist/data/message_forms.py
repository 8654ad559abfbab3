"""Forms in which chat templates take messages: tool calls, names of roles, and places."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from qlora_dist.data.messages import TOOL_ROLES

SIMILAR_ROLES = {
    "developer": ("system",),
    **{role: tuple(name for name in TOOL_ROLES if name != role) for role in TOOL_ROLES},
}
"""Roles that a template need not know, and the roles that may stand for them."""


@dataclass(frozen=True)
class CallForm:
    """Form of an assistant's message with tool calls."""

    has_text_arguments: bool = False
    """Arguments are JSON text instead of an object."""
    has_null_content: bool = False
    """A `content` without text is null instead of an empty text."""

    def applied_to(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return a message in this form; others than those with tool calls stay as they are."""
        if "tool_calls" not in message or self == CALL_FORMS[0]:
            return message
        calls, content = message["tool_calls"], message["content"]
        if self.has_text_arguments:
            calls = list(map(_with_text_arguments, calls))
        if self.has_null_content and not content.strip():
            content = None
        return {**message, "content": content, "tool_calls": calls}

    def __str__(self) -> str:
        """Return the form in words, to follow "the chat template takes"."""
        parts = ["the arguments of tool calls as JSON text"] * self.has_text_arguments
        parts += ["an empty `content` beside tool calls as null"] * self.has_null_content
        return " and ".join(parts)


CALL_FORMS = tuple(CallForm(text, null) for null in (False, True) for text in (False, True))
"""Forms in the order in which they are tried; the first one is the usual one."""


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


def conversations_with(said: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Return conversations with a message as the first, as an answer, and as a tool's answer."""
    function = {"name": "zQnameQz", "arguments": {"a": "zQvalueQz"}}
    call = {"id": "zQ00000Qz", "type": "function", "function": function}
    asked = {"role": "user", "content": "zQaskedQz"}
    calling: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [call]}
    answering = {"tool_call_id": "zQ00000Qz", "name": "zQnameQz", **said}
    return [[said, asked], [asked, said], [asked, calling, answering]]
