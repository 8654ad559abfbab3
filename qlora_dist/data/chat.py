"""Conversations and texts to tokens and labels: the model's chat template, the loss on what the assistant says only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from qlora_dist.config import IGNORE_INDEX
from qlora_dist.data.formats import Conversation, PlainText, RowFault
from qlora_dist.data.long_text import Span, is_long, long_ids, long_ids_and_spans
from qlora_dist.data.samples import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenize(
    contents: Sequence[Conversation | PlainText],
    tokenizer: PreTrainedTokenizerBase,
    train_on: Literal["completions", "all"],
    num_tokens: int | None = None,
) -> list[Sample | RowFault]:
    """The sample of each content, or why there is none. Tokenizers work in parallel on what they get at once.

    Args:
        num_tokens: the first so many of a sample are all that matters: what lies far beyond them may be missing.
    """
    drafts: list[_Draft | RowFault] = []
    for content in contents:
        try:
            drafts.append(_draft(content, tokenizer))
        except RowFault as fault:
            drafts.append(fault)
    good = [draft for draft in drafts if isinstance(draft, _Draft)]
    openings = iter(_opening_ids([draft.opening for draft in good], tokenizer, num_tokens))
    texts = iter(_ids_and_offsets([draft.text for draft in good], tokenizer, num_tokens))
    return [
        _sample(draft, next(openings), *next(texts), tokenizer, train_on) if isinstance(draft, _Draft) else draft
        for draft in drafts
    ]


@dataclass(frozen=True)
class _Draft:
    """A row as text that only has to be tokenised: a beginning, and what follows it."""

    opening: str
    """Gets the start token where the tokenizer sets one. It is tokenised apart, so that the border is exact."""
    text: str
    """Is tokenised as it stands."""
    spans: list[Span] | None = None
    """Parts of the text that are targets; None for plain text, where all that is not a prompt is."""


def _draft(content: Conversation | PlainText, tokenizer: PreTrainedTokenizerBase) -> _Draft:
    if isinstance(content, Conversation):
        text, spans = render_with_spans(content, tokenizer)
        _check_characters(text)
        return _Draft("", text, spans)
    _check_characters(content.prompt + content.text)
    return _Draft(content.prompt, content.text) if content.prompt else _Draft(content.text, "")


def _sample(
    draft: _Draft,
    opening: list[int],
    text: list[int],
    offsets: list[Span],
    tokenizer: PreTrainedTokenizerBase,
    train_on: Literal["completions", "all"],
) -> Sample:
    if draft.spans is None:
        prompt, text = (opening, text) if draft.text else ([], opening)
        if tokenizer.eos_token_id is not None and text[-1:] != [tokenizer.eos_token_id]:
            text = [*text, tokenizer.eos_token_id]
        labels = prompt + text if train_on == "all" else [IGNORE_INDEX] * len(prompt) + text
        return Sample(prompt + text, labels)
    if train_on == "all":
        return Sample(text, list(text))
    labels = [
        token if any(first <= start and first < end <= last for first, last in draft.spans) else IGNORE_INDEX
        for token, (start, end) in zip(text, offsets, strict=True)
    ]
    return Sample(text, labels)


def plain_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a text that something follows: with the start token, if the tokenizer sets one, and no end."""
    return _opening_ids([text], tokenizer)[0]


def _opening_ids(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, num_tokens: int | None = None
) -> list[list[int]]:
    if not any(texts):
        return [[] for _ in texts]
    whole = [text for text in texts if not is_long(text, num_tokens)]
    ids = iter(tokenizer(whole, verbose=False).input_ids if whole else [])
    return [
        _opened(_long_opening(text, tokenizer, num_tokens) if is_long(text, num_tokens) else list(next(ids)), tokenizer)
        for text in texts
    ]


def _long_opening(text: str, tokenizer: PreTrainedTokenizerBase, num_tokens: int | None) -> list[int]:
    """With the special tokens that the tokenizer puts around any text."""
    around, alone = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    first = next(i for i in range(len(around)) if around[i : i + len(alone)] == alone)
    return [*around[:first], *long_ids(text, tokenizer, num_tokens), *around[first + len(alone) :]]


def _opened(input_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if input_ids and input_ids[-1] == tokenizer.eos_token_id:  # some tokenizers close every text
        input_ids.pop()
    if len(input_ids) > 1 and input_ids[0] == input_ids[1] == tokenizer.bos_token_id:  # the text brings its own
        input_ids.pop(0)
    return input_ids


def _ids_and_offsets(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, num_tokens: int | None = None
) -> list[tuple[list[int], list[Span]]]:
    if not any(texts):
        return [([], []) for _ in texts]
    whole = [text for text in texts if not is_long(text, num_tokens)]
    encoded = tokenizer(whole or [""], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [
        long_ids_and_spans(text, tokenizer, num_tokens) if is_long(text, num_tokens) else next(pairs) for text in texts
    ]


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
    messages: list[dict[str, Any]] = content.messages[:num_messages]
    try:
        text = tokenizer.apply_chat_template(
            messages, tools=content.tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # noqa: BLE001 - a template is a program, and this one came with a model
        roles = ", ".join(message["role"] for message in messages)
        raise RowFault(
            "refused by the chat template", f"the model's chat template refuses this conversation ({roles}): {error}."
        ) from None
    assert isinstance(text, str)
    return text
