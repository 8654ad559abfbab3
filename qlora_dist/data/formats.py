"""Rows in one of the common formats, read as a conversation or as plain text."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, ClassVar, Literal

from qlora_dist.data.sources import Row
from qlora_dist.errors import DataError

Format = Literal["messages", "sharegpt", "prompt_completion", "alpaca", "text"]
"""Ways to write rows, told apart by their columns."""
PromptLayout = Literal["messages", "prompt_completion", "text"]
"""Ways to show rows to the model: by its chat template, or as text with or without a prompt."""

ROLES = ("system", "user", "assistant", "tool", "developer")
OTHER_ROLES = {"function": "tool", "ipython": "tool", "observation": "tool"}
"""Names that other programs give the roles of `messages`."""

COLUMNS: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
"""Columns by which a format is recognized; the first match wins.

What is surely a conversation comes before what may be only its parts or its text.
"""

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bing": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "function_response": "tool",
    "observation": "tool",
    "function_call": "assistant",
    "developer": "developer",
}


_SHAREGPT_KEYS = ("from", "role", "value", "content")
_TEXT_PARTS = ("text", "input_text", "output_text")
_KNOWN_KEYS = frozenset(
    [
        "role",
        "content",
        "tool_calls",
        "tool_call_id",
        "name",
        "function_call",
        "weight",
        "train",
        "reasoning_content",
        "reasoning",
        "thinking",
    ]
)
"""Keys of messages that are read here or by many templates."""


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
    unread: frozenset[str] = frozenset()
    """Keys of messages with a value that neither this program nor templates in general know."""
    layout: ClassVar[PromptLayout] = "messages"

    def is_target(self, index: int) -> bool:
        """True if a message is an assistant's turn to learn."""
        is_context = index < self.num_given or index in self.muted
        return self.messages[index]["role"] == "assistant" and not is_context

    @property
    def num_chars(self) -> int:
        """Characters of the messages' contents, without what the template adds."""
        return sum(len(message["content"]) for message in self.messages)


@dataclass(frozen=True)
class PlainText:
    """Text that goes to the model as it stands."""

    text: str
    prompt: str = ""
    """Text before it that is no target."""

    @property
    def layout(self) -> PromptLayout:
        return "prompt_completion" if self.prompt else "text"

    @property
    def num_chars(self) -> int:
        """Characters of the prompt and the text."""
        return len(self.prompt) + len(self.text)


def format_of(columns: Iterable[str]) -> Format | None:
    """Return the first format all of whose columns are among `columns`."""
    there = set(columns)
    return next((format for format, needed in COLUMNS.items() if there.issuperset(needed)), None)


def read_row(row: Mapping[str, Any], format: Format) -> Conversation | PlainText:
    """Return the conversation or the text that a row of that format holds.

    Raises:
        RowFault: a column is missing, a value has the wrong type, nothing is said, or the roles are
            out of order.
    """
    missing = [column for column in COLUMNS[format] if column not in row]
    if not missing:
        return _READERS[format](row)
    other = format_of(row)
    if other is not None and other != format:
        raise RowFault(
            f"{other} row",
            f"this row is in the {other} format, the file in the {format} format. Split the file "
            "by format.",
        )
    raise RowFault(
        f"no `{missing[0]}`",
        f"no column `{missing[0]}` (the row has {listed(row)}), which data.format: {format} needs.",
    )


# -- A reader for each format.


def _sharegpt(row: Mapping[str, Any]) -> Conversation:
    turns = _listed_as_text(row["conversations"], "`conversations`")
    if not isinstance(turns, list) or not turns:
        raise RowFault(
            "empty row",
            f"`conversations` is {turns!r:.80}, but must be a list of from and value pairs.",
        )
    messages = [_of_sharegpt(turn, number) for number, turn in enumerate(turns, start=1)]
    return _conversation(_with_system(row, messages), row, "conversations")


def _of_sharegpt(turn: Any, number: int) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise RowFault(
            "turn without `from` and `value`",
            f"turn {number} is {turn!r:.80}, but needs from and value.",
        )
    # Some data sets of that name have `role` and `content` in the column `conversations`.
    speaker, said = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise RowFault(
            "unknown speaker",
            f"turn {number} is from {speaker!r}, but a turn is from one of "
            f"{', '.join(_SHAREGPT_ROLES)}.",
        )
    rest = {key: value for key, value in turn.items() if key not in _SHAREGPT_KEYS}
    if speaker == "function_call":  # the value holds the calls, as JSON text or as they are
        calls = _from_json(said, list, f"turn {number}")
        if isinstance(said, str):  # a null that is written out is meant
            calls = [_as_written(call) for call in calls]
        return {**rest, "role": role, "content": "", "tool_calls": calls}
    return {**rest, "role": role, "content": said}


def _as_written(call: Any) -> Any:
    """Return a call that was JSON text with its arguments as text, which stay as they are."""
    if isinstance(call, Mapping) and isinstance(call.get("arguments"), Mapping):
        return {**call, "arguments": json.dumps(call["arguments"])}
    return call


def _alpaca(row: Mapping[str, Any]) -> Conversation:
    instruction, output = _text(row, "instruction"), _text(row, "output")
    context = row.get("input")
    if context is not None and not isinstance(context, str):
        raise RowFault(
            "`input` is no text", f"`input` is {context!r:.80}, but must be text, or left out."
        )
    asked = f"{instruction}\n\n{context}" if context else instruction
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": output}]
    return _conversation(_with_system(row, turns), row, "instruction")


def _prompt_completion(row: Mapping[str, Any]) -> Conversation | PlainText:
    prompt, completion = row["prompt"], row["completion"]
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        return PlainText(_text(row, "completion"), prompt=_text(row, "prompt"))
    conversation = _conversation([*prompt, *completion], row, "prompt")
    if not any(message["role"] == "assistant" for message in conversation.messages[len(prompt) :]):
        raise RowFault(
            "no assistant turn",
            "no assistant turn in `completion`, so there is nothing to learn from it.",
        )
    return replace(conversation, num_given=len(prompt))


_READERS: dict[Format, Callable[[Mapping[str, Any]], Conversation | PlainText]] = {
    "messages": lambda row: _conversation(row["messages"], row, "messages"),
    "sharegpt": _sharegpt,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "text": lambda row: PlainText(_text(row, "text")),
}


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if isinstance(value, str) and value.strip():
        return value
    is_empty = value is None or value == [] or isinstance(value, str)
    raise RowFault(
        f"`{column}` {'is empty' if is_empty else 'is no text'}",
        f"`{column}` is {value!r:.80}, but must be text that is not empty.",
    )


def _with_system(row: Mapping[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages, after a system message of the row's `system` column if it has text."""
    system = row.get("system")
    if system is None or system == "":
        return messages
    return [{"role": "system", "content": system}, *messages]


# -- Conversations.


def _conversation(messages: Any, row: Mapping[str, Any], column: str) -> Conversation:
    messages = _listed_as_text(messages, f"`{column}`")
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
    unread = frozenset(chain(*checked)) - _KNOWN_KEYS
    roles = [message["role"] for message in checked]
    if next((role for role in roles if role not in ("system", "developer")), "") == "assistant":
        raise RowFault(
            "starts with an assistant turn",
            "the conversation starts with an assistant turn, which nothing asked for. Put a user "
            "turn before it, or remove it.",
        )
    for number, (before, role) in enumerate(zip(["nobody", *roles], roles, strict=False), start=1):
        if role == "tool" and before not in ("assistant", "tool"):
            raise RowFault(
                "tool turn that nothing called",
                f"message {number} has the role tool, but comes after {before}: a tool answers an "
                "assistant's call.",
            )
    if "assistant" not in roles:
        raise RowFault(
            "no assistant turn",
            f"no assistant turn (its roles: {', '.join(roles)}), so there is nothing to learn from "
            "it. Add the answer, or remove the row.",
        )
    if all(index in muted for index, role in enumerate(roles) if role == "assistant"):
        raise RowFault(
            "no assistant turn to learn",
            "every assistant turn is marked not to be learned (weight: 0 or train: false). Remove "
            "the row, or a mark.",
        )
    return Conversation(checked, _tools(row), muted=muted, unread=unread)


def _checked(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _without_content(message, number)
    role = message.get("role")
    role = OTHER_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise RowFault(
            "unknown role",
            f"message {number} has the role {role!r}, but a role is one of {', '.join(ROLES)} "
            f"(also read are {', '.join(OTHER_ROLES)}).",
        )
    # Tables give every message all names; templates test some of them for existence.
    checked = {name: value for name, value in message.items() if value is not None}
    checked["role"] = role
    # OpenAI's older form: one call, beside or instead of the list.
    if older := checked.pop("function_call", None):
        checked["tool_calls"] = [*_listed(checked.get("tool_calls")), older]
    if checked.get("tool_calls"):
        checked["tool_calls"] = _calls(checked["tool_calls"], number)
    else:
        checked.pop("tool_calls", None)
    content = checked.get("content", "" if "tool_calls" in checked else None)
    if isinstance(content, list):
        content = "".join(_text_of_part(part, number) for part in content if part is not None)
    if not isinstance(content, str):
        raise _without_content(message, number, " or `tool_calls`" if role == "assistant" else "")
    return {**checked, "content": content}


def _is_muted(message: dict[str, Any], number: int) -> bool:
    """Take the marks `weight` and `train` from a message; true if it is not to be learned."""
    muted = False
    for key in ("weight", "train"):
        value = message.pop(key, None)
        if value is not None and value not in (0, 1):
            raise RowFault(
                f"`{key}` is not 0 or 1",
                f"message {number} has {key}: {value!r:.40}, but a turn is learned (1, true) or "
                "not (0, false). Turns of other weights cannot be trained: remove the key.",
            )
        muted = muted or value == 0
    return muted


def _text_of_part(part: Any, number: int) -> str:
    """Return the text of a part of a message's `content`, which is a list of them."""
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type", "text") in _TEXT_PARTS:
        # Tables fill with None the keys of other parts.
        texts = [part[key] for key in ("text", "value", "content") if part.get(key) is not None]
        if not texts:
            return ""
        if isinstance(texts[0], str):
            return texts[0]
    kind = part.get("type") if isinstance(part, Mapping) else None
    raise RowFault(
        "part of `content` that is no text",
        f"message {number} has the part {part!r:.80}"
        f"{f' of type {kind!r}' if isinstance(kind, str) else ''} in its `content`, but only text "
        "can be learned. Remove the part, or the row.",
    )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _listed_as_text(value: Any, label: str) -> Any:
    """Return the list that JSON text holds; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        return _from_json(value, list, label, "a list")
    return value


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
        name, arguments = function["name"], function.get("arguments", {})
        # OpenAI writes arguments as JSON text, which templates would quote once more.
        if isinstance(arguments, str):
            label = f"message {number}, arguments of {name}"
            arguments = _from_json(arguments or "{}", dict, label)
        elif isinstance(arguments, Mapping):
            arguments = _without_none(arguments)
        elif arguments is None:
            arguments = {}
        # `name` and `arguments` stand here if the call is written without `function`.
        rest = {k: v for k, v in call.items() if k not in ("name", "arguments") and v is not None}
        function = {"name": name, "arguments": arguments}
        checked.append({**rest, "type": "function", "function": function})
    return checked


def _tools(row: Mapping[str, Any]) -> list[Any] | None:
    tools = row.get("tools")
    # Tables cannot hold lists of differing schemas well, so many data sets write JSON text.
    if isinstance(tools, str) and tools.strip():
        tools = _from_json(tools, list, "`tools`")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowFault(
            "`tools` is no list",
            f"`tools` is {tools!r:.80}, but must be a list of function descriptions.",
        )
    filled: list[Any] = _without_none(tools)
    return filled


def _from_json(text: Any, kind: type, label: str, what: str = "a tool call") -> Any:
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


def listed(columns: Collection[str]) -> str:
    """Return the first ten columns for a message, and their number if there are more."""
    names = ", ".join(f"`{column:.40}`" for column in islice(columns, 10)) or "no columns"
    return names if len(columns) <= 10 else f"{names} and others, {len(columns):,} in all"


# -- The format of a source.

_LOOKED_AT = 100  # rows within which the format must show; the first rows may be faulty


def recognize_format(
    rows: Iterable[Row], asked: Literal["auto"] | Format
) -> tuple[Format, Iterator[Row]]:
    """Return the format of a source, as its first rows show it, and an iterator over all rows.

    Raises:
        DataError: none of the first rows has the columns of a format, or of the format `asked` for.
    """

    def found(columns: Iterable[str]) -> Format | None:
        if asked == "auto":
            return format_of(columns)
        return asked if set(COLUMNS[asked]) <= set(columns) else None

    rest = iter(rows)
    first: list[Row] = []
    for row in islice(rest, _LOOKED_AT):
        first.append(row)
        # A table has every column in each row; those that a row does not use are None.
        if format := found(column for column, value in row.values.items() if value is not None):
            return format, chain(first, rest)
    if format := found(first[0].values):
        return format, chain(first, rest)
    formats = list(COLUMNS) if asked == "auto" else [asked]
    needed = "; or ".join(" and ".join(map("`{}`".format, COLUMNS[f])) for f in formats)
    raise DataError(
        f"{first[0].where} has the columns {listed(first[0].values)}, but data.format: {asked} "
        f"needs {needed}. Rename the columns."
    )
