"""The chat template: which one a run uses, and conversations through it to text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_dist.data.formats import RowFault
from qlora_dist.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_BUILT_IN = Path(__file__).parent / "templates"
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def set_chat_template(tokenizer: PreTrainedTokenizerBase, choice: str | None) -> None:
    """Give the tokenizer the template that `data.chat_template` chooses, so that it is saved with the adapter.

    Args:
        choice: one of the tokenizer's own templates by name, a built-in one, or a file; None leaves things as they are.

    Raises:
        ConfigError: there is no such template, or it is not valid Jinja.
    """
    if choice is None:
        return
    own = _own_templates(tokenizer)
    built_in = {path.stem: path for path in _BUILT_IN.glob("*.jinja")}
    if choice in own:
        text = own[choice]
    else:
        path = built_in.get(choice, Path(choice))
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"data.chat_template is {choice}: not the name of a template, and not a Jinja file that can be read "
                f"({reason}). Give the path of one, or a name: {', '.join(sorted({*own, *built_in}))}."
            ) from None
    if fault := _syntax_fault(text):
        raise ConfigError(
            f"data.chat_template {choice}, {fault}. Mend the template, or choose another."
        )
    tokenizer.chat_template = text


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """See that the tokenizer can turn conversations into text.

    Raises:
        DataError: it has no template, several without a usual one, or a broken one.
    """
    own = _own_templates(tokenizer)
    if not own:
        raise DataError(
            "the model's tokenizer has no chat template to turn chat messages into text. Use an instruction-tuned "
            "model, set data.chat_template (chatml, or a file), or give rows with `prompt` and `completion` text."
        )
    if "default" not in own:
        raise DataError(
            f"the model's tokenizer has several chat templates and none of them is its default: "
            f"{', '.join(sorted(own))}. Set data.chat_template to one of these names."
        )
    for name, text in own.items():
        if fault := _syntax_fault(text):
            raise DataError(
                f"the tokenizer's chat template ({name}), {fault}. Choose another with data.chat_template."
            )


def _own_templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
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


_FAILURES = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What a template may raise besides Jinja's own errors."""


class ChatTemplate:
    """A tokenizer's chat template at work, in Jinja's sandbox and on plain data only."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def render(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, *, is_prompt: bool = False
    ) -> str:
        """The conversation as text; with `is_prompt`, up to where the assistant speaks next.

        Raises:
            RowFault: the template refuses the conversation.
            DataError: the template does what the sandbox forbids, whatever the row is.
        """
        return self._render(messages, tools, add_generation_prompt=is_prompt)[0]

    def generations(
        self, messages: list[dict[str, Any]], tools: list[Any] | None
    ) -> list[tuple[int, int]]:
        """The (first, past-last) characters of each `{% generation %}` part, with which a template may say itself what
        the assistant's turns are; none if it does not.

        Raises:
            RowFault, DataError: see `render`.
        """
        if not _GENERATION.search(self.tokenizer.get_chat_template(tools=tools)):
            return []
        parts = self._render(messages, tools, return_assistant_tokens_mask=True)[1]
        return [(int(first), int(last)) for first, last in parts]

    def _render(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, **how: bool
    ) -> tuple[str, list[Any]]:
        from jinja2 import TemplateError
        from jinja2.exceptions import SecurityError
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self.tokenizer.get_chat_template(tools=tools)
        try:
            [text], [*parts] = render_jinja_template(
                [messages], tools, chat_template=template, **how, **self._special_tokens_map
            )
        except (SecurityError, OverflowError, MemoryError) as error:
            raise DataError(
                f"the chat template does what its sandbox forbids ({str(error) or type(error).__name__}), whatever the "
                "row says. Do not use this template; choose another one with data.chat_template."
            ) from None
        except (TemplateError, *_FAILURES) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise RowFault(
                "refused by the chat template",
                f"the model's chat template refuses this conversation ({roles}): {str(error) or type(error).__name__}.",
            ) from None
        return text, parts[0] if parts else []

    @cached_property
    def _special_tokens_map(self) -> dict[str, Any]:
        return dict(self.tokenizer.special_tokens_map)

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """Texts of all special tokens, the longest first: those with a role, and those that only the vocabulary has."""
        added = self.tokenizer.added_tokens_decoder.values()
        texts = {str(token) for token in added if token.special} | set(
            self.tokenizer.all_special_tokens
        )
        return tuple(sorted(filter(None, texts), key=lambda text: (-len(text), text)))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens."""
        return frozenset(self.tokenizer.convert_tokens_to_ids(list(self.special_tokens)))

    @cached_property
    def end_of_turn(self) -> str | None:
        """The special token that ends what the assistant says; None if nothing, or only ordinary text, ends it.

        Some templates write another one at the end of a conversation, which the model need not learn: it is the first
        one that counts.

        Raises:
            RowFault: the template does not take a question and an answer.
        """
        question, answer = "zQaskedQz", "zQsaidQz"
        text = self.render(
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], None
        )
        special = re.search(
            "|".join(map(re.escape, self.special_tokens)) or "(?!)", text.rpartition(answer)[2]
        )
        return special and special.group()


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id of the token that ends the assistant's turns; None if the tokenizer has no template, or that no such token."""
    try:
        token = ChatTemplate(tokenizer).end_of_turn if tokenizer.chat_template else None
    except RowFault:
        return None
    return None if token is None else int(tokenizer.convert_tokens_to_ids(token))
