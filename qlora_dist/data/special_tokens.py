"""Special tokens of a tokenizer, and a quick look for them in texts."""

# Tested by tests/unit/data/test_lost_parts.py.

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SpecialTokens:
    """The special tokens of a tokenizer, as texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        # `all_special_tokens` are those with a role (bos, eos, pad); a vocabulary may have more.
        added = tokenizer.added_tokens_decoder.values()
        texts = {str(token) for token in added if token.special}
        texts.update(tokenizer.all_special_tokens)
        self.texts = tuple(sorted(filter(None, texts), key=lambda text: (-len(text), text)))
        """All of them, the longest first."""
        # A vocabulary has up to thousands of them; a pattern of them all would be slow.
        openings: dict[str, list[str]] = {}
        for token in self.texts:
            openings.setdefault(token[:2], []).append(token)
        self._openings = {opening: tuple(tokens) for opening, tokens in openings.items()}
        """Tokens by their first two characters, which few texts have."""

    def first_in(self, text: str, among: Collection[str] | None = None) -> str | None:
        """Return a special token that a text has, of those in `among` if it is given."""
        for opening, tokens in self._openings.items():
            at = text.find(opening)
            while at >= 0:
                token = next((t for t in tokens if text.startswith(t, at)), None)
                if token is not None and (among is None or token in among):
                    return token
                at = text.find(opening, at + 1)
        return None
