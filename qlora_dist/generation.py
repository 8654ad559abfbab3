"""Answers from a trained adapter on its 4-bit base."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TextStreamer

from qlora_dist.build import load_trained
from qlora_dist.data.chat_template import ChatTemplate, end_of_turn_id
from qlora_dist.data.messages import PromptLayout, RowFault
from qlora_dist.data.tokenization import plain_ids
from qlora_dist.data.tokenizer import pad_token_id
from qlora_dist.errors import ConfigError, DataError, LaunchError
from qlora_dist.metrics.console import Reporter
from qlora_dist.run.adapter_folder import AdapterRecord, read_adapter_record
from qlora_dist.runtime.processes import Runtime, launched_world_size, start_runtime


@dataclass(frozen=True)
class Sampling:
    """Rule by which tokens are chosen."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 takes the likeliest token each time; above 0, tokens are drawn at this temperature."""


def generate(
    adapter: str, prompt: str | None, chat: bool, max_new_tokens: int, temperature: float
) -> None:
    """Load a trained model once, then answer one prompt or converse.

    Args:
        adapter: folder of the adapter.
        prompt: text to answer; None reads standard input.
        chat: converse on the terminal instead.

    Raises:
        QloraDistError: the adapter or its base cannot be loaded, or there is no prompt.
    """
    if launched_world_size() > 1:
        raise LaunchError("generate runs as one process. Start it without a launcher.")
    if not chat and prompt is None:
        prompt = "" if sys.stdin.isatty() else sys.stdin.read()
    if not chat and not (prompt or "").strip():
        raise ConfigError("there is no prompt. Give --prompt TEXT, pipe text in, or use --chat.")
    recipe = read_adapter_record(Path(adapter))
    runtime = start_runtime(seed=0, dtype="auto")
    # Answers go to standard output alone, so that they can be piped on.
    reporter = Reporter(is_main=True, file=sys.stderr)
    with reporter.working("loading the model"):
        model, tokenizer = load_trained(Path(adapter), recipe, runtime=runtime, reporter=reporter)
    settings = Sampling(max_new_tokens, temperature)
    if chat:
        _converse(model, tokenizer, recipe, settings, runtime)
    else:
        assert prompt is not None
        input_ids = prompt_ids(prompt, tokenizer, recipe.layout, recipe.template_kwargs)
        answer(model, tokenizer, input_ids, settings, runtime, stream=True)
    runtime.close()


def prompt_ids(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    layout: PromptLayout,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """Encode a prompt as in training: as a user turn, or as plain text. (1, seq_len) int64."""
    if layout == "messages":
        return chat_ids([{"role": "user", "content": prompt}], tokenizer, template_kwargs)
    return torch.tensor([plain_ids(prompt, tokenizer)], dtype=torch.int64)


def chat_ids(
    messages: list[dict[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """Encode a conversation up to the assistant's next answer. (1, seq_len) int64.

    Args:
        template_kwargs: variables that the chat template is given.

    Raises:
        DataError: the chat template refuses the conversation.
    """
    template = ChatTemplate(tokenizer, variables=template_kwargs)
    try:
        text = template.render(messages, None, is_prompt=True)
    except RowFault as fault:
        raise DataError(str(fault)) from None
    return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids


@torch.inference_mode()
def answer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Tensor,
    sampling: Sampling,
    runtime: Runtime,
    *,
    stream: bool = False,
) -> str:
    """Continue `input_ids` until an end token, and return the new text.

    Args:
        input_ids: (1, seq_len) int64.
        stream: print tokens as they come.
    """
    input_ids = input_ids.to(runtime.device)
    choice: dict[str, Any] = {"do_sample": sampling.temperature > 0}
    if choice["do_sample"]:
        choice["temperature"] = sampling.temperature
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with runtime.autocast():
        output = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=sampling.max_new_tokens,
            # An id that the embedding has: a tokenizer may know more tokens than that.
            pad_token_id=pad_token_id(tokenizer, model.get_input_embeddings().weight.shape[0]),
            eos_token_id=_end_token_ids(model, tokenizer),
            streamer=streamer if stream else None,
            **choice,
        )
    return str(tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True)).strip()


def _end_token_ids(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    configured = model.generation_config.eos_token_id
    ids = set(configured if isinstance(configured, list) else [configured])
    # A base model that was trained with a chat template learned to stop with that template's token.
    ids |= {tokenizer.eos_token_id, end_of_turn_id(tokenizer)}
    return sorted(token for token in ids if token is not None)


def _converse(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: AdapterRecord,
    sampling: Sampling,
    runtime: Runtime,
) -> None:
    """Read user turns from standard input and answer each, until an empty line or the end."""
    if recipe.layout != "messages":
        raise ConfigError(
            "this adapter was trained on plain text, not on conversations. Use --prompt TEXT."
        )
    messages: list[dict[str, str]] = []
    while True:
        try:
            text = input("you> ").strip()
        except EOFError:
            return
        if not text:
            return
        messages.append({"role": "user", "content": text})
        input_ids = chat_ids(messages, tokenizer, recipe.template_kwargs)
        reply = answer(model, tokenizer, input_ids, sampling, runtime, stream=True)
        messages.append({"role": "assistant", "content": reply})
