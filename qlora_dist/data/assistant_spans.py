"""Where the turns to learn stand in a rendered conversation, whatever the chat template does around them.

The template is asked about a conversation of the same shape in which stand-ins take the place of what is said. There
nothing but the template's own text surrounds them, so it shows where a turn begins and ends. A row is then rendered
once, and matched against that outline: equal text has equal turns. Rows of a shape share its outline.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from qlora_dist.data.chat_template import ChatTemplate
from qlora_dist.data.formats import Conversation, RowFault
from qlora_dist.data.long_text import Span
from qlora_dist.data.placeholders import (
    MARK,
    OPEN_THOUGHTS,
    MarkedConversation,
    mark_conversation,
    marked,
    unmarked,
)

_MOST_OUTLINES = 4096
"""Outlines that are kept, some kilobytes each."""


class TurnFinder:
    """Renders conversations and finds the turns to learn in them."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self._outlines: dict[str, _Outline | None] = {}

    def render(self, content: Conversation) -> tuple[str, list[Span]]:
        """The conversation as text, and the characters of each turn to learn, up to and with its end token.

        A turn is what the model is asked to continue after its generation prompt; what the template cuts out of it is
        not in it.

        Raises:
            RowFault: the template refuses the conversation, leaves something out, or changes a turn with what comes
                later in a way that does not show where it stands.
            DataError: see `ChatTemplate.render`.
        """
        text = self.template.render(content.messages, content.tools)
        sketch = mark_conversation(content)
        if sketch.shape not in self._outlines:
            if len(self._outlines) >= _MOST_OUTLINES:
                self._outlines.clear()
            self._outlines[sketch.shape] = self._outline(sketch)
        outline = self._outlines[sketch.shape]
        spans = outline.fit(text, sketch.said) if outline is not None else None
        return (text, spans) if spans is not None else (text, self._spans_by_content(content, text))

    def _outline(self, sketch: MarkedConversation) -> _Outline | None:
        """None if the template refuses stand-ins, leaves some of them out, or their turns cannot be found."""
        try:
            outline = self._locate(sketch)
            _check_nothing_left_out(sketch.content, "".join(outline.parts()), missing=set())
        except RowFault:
            return None
        there = set(outline.marks)
        return outline if all(there & set(words) for words in sketch.words if words) else None

    def _spans_by_content(self, content: Conversation, text: str) -> list[Span]:
        """For a template that looks at what is said, or a row with which something is wrong: this row by itself."""
        missing = set(range(len(content.messages)))
        spans = None
        fault: RowFault | None = None
        for sketch in (marked(content), unmarked(content)):
            try:
                outline = self._locate(sketch)
            except RowFault as error:
                fault = error
                continue
            if (spans := outline.fit(text, sketch.said)) is not None:
                missing -= {
                    number for number, mark in enumerate(sketch.marks) if mark in outline.marks
                }
                break
        _check_nothing_left_out(content, text, missing)
        if spans is None:
            assert fault is not None  # without marks, the text is its own outline
            raise fault
        return spans

    def _locate(self, sketch: MarkedConversation) -> _Outline:
        """The sketched conversation as text, with its turns."""
        messages, tools = sketch.content.messages, sketch.content.tools
        whole = self.template.render(messages, tools)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or index < sketch.content.num_given:
                continue
            before = self.template.render(messages[:index], tools, is_prompt=True)
            is_last = index + 1 == len(messages)
            through = whole if is_last else self.template.render(messages[: index + 1], tools)
            end = self._end(through, _place(through, sketch.marks[index]), len(before))
            if through.startswith(before) and whole.startswith(through[:end]):
                spans.append((len(before), end))
            else:
                span = self._rewritten(sketch, index, whole, before, through[:end])
                if span is None:
                    raise RowFault(
                        "earlier turns rewritten by the template",
                        f"the chat template renders assistant turn {index + 1} differently once other turns "
                        "surround it, so its tokens cannot be told apart. Give rows with one assistant turn each, "
                        "or `prompt` and `completion` text.",
                    )
                spans.append(span)
        return _Outline.of(whole, spans)

    def _end(self, through: str, mark: Span | None, len_before: int) -> int:
        """Past the end token of the turn that a text ends with: the line break that many templates put after it is not
        something to generate, nor is a token that ends the conversation."""
        end_of_turn = self._end_of_turn
        first = mark[1] if mark else min(len_before, len(through))
        stripped = through.rstrip()
        if end_of_turn and (at := through.rfind(end_of_turn, first)) >= 0:
            return at + len(end_of_turn)
        return len(stripped) if stripped.endswith(self.template.special_tokens) else len(through)

    def _rewritten(
        self, sketch: MarkedConversation, index: int, whole: str, before: str, through: str
    ) -> Span | None:
        """Where a turn stands if what surrounds it is not what surrounded it when it was the last one.

        Args:
            before: the text up to the turn, with its generation prompt.
            through: the text up to the turn's end token.
        """
        mark = sketch.marks[index]
        own, own_through = _place(whole, mark), _place(through, mark)
        if mark is None or own is None or own_through is None:
            return None
        start, end = self._start(sketch, index, whole, before, own), own[1]
        if start is None:
            return None
        closing = through[own_through[1] :]
        if whole.startswith(closing, end):
            end += len(closing)
        elif follower := self._end_token_at(whole, end, sketch):
            end += len(follower)
        generation = self._generation(sketch, index, whole, own)
        if generation is not None:
            start, end = max(start, generation[0]), max(end, generation[1])
        return start, end

    def _start(
        self, sketch: MarkedConversation, index: int, whole: str, before: str, own: Span
    ) -> int | None:
        """Past the generation prompt, which follows what was said last; else where the turn's own words begin."""
        said_before = [
            found for mark in filter(None, sketch.marks[:index]) if (found := _place(before, mark))
        ]
        last = max(said_before, default=(0, 0))
        at = _place(whole, before[slice(*last)] or None)
        if at is None or any(mark in whole[at[1] : own[0]] for mark in sketch.other(index)):
            return None
        prompt = before[last[1] :]
        words = [found[0] for mark in sketch.words[index] if (found := _place(whole, mark))]
        # Prompts may open thoughts that are not there any more once the turn is an earlier one.
        for start, lead in (
            (at[1], prompt),
            *((word, "") for word in sorted(words)),
            (at[1], OPEN_THOUGHTS.sub("", prompt)),
        ):
            if whole.startswith(lead, start) and start + len(lead) <= own[0]:
                return start + len(lead)
        return None

    def _generation(
        self, sketch: MarkedConversation, index: int, whole: str, own: Span
    ) -> Span | None:
        """The template's own word on where a turn stands, `{% generation %}`, with the end token right after it."""
        parts = self.template.generations(sketch.content.messages, sketch.content.tools)
        holding = [(first, last) for first, last in parts if first <= own[0] and own[1] <= last]
        if len(holding) != 1 or any(
            mark in whole[slice(*holding[0])] for mark in sketch.other(index)
        ):
            return None
        first, last = holding[0]
        stripped = whole[first:last].rstrip()
        if stripped.endswith(self.template.special_tokens):
            return first, first + len(stripped)
        end_of_turn = self._end_of_turn
        return first, last + len(end_of_turn) if end_of_turn and whole.startswith(
            end_of_turn, last
        ) else last

    def _end_token_at(self, whole: str, at: int, sketch: MarkedConversation) -> str | None:
        """A special token that stands here and ends other messages too, so that it does not open the next one."""
        others = [
            m
            for m, msg in zip(sketch.marks, sketch.content.messages, strict=True)
            if msg["role"] != "assistant"
        ]
        ends = [found[1] for mark in filter(None, others) if (found := _place(whole, mark))]
        for token in self.template.special_tokens:
            if whole.startswith(token, at) and any(whole.startswith(token, end) for end in ends):
                return token
        return None

    @cached_property
    def _end_of_turn(self) -> str | None:
        try:
            return self.template.end_of_turn
        except RowFault:
            return None


def _place(text: str, mark: str | None) -> Span | None:
    """Where a mark stands, if it does so exactly once."""
    if mark is None or (at := text.find(mark)) < 0 or text.find(mark, at + 1) >= 0:
        return None
    return at, at + len(mark)


# --------------------------------------------------------------------------------------------------------------------
# From a sketch's text to a row's.


@dataclass(frozen=True)
class _Outline:
    """A rendered sketch: the template's text between marks, and where the turns are."""

    pieces: list[str]
    """Text before, between and after the marks."""
    marks: list[str]
    """In the order in which they stand there, possibly some of them more than once."""
    ends: list[int]
    """Past the last character of each of them."""
    spans: list[Span]

    @classmethod
    def of(cls, text: str, spans: list[Span]) -> _Outline:
        parts = MARK.split(text)
        return cls(parts[::2], parts[1::2], list(accumulate(map(len, parts)))[1::2], spans)

    def parts(self) -> Iterator[str]:
        """The text it was made of, in parts."""
        for piece, mark in zip(self.pieces, [*self.marks, ""], strict=True):
            yield piece
            yield mark

    def fit(self, text: str, said: dict[str, str]) -> list[Span] | None:
        """The turns in a text that is this one with something said in place of each mark; None if it is not."""
        at = 0
        shifts = [0]
        for mark, end, piece, following in zip(
            self.marks, self.ends, self.pieces, self.pieces[1:], strict=False
        ):
            if not text.startswith(piece, at):
                return None
            at += len(piece)
            form = next(
                (
                    form
                    for form in _forms(said.get(mark, mark))
                    if text.startswith(form + following, at)
                ),
                None,
            )
            if form is None:
                return None
            at += len(form)
            shifts.append(at - end)
        if text[at:] != self.pieces[-1]:
            return None

        def moved(place: int) -> int:
            return place + shifts[bisect_right(self.ends, place)]

        return [(moved(first), moved(last)) for first, last in self.spans]


def _forms(said: str) -> Iterator[str]:
    """A text as templates write it: as it is, trimmed in one way or another, or quoted."""
    yield said
    yield said.strip()
    yield said.strip("\n")
    yield said.lstrip()
    yield said.rstrip()
    yield said.lstrip("\n")
    yield json.dumps(said, ensure_ascii=False)[1:-1]


def _check_nothing_left_out(content: Conversation, text: str, missing: set[int]) -> None:
    """Refuse a conversation of which the template ignores a turn, a tool call or the tools, as many templates do.

    Args:
        missing: messages that do not show by their marks.
    """

    def is_there(said: str) -> bool:
        return (
            said in text or json.dumps(said, ensure_ascii=False)[1:-1] in text
        )  # some quote what a tool returns

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
        if number - 1 in missing and lines and not calls and not any(map(is_there, lines)):
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
