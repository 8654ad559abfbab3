"""The chat template of a run: its choice, and the text that it makes of conversations."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_dist.data.long_text import Span
from qlora_dist.data.messages import Conversation, RowFault
from qlora_dist.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_BUILT_IN = Path(__file__).parent / "templates"
_DATE_CALL = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def set_chat_template(tokenizer: PreTrainedTokenizerBase, choice: str | None) -> None:
    """Give the tokenizer the template of `data.chat_template`; saved adapters then contain it.

    Args:
        choice: a name of one of the tokenizer's own templates, a built-in name, or a file; None
            keeps the tokenizer as it is.

    Raises:
        ConfigError: there is no such template, or it is not valid Jinja.
    """
    if choice is None:
        return
    own = _own_templates(tokenizer)
    built_in = {path.stem: path for path in _BUILT_IN.glob("*.jinja")}
    try:
        text = (
            own[choice] if choice in own else built_in.get(choice, Path(choice)).read_text("utf-8")
        )
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"data.chat_template is {choice}: not the name of a template, and not a Jinja file "
            f"that can be read ({getattr(error, 'strerror', None) or error}). Give the path of "
            f"one, or a name: {', '.join(sorted({*own, *built_in}))}."
        ) from None
    if fault := _syntax_fault(text):
        raise ConfigError(
            f"data.chat_template {choice}, {fault}. Mend the template, or choose another."
        )
    tokenizer.chat_template = text


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that cannot turn conversations into text.

    Raises:
        DataError: it has no template, several without a default, or a broken one.
    """
    own = _own_templates(tokenizer)
    if not own:
        raise DataError(
            "the model's tokenizer has no chat template to turn chat messages into text. Use an "
            "instruction-tuned model, set data.chat_template (chatml, or a file), or give rows "
            "with `prompt` and `completion` text."
        )
    if "default" not in own:
        raise DataError(
            "the model's tokenizer has several chat templates and none of them is its default: "
            f"{', '.join(sorted(own))}. Set data.chat_template to one of these names."
        )
    for name, text in own.items():
        if fault := _syntax_fault(text):
            raise DataError(
                f"the tokenizer's chat template ({name}), {fault}. Choose another with "
                "data.chat_template."
            )


def _own_templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    template = tokenizer.chat_template
    if isinstance(template, Mapping):  # several, by name
        return {str(name): str(text) for name, text in template.items()}
    return {"default": template} if template else {}


def _syntax_fault(text: str) -> str | None:
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template([], chat_template=text)  # compiles it, and renders nothing
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: not valid Jinja ({error.message})"
    return None


# Errors of a template besides Jinja's own, on a row with unusual values.
_FAILURES = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class ChatTemplate:
    """A tokenizer's chat template at work, in Jinja's sandbox and on plain data only."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, date: str | None = None) -> None:
        """Take the template of a tokenizer.

        Args:
            date: date and time that the template is told (ISO 8601); None: the present ones.
        """
        self.tokenizer = tokenizer
        self._date = None if date is None else datetime.fromisoformat(date)

    def render(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, *, is_prompt: bool = False
    ) -> str:
        """Return the conversation as text; with `is_prompt`, followed by the generation prompt.

        Raises:
            RowFault: the template refuses the conversation.
            DataError: the template does what the sandbox forbids, whatever the row is.
        """
        return self._render(messages, tools, add_generation_prompt=is_prompt)[0]

    def generations(
        self, messages: list[dict[str, Any]], tools: list[Any] | None
    ) -> list[tuple[int, int]]:
        """Return the (first, past-last) characters of each `{% generation %}` part.

        With these parts a template marks the assistant's turns itself. Empty if it has none.

        Raises:
            RowFault, DataError: see `render`.
        """
        if not _GENERATION.search(self.tokenizer.get_chat_template(tools=tools)):
            return []
        parts = self._render(messages, tools, return_assistant_tokens_mask=True)[1]
        return [(int(first), int(last)) for first, last in parts]

    def _render(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, **options: bool
    ) -> tuple[str, list[Any]]:
        from jinja2 import TemplateError
        from jinja2.exceptions import SecurityError
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self._dated(self.tokenizer.get_chat_template(tools=tools))
        try:
            [text], [*parts] = render_jinja_template(
                [messages], tools, chat_template=template, **options, **self._special_tokens_map
            )
        # The sandbox raises OverflowError for a large range; it is an ArithmeticError as well.
        except (SecurityError, OverflowError, MemoryError) as error:
            raise DataError(
                "the chat template does what its sandbox forbids "
                f"({str(error) or type(error).__name__}), whatever the row says. Do not use this "
                "template; choose another one with data.chat_template."
            ) from None
        except (TemplateError, *_FAILURES) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise RowFault(
                "refused by the chat template",
                f"the model's chat template refuses this conversation ({roles}): "
                f"{str(error) or type(error).__name__}.",
            ) from None
        return text, parts[0] if parts else []

    def _dated(self, template: str) -> str:
        """Return a template that is told the run's date instead of the present one."""
        date = self._date
        if date is None or "strftime_now" not in template:
            return template
        # transformers lets callers pass plain data only, so the calls are replaced in the text.
        return _DATE_CALL.sub(lambda call: json.dumps(date.strftime(call[2])), template)

    def fitted(self, content: Conversation) -> Conversation:
        """Return a conversation in the form that this template takes.

        The role `developer` becomes `system` where the template does not show it, and arguments of
        tool calls become JSON text where the template cannot take an object.
        """
        messages = [
            {**message, "role": "system"}
            if message["role"] == "developer" and not self.shows_developer
            else message
            for message in content.messages
        ]
        if any("tool_calls" in message for message in messages) and self.wants_text_arguments:
            messages = [_with_text_arguments(message) for message in messages]
        return replace(content, messages=messages)

    @cached_property
    def ends_with_next_role(self) -> bool:
        """True if the token that opens the next message ends the assistant's turns (GLM)."""
        question, answer = "zQaskedQz", "zQsaidQz"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        try:
            if self.end_of_turn is not None:
                return False
            after = self.render([*turns, turns[0]], None).partition(answer)[2]
        except RowFault:
            return False
        return _first_special(after, self.special_tokens) is not None

    def with_ends(self, text: str, spans: list[Span]) -> tuple[str, list[Span]]:
        """Let each turn end with the token that the model is to write after it.

        Only for templates that end turns with the next message's token: after the last message
        comes the tokenizer's end token.
        """
        ended = []
        for first, last in spans:
            token = _first_special(text[last:], self.special_tokens)
            if token is None and last == len(text):
                token = self.tokenizer.eos_token or ""
                text += token
            ended.append((first, last + len(token or "")))
        return text, ended

    @cached_property
    def text(self) -> str:
        """The template, or all of several."""
        return "".join(_own_templates(self.tokenizer).values())

    @cached_property
    def shows_developer(self) -> bool:
        """True if the template shows messages of the role `developer`."""
        rule = "zQruleQz"
        turns = [{"role": "developer", "content": rule}, {"role": "user", "content": "zQaskedQz"}]
        try:
            return rule in self.render(turns, None)
        except RowFault:
            return False

    @cached_property
    def wants_text_arguments(self) -> bool:
        """True if the template takes the arguments of a tool call as JSON text only."""
        value = "zQvalueQz"
        function = {"name": "zQnameQz", "arguments": {"a": value}}
        call = {"id": "zQ00000Qz", "type": "function", "function": function}
        answer: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [call]}
        turns: list[dict[str, Any]] = [{"role": "user", "content": "zQaskedQz"}, answer]
        try:
            # Written as it is, an object has Python's quotes.
            return repr(function["arguments"]) in self.render(turns, None)
        except RowFault:
            pass
        try:
            return value in self.render([turns[0], _with_text_arguments(answer)], None)
        except RowFault:
            return False

    @cached_property
    def _special_tokens_map(self) -> dict[str, Any]:
        # Cached: the tokenizer builds its map anew on each access.
        return dict(self.tokenizer.special_tokens_map)

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """Texts of all special tokens, the longest first."""
        # `all_special_tokens` are those with a role (bos, eos, pad); a vocabulary may have more.
        added = self.tokenizer.added_tokens_decoder.values()
        texts = {str(token) for token in added if token.special}
        texts.update(self.tokenizer.all_special_tokens)
        return tuple(sorted(filter(None, texts), key=lambda text: (-len(text), text)))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens."""
        return frozenset(self.tokenizer.convert_tokens_to_ids(list(self.special_tokens)))

    @cached_property
    def end_of_turn(self) -> str | None:
        """The special token that ends the assistant's turns; None if ordinary text or nothing does.

        Raises:
            RowFault: the template does not take a question and an answer.
        """
        question, answer = "zQaskedQz", "zQsaidQz"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        after = self.render(turns, None).rpartition(answer)[2]
        # The first one counts: a second one may end the conversation, which nothing has to learn.
        special = re.search("|".join(map(re.escape, self.special_tokens)) or "(?!)", after)
        return special and special.group()


def _first_special(text: str, special_tokens: tuple[str, ...]) -> str | None:
    return next((token for token in special_tokens if text.startswith(token)), None)


def _with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    calls = [
        {
            **call,
            "function": {
                **call["function"],
                "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
            },
        }
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the token that ends the assistant's turns.

    None if the tokenizer has no template, or its template ends turns without a special token.
    """
    try:
        token = ChatTemplate(tokenizer).end_of_turn if tokenizer.chat_template else None
    except RowFault:
        return None
    return None if token is None else int(tokenizer.convert_tokens_to_ids(token))
