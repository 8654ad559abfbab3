"""One pass over tokenized samples: what only their tokens tell, in a few bytes per sample."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qlora_dist.data.samples import Rows

_HASH_BYTES = 8
"""Of each sample: among ten million different ones, two get the same with a probability of 3e-6."""
_SHOW_EVERY = 10_000


@dataclass
class Answers:
    """Runs of targets, in a chat the assistant's turns; tokens such as the one that ends a turn are special."""

    num_answers: int = 0
    num_empty: int = 0
    """Those that hold special tokens only."""
    num_of_one_token: int = 0
    """Those that hold one other token."""
    num_open: int = 0
    """Samples whose last target is no special token, so that they do not teach to stop."""
    openings: Counter[int] = field(default_factory=Counter)
    """How many samples begin to answer with this token."""

    def count(
        self,
        tokens: NDArray[np.generic],
        is_target: NDArray[np.bool_],
        is_special: NDArray[np.bool_],
    ) -> None:
        """One more sample. Each array: (num_tokens,), but `is_special` is by token id."""
        borders = np.flatnonzero(np.diff(is_target, prepend=False, append=False))
        firsts, ends = borders[::2], borders[1::2]
        ordinary = ~is_special[tokens]
        num_ordinary = np.add.reduceat(ordinary & is_target, firsts)
        self.num_answers += len(firsts)
        self.num_empty += int((num_ordinary == 0).sum())
        self.num_of_one_token += int((num_ordinary == 1).sum())
        self.num_open += bool(ordinary[ends[-1] - 1])
        self.openings[int(tokens[firsts[0]])] += 1


@dataclass(frozen=True)
class Scan:
    """What a pass over samples found."""

    hashes: NDArray[np.uint64]
    """Of the tokens of each sample: equal samples have equal ones. (num_samples,)"""
    prompt_hashes: NDArray[np.uint64]
    """Of what stands before the first target, 0 where that is less than two tokens. (num_samples,)"""
    num_targets: NDArray[np.int64]
    """Of each sample. (num_samples,)"""
    answers: Answers


def scan(
    rows: Rows, is_special: NDArray[np.bool_], show: Callable[[str], None] = lambda text: None
) -> Scan:
    """Look at every sample once; only one is in memory at a time.

    Args:
        is_special: by token id. (vocab_size,)
        show: is called with a line about how far things are, every now and then.
    """
    num = rows.num_samples
    found = Scan(
        np.zeros(num, np.uint64), np.zeros(num, np.uint64), np.zeros(num, np.int64), Answers()
    )
    for number, (tokens, targets) in enumerate(rows.arrays()):
        is_target = np.array(targets, dtype=np.bool_)
        is_target[0] = False  # nothing comes before it that it could be predicted from
        first = int(is_target.argmax())
        found.hashes[number] = _hash(tokens)
        found.prompt_hashes[number] = _hash(tokens[:first]) if first > 1 else 0
        found.num_targets[number] = is_target.sum()
        found.answers.count(tokens, is_target, is_special)
        if number % _SHOW_EVERY == 0:
            show(f"looking at samples: {number:,} of {num:,}")
    return found


def _hash(tokens: NDArray[np.generic]) -> int:
    return int.from_bytes(
        hashlib.blake2b(tokens.tobytes(), digest_size=_HASH_BYTES).digest(), "little"
    )
