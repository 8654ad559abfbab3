"""The rows of a source to samples on disk, and what became of each row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from qlora_dist.config import DataConfig
from qlora_dist.data.chat import tokenize
from qlora_dist.data.formats import (
    COLUMNS,
    Conversation,
    Format,
    Layout,
    PlainText,
    RowFault,
    format_of,
    listed,
    read_row,
)
from qlora_dist.data.samples import Sample
from qlora_dist.data.sources import Row
from qlora_dist.data.template import ChatTemplate, check_chat_template
from qlora_dist.data.turns import TurnFinder
from qlora_dist.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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


@dataclass
class Report:
    """What became of the rows of a source."""

    path: str
    format: Format
    layout: Layout | None = None
    """Of the first usable row, and so of all; None: no row is usable."""
    num_rows: int = 0
    num_samples: int = 0
    num_tokens: int = 0
    num_targets: int = 0
    num_cut: int = 0
    """Samples that lost tokens, since they were longer than `data.max_seq_len`."""
    num_split: int = 0
    """Rows of text that were made several samples for that reason."""
    num_too_long: int = 0
    """Rows that were dropped for that reason."""
    num_without_targets: int = 0
    """Rows that were dropped because none of their tokens (within `data.max_seq_len`) counts in the loss."""
    max_token_id: int = -1
    """The largest one of all samples."""
    is_open_ended: bool = False
    """The chat template ends the assistant's turns without a special token."""
    faulty: FaultyRows = field(default_factory=FaultyRows)

    def count(self, sample: Sample) -> None:
        """One more sample that is used."""
        self.num_samples += 1
        self.num_tokens += len(sample.input_ids)
        self.num_targets += sample.num_targets
        self.max_token_id = max(self.max_token_id, *sample.input_ids)

    def sentence(self, max_seq_len: int) -> str:
        """All of this for a log."""
        text = (
            f"{self.path}: format {self.format}, {self.num_samples:,} rows, {self.num_tokens:,} tokens, "
            f"{self.num_targets / self.num_tokens:.0%} of them targets"
        )
        if self.num_cut:
            text += f", {self.num_cut:,} rows cut to {max_seq_len}"
        if self.num_split:
            text += f", {self.num_split:,} rows split at {max_seq_len}"
        if self.num_too_long:
            text += f", {self.num_too_long:,} rows dropped (longer than {max_seq_len})"
        if self.num_without_targets:
            text += f", {self.num_without_targets:,} rows dropped (no target left)"
        if self.faulty.num_rows:
            text += f", {self.faulty.num_rows:,} faulty rows left out: {self.faulty}"
        if self.is_open_ended:
            text += (
                "; the chat template ends the assistant's turns without a special token, so the model does not learn "
                "to stop: choose another one with data.chat_template"
            )
        return text

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Report:
        """What `to_json` gave."""
        faulty = FaultyRows(**values["faulty"])
        faulty.reasons = {reason: (count, where) for reason, (count, where) in faulty.reasons.items()}
        return cls(**{**values, "faulty": faulty})

    def check(self, config: DataConfig) -> None:
        """Refuse a source of which too little can be used.

        Raises:
            DataError: more than `data.max_bad_fraction` of the rows are faulty (with the number of the first), or no
                row is left.
        """
        # Not a product: 0.29 * 100 is less than 29.
        if self.num_rows and self.faulty.num_rows / self.num_rows > config.max_bad_fraction:
            raise DataError(
                f"{self.faulty.first_message} In all, {self.faulty.num_rows:,} of {self.num_rows:,} rows are faulty, "
                f"more than data.max_bad_fraction ({config.max_bad_fraction:g}) lets pass: {self.faulty}."
            )
        if not self.num_samples:
            dropped = f", {self.num_too_long} are longer" if self.num_too_long else ""
            raise DataError(
                f"{self.path}: none of its {self.num_rows - self.faulty.num_rows} rows has a target token within "
                f"data.max_seq_len ({config.max_seq_len}){dropped}. Raise data.max_seq_len, or check that the rows "
                "hold answers."
            )


_BATCH = 256
"""Rows that are tokenised at once, or fewer where they are long."""
_BATCH_CHARS = 2**22


def encode_rows(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    path: str,
    add: Callable[[Sample], None],
    on_rows: Callable[[int], None] = lambda num_rows: None,
) -> Report:
    """Tokenise all rows of a source, a few at a time.

    Args:
        add: is called with each usable sample, in the order of the rows.
        on_rows: is called with the number of rows so far, every now and then.

    Raises:
        DataError: a file is broken, the columns form no format, or the tokenizer has no chat template.
    """
    format, rows = recognise_format(rows, config.format)
    report = Report(path, format)
    turns = TurnFinder(ChatTemplate(tokenizer))
    for batch in _batches((row.where, _content(row, report, turns.template)) for row in rows):
        good = [content for _, content in batch if not isinstance(content, RowFault)]
        samples = iter(tokenize(good, turns, config.train_on, _num_needed(report, config)))
        for where, content in batch:
            result = content if isinstance(content, RowFault) else next(samples)
            if isinstance(result, RowFault):
                report.faulty.add(result, where)
                continue
            for sample in _within_limit(result, report, config, tokenizer.bos_token_id):
                report.count(sample)
                add(sample)
        report.num_rows += len(batch)
        on_rows(report.num_rows)
    return report


_Content: TypeAlias = "Conversation | PlainText | RowFault"
_Placed: TypeAlias = "tuple[str, _Content]"
"""What a row says, after where it stands."""


def _batches(contents: Iterable[_Placed]) -> Iterator[list[_Placed]]:
    batch: list[_Placed] = []
    num_chars = 0
    for where, content in contents:
        batch.append((where, content))
        num_chars += 0 if isinstance(content, RowFault) else content.num_chars
        if len(batch) == _BATCH or num_chars >= _BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def _num_needed(report: Report, config: DataConfig) -> int | None:
    """Tokens at the start of a sample that decide what `_within_limit` makes of it; None: all."""
    loses_end = config.too_long in ("truncate_end", "drop") or (config.too_long == "split" and report.layout != "text")
    return config.max_seq_len + 1 if loses_end else None


def _content(row: Row, report: Report, template: ChatTemplate) -> _Content:
    try:
        content = read_row(row.values, report.format)
        if report.layout is None:
            if content.layout == "messages":
                report.is_open_ended = _is_open_ended(template, report.path)
            report.layout = content.layout
        if content.layout != report.layout:
            raise RowFault(
                f"{content.layout} row among {report.layout} rows",
                f"`prompt` and `completion` are {'messages' if report.layout != 'messages' else 'plain text'} here, "
                "but not in the rows before. Split the file.",
            )
    except RowFault as fault:
        return fault
    except RecursionError:
        return RowFault("nested too deep", "a value is nested too deep. Flatten or remove it.")
    return content


def _within_limit(sample: Sample, report: Report, config: DataConfig, start_token: int | None) -> list[Sample]:
    """What of a sample is used, as `data.too_long` says; counts what is lost."""
    limit = config.max_seq_len
    num_tokens = len(sample.input_ids)
    if num_tokens <= limit:
        parts = [sample]
    elif config.too_long == "drop":
        report.num_too_long += 1
        return []
    elif config.too_long == "split" and report.layout == "text":
        parts = [_part(sample, first, first + limit) for first in range(0, num_tokens, limit)]
    elif config.too_long == "truncate_start":
        num_kept = int(sample.input_ids[0] == start_token)  # models expect it at the start, whatever follows
        opening, rest = _part(sample, 0, num_kept), _part(sample, num_tokens - limit + num_kept, num_tokens)
        parts = [Sample(opening.input_ids + rest.input_ids, opening.labels + rest.labels)]
    else:
        parts = [_part(sample, 0, limit)]
    usable = [part for part in parts if part.num_targets]
    if not usable:
        report.num_without_targets += 1
    elif len(parts) > 1:
        report.num_split += 1
    elif num_tokens > limit:
        report.num_cut += 1
    return usable


def _part(sample: Sample, first: int, last: int) -> Sample:
    return Sample(sample.input_ids[first:last], sample.labels[first:last])


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
    raise DataError(
        f"{first[0].where} has the columns {listed(first[0].values)}, but data.format: {asked} needs {needed}. "
        "Rename the columns."
    )


def _asked_or_found(columns: Iterable[str], asked: Literal["auto"] | Format) -> Format | None:
    """`format_of` the columns, or the format that is asked for if they are its columns."""
    if asked == "auto":
        return format_of(columns)
    return asked if set(COLUMNS[asked]) <= set(columns) else None


def _is_open_ended(template: ChatTemplate, path: str) -> bool:
    """Whether no special token ends the assistant's turns; refuses a template that cannot be used at all."""
    try:
        check_chat_template(template.tokenizer)
        return template.end_of_turn is None
    except DataError as error:
        raise DataError(f"{path} holds chat messages, but {error}") from None
    except RowFault:  # it wants more than a question and an answer
        return False
