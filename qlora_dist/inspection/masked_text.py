"""A tokenized row as text that shows which of its tokens count in the loss."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from qlora_dist.config.schema import IGNORE_INDEX
from qlora_dist.data.samples import Sample

TARGET, CONTEXT, REMARK = "bold green", "dim", "cyan"
"""Styles of tokens that count in the loss, of the other tokens, and of text that is no token."""
_HEAD, _TAIL = 48, 24  # tokens that are shown at either end of a run of like tokens
_RUNS = 12  # runs that are shown at either end of a row
_FOREIGN = "⟦⟧⟨↵"  # characters with a meaning on the page, which cannot stand for themselves
_JOINERS = "\u200c\u200d"  # invisible, but part of how some languages and emojis are written


def legend(in_color: bool) -> Text:
    """Return the meaning of the marks."""
    if not in_color:
        return Text("⟦counts in the loss⟧  context  ⟨remark⟩  ↵ end of a line")
    target, context = ("counts in the loss", TARGET), ("context", CONTEXT)
    return Text.assemble(target, "  ", context, "  ", ("⟨remark⟩", REMARK), "  ↵ end of a line")


def masked_text(sample: Sample, tokenizer: PreTrainedTokenizerBase, in_color: bool) -> Text:
    """Return a row's text, with the borders of its mask and of its samples.

    Long runs of like tokens, and rows of many runs, lose their middle.

    Args:
        in_color: targets have the style TARGET; else they stand between ⟦ and ⟧.
    """
    runs = list(_runs(sample))
    left_out = runs[_RUNS:-_RUNS]
    text = Text()
    for number, run in enumerate(runs):
        if _RUNS <= number < len(runs) - _RUNS:
            if number == _RUNS:
                num_tokens = left_out[-1].end - left_out[0].first
                text.append(f"⟨… {len(left_out)} parts, {num_tokens:,} tokens …⟩\n", REMARK)
            continue
        if len(sample.starts) > 1 and run.first in sample.starts:
            text.append(_border(sample, run.first), REMARK)
        _append(text, run, sample.input_ids, tokenizer, in_color)
    return text


def visible(text: str) -> str:
    """Return a text with signs for hidden characters, which no terminal takes for a command."""
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    if character == "\n":
        return "↵\n"
    # Control, format and surrogate characters, and separators of lines and paragraphs.
    is_hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    if character in _FOREIGN or (is_hidden and character not in "\t" + _JOINERS):
        return f"⟨U+{ord(character):04X}⟩"
    return character


@dataclass(frozen=True)
class _Run:
    """Neighboring tokens of one sample that are all targets, or all not."""

    first: int
    end: int
    is_target: bool


def _runs(sample: Sample) -> Iterator[_Run]:
    starts = set(sample.starts)
    number = 0
    keys = []
    for index, label in enumerate(sample.labels):
        number += index in starts
        # The first token is never predicted: nothing comes before it.
        keys.append((number, index > 0 and label != IGNORE_INDEX))
    first = 0
    for (_, is_target), members in groupby(keys):
        end = first + len(list(members))
        yield _Run(first, end, is_target)
        first = end


def _border(sample: Sample, first: int) -> str:
    number = sample.starts.index(first)
    end = (*sample.starts[1:], len(sample.input_ids))[number]
    label = f"sample {number + 1} of {len(sample.starts)} in this row: {end - first:,} tokens"
    return ("\n" if number else "") + f"⟨{label}⟩\n"


def _append(
    text: Text, run: _Run, ids: list[int], tokenizer: PreTrainedTokenizerBase, in_color: bool
) -> None:
    style = "" if not in_color else TARGET if run.is_target else CONTEXT
    is_marked = run.is_target and not in_color
    text.append("⟦" if is_marked else "")
    num_left_out = run.end - run.first - _HEAD - _TAIL
    if num_left_out > _TAIL:
        text.append(visible(decoded(ids, run.first, run.first + _HEAD, tokenizer)), style)
        text.append(f"⟨… {num_left_out:,} tokens …⟩", REMARK)
        text.append(visible(decoded(ids, run.end - _TAIL, run.end, tokenizer)), style)
    else:
        text.append(visible(decoded(ids, run.first, run.end, tokenizer)), style)
    text.append("⟧" if is_marked else "")


_CONTEXT_TOKENS = 4


def decoded(ids: list[int], first: int, end: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text that tokens `first` to `end` (exclusive) add to the text before them.

    Special tokens are there by their names.
    """
    # With some tokens before: some tokenizers drop the space that a text begins with.
    start = max(0, first - _CONTEXT_TOKENS)
    before, through = _decode(ids[start:first], tokenizer), _decode(ids[start:end], tokenizer)
    if through.startswith(before):
        return through[len(before) :]
    # The border cuts a character in two; then its first part alone is no text.
    return _decode(ids[first:end], tokenizer)


def _decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    if not ids:
        return ""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
