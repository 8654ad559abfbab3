"""Search for the turns to learn in a rendered conversation, for any chat template.

The template is given a conversation of the same shape in which stand-ins take the place of what is
said. Nothing but the template's own text surrounds the stand-ins, so the result shows the first and
last character of each turn. A row is then rendered once and matched against that outline: equal
text has equal turns. Rows of equal shape share an outline.
"""

# Tested by tests/unit/data/test_chat_template.py.

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain

from qlora_dist.data.chat_template import ChatTemplate
from qlora_dist.data.long_text import Span
from qlora_dist.data.messages import Conversation, RowFault
from qlora_dist.data.placeholders import (
    MARK,
    OPEN_THOUGHTS,
    LostKind,
    MarkedConversation,
    mark_conversation,
    marked,
    probe_of,
    unmarked,
)

_MOST_OUTLINES = 4096  # outlines in memory, some kilobytes each


class TurnFinder:
    """Renders conversations and finds the turns to learn in them."""

    def __init__(self, template: ChatTemplate, allow_lost: Collection[LostKind] = ()) -> None:
        self.template = template
        self._allow_lost = frozenset(allow_lost)
        self._lost: dict[str, dict[tuple[LostKind, int], bool] | None] = {}
        self._outlines: dict[str, _Outline | None] = {}

    def render(self, content: Conversation) -> tuple[str, list[Span]]:
        """Return a conversation as text, and the span of each turn to learn with its end token.

        A turn is the text that the model is asked to write after its generation prompt. Text that
        the template cuts out of a turn is not part of it.

        Raises:
            RowFault: the template refuses the conversation, leaves a part out, or changes a turn
                because of later turns in a way that hides the turn's position.
            DataError: see `ChatTemplate.render`.
        """
        return self.render_with_lost(content)[:2]

    def render_with_lost(
        self, content: Conversation
    ) -> tuple[str, list[Span], frozenset[LostKind]]:
        """Return the result of :meth:`render`, and the kinds of parts that are left out."""
        text = self.template.render(content.messages, content.tools)
        sketch = mark_conversation(content)
        lost = self._lost_parts(sketch.shape, content)
        if lost:
            self._refuse_lost(content, lost)
        if sketch.shape not in self._outlines:
            if len(self._outlines) >= _MOST_OUTLINES:
                self._outlines.clear()
            self._outlines[sketch.shape] = self._outline(sketch)
        outline = self._outlines[sketch.shape]
        spans = outline.fit(text, sketch.said) if outline is not None else None
        if spans is None:
            spans = self._spans_by_content(content, text, is_checked=lost is not None)
        if self.template.ends_with_next_role:
            text, spans = self.template.with_ends(text, spans)
        return text, spans, frozenset(kind for kind, _ in lost or ())

    def _lost_parts(
        self, shape: str, content: Conversation
    ) -> dict[tuple[LostKind, int], bool] | None:
        """Return the parts that the template leaves out of conversations of a shape.

        Returns:
            (kind, number of the message), with true where nothing of that kind is left of the
            message; None if the template refuses the marks.
        """
        if shape not in self._lost:
            if len(self._lost) >= _MOST_OUTLINES:
                self._lost.clear()
            self._lost[shape] = self._find_lost(content)
        return self._lost[shape]

    def _find_lost(self, content: Conversation) -> dict[tuple[LostKind, int], bool] | None:
        probe, parts = probe_of(content)
        try:
            text = self.template.render(probe.messages, probe.tools)
        except RowFault:
            return None
        there = {part for mark, part in parts.items() if mark in text}
        missing = dict.fromkeys(part for mark, part in parts.items() if mark not in text)
        return {part: part not in there for part in missing}

    def _refuse_lost(self, content: Conversation, lost: dict[tuple[LostKind, int], bool]) -> None:
        """Refuse a conversation that would be learned without something that it says.

        Raises:
            RowFault: a part is left out, and `data.allow_lost` does not name its kind.
        """
        last = max(
            i for i, message in enumerate(content.messages) if message["role"] == "assistant"
        )
        for (kind, number), is_all in lost.items():
            # Templates of reasoning models cut thoughts on purpose, most of them those of earlier
            # turns. One that does not know thoughts drops them all.
            is_cut = kind == "thoughts" and (number - 1 != last or "think" in self.template.text)
            if kind in self._allow_lost or is_cut:
                continue
            raise _left_out(content, kind, number, is_all)

    def _outline(self, sketch: MarkedConversation) -> _Outline | None:
        """Return the outline of a sketch, or None if it cannot stand for all rows of its shape.

        None if the template refuses stand-ins, leaves some of them out, or hides their turns.
        """
        try:
            outline = self._locate(sketch)
        except RowFault:
            return None
        there = set(outline.marks)
        return outline if all(there & set(words) for words in sketch.words if words) else None

    def _spans_by_content(
        self, content: Conversation, text: str, is_checked: bool = False
    ) -> list[Span]:
        """Return the turns of a row that no outline fits.

        Either the template looks at what is said, or the row has a fault.
        """
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
                there = set(outline.marks)
                missing -= {number for number, mark in enumerate(sketch.marks) if mark in there}
                break
        if not is_checked:
            _check_nothing_left_out(content, text, missing)
        if spans is None:
            assert fault is not None  # without marks, the text is its own outline
            raise fault
        return spans

    def _locate(self, sketch: MarkedConversation) -> _Outline:
        """Return the sketched conversation as text, with its turns."""
        messages, tools = sketch.content.messages, sketch.content.tools
        whole = self.template.render(messages, tools)
        spans = []
        for index in range(len(messages)):
            if not sketch.content.is_target(index):
                continue
            is_last = index + 1 == len(messages)
            through = whole if is_last else self.template.render(messages[: index + 1], tools)
            if index:
                before = self.template.render(messages[:index], tools, is_prompt=True)
            else:
                before = self._before_first(sketch, through)
            end = self._end(through, _place(through, sketch.marks[index]), len(before))
            span: Span | None = len(before), end
            # Templates rewrite earlier turns, for example without their thoughts.
            if not through.startswith(before) or not whole.startswith(through[:end]):
                span = self._rewritten(sketch, index, whole, before, through[:end])
            if span is None:
                raise RowFault(
                    "earlier turns rewritten by the template",
                    f"the chat template renders assistant turn {index + 1} differently once other "
                    "turns surround it, so its tokens cannot be told apart. Give rows with one "
                    "assistant turn each, or `prompt` and `completion` text.",
                )
            spans.append(span)
        return _Outline.of(whole, spans)

    def _before_first(self, sketch: MarkedConversation, through: str) -> str:
        """Return the text up to an assistant's turn that opens the conversation, with its heading.

        Raises:
            RowFault: the turn has neither the heading of an answer nor words.
        """
        # Many templates fail without any message, so there is no prompt to render.
        prompt = self.template.generation_prompt
        words = (_place(through, mark) for mark in sketch.words[0])
        first_word = min((place[0] for place in words if place), default=-1)
        # Prompts may open thoughts that are no part of an answer without them.
        for heading in (prompt, OPEN_THOUGHTS.sub("", prompt)):
            at = through.find(heading) if heading else -1
            if at >= 0 and (first_word < 0 or at + len(heading) <= first_word):
                return through[: at + len(heading)]
        if first_word >= 0:
            return through[:first_word]
        raise RowFault(
            "first turn that cannot be located",
            "the conversation starts with an assistant turn, and the chat template does not show "
            "where it begins. Put a user turn before it, or remove it.",
        )

    def _end(self, through: str, mark: Span | None, len_before: int) -> int:
        """Return the place past the end token of the turn that a text ends with."""
        first = mark[1] if mark else min(len_before, len(through))
        end_of_turn = self._end_of_turn
        if end_of_turn and (at := through.rfind(end_of_turn, first)) >= 0:
            # The line break that many templates put after it is not something to generate, nor is
            # a token that ends the conversation.
            return at + len(end_of_turn)
        stripped = through.rstrip()
        return len(stripped) if stripped.endswith(self.template.special_tokens) else len(through)

    def _rewritten(
        self, sketch: MarkedConversation, index: int, whole: str, before: str, through: str
    ) -> Span | None:
        """Return the span in `whole` of a turn that reads otherwise where it is the last turn.

        Args:
            before: the text up to the turn, with its generation prompt.
            through: the text up to the turn's end token.
        """
        mark = sketch.marks[index]
        own, own_through = _place(whole, mark), _place(through, mark)
        if own is None or own_through is None:
            return None
        start, end = self._start(sketch, index, whole, before, own), own[1]
        if start is None:
            return None
        closing = through[own_through[1] :]
        if not whole.startswith(closing, end):
            closing = self._end_token_at(whole, end, sketch)
        end += len(closing)
        generation = self._generation(sketch, index, whole, own)
        if generation is not None:
            start, end = max(start, generation[0]), max(end, generation[1])
        return start, end

    def _start(
        self, sketch: MarkedConversation, index: int, whole: str, before: str, own: Span
    ) -> int | None:
        """Return the place past the generation prompt, else the first of the turn's own words."""
        # The prompt follows what was said last before the turn.
        said_before = [place for mark in sketch.marks[:index] if (place := _place(before, mark))]
        last = max(said_before, default=(0, 0))
        at = _place(whole, before[slice(*last)] or None)
        if at is None or any(mark in whole[at[1] : own[0]] for mark in sketch.other(index)):
            return None
        prompt = before[last[1] :]
        words = [place[0] for mark in sketch.words[index] if (place := _place(whole, mark))]
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
        """Return the template's `{% generation %}` part of a turn, with the end token after it."""
        parts = self.template.generations(sketch.content.messages, sketch.content.tools)
        holding = [(first, last) for first, last in parts if first <= own[0] and own[1] <= last]
        if len(holding) != 1:
            return None
        first, last = holding[0]
        if any(mark in whole[first:last] for mark in sketch.other(index)):
            return None
        stripped = whole[first:last].rstrip()
        if stripped.endswith(self.template.special_tokens):
            return first, first + len(stripped)
        end_of_turn = self._end_of_turn or ""
        return first, last + len(end_of_turn) if whole.startswith(end_of_turn, last) else last

    def _end_token_at(self, whole: str, at: int, sketch: MarkedConversation) -> str:
        """Return the special token at a place that ends other roles' messages too, else no text."""
        # A token that ends no other message may be the one that opens the next message.
        ends = [
            place[1]
            for mark, message in zip(sketch.marks, sketch.content.messages, strict=True)
            if message["role"] != "assistant" and (place := _place(whole, mark))
        ]
        for token in self.template.special_tokens:
            if whole.startswith(token, at) and any(whole.startswith(token, end) for end in ends):
                return token
        return ""

    @cached_property
    def _end_of_turn(self) -> str | None:
        try:
            return self.template.end_of_turn
        except RowFault:
            return None


def _place(text: str, mark: str | None) -> Span | None:
    """Return the span of a mark, or None if it occurs never or more than once."""
    if mark is None or (at := text.find(mark)) < 0 or text.find(mark, at + 1) >= 0:
        return None
    return at, at + len(mark)


# -- From a sketch's text to a row's.


@dataclass(frozen=True)
class _Outline:
    """A rendered sketch: the template's text between marks, and the spans of the turns."""

    pieces: list[str]  # text before, between and after the marks
    marks: list[str]  # in the order of the text; a template may write a mark more than once
    ends: list[int]  # the place past each of the marks
    spans: list[Span]

    @classmethod
    def of(cls, text: str, spans: list[Span]) -> _Outline:
        parts = MARK.split(text)  # pieces and marks in turn
        return cls(parts[::2], parts[1::2], list(accumulate(map(len, parts)))[1::2], spans)

    def text(self) -> str:
        """Return the text that the outline was made of."""
        return "".join(chain(*zip(self.pieces, [*self.marks, ""], strict=True)))

    def fit(self, text: str, said: dict[str, str]) -> list[Span] | None:
        """Return the turns in a text, or None if it is not this outline with words for marks."""
        at = 0
        shifts = [0]  # shifts[i]: distance to the outline of the text that follows i marks
        for mark, end, piece, following in zip(
            self.marks, self.ends, self.pieces, self.pieces[1:], strict=False
        ):
            if not text.startswith(piece, at):
                return None
            at += len(piece)
            forms = _forms(said.get(mark, mark))
            form = next((form for form in forms if text.startswith(form + following, at)), None)
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
    """Yield a text in the ways that templates write it: as it is, trimmed, or quoted."""
    yield said
    yield said.strip()
    yield said.strip("\n")
    yield said.lstrip()
    yield said.rstrip()
    yield said.lstrip("\n")
    yield _quoted(said)


def _quoted(said: str) -> str:
    return json.dumps(said, ensure_ascii=False)[1:-1]


def _left_out(content: Conversation, kind: LostKind, number: int, is_all: bool) -> RowFault:
    """Return the fault of a row a part of which the template leaves out."""
    allow = f"data.allow_lost: [{kind}] trains the row without it."
    if kind == "tools":
        names = [tool.get("function", tool).get("name") for tool in content.tools or ()]
        return RowFault(
            "tools left out by the template",
            f"the chat template leaves out the tool {names[0]!r}. Use a model whose template lists "
            f"tools, or remove the column `tools`. {allow}",
        )
    if kind == "tool_calls":
        what = "the tool call" if is_all else "a tool call, or its arguments,"
        return RowFault(
            "tool call left out by the template",
            f"the chat template leaves out {what} of message {number}. Use a model whose template "
            f"knows tool calls, or write the call as text. {allow}",
        )
    role = content.messages[number - 1]["role"]
    if kind == "thoughts":
        return RowFault(
            "thoughts left out by the template",
            f"the chat template leaves out the thoughts of message {number} (reasoning_content). "
            f"Use a model whose template knows thoughts, or write them into `content`. {allow}",
        )
    if not is_all or "tool_calls" in content.messages[number - 1]:
        return RowFault(
            f"text of the {role} turn left out by the template",
            f"the chat template leaves out text of message {number} ({role}), "
            f"{content.messages[number - 1]['content']!r:.60}. Remove it, or use a model whose "
            f"template shows it. {allow}",
        )
    return RowFault(
        f"{role} turn left out by the template",
        f"the chat template leaves out message {number} ({role}). Use a model whose template knows "
        f"such turns, or put the text into another turn. {allow}",
    )


def _check_nothing_left_out(content: Conversation, text: str, missing: set[int]) -> None:
    """Refuse a conversation if the template ignores a turn, a tool call or the tools.

    Args:
        missing: indices of messages whose marks are not in the text.
    """

    def is_there(said: str) -> bool:
        return said in text or _quoted(said) in text  # some templates quote a tool's answer

    for number, message in enumerate(content.messages, start=1):
        calls = message.get("tool_calls", ())
        if not all(is_there(call["function"]["name"]) for call in calls):
            raise RowFault(
                "tool call left out by the template",
                f"the chat template leaves out the tool call of message {number}. Use a model "
                "whose template knows tool calls, or write the call as text.",
            )
        lines = [line.strip() for line in message["content"].splitlines() if line.strip()]
        # Templates may trim a turn or cut thoughts out; a turn without any of its lines is dropped.
        if number - 1 in missing and lines and not calls and not any(map(is_there, lines)):
            raise RowFault(
                f"{message['role']} turn left out by the template",
                f"the chat template leaves out message {number} ({message['role']}). Use a model "
                "whose template knows such turns, or put the text into another turn.",
            )
    for tool in content.tools or ():
        name = tool.get("function", tool).get("name")
        if isinstance(name, str) and not is_there(name):
            raise RowFault(
                "tools left out by the template",
                f"the chat template leaves out the tool {name!r}. Use a model whose template lists "
                "tools, or remove the column `tools`.",
            )
