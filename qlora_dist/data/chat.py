"""Rows to tokens and labels: the model's chat template, and the loss on what the assistant says only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Literal

from qlora_dist.config import IGNORE_INDEX, DataConfig
from qlora_dist.data.formats import COLUMNS, Conversation, Format, Layout, PlainText, RowFault, format_of, read_row
from qlora_dist.data.sources import Row
from qlora_dist.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sample:
    """One tokenised row; `labels[i]` is `input_ids[i]` where that token is a target, else IGNORE_INDEX."""

    input_ids: list[int]
    labels: list[int]
    starts: tuple[int, ...] = (0,)
    """Where each sample of a packed row begins."""

    @property
    def num_targets(self) -> int:
        """Tokens that count in the loss. The first token of a row is never predicted."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


@dataclass
class FaultyRows:
    """The rows that were left out because they cannot be used, counted by reason."""

    num_rows: int = 0
    first_message: str = ""
    reasons: dict[str, tuple[int, str]] = field(default_factory=dict)
    """How many, and where the first of them is."""

    def add(self, fault: RowFault, where: str) -> None:
        self.num_rows += 1
        self.first_message = self.first_message or f"{where}: {fault}"
        count, first = self.reasons.get(fault.reason, (0, where))
        self.reasons[fault.reason] = count + 1, first

    def __str__(self) -> str:
        """`unknown role: 3 (first: chat.jsonl, row 7), empty row: 1 (chat.jsonl, row 9)`, the most frequent first."""
        ordered = sorted(self.reasons.items(), key=lambda item: -item[1][0])
        return ", ".join(
            f"{reason}: {count:,} ({'first: ' if count > 1 else ''}{where})" for reason, (count, where) in ordered
        )


@dataclass(frozen=True)
class EncodedRows:
    """The usable samples of a source, and what happened to its other rows."""

    samples: list[Sample]
    format: Format
    layout: Layout
    num_truncated: int
    num_without_targets: int
    faulty: FaultyRows


def encode_rows(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, config: DataConfig, path: str) -> EncodedRows:
    """Tokenise all rows of a source.

    Raises:
        DataError: the columns form no format, more than `data.max_bad_fraction` of the rows are faulty (with the number
            of the first), the tokenizer has no chat template, or no row has a target.
    """
    format, rows = recognise_format(rows, config.format)
    layout: Layout | None = None
    samples: list[Sample] = []
    faulty = FaultyRows()
    num_rows = num_truncated = num_without_targets = 0
    for row in rows:
        num_rows += 1
        try:
            content = read_row(row.values, format)
            layout = layout or _usable_layout(content, tokenizer, path)
            if content.layout != layout:
                raise RowFault(
                    f"{content.layout} row among {layout} rows",
                    f"`prompt` and `completion` are {'messages' if layout != 'messages' else 'plain text'} here, but "
                    "not in the rows before. Split the file.",
                )
            sample = _encode(content, tokenizer, config.train_on)
        except RowFault as fault:
            faulty.add(fault, row.where)
            continue
        kept = Sample(sample.input_ids[: config.max_seq_len], sample.labels[: config.max_seq_len])
        if kept.num_targets == 0:
            num_without_targets += 1
            continue
        samples.append(kept)
        num_truncated += len(kept.input_ids) < len(sample.input_ids)
    if faulty.num_rows > config.max_bad_fraction * num_rows:
        raise DataError(
            f"{faulty.first_message} In all, {faulty.num_rows:,} of {num_rows:,} rows are faulty, more than "
            f"data.max_bad_fraction ({config.max_bad_fraction:g}) lets pass: {faulty}."
        )
    if not samples:
        raise DataError(
            f"{path}: none of its {num_without_targets} rows has a target token within data.max_seq_len "
            f"({config.max_seq_len}). Raise data.max_seq_len, or check that the rows hold answers."
        )
    assert layout is not None
    return EncodedRows(samples, format, layout, num_truncated, num_without_targets, faulty)


_LOOKED_AT = 100
"""Rows within which the format of a source must show: the first ones may be faulty."""


def recognise_format(rows: Iterable[Row], asked: Literal["auto"] | Format) -> tuple[Format, Iterator[Row]]:
    """The format of a source, as its first rows show it, and all of its rows.

    Raises:
        DataError: none of the first rows has the columns of a format, or of the one that is asked for.
    """
    rest = iter(rows)
    first: list[Row] = []
    for row in islice(rest, _LOOKED_AT):
        first.append(row)
        # A table has every column in each row; those that a row does not use are empty.
        if (found := _asked_or_found((c for c, value in row.values.items() if value is not None), asked)) is not None:
            return found, chain(first, rest)
    if (found := _asked_or_found(first[0].values, asked)) is not None:
        return found, chain(first, rest)
    formats = list(COLUMNS) if asked == "auto" else [asked]
    needed = "; or ".join(" and ".join(f"`{column}`" for column in COLUMNS[format]) for format in formats)
    columns = ", ".join(f"`{column}`" for column in first[0].values) or "no columns"
    raise DataError(
        f"{first[0].where} has the columns {columns}, but data.format: {asked} needs {needed}. Rename the columns."
    )


def _asked_or_found(columns: Iterable[str], asked: Literal["auto"] | Format) -> Format | None:
    """`format_of` the columns, or the format that is asked for if they are its columns."""
    if asked == "auto":
        return format_of(columns)
    return asked if set(COLUMNS[asked]) <= set(columns) else None


def _usable_layout(content: Conversation | PlainText, tokenizer: PreTrainedTokenizerBase, path: str) -> Layout:
    if content.layout == "messages" and not tokenizer.chat_template:
        raise DataError(
            f"{path} holds chat messages, but the model's tokenizer has no chat template to turn them into text. "
            "Use an instruction-tuned model, or give rows with `prompt` and `completion` text."
        )
    return content.layout


def _encode(
    content: Conversation | PlainText, tokenizer: PreTrainedTokenizerBase, train_on: Literal["completions", "all"]
) -> Sample:
    if isinstance(content, Conversation):
        return _encode_conversation(content, tokenizer, train_on)
    return _encode_plain_text(content, tokenizer, train_on)


def plain_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a text that something follows: with the start token, if the tokenizer sets one, and no end."""
    input_ids = list(tokenizer(text).input_ids)
    if input_ids and input_ids[-1] == tokenizer.eos_token_id:  # some tokenizers close every text
        input_ids.pop()
    if len(input_ids) > 1 and input_ids[0] == input_ids[1] == tokenizer.bos_token_id:  # the text brings its own
        input_ids.pop(0)
    return input_ids


def _encode_plain_text(
    content: PlainText, tokenizer: PreTrainedTokenizerBase, train_on: Literal["completions", "all"]
) -> Sample:
    """Text and the end token; a prompt before it is tokenised apart, so that the border is exact.

    Without a prompt every token is a target, whatever `train_on` says: there is no other part.
    """
    _check_characters(content.prompt + content.text)
    if content.prompt:
        prompt = plain_ids(content.prompt, tokenizer)
        text = list(tokenizer(content.text, add_special_tokens=False).input_ids)
    else:
        prompt, text = [], plain_ids(content.text, tokenizer)
    if tokenizer.eos_token_id is not None and text[-1:] != [tokenizer.eos_token_id]:
        text.append(tokenizer.eos_token_id)
    labels = prompt + text if train_on == "all" else [IGNORE_INDEX] * len(prompt) + text
    return Sample(prompt + text, labels)


def _encode_conversation(
    content: Conversation, tokenizer: PreTrainedTokenizerBase, train_on: Literal["completions", "all"]
) -> Sample:
    text, spans = render_with_spans(content, tokenizer)
    _check_characters(text)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    input_ids = list(encoded["input_ids"])
    if train_on == "all":
        return Sample(input_ids, list(input_ids))
    labels = [
        token if any(first <= start and first < end <= last for first, last in spans) else IGNORE_INDEX
        for token, (start, end) in zip(input_ids, encoded["offset_mapping"], strict=True)
    ]
    return Sample(input_ids, labels)


def _check_characters(text: str) -> None:
    if "\0" in text:
        raise RowFault("NUL character", "the text has a NUL character, which no text should. Remove it.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowFault(
            "half a character",
            f"the text has half a character ({error.object[error.start]!r}), as of an emoji cut in two. Remove it.",
        ) from None


def render_with_spans(content: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and the (first, past-last) characters of each turn to learn, end token included.

    A turn is what the text gains when the turn is added after its generation prompt: exactly what the model will be
    asked to continue, whatever the template puts around it.

    Raises:
        RowFault: the template refuses the conversation, leaves something out, or rewrites earlier turns when later
            ones come.
    """
    messages = content.messages
    whole = _render(content, len(messages), tokenizer)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index < content.num_given:
            continue
        before = _render(content, index, tokenizer, add_generation_prompt=True)
        through = _render(content, index + 1, tokenizer)
        if not (whole.startswith(through) and through.startswith(before)):
            raise RowFault(
                "earlier turns rewritten by the template",
                f"the chat template renders assistant turn {index + 1} differently once other turns "
                "surround it, so its tokens cannot be told apart. Give rows with one assistant turn each, "
                "or `prompt` and `completion` text.",
            )
        spans.append((len(before), len(before) + len(_without_separator(through[len(before) :], tokenizer))))
    _check_nothing_left_out(content, whole)
    return whole, spans


def _check_nothing_left_out(content: Conversation, text: str) -> None:
    """Refuse a conversation of which the template ignores a turn, a tool call or the tools, as many templates do."""

    def is_there(said: str) -> bool:
        return said in text or json.dumps(said, ensure_ascii=False)[1:-1] in text  # some quote what a tool returns

    for number, message in enumerate(content.messages, start=1):
        calls = message.get("tool_calls", ())
        for call in calls:
            if not is_there(call["function"]["name"]):
                raise RowFault(
                    "tool call left out by the template",
                    f"the chat template leaves out the tool call of message {number}. Use a model whose template knows "
                    "tool calls, or write the call as text.",
                )
        lines = [line.strip() for line in message["content"].splitlines() if line.strip()]
        # Templates may trim a turn or cut thoughts out of it; one of which no line is left has been dropped.
        if lines and not calls and not any(map(is_there, lines)):
            raise RowFault(
                f"{message['role']} turn left out by the template",
                f"the chat template leaves out message {number} ({message['role']}). Use a model whose template knows "
                "such turns, or put the text into another turn.",
            )
    for tool in content.tools or ():
        name = tool.get("function", tool).get("name")
        if isinstance(name, str) and not is_there(name):
            raise RowFault(
                "tools left out by the template",
                f"the chat template leaves out the tool {name!r}. Use a model whose template lists tools, or remove "
                "the column `tools`.",
            )


def _without_separator(turn: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A turn up to its end token: the line break that many templates put after it is not something to generate."""
    stripped = turn.rstrip()
    return stripped if stripped.endswith(tuple(tokenizer.all_special_tokens)) else turn


def _render(
    content: Conversation, num_messages: int, tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = False
) -> str:
    from jinja2 import TemplateError

    messages: list[dict[str, Any]] = content.messages[:num_messages]
    try:
        text = tokenizer.apply_chat_template(
            messages, tools=content.tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise RowFault(
            "refused by the chat template", f"the model's chat template refuses this conversation ({roles}): {error}."
        ) from None
    assert isinstance(text, str)
    return text
