"""The chat template of a run: its choice, and the text that it makes of conversations."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_dist.data.long_text import Span
from qlora_dist.data.message_forms import CALL_FORMS, SIMILAR_ROLES, CallForm, conversations_with
from qlora_dist.data.messages import (
    EVERY_TEMPLATES_ROLES,
    THOUGHTS,
    Conversation,
    RowFault,
    refused_by_template,
    unknown_role,
)
from qlora_dist.data.special_tokens import SpecialTokens
from qlora_dist.data.template_date import with_date
from qlora_dist.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_BUILT_IN = Path(__file__).parent / "templates"
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
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

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        date: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        """Take the template of a tokenizer.

        Args:
            date: date and time that the template is told (ISO 8601); None: the present ones.
            variables: further variables that the template is given (`data.template_kwargs`).
        """
        self.tokenizer = tokenizer
        self._date = None if date is None else datetime.fromisoformat(date)
        self._variables = dict(variables or {})
        self._roles: dict[str, str | None] = {}
        self._reads: dict[tuple[str, str, object], bool] = {}

    def render(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, *, is_prompt: bool = False
    ) -> str:
        """Return the conversation as text; with `is_prompt`, followed by the generation prompt.

        Raises:
            RowFault: the template refuses the conversation.
            DataError: the template does what the sandbox forbids, whatever the row is.
        """
        written = self._written(messages)
        return self._render(written, tools, add_generation_prompt=is_prompt)[0]

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
        written = self._written(messages)
        parts = self._render(written, tools, return_assistant_tokens_mask=True)[1]
        return [(int(first), int(last)) for first, last in parts]

    def _render(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, **options: bool
    ) -> tuple[str, list[Any]]:
        from jinja2 import TemplateError
        from jinja2.exceptions import SecurityError
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self._dated(self.tokenizer.get_chat_template(tools=tools))
        given = {**options, **self._special_tokens_map, **self._variables}
        try:
            [text], [*parts] = render_jinja_template(
                [messages], tools, chat_template=template, **given
            )
        # The sandbox raises OverflowError for a large range; it is an ArithmeticError as well.
        except (SecurityError, OverflowError, MemoryError) as error:
            raise DataError(
                "the chat template does what its sandbox forbids "
                f"({str(error) or type(error).__name__}), whatever the row says. Do not use this "
                "template; choose another one with data.chat_template."
            ) from None
        except (TemplateError, *_FAILURES) as error:
            raise refused_by_template(messages, error) from None
        return text, parts[0] if parts else []

    def _dated(self, template: str) -> str:
        """Return a template that is told the run's date instead of the present one."""
        return template if self._date is None else with_date(template, self._date)

    @property
    def dated_text(self) -> list[str]:
        """Templates that ask for the date, with the date that they are told in its place."""
        known = self if self._date else ChatTemplate(self.tokenizer, datetime.now().isoformat())
        texts = _own_templates(self.tokenizer).values()
        return [known._dated(text) for text in texts if "strftime_now" in text]

    def _written(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return messages with their tool calls in the form that the template takes."""
        if not any("tool_calls" in message for message in messages):
            return messages
        return [self.call_form.applied_to(message) for message in messages]

    @cached_property
    def call_form(self) -> CallForm:
        """The first form of tool calls that the template shows whole; the usual one if none."""
        arguments = {"a": "zQvalueQz"}
        function = {"name": "zQnameQz", "arguments": arguments}
        call = {"id": "zQ00000Qz", "type": "function", "function": function}
        answer: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [call]}
        for form in CALL_FORMS:
            turns = [{"role": "user", "content": "zQaskedQz"}, form.applied_to(answer)]
            try:
                text = self._render(turns, None)[0]
            except RowFault:
                continue
            # Written as it is, an object has Python's quotes.
            if "zQnameQz" in text and "zQvalueQz" in text and repr(arguments) not in text:
                return form
        return CALL_FORMS[0]

    def fitted(self, content: Conversation) -> Conversation:
        """Return a conversation with the roles under which the template shows its messages.

        Raises:
            RowFault: neither the template nor this program knows a role.
        """
        roles = {message["role"] for message in content.messages} - EVERY_TEMPLATES_ROLES
        names = {role: self.role_for(role) for role in roles}
        if all(role == name for role, name in names.items()):
            return content
        for number, message in enumerate(content.messages, start=1):
            if names.get(message["role"], "") is None:
                raise unknown_role(message["role"], number)
        messages = [
            {**message, "role": names.get(message["role"], message["role"])}
            for message in content.messages
        ]
        renamed = {(role, name) for role, name in names.items() if name and role != name}
        return replace(content, messages=messages, renamed=frozenset(renamed))

    def role_for(self, role: str) -> str | None:
        """Return the role under which the template shows messages of a role; None: unknown."""
        if role not in self._roles:
            self._roles[role] = self._find_role(role)
        return self._roles[role]

    def _find_role(self, role: str) -> str | None:
        others = SIMILAR_ROLES.get(role, ())
        shown = [name for name in (role, *others) if self._shows(name)]
        known = [name for name in shown if self._names_role(name)]
        if known and role != "developer":
            return known[0]
        if role not in SIMILAR_ROLES:
            return None  # a template that writes any role writes misspelled ones, too
        if role == "developer":
            return role if role in shown else "system"
        return "tool" if "tool" in shown or not shown else shown[0]

    def _shows(self, role: str) -> bool:
        """True if the template shows messages of a role where they stand in conversations."""
        said = {"role": role, "content": "zQsaidQz"}
        first, *later = conversations_with(said)
        for turns in [first] if role in ("system", "developer") else later:
            with suppress(RowFault):
                if said["content"] in self.render(turns, None):
                    return True
        return False

    def reads(self, key: str, message: Mapping[str, Any]) -> bool:
        """True if the template shows a message otherwise for the value of a key."""
        role, value = message["role"], message[key]
        kind = key, role, value if isinstance(value, bool) else type(value)
        if kind not in self._reads:
            plain = {"role": role, "content": "zQsaidQz"}
            pairs = zip(
                conversations_with(plain), conversations_with({**plain, key: value}), strict=True
            )
            self._reads[kind] = any(self._differ(*pair) for pair in pairs)
        return self._reads[kind]

    def _differ(self, plain: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
        """True if the template takes a conversation, and shows another otherwise or refuses it."""
        try:
            shown = self.render(plain, None)
        except RowFault:
            return False
        try:
            return self.render(other, None) != shown
        except RowFault:
            return True

    def _names_role(self, role: str) -> bool:
        """True if the template compares with a role, or the vocabulary has a token for it."""
        name = re.escape(role)
        compared = rf"[=!]=\s*(['\"]){name}\1|\bin\s*[\[(][^\])]*(['\"]){name}\2"
        return f"<|{role}|>" in self.special_tokens or bool(re.search(compared, self.text))

    @property
    def unused_variables(self) -> list[str]:
        """Names of the given variables that the template does not use."""
        from jinja2 import Environment, meta

        environment = Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=True)
        used: set[str] = set()
        for text in _own_templates(self.tokenizer).values():
            plain = _GENERATION_TAG.sub("", text)
            used |= meta.find_undeclared_variables(environment.parse(plain))
        return [name for name in self._variables if name not in used]

    @property
    def ends_with_next_role(self) -> bool:
        """True if the token that opens the next message ends the assistant's turns (GLM)."""
        return self.next_role_token is not None

    @cached_property
    def next_role_token(self) -> str | None:
        """The token that opens a question and so ends the answer before it; None: another does."""
        question, answer = "zQaskedQz", "zQsaidQz"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        try:
            if self.end_of_turn is not None:
                return None
            after = self.render([*turns, turns[0]], None).partition(answer)[2]
        except RowFault:
            return None
        return _first_special(after, self.special_tokens)

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
    def generation_prompt(self) -> str:
        """The text after a question that asks for an answer; empty if there is none."""
        turns = [{"role": "user", "content": "zQaskedQz"}]
        try:
            asked = self.render(turns, None)
            prompt = self.render(turns, None, is_prompt=True)
        except RowFault:
            return ""
        # Phi-3 ends a text without a prompt with the end token.
        asked = asked.removesuffix(self.tokenizer.eos_token or "")
        return prompt[len(asked) :] if prompt.startswith(asked) else ""

    @cached_property
    def text(self) -> str:
        """The template, or all of several."""
        return "".join(_own_templates(self.tokenizer).values())

    @cached_property
    def _special_tokens_map(self) -> dict[str, Any]:
        # Cached: the tokenizer builds its map anew on each access.
        return dict(self.tokenizer.special_tokens_map)

    @cached_property
    def _special(self) -> SpecialTokens:
        return SpecialTokens(self.tokenizer)

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Texts of all special tokens, the longest first."""
        return self._special.texts

    def special_tokens_in(self, content: Conversation) -> dict[bool, tuple[int, str]]:
        """Return the first special token in the assistant's words, and in those of others.

        Of the assistant's, those count that the template writes around words: others may be for it
        to write.

        Returns:
            for the assistant (true) and for others: the number of the message, from 1, and the
            token.
        """
        found: dict[bool, tuple[int, str]] = {}
        for number, message in enumerate(content.messages, start=1):
            is_answer = message["role"] == "assistant"
            if is_answer in found:
                continue
            text = message["content"]
            if is_answer and len(message) > 2:
                more = (message[key] for key in ("tool_calls", *THOUGHTS) if key in message)
                text = "\n".join([text, *map(str, more)])
            token = self._special.first_in(text, self._own_tokens if is_answer else None)
            if token is not None:
                found[is_answer] = number, token
        return found

    @cached_property
    def _own_tokens(self) -> frozenset[str]:
        """Special tokens that the template writes around words, or that start or end texts."""
        turns = [{"role": "user", "content": "zQaskedQz"}, {"role": "assistant", "content": "zQ"}]
        shown = ""
        with suppress(RowFault):
            shown = self.render([*turns, *turns], None)
        ends = (self.tokenizer.bos_token, self.tokenizer.eos_token)
        return frozenset(t for t in self.special_tokens if t in shown or t in ends)

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


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the token that ends the assistant's turns.

    None if the tokenizer has no template, or its template ends turns without a special token.
    """
    try:
        template = ChatTemplate(tokenizer)
        has_one = bool(tokenizer.chat_template)
        token = (template.end_of_turn or template.next_role_token) if has_one else None
    except RowFault:
        return None
    return None if token is None else int(tokenizer.convert_tokens_to_ids(token))
