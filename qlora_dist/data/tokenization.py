"""Tokens and labels of conversations and texts, by the model's chat template.

In a conversation, the loss is on what the assistant says only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qlora_dist.config.schema import IGNORE_INDEX
from qlora_dist.data.assistant_spans import TurnFinder
from qlora_dist.data.chat_template import ChatTemplate
from qlora_dist.data.formats import PlainText
from qlora_dist.data.long_text import Span, is_long, long_ids, long_ids_and_spans
from qlora_dist.data.messages import Conversation, RowFault
from qlora_dist.data.placeholders import LostKind
from qlora_dist.data.samples import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenize(
    contents: Sequence[Conversation | PlainText],
    turns: TurnFinder,
    train_on: Literal["completions", "all"],
    num_tokens: int | None = None,
    on_lost: Callable[[int, LostKind], None] = lambda number, kind: None,
) -> list[Sample | RowFault]:
    """Return the sample of each content, or its fault.

    Args:
        num_tokens: the tokens at the start of a sample that are needed, though more may come; None:
            all.
        on_lost: called with the number of a content, from 0, and a kind of parts that the template
            leaves out of it.
    """
    tokenizer = turns.template.tokenizer
    drafts: list[_Draft | RowFault] = []
    for number, content in enumerate(contents):
        try:
            drafts.append(draft := _draft(content, turns, train_on))
            for kind in sorted(draft.lost):
                on_lost(number, kind)
        except RowFault as fault:
            drafts.append(fault)
    good = [draft for draft in drafts if isinstance(draft, _Draft)]
    # All texts in one call each: the tokenizer works on them in parallel.
    openings = iter(_opening_ids([draft.opening for draft in good], tokenizer, num_tokens))
    texts = iter(_ids_and_offsets([draft.text for draft in good], tokenizer, num_tokens))
    return [
        _sample(draft, next(openings), *next(texts), turns.template, train_on)
        if isinstance(draft, _Draft)
        else draft
        for draft in drafts
    ]


@dataclass(frozen=True)
class _Draft:
    """A row as text that only has to be tokenized: a beginning, and the text that follows it."""

    opening: str  # gets the start token; tokenized by itself, so that the border is exact
    text: str  # tokenized as it stands
    spans: list[Span] | None = None  # the targets in `text`; None: all plain text but the prompt
    lost: frozenset[LostKind] = frozenset()


def _draft(
    content: Conversation | PlainText, turns: TurnFinder, train_on: Literal["completions", "all"]
) -> _Draft:
    if isinstance(content, Conversation):
        if content.muted and train_on == "all":
            raise RowFault(
                "turn not to be learned, with data.train_on: all",
                "an assistant turn is marked not to be learned (such as weight: 0), but "
                "data.train_on: all learns every token. Set data.train_on: completions, or remove "
                "the mark.",
            )
        text, spans, lost = turns.render_with_lost(content)
        _check_characters(text)
        return _Draft("", text, spans, lost)
    _check_characters(content.prompt + content.text)
    return _Draft(content.prompt, content.text) if content.prompt else _Draft(content.text, "")


def _sample(
    draft: _Draft,
    opening: list[int],
    text: list[int],
    offsets: list[Span],
    template: ChatTemplate,
    train_on: Literal["completions", "all"],
) -> Sample:
    if draft.spans is None:
        end_token = template.tokenizer.eos_token_id
        prompt, text = (opening, text) if draft.text else ([], opening)
        if end_token is not None and text[-1:] != [end_token]:
            text = [*text, end_token]
        labels = prompt + text if train_on == "all" else [IGNORE_INDEX] * len(prompt) + text
        return Sample(prompt + text, labels)
    if train_on == "all":
        return Sample(text, list(text))
    return Sample(text, _labels(text, offsets, draft, template.special_ids))


def _labels(
    input_ids: list[int], offsets: list[Span], draft: _Draft, special_ids: frozenset[int]
) -> list[int]:
    """Return the id of each token that lies within a target part of the text, else IGNORE_INDEX."""
    labels = [IGNORE_INDEX] * len(input_ids)
    starts = [start for start, _ in offsets]
    for first, last in draft.spans or ():
        for i in range(bisect_left(starts, first), bisect_left(starts, last)):
            end = offsets[i][1]
            # Some tokenizers (Phi-3's) let an end token swallow the white space after it.
            if first < end and (
                end <= last or (input_ids[i] in special_ids and not draft.text[last:end].strip())
            ):
                labels[i] = input_ids[i]
    return labels


def plain_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of a text to continue: after a start token if the tokenizer sets one."""
    return _opening_ids([text], tokenizer)[0]


def _opening_ids(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, num_tokens: int | None = None
) -> list[list[int]]:
    if not any(texts):
        return [[] for _ in texts]
    whole = [text for text in texts if not is_long(text, num_tokens)]
    ids = iter(tokenizer(whole, verbose=False).input_ids if whole else [])
    found = []
    for text in texts:
        if is_long(text, num_tokens):
            input_ids = _long_opening(text, tokenizer, num_tokens)
        else:
            input_ids = list(next(ids))
        if input_ids and input_ids[-1] == tokenizer.eos_token_id:  # some close every text
            input_ids.pop()
        if len(input_ids) > 1 and input_ids[0] == input_ids[1] == tokenizer.bos_token_id:
            input_ids.pop(0)  # the text has a start token of its own
        found.append(input_ids)
    return found


def _long_opening(
    text: str, tokenizer: PreTrainedTokenizerBase, num_tokens: int | None
) -> list[int]:
    """Return the tokens of a text, with the special tokens that the tokenizer puts around it."""
    around, alone = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    first = next(i for i in range(len(around)) if around[i : i + len(alone)] == alone)
    return [*around[:first], *long_ids(text, tokenizer, num_tokens), *around[first + len(alone) :]]


def _ids_and_offsets(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, num_tokens: int | None = None
) -> list[tuple[list[int], list[Span]]]:
    if not any(texts):
        return [([], []) for _ in texts]
    encoded = tokenizer(
        [text for text in texts if not is_long(text, num_tokens)] or [""],
        add_special_tokens=False,
        return_offsets_mapping=True,
        verbose=False,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [
        long_ids_and_spans(text, tokenizer, num_tokens)
        if is_long(text, num_tokens)
        else next(pairs)
        for text in texts
    ]


def _check_characters(text: str) -> None:
    if "\0" in text:
        raise RowFault(
            "NUL character", "the text has a NUL character, which no text should. Remove it."
        )
    try:
        text.encode()  # fails for one half of a surrogate pair, which JSON can write
    except UnicodeEncodeError as error:
        raise RowFault(
            "half a character",
            f"the text has half a character ({error.object[error.start]!r}), as of an emoji cut in "
            "two. Remove it.",
        ) from None
