"""Rows to tokens and labels: the model's chat template, and the loss on what the assistant says only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from qlora_dist.config import IGNORE_INDEX, DataConfig
from qlora_dist.data.sources import Layout
from qlora_dist.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Sample:
    """One tokenised row; `labels[i]` is `input_ids[i]` where that token is a target, else IGNORE_INDEX."""

    input_ids: list[int]
    labels: list[int]
    starts: tuple[int, ...] = (0,)
    """Where each sample of a packed row begins."""

    @property
    def num_targets(self) -> int:
        """Tokens that count in the loss. The first token of a row is never predicted."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


@dataclass(frozen=True)
class EncodedRows:
    """The usable samples of a file, and what happened to the others."""

    samples: list[Sample]
    num_truncated: int
    num_without_targets: int


def encode_rows(
    rows: Iterable[Mapping[str, Any]],
    layout: Layout,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    path: str,
) -> EncodedRows:
    """Tokenise all rows of a file.

    Raises:
        DataError: a row is malformed (with its number), the tokenizer has no chat template, or no row has a target.
    """
    if layout == "messages" and not tokenizer.chat_template:
        raise DataError(
            f"{path} holds chat messages, but the model's tokenizer has no chat template to turn them into text. "
            "Use an instruction-tuned model, or give rows with `prompt` and `completion` text."
        )
    encode = _encode_messages if layout == "messages" else _encode_prompt_completion
    samples: list[Sample] = []
    num_truncated = num_without_targets = 0
    for number, row in enumerate(rows, start=1):
        sample = encode(row, tokenizer, config.train_on, f"{path}, row {number}")
        kept = Sample(sample.input_ids[: config.max_seq_len], sample.labels[: config.max_seq_len])
        if kept.num_targets == 0:
            num_without_targets += 1
            continue
        samples.append(kept)
        num_truncated += len(kept.input_ids) < len(sample.input_ids)
    if not samples:
        raise DataError(
            f"{path}: none of its {num_without_targets} rows has a target token within data.max_seq_len "
            f"({config.max_seq_len}). Raise data.max_seq_len, or check that the rows hold answers."
        )
    return EncodedRows(samples, num_truncated, num_without_targets)


def _encode_prompt_completion(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, train_on: Literal["completions", "all"], where: str
) -> Sample:
    """Plain text, no template: prompt, completion and the end token, tokenised apart so that the border is exact."""
    for column in ("prompt", "completion"):
        if not isinstance(row[column], str) or not row[column]:
            raise DataError(f"{where}: `{column}` is {row[column]!r}, but must be text that is not empty.")
    prompt = tokenizer(row["prompt"]).input_ids
    if prompt and prompt[-1] == tokenizer.eos_token_id:  # some tokenizers close every text
        prompt = prompt[:-1]
    completion = tokenizer(row["completion"], add_special_tokens=False).input_ids
    if tokenizer.eos_token_id is not None:
        completion = [*completion, tokenizer.eos_token_id]
    input_ids = prompt + completion
    labels = input_ids if train_on == "all" else [IGNORE_INDEX] * len(prompt) + completion
    return Sample(input_ids, list(labels))


def _encode_messages(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, train_on: Literal["completions", "all"], where: str
) -> Sample:
    messages = _checked_messages(row["messages"], where)
    text, spans = render_with_spans(messages, tokenizer, where)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    input_ids = list(encoded["input_ids"])
    if train_on == "all":
        return Sample(input_ids, list(input_ids))
    labels = [
        token if any(first <= start and first < end <= last for first, last in spans) else IGNORE_INDEX
        for token, (start, end) in zip(input_ids, encoded["offset_mapping"], strict=True)
    ]
    return Sample(input_ids, labels)


def _checked_messages(messages: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: `messages` is {messages!r}, but must be a list of role and content pairs.")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise DataError(f"{where}: message {number} is {message!r}, but needs a text `content`.")
        if message.get("role") not in ROLES:
            raise DataError(
                f"{where}: message {number} has the role {message.get('role')!r}, but a role is one of "
                f"{', '.join(ROLES)}."
            )
    if messages[0]["role"] == "assistant":
        raise DataError(
            f"{where}: the conversation starts with an assistant turn, which nothing asked for. Put a user turn before "
            "it, or remove it."
        )
    if not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"{where}: no assistant turn (its roles: {roles}), so there is nothing to learn from it. "
            "Add the answer, or remove the row."
        )
    # `datasets` fills keys that only other rows have with None; templates must not see those.
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def render_with_spans(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and the (first, past-last) characters of each assistant turn, end token included.

    A turn is what the text gains when the turn is added after its generation prompt: exactly what the model will be
    asked to continue, whatever the template puts around it.

    Raises:
        DataError: the template refuses the conversation, or rewrites earlier turns when later ones come.
    """
    whole = _render(messages, tokenizer, where)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(messages[:index], tokenizer, where, add_generation_prompt=True)
        through = _render(messages[: index + 1], tokenizer, where)
        if not (whole.startswith(through) and through.startswith(before)):
            raise DataError(
                f"{where}: the chat template renders assistant turn {index + 1} differently once other turns "
                "surround it, so its tokens cannot be told apart. Give rows with one assistant turn each, "
                "or `prompt` and `completion` text."
            )
        spans.append((len(before), len(before) + len(_without_separator(through[len(before) :], tokenizer))))
    return whole, spans


def _without_separator(turn: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A turn up to its end token: the line break that many templates put after it is not something to generate."""
    stripped = turn.rstrip()
    return stripped if stripped.endswith(tuple(tokenizer.all_special_tokens)) else turn


def _render(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, where: str, add_generation_prompt: bool = False
) -> str:
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (TemplateError, ValueError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"{where}: the model's chat template refuses this conversation ({roles}): {error}") from None
    assert isinstance(text, str)
    return text
