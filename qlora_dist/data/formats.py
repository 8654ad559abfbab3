"""Rows in one of the common formats, read as a conversation or as plain text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, Literal

from qlora_dist.config.data_names import COLUMNS, Format
from qlora_dist.data.messages import (
    Conversation,
    PromptLayout,
    RowFault,
    from_json,
    list_of,
    prompt_and_completion,
    read_conversation,
)
from qlora_dist.data.names import FileNames, listed
from qlora_dist.data.sources import Row
from qlora_dist.errors import DataError

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


_SHAREGPT_PAIRS = (("from", "role"), ("value", "content"))
_SHAREGPT_KEYS = tuple(chain(*_SHAREGPT_PAIRS))


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
    turns = list_of(row["conversations"], "`conversations`")
    if not isinstance(turns, list) or not turns:
        raise RowFault(
            "empty row",
            f"`conversations` is {turns!r:.80}, but must be a list of from and value pairs.",
        )
    messages = [_of_sharegpt(turn, number) for number, turn in enumerate(turns, start=1)]
    return read_conversation(_with_system(row, messages), row, "conversations")


def _of_sharegpt(turn: Any, number: int) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise RowFault(
            "turn without `from` and `value`",
            f"turn {number} is {turn!r:.80}, but needs from and value.",
        )
    # Some data sets of that name have `role` and `content` in the column `conversations`.
    speaker, said = (_one_of(turn, keys, number) for keys in _SHAREGPT_PAIRS)
    role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise RowFault(
            "unknown speaker",
            f"turn {number} is from {speaker!r}, but a turn is from one of "
            f"{', '.join(_SHAREGPT_ROLES)}.",
        )
    rest = {key: value for key, value in turn.items() if key not in _SHAREGPT_KEYS}
    if speaker == "function_call":  # the value holds the calls, as JSON text or as they are
        calls = from_json(said, list, f"turn {number}")
        if isinstance(said, str):  # a null that is written out is meant
            calls = [_as_written(call) for call in calls]
        return {**rest, "role": role, "content": "", "tool_calls": calls}
    return {**rest, "role": role, "content": said}


def _one_of(turn: Mapping[str, Any], keys: Sequence[str], number: int) -> Any:
    """Return the value that a turn has under one of two keys, or alike under both."""
    # Tables give every turn all keys, and fill those of other turns with None.
    own = [turn[key] for key in keys if turn.get(key) is not None]
    if len(own) > 1 and len({_SHAREGPT_ROLES.get(str(v), str(v)) for v in own}) > 1:
        raise RowFault(
            f"turn with `{keys[0]}` and `{keys[1]}`",
            f"turn {number} has {keys[0]}: {own[0]!r:.40} and {keys[1]}: {own[1]!r:.40}, of which "
            "only one can be read. Remove the other.",
        )
    return own[0] if own else None


def _rounds(history: Any) -> list[dict[str, Any]]:
    """Return the earlier rounds of an Alpaca row, pairs of a question and an answer."""
    history = list_of(history, "`history`") or []
    pairs = history if isinstance(history, list) else [history]
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise RowFault(
            "`history` is no list of pairs",
            f"`history` is {history!r:.80}, but must be a list of pairs of a question and an "
            "answer, or left out.",
        )
    roles = ("user", "assistant")
    return [
        {"role": role, "content": said}
        for pair in pairs
        for role, said in zip(roles, pair, strict=True)
    ]


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
    turns = [*_rounds(row.get("history")), *turns]
    return read_conversation(_with_system(row, turns), row, "instruction")


def _prompt_completion(row: Mapping[str, Any]) -> Conversation | PlainText:
    prompt, completion = prompt_and_completion(row)
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        return PlainText(_text(row, "completion"), prompt=_text(row, "prompt"))
    conversation = read_conversation([*prompt, *completion], row, "prompt")
    if not any(message["role"] == "assistant" for message in conversation.messages[len(prompt) :]):
        raise RowFault(
            "no assistant turn",
            "no assistant turn in `completion`, so there is nothing to learn from it.",
        )
    return replace(conversation, num_given=len(prompt))


_READERS: dict[Format, Callable[[Mapping[str, Any]], Conversation | PlainText]] = {
    "messages": lambda row: read_conversation(row["messages"], row, "messages"),
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


# -- The format of a source.

_LOOKED_AT = 100  # rows within which the format must show; the first rows may be faulty


def recognize_format(
    rows: Iterable[Row], asked: Literal["auto"] | Format, names: FileNames | None = None
) -> tuple[Format, Iterator[Row]]:
    """Return the format of a source, as its first rows show it, and an iterator over all rows.

    Args:
        names: the file's names of columns; they are found out by the first rows.

    Raises:
        DataError: none of the first rows has the columns of a format, or of the format `asked` for.
    """
    names = names or FileNames()
    rest = iter(rows)
    first = list(islice(rest, _LOOKED_AT)) if names.are_asked_for else []
    names.look_at(first)

    def found(row: Row, is_used: Callable[[Any], bool]) -> Format | None:
        there = {column for column, value in names.columns_of(row).items() if is_used(value)}
        fitting = [
            format
            for format, needed in COLUMNS.items()
            if there.issuperset(needed) and asked in ("auto", format)
        ]
        # A format whose columns the user names is meant; of several, the first.
        return max(fitting, key=names.num_named, default=None)

    seen: list[Row] = []
    for row in chain(first, islice(rest, _LOOKED_AT - len(first))):
        seen.append(row)
        # A table has every column in each row; those that a row does not use are None.
        if format := found(row, lambda value: value is not None):
            break
    else:
        format = found(seen[0], lambda value: True)
    if format is None:
        raise _unrecognized(seen[0], asked, names)
    names.settle(format)
    return format, chain(seen, first[len(seen) :], rest)


def _unrecognized(row: Row, asked: Literal["auto"] | Format, names: FileNames) -> DataError:
    formats = list(COLUMNS) if asked == "auto" else [asked]
    needed = "; or ".join(" and ".join(map("`{}`".format, COLUMNS[f])) for f in formats)
    missing = "".join(
        f" data.columns.{name} is {column!r}, which is not there."
        for name, column in names.asked.items()
        if name in names.unread
    )
    return DataError(
        f"{row.where} has the columns {listed(row.values)}, but data.format: {asked} needs "
        f"{needed}.{missing} Rename the columns, or name them in data.columns, such as "
        "{prompt: question, completion: answer}."
    )
