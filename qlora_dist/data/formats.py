"""What a row says, whichever of the common formats it is written in: a conversation, or plain text."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Literal

from qlora_dist.data.sources import Row
from qlora_dist.errors import DataError

if TYPE_CHECKING:
    pass

Format = Literal["messages", "sharegpt", "prompt_completion", "alpaca", "text"]
"""How rows are written."""
PromptLayout = Literal["messages", "prompt_completion", "text"]
"""How the model sees them: through its chat template, or as plain text with or without a prompt."""

ROLES = ("system", "user", "assistant", "tool")

COLUMNS: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
"""The columns by which a format is recognized, the first match wins: what is surely a conversation comes before what
may be only its parts or its text."""

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
}


class RowFault(Exception):
    """A row that cannot be used: the reason in few words, by which rows are counted, and the message in full."""

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

    @property
    def layout(self) -> PromptLayout:
        return "messages"

    @property
    def num_chars(self) -> int:
        """Of what is said, without what the template adds."""
        return sum(len(message["content"]) for message in self.messages)


@dataclass(frozen=True)
class PlainText:
    """Text that goes to the model as it stands."""

    text: str
    prompt: str = ""
    """What comes before it and is no target."""

    @property
    def layout(self) -> PromptLayout:
        return "prompt_completion" if self.prompt else "text"

    @property
    def num_chars(self) -> int:
        """Of the prompt and the text."""
        return len(self.prompt) + len(self.text)


def format_of(columns: Iterable[str]) -> Format | None:
    """The format whose columns are there."""
    there = set(columns)
    return next((format for format, needed in COLUMNS.items() if there.issuperset(needed)), None)


def read_row(row: Mapping[str, Any], format: Format) -> Conversation | PlainText:
    """What a row of that format says.

    Raises:
        RowFault: a column is missing, a value has the wrong type, nothing is said, or the roles are out of order.
    """
    missing = [column for column in COLUMNS[format] if column not in row]
    if missing:
        other = format_of(row)
        if other is not None and other != format:
            raise RowFault(
                f"{other} row",
                f"this row is in the {other} format, the file in the {format} format. Split the file by format.",
            )
        raise RowFault(
            f"no `{missing[0]}`",
            f"no column `{missing[0]}` (the row has {listed(row)}), which data.format: {format} needs.",
        )
    return _READERS[format](row)


# --------------------------------------------------------------------------------------------------------------------
# One reader for each format.


def _messages(row: Mapping[str, Any]) -> Conversation:
    return _conversation(row["messages"], row, "messages")


def _sharegpt(row: Mapping[str, Any]) -> Conversation:
    """`from` and `value`; some data sets of that name have `role` and `content` in the same column."""
    turns = row["conversations"]
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
    speaker, said = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise RowFault(
            "unknown speaker",
            f"turn {number} is from {speaker!r}, but a turn is from one of {', '.join(_SHAREGPT_ROLES)}.",
        )
    if speaker == "function_call":
        return {"role": role, "content": "", "tool_calls": _from_json(said, list, f"turn {number}")}
    return {"role": role, "content": said, "tool_calls": turn.get("tool_calls")}


def _alpaca(row: Mapping[str, Any]) -> Conversation:
    instruction, output = (_text(row, column) for column in ("instruction", "output"))
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
    return Conversation(conversation.messages, conversation.tools, num_given=len(prompt))


def _plain(row: Mapping[str, Any]) -> PlainText:
    return PlainText(_text(row, "text"))


_READERS: dict[Format, Callable[[Mapping[str, Any]], Conversation | PlainText]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "text": _plain,
}


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        reason = (
            "is empty" if value is None or value == [] or isinstance(value, str) else "is no text"
        )
        raise RowFault(
            f"`{column}` {reason}",
            f"`{column}` is {value!r:.80}, but must be text that is not empty.",
        )
    return value


def _with_system(row: Mapping[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages after the system message of the row's own `system` column, if it has one."""
    system = row.get("system")
    if system is None or system == "":
        return messages
    return [{"role": "system", "content": system}, *messages]


# --------------------------------------------------------------------------------------------------------------------
# Conversations.


def _conversation(messages: Any, row: Mapping[str, Any], column: str) -> Conversation:
    if not isinstance(messages, list) or not messages:
        raise RowFault(
            "empty row",
            f"`{column}` is {messages!r:.80}, but must be a list of role and content pairs.",
        )
    checked = [_checked(message, number) for number, message in enumerate(messages, start=1)]
    roles = [message["role"] for message in checked]
    if roles[0] == "assistant":
        raise RowFault(
            "starts with an assistant turn",
            "the conversation starts with an assistant turn, which nothing asked for. Put a user turn before it, or "
            "remove it.",
        )
    for number, (before, role) in enumerate(zip(["nobody", *roles], roles, strict=False), start=1):
        if role == "tool" and before not in ("assistant", "tool"):
            raise RowFault(
                "tool turn that nothing called",
                f"message {number} has the role tool, but comes after {before}: a tool answers an assistant's call.",
            )
    if "assistant" not in roles:
        raise RowFault(
            "no assistant turn",
            f"no assistant turn (its roles: {', '.join(roles)}), so there is nothing to learn from it. "
            "Add the answer, or remove the row.",
        )
    return Conversation(checked, _tools(row))


def _checked(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RowFault(
            "message without `content`",
            f"message {number} is {message!r:.80}, but needs a text `content`.",
        )
    if message.get("role") not in ROLES:
        raise RowFault(
            "unknown role",
            f"message {number} has the role {message.get('role')!r}, but a role is one of {', '.join(ROLES)}.",
        )
    # Columns that are there for other messages only; templates must not see them.
    checked = {name: value for name, value in message.items() if value is not None}
    if checked.get("tool_calls"):
        checked["tool_calls"] = _calls(checked["tool_calls"], number)
    else:
        checked.pop("tool_calls", None)
    content = checked.get("content", "" if "tool_calls" in checked else None)
    if isinstance(content, list) and all(
        isinstance(part, Mapping) and part.get("type") == "text" for part in content
    ):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise RowFault(
            "message without `content`",
            f"message {number} is {message!r:.80}, but needs a text `content`"
            f"{' or `tool_calls`' if message['role'] == 'assistant' else ''}.",
        )
    return {**checked, "content": content}


def _calls(calls: Any, number: int) -> list[dict[str, Any]]:
    """Tool calls with their arguments as an object: OpenAI writes them as JSON text, which templates would quote."""
    checked = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowFault(
                "tool call without a name",
                f"message {number} calls {call!r:.80}, but a call needs the name of a function and its arguments.",
            )
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _from_json(
                arguments or "{}", dict, f"message {number}, arguments of {function['name']}"
            )
        rest = {
            name: value
            for name, value in call.items()
            if name not in ("name", "arguments") and value is not None
        }
        function = {"name": function["name"], "arguments": arguments}
        checked.append({**rest, "type": "function", "function": function})
    return checked


def _tools(row: Mapping[str, Any]) -> list[Any] | None:
    """The `tools` column: a list, or, since tables cannot hold lists of schemas well, the JSON text of one."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = _from_json(tools, list, "`tools`")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowFault(
            "`tools` is no list",
            f"`tools` is {tools!r:.80}, but must be a list of function descriptions.",
        )
    return tools


def _from_json(text: Any, kind: type, what: str) -> Any:
    """JSON text as a list or a dict; a single dict makes a list of one."""
    try:
        value = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        value = None
    if kind is list and isinstance(value, dict):
        value = [value]
    if not isinstance(value, kind):
        raise RowFault(
            "broken tool call", f"{what} is {text!r:.80}, but must be the JSON text of a tool call."
        )
    return value


def listed(columns: Collection[str]) -> str:
    """The first columns for a message, and how many there are when these are not all."""
    names = ", ".join(f"`{column:.40}`" for column in islice(columns, 10)) or "no columns"
    return names if len(columns) <= 10 else f"{names} and others, {len(columns):,} in all"


_LOOKED_AT = 100
"""Rows within which the format of a source must show: the first ones may be faulty."""


def recognize_format(
    rows: Iterable[Row], asked: Literal["auto"] | Format
) -> tuple[Format, Iterator[Row]]:
    """The format of a source, as its first rows show it, and all of its rows.

    Raises:
        DataError: none of the first rows has the columns of a format, or of the one that is asked for.
    """
    rest = iter(rows)
    first: list[Row] = []
    for row in islice(rest, _LOOKED_AT):
        first.append(row)
        # A table has every column in each row; those that a row does not use are empty.
        if (
            found := _asked_or_found(
                (c for c, value in row.values.items() if value is not None), asked
            )
        ) is not None:
            return found, chain(first, rest)
    if (found := _asked_or_found(first[0].values, asked)) is not None:
        return found, chain(first, rest)
    formats = list(COLUMNS) if asked == "auto" else [asked]
    needed = "; or ".join(
        " and ".join(f"`{column}`" for column in COLUMNS[format]) for format in formats
    )
    raise DataError(
        f"{first[0].where} has the columns {listed(first[0].values)}, but data.format: {asked} needs {needed}. "
        "Rename the columns."
    )


def _asked_or_found(columns: Iterable[str], asked: Literal["auto"] | Format) -> Format | None:
    """`format_of` the columns, or the format that is asked for if they are its columns."""
    if asked == "auto":
        return format_of(columns)
    return asked if set(COLUMNS[asked]) <= set(columns) else None
