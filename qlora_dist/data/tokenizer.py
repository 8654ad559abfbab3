"""The model's tokenizer: loaded, given a token to pad with, and checked against the embedding."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from qlora_dist.config.schema import ModelConfig
from qlora_dist.errors import ModelError


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer, with a pad token.

    A pad token that is there stays, even if it is the end token: the model's authors chose it, and
    `pad_token_id` does not depend on it.

    Raises:
        ModelError: the folder has none, or a Python-only one, which gives no character offsets.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelError(
            f"model folder {folder} has no tokenizer that can be loaded: {error}"
        ) from None
    if not tokenizer.is_fast:
        raise ModelError(
            f"model folder {folder}: its tokenizer reports no character offsets, which the loss "
            "mask needs. Convert it once: AutoTokenizer.from_pretrained(FOLDER, use_fast=True)"
            ".save_pretrained(FOLDER)."
        )
    # Training does not need a pad token; other programs that use the adapter on batches do.
    if tokenizer.pad_token_id is None and (candidates := _paddings(tokenizer)):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(candidates[0])
    return tokenizer


def pad_token_id(tokenizer: PreTrainedTokenizerBase, num_embeddings: int | None = None) -> int:
    """Return the id that fills the ends of rows: in the embedding, and not the end token's.

    Padding is masked by position, so its id changes no loss. But a trace, a plot or another
    program's mask that goes by ids should not take the end of an answer for padding.

    Args:
        num_embeddings: rows of the model's embedding, if known.
    """
    known = num_embeddings if num_embeddings is not None else len(tokenizer)
    # 0 and 1 may be ordinary tokens of the text: better than the end token.
    candidates = (*_paddings(tokenizer), 0, 1)
    return next(i for i in candidates if i != tokenizer.eos_token_id and i < known)


def _paddings(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of special tokens that can be padding, the best first."""
    added = sorted(tokenizer.added_tokens_decoder.items())
    special = {i: str(token).lower() for i, token in added if token.special}
    # "reserved" and "unused" are in no text; "endoftext" is not either where turns end otherwise.
    pad, *others = (
        [i for i, text in special.items() if word in text]
        for word in ("pad", "reserved", "unused", "endoftext")
    )
    ids = [tokenizer.pad_token_id, *pad, tokenizer.unk_token_id, *chain(*others)]
    return [int(i) for i in ids if i is not None and i != tokenizer.eos_token_id]


def check_tokenizer_fits(
    tokenizer: PreTrainedTokenizerBase, max_token_id: int, num_embeddings: int
) -> None:
    """Refuse a tokenizer with a token in use for which the model has no embedding.

    A larger embedding is common (it is padded to a round number), and so are tokens without an
    embedding that no text uses.

    Args:
        max_token_id: the largest token id in the data.
        num_embeddings: rows of the model's embedding.

    Raises:
        ModelError: the data, or the start or end token, has no embedding.
    """
    for use, token_id in (
        ("in the data", max_token_id),
        ("its start token", tokenizer.bos_token_id),
        ("its end token", tokenizer.eos_token_id),
    ):
        if token_id is not None and token_id >= num_embeddings:
            raise ModelError(
                "the tokenizer in the model's folder does not belong to the model: it has "
                f"{len(tokenizer):,} tokens, and number {token_id:,} "
                f"({tokenizer.convert_ids_to_tokens(token_id)!r}) is {use}, but the model's "
                f"embedding has {num_embeddings:,} rows (vocab_size in config.json). Put the "
                "model's own tokenizer files there; tokens that were added to them need a model "
                "that was resized and trained with them."
            )


def num_embeddings(folder: Path, config: ModelConfig) -> int:
    """Return the rows of the model's embedding, as its configuration says.

    Raises:
        ModelError: transformers cannot read the configuration.
    """
    trust = config.trust_remote_code
    try:
        model_config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    except (ValueError, ImportError, KeyError) as error:
        raise ModelError(f"model.path {folder} cannot be built by transformers: {error}") from None
    return int(model_config.get_text_config().vocab_size)
