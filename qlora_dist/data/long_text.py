"""Tokens of a text that is too long to be tokenized at once: in blocks, as far as they are needed.

Tokenizers take some 150 bytes a character, and most rows of megabytes are cut to a few thousand
tokens anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Span = tuple[int, int]
"""First and past-last character of a part of a text."""

_BLOCK = 2**18  # characters that are tokenized at once
_SMALL_BLOCK = 2**14  # the same if at most 1024 tokens are needed; 16 characters for each if more
# Characters that two blocks share. Cutting the text changes tokens near the cut, since they depend
# on the words around them. So the two must have equal tokens only in the inner half of the overlap.
_OVERLAP = 2**12


def is_long(text: str, num_tokens: int | None) -> bool:
    """True if a text has several blocks.

    Args:
        num_tokens: tokens that are needed, from the start; None: all.
    """
    return len(text) > _block(num_tokens) + _OVERLAP


def long_ids(
    text: str, tokenizer: PreTrainedTokenizerBase, num_tokens: int | None = None
) -> list[int]:
    """Return the tokens of a text, without special ones around it.

    Args:
        num_tokens: tokens that are needed, from the start, though more may come; None: all.
    """
    return _collected(text, tokenizer, num_tokens, keep_spans=False)[0]


def long_ids_and_spans(
    text: str, tokenizer: PreTrainedTokenizerBase, num_tokens: int | None = None
) -> tuple[list[int], list[Span]]:
    """Return the tokens as `long_ids` does, and the span of each token in the text."""
    return _collected(text, tokenizer, num_tokens, keep_spans=True)


def _collected(
    text: str, tokenizer: PreTrainedTokenizerBase, num_tokens: int | None, *, keep_spans: bool
) -> tuple[list[int], list[Span]]:
    input_ids: list[int] = []
    spans: list[Span] = []
    for part in _blocks(text, tokenizer, _block(num_tokens)):
        if part is None:
            return _encoded(text, tokenizer)  # whole, whatever memory that takes
        input_ids += [token for token, _ in part]
        if keep_spans:
            spans += [span for _, span in part]
        if num_tokens is not None and len(input_ids) >= num_tokens:
            break
    return input_ids, spans


def _block(num_tokens: int | None) -> int:
    return _BLOCK if num_tokens is None else min(max(_SMALL_BLOCK, 16 * num_tokens), _BLOCK)


def _blocks(
    text: str, tokenizer: PreTrainedTokenizerBase, size: int
) -> Iterator[list[tuple[int, Span]] | None]:
    """Yield the tokens of each block past those of the block before; end with None on a conflict.

    Two blocks conflict if they have different tokens in the inner half of their overlap.
    """
    done = 0  # characters whose tokens have been given
    last: list[tuple[int, Span]] = []
    while done < len(text):
        first = max(0, done - _OVERLAP)
        is_end = first + size + _OVERLAP >= len(text)
        # Beyond this, tokens may differ from those of the whole text: the block is cut there.
        sure_until = len(text) if is_end else first + size
        ids, spans = _encoded(text[first : first + size + _OVERLAP], tokenizer, first)
        tokens = [item for item in zip(ids, spans, strict=True) if item[1][1] <= sure_until]
        num_known = sum(span[1] <= done for _, span in tokens)
        known, new = tokens[:num_known], tokens[num_known:]
        inner = done - _OVERLAP // 2
        here, there = ([item for item in part if item[1][0] >= inner] for part in (known, last))
        if here != there or (first > 0 and not here) or not (is_end or new):
            yield None
            return
        yield new
        done = len(text) if is_end else new[-1][1][1]
        last = new


def _encoded(
    text: str, tokenizer: PreTrainedTokenizerBase, first: int = 0
) -> tuple[list[int], list[Span]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = [(start + first, end + first) for start, end in encoded["offset_mapping"]]
    return encoded["input_ids"], spans
