"""Conversations of rows: messages, calls and tools, checked and brought into one form."""

# Tested by tests/unit/data/test_formats.py and tests/unit/data/test_lost_parts.py.

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

PromptLayout = Literal["messages", "prompt_completion", "text"]
"""Ways to show rows to the model: by its chat template, or as text with or without a prompt."""

EVERY_TEMPLATES_ROLES = frozenset(["system", "user", "assistant"])
TOOL_ROLES = ("tool", "ipython", "observation", "function", "tool_response", "tool_results")
"""Names that templates and data give the role of a tool's answer; the usual one first."""
_USUAL_ROLES = ("system", "user", "assistant", "developer", *TOOL_ROLES)
"""Roles that are read under any template; others only where the template knows them."""
_TEXT_PARTS = ("text", "input_text", "output_text")
_TEXT_KEYS = ("text", "value", "content")
_BESIDE_TEXT = frozenset(["index", "id", "cache_control", "annotations", "citations", "logprobs"])
"""Keys of parts that say nothing to a model."""
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys of thoughts, any of which templates may read."""
_KNOWN_KEYS = frozenset(
    ["role", "content", "tool_calls", "tool_call_id", "name", "function_call", *THOUGHTS]
)
"""Keys of messages that are read here or by many templates."""
_CALL_KEYS = frozenset(
    ["function", "name", "arguments", "id", "type", "index", "description", "strict"]
)
"""Keys of tool calls and their functions that are read, or say nothing of the call itself."""
_MARKS = ("weight", "train", "training", "trainable", "loss", "loss_weight", "loss_mask")
"""Keys by which data tell whether a turn is learned (1, true) or not (0, false)."""
_OTHER_MARKS = ("mask", "train_detail", "training_detail")
"""Keys of which one value has several meanings, or a meaning for parts of a turn."""
_ALL_MARKS = frozenset([*_MARKS, "masked", *_OTHER_MARKS])
# Also with Python's quotes, which are no JSON and so refused.
_MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*(['"])(role|content)\1\s*:""")
NOTHING: tuple[Any, ...] = (None, "", [], {})
"""Values that say nothing."""


class RowFault(Exception):
    """A row that cannot be used: a short `reason`, by which rows are counted, and the message."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates want them, each with a role and a text `content`."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    """Descriptions of the functions that the assistant may call, as JSON schemas."""
    num_given: int = 0
    """Messages at the start that are a prompt: no turn among them is a target."""
    muted: frozenset[int] = frozenset()
    """Indices of assistant turns that are marked not to be learned: they are context."""
    unread: Mapping[str, int] = field(default_factory=dict)
    """Keys of messages with a value that neither this program nor templates in general know, each
    with the index of the first message that has it."""
    renamed: frozenset[tuple[str, str]] = frozenset()
    """Roles that the chat template does not know, each with the role that stands for it."""
    layout: ClassVar[PromptLayout] = "messages"

    def is_target(self, index: int) -> bool:
        """True if a message is an assistant's turn to learn."""
        is_context = index < self.num_given or index in self.muted
        return self.messages[index]["role"] == "assistant" and not is_context

    @property
    def num_chars(self) -> int:
        """Characters of the messages' contents, without what the template adds."""
        return sum(len(message["content"]) for message in self.messages)


# -- Conversations.


def read_conversation(messages: Any, row: Mapping[str, Any], column: str) -> Conversation:
    messages = list_of(messages, f"`{column}`")
    if not isinstance(messages, list) or not messages:
        raise RowFault(
            "empty row",
            f"`{column}` is {messages!r:.80}, but must be a list of role and content pairs.",
        )
    checked = [_checked(message, number) for number, message in enumerate(messages, start=1)]
    muted = frozenset(
        index
        for index, message in enumerate(checked)
        if _is_muted(message, index + 1) and message["role"] == "assistant"
    )
    unread = _unread(checked)
    roles = [message["role"] for message in checked]
    for number, (before, role) in enumerate(zip(["nobody", *roles], roles, strict=False), start=1):
        if role in TOOL_ROLES and before not in ("assistant", *TOOL_ROLES):
            raise RowFault(
                "tool turn that nothing called",
                f"message {number} has the role {role}, but comes after {before}: a tool answers "
                "an assistant's call. Put the call before it, or remove it.",
            )
    for number, role in enumerate(roles, start=1):
        if "assistant" not in roles and role not in _USUAL_ROLES:
            raise unknown_role(role, number)
    if "assistant" not in roles:
        raise RowFault(
            "no assistant turn",
            f"no assistant turn (its roles: {', '.join(roles)}), so there is nothing to learn from "
            "it. Add the answer, or remove the row.",
        )
    if all(index in muted for index, role in enumerate(roles) if role == "assistant"):
        raise RowFault(
            "no assistant turn to learn",
            "every assistant turn is marked not to be learned (such as weight: 0). Remove the row, "
            "or a mark.",
        )
    return Conversation(checked, _tools(row), muted=muted, unread=unread)


def _unread(messages: list[dict[str, Any]]) -> dict[str, int]:
    """Return the keys of messages that are not known, each with the first index."""
    unread: dict[str, int] = {}
    for index, message in enumerate(messages):
        for key in message.keys() - _KNOWN_KEYS:
            if message[key] not in NOTHING:
                unread.setdefault(key, index)
        # Templates that leave out the name of a tool show its answer beside its call.
        if "name" in message and message["role"] not in TOOL_ROLES and message["name"]:
            unread.setdefault("name", index)
    return unread


def unknown_role(role: object, number: int) -> RowFault:
    """Return the fault of a message whose role nothing knows."""
    return RowFault(
        "unknown role",
        f"message {number} has the role {role!r}, which the chat template does not know. Use one "
        f"of {', '.join(_USUAL_ROLES)}, or a template that knows it (data.chat_template).",
    )


def refused_by_template(messages: list[dict[str, Any]], error: Exception) -> RowFault:
    """Return the fault of a conversation that a template refuses."""
    roles = [message["role"] for message in messages]
    remedy = "Change the row, or choose another template with data.chat_template."
    if next((role for role in roles if role not in ("system", "developer")), "") == "assistant":
        remedy = (
            "It starts with an assistant turn, which nothing asked for: put a user turn before it, "
            "remove it, or choose another template with data.chat_template."
        )
    reason = str(error) or type(error).__name__
    reason += "" if reason.endswith((".", "!", "?")) else "."
    return RowFault(
        "refused by the chat template",
        f"the model's chat template refuses this conversation ({', '.join(roles)}): {reason} "
        f"{remedy}",
    )


def _checked(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _without_content(message, number)
    role = message.get("role")
    if not isinstance(role, str):
        raise unknown_role(role, number)
    # Tables give every message all names; templates test some of them for existence.
    checked = {name: value for name, value in message.items() if value is not None}
    # OpenAI's older form: one call, beside or instead of the list.
    if older := checked.pop("function_call", None):
        checked["tool_calls"] = [*_listed(checked.get("tool_calls")), older]
    if checked.get("tool_calls"):
        checked["tool_calls"] = _calls(checked["tool_calls"], number)
    else:
        checked.pop("tool_calls", None)
    for key in THOUGHTS:
        thoughts = checked.get(key, "")
        if isinstance(thoughts, str):
            continue
        if thoughts in NOTHING:
            del checked[key]
        else:
            raise RowFault(
                f"`{key}` is no text",
                f"message {number} has {key}: {thoughts!r:.80}, but thoughts must be text. Write "
                "them as one text, or remove the key.",
            )
    content = checked.get("content", "" if "tool_calls" in checked else None)
    if isinstance(content, list):
        content = "".join(_text_of_part(part, number) for part in content if part is not None)
    if not isinstance(content, str) and role not in _USUAL_ROLES:
        raise unknown_role(role, number)
    if not isinstance(content, str):
        raise _without_content(message, number, " or `tool_calls`" if role == "assistant" else "")
    return {**checked, "content": content}


def unopened_thoughts(content: Conversation) -> int | None:
    """Return the number of the first answer that ends thoughts which it does not begin."""
    for number, message in enumerate(content.messages, start=1):
        content_text = message["content"]
        # Most answers have no tag: a look for it is quicker than a cut.
        if "</think>" in content_text and message["role"] == "assistant":
            before = content_text.partition("</think>")[0]
            if "<think>" not in before:
                return number
    return None


def _is_muted(message: dict[str, Any], number: int) -> bool:
    """Take the marks of learning from a message; true if it is not to be learned."""
    muted = False
    if _ALL_MARKS.isdisjoint(message):
        return False
    for key in (*_MARKS, "masked"):
        value = message.pop(key, None)
        if value is not None and value not in (0, 1):
            raise RowFault(
                f"`{key}` is not 0 or 1",
                f"message {number} has {key}: {value!r:.40}, but a turn is learned (1, true) or "
                "not (0, false). Turns of other weights cannot be trained: remove the key.",
            )
        muted = muted or value == (key == "masked")
    for key in _OTHER_MARKS:
        if message["role"] == "assistant" and message.get(key) not in NOTHING:
            raise RowFault(
                f"mark `{key}`",
                f"message {number} has {key}: {message[key]!r:.40}, which may tell what of the "
                "turn is learned, but is not read. Write weight: 0 for a turn that is not to be "
                "learned, else remove the key.",
            )
    return muted


def _text_of_part(part: Any, number: int) -> str:
    """Return the text of a part of a message's `content`, which is a list of them."""
    if isinstance(part, str):
        return part
    # Tables fill with None the keys of other parts.
    said = {k: v for k, v in part.items() if v not in NOTHING} if isinstance(part, Mapping) else {}
    kind = said.pop("type", "text")
    texts = [said.pop(key) for key in _TEXT_KEYS if key in said]
    if isinstance(part, Mapping) and kind in _TEXT_PARTS and not said.keys() - _BESIDE_TEXT:
        if not texts:
            return ""
        if len(texts) == 1 and isinstance(texts[0], str):
            return texts[0]
    raise RowFault(
        "part of `content` that is no text",
        f"message {number} has the part {part!r:.80}"
        f"{f' of type {kind!r}' if isinstance(kind, str) else ''} in its `content`, but only a "
        "part that is one text, under `text`, can be learned. Change or remove the part, or remove "
        "the row.",
    )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def list_of(value: Any, label: str) -> Any:
    """Return the list that JSON text holds; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        return from_json(value, list, label, "a list")
    return value


def prompt_and_completion(row: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return both columns; if both are JSON text of messages, as CSV has them, the messages.

    Raises:
        RowFault: such text is broken.
    """
    pair = row.get("prompt"), row.get("completion")
    # Text may begin with a bracket, or one of both speak of messages.
    if all(isinstance(value, str) and _MESSAGES_AS_TEXT.match(value) for value in pair):
        return list_of(pair[0], "`prompt`"), list_of(pair[1], "`completion`")
    return pair


def _without_none(value: Any) -> Any:
    """Return data without the keys whose value is None, which tables fill in.

    A null that a JSON schema means (`default`, `const`) stays.
    """
    if isinstance(value, Mapping):
        kept = {k: v for k, v in value.items() if v is not None or k in ("default", "const")}
        return {key: _without_none(item) for key, item in kept.items()}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _without_content(message: Any, number: int, instead: str = "") -> RowFault:
    return RowFault(
        "message without `content`",
        f"message {number} is {message!r:.80}, but needs a text `content`{instead}.",
    )


def _calls(calls: Any, number: int) -> list[dict[str, Any]]:
    """Return tool calls, each with a function's name and its arguments as an object."""
    checked = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowFault(
                "tool call without a name",
                f"message {number} calls {call!r:.80}, but a call needs the name of a function and "
                "its arguments.",
            )
        _check_call_keys({**call, **function}, number)
        name, arguments = function["name"], function.get("arguments", {})
        # OpenAI writes arguments as JSON text, which templates would quote once more.
        if isinstance(arguments, str):
            label = f"message {number}, arguments of {name}"
            arguments = from_json(arguments or "{}", dict, label)
        elif isinstance(arguments, Mapping):
            arguments = _without_none(arguments)
        elif arguments is None:
            arguments = {}
        else:
            raise RowFault(
                "broken tool call",
                f"message {number}, arguments of {name} are {arguments!r:.80}, but must be an "
                "object with a name for each, or its JSON text.",
            )
        # `name` and `arguments` stand here if the call is written without `function`.
        rest = {k: v for k, v in call.items() if k not in ("name", "arguments") and v is not None}
        function = {"name": name, "arguments": arguments}
        checked.append({**rest, "type": "function", "function": function})
    return checked


def _check_call_keys(call: Mapping[str, Any], number: int) -> None:
    """Refuse a tool call that says more than is read, such as arguments under another name.

    Raises:
        RowFault: with the key.
    """
    for key, value in call.items():
        if key not in _CALL_KEYS and value not in NOTHING:
            raise RowFault(
                f"tool call with `{key:.40}`",
                f"message {number} calls {call.get('name')!r:.40} with the key `{key:.40}`, which "
                "is not read. Arguments stand under `arguments`, and a result in a turn of the "
                "role tool: rename or move it, or remove it.",
            )


def _tools(row: Mapping[str, Any]) -> list[Any] | None:
    tools = row.get("tools")
    # Tables cannot hold lists of differing schemas well, so many data sets write JSON text.
    if isinstance(tools, str) and tools.strip():
        tools = from_json(tools, list, "`tools`")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowFault(
            "`tools` is no list",
            f"`tools` is {tools!r:.80}, but must be a list of function descriptions.",
        )
    filled: list[Any] = _without_none(tools)
    return filled


def from_json(text: Any, kind: type, label: str, what: str = "a tool call") -> Any:
    """Return the list or the dict that JSON text holds, or that is given as it is.

    A dict where a list is due is wrapped.
    """
    try:
        value = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        value = None
    if kind is list and isinstance(value, dict):
        value = [value]
    if not isinstance(value, kind):
        raise RowFault(
            f"broken {what.partition(' ')[2]}",
            f"{label} is {text!r:.80}, but must be the JSON text of {what}.",
        )
    return value
