"""Encoding of a source's rows as samples, with an account of each row."""

# Tested by tests/unit/data/test_tokenization.py and tests/unit/data/test_formats.py.

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

from qlora_dist.config.schema import DataConfig
from qlora_dist.data.assistant_spans import TurnFinder
from qlora_dist.data.chat_template import ChatTemplate, check_chat_template
from qlora_dist.data.formats import PlainText, read_row, recognize_format
from qlora_dist.data.messages import Conversation, RowFault
from qlora_dist.data.names import FileNames
from qlora_dist.data.placeholders import LostKind
from qlora_dist.data.report import Report
from qlora_dist.data.samples import Sample
from qlora_dist.data.sources import Row
from qlora_dist.data.tokenization import tokenize
from qlora_dist.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Rows that are tokenized at once; fewer if they have more characters than this together.
_BATCH, _BATCH_CHARS = 256, 2**22


def encode_rows(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    path: str,
    add: Callable[[Sample], None],
    on_rows: Callable[[int], None] = lambda num_rows: None,
) -> Report:
    """Tokenize all rows of a source, a few hundred at a time.

    Args:
        add: is called with each usable sample, in the order of the rows.
        on_rows: is called with the number of rows so far, after each batch.

    Raises:
        DataError: a file is broken, the columns form no format, or the tokenizer has no template.
    """
    names = FileNames(config)
    format, rows = recognize_format(rows, config.format, names)
    report = Report(path, format)
    template = ChatTemplate(tokenizer, config.template_date, config.template_kwargs)
    turns = TurnFinder(template, config.allow_lost or ())
    for batch in _batches((row.where, _content(row, report, names, template)) for row in rows):
        good = [placed for placed in batch if not isinstance(placed[1], RowFault)]

        def count_lost(number: int, kind: LostKind, good: Any = good) -> None:
            report.count_lost(kind, good[number][0])

        contents = [content for _, content in good if not isinstance(content, RowFault)]
        num_needed = _num_needed(report, config)
        samples = iter(tokenize(contents, turns, config.train_on, num_needed, count_lost))
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
    report.add_names(names)
    return report


_Content: TypeAlias = "Conversation | PlainText | RowFault"
_Placed: TypeAlias = "tuple[str, _Content]"  # file and row number, and the row's content


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
    """Return how many first tokens of a sample decide the result of `_within_limit`; None: all."""
    is_split = config.too_long == "split" and report.layout == "text"
    # One more than the limit, to tell a sample that is too long.
    return None if is_split or config.too_long == "truncate_start" else config.max_seq_len + 1


def _content(row: Row, report: Report, names: FileNames, template: ChatTemplate) -> _Content:
    try:
        values = names.read(row)
        content = read_row(values, report.format)
        report.count_columns(values, row.where)
        if report.layout is None:  # the first usable row decides for all
            if content.layout == "messages":
                report.is_open_ended = _is_open_ended(template, report.path)
            report.layout = content.layout
        if isinstance(content, Conversation):
            content = template.fitted(content)
            report.count_content(content, template, row.where)
    except RowFault as fault:
        return names.explained(fault)
    except RecursionError:
        return RowFault("nested too deep", "a value is nested too deep. Flatten or remove it.")
    if content.layout == report.layout:
        return content
    kind = "messages" if report.layout != "messages" else "plain text"
    return RowFault(
        f"{content.layout} row among {report.layout} rows",
        f"`prompt` and `completion` are {kind} here, but not in the rows before. Split the file.",
    )


def _within_limit(
    sample: Sample, report: Report, config: DataConfig, start_token: int | None
) -> list[Sample]:
    """Return the usable parts of a sample under `data.too_long`; count losses in `report`."""
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
        # Models expect the start token at the start, whatever follows it.
        num_kept = int(sample.input_ids[0] == start_token)
        opening = _part(sample, 0, num_kept)
        rest = _part(sample, num_tokens - limit + num_kept, num_tokens)
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


def _is_open_ended(template: ChatTemplate, path: str) -> bool:
    """True if no special token ends the assistant's turns; refuse a template that is unusable."""
    try:
        check_chat_template(template.tokenizer)
        return template.end_of_turn is None and not template.ends_with_next_role
    except DataError as error:
        raise DataError(f"{path} holds chat messages, but {error}") from None
    except RowFault:  # it wants more than a question and an answer
        return False
