"""Checks of the tokens that a model's layers let each token see, by running it on short rows."""

# Tested by tests/distributed/test_packed_training.py and tests/unit/model/test_packing_check.py.

from __future__ import annotations

import inspect

import torch
from peft import PeftModel
from torch import Tensor

from qlora_dist.errors import ModelError
from qlora_dist.model.experts import expert_stacks
from qlora_dist.model.parts import base_model

_LENGTH = 8
_BORDERS = ("sliding_window", "attention_chunk_size", "chunk_size", "mamba_chunk_size")
"""Keys of transformers' configurations: lengths from which on a layer computes otherwise."""


@torch.no_grad()
def check_causal(model: PeftModel, device: torch.device) -> None:
    """Refuse a model in which tokens see those after them, their targets; a collective.

    Encoders can be built as language models (BERT without `is_decoder`), and would learn to copy.
    The logits of tokens must be the same with another last token: two forwards of a few tokens. A
    thousandth of the last token's own change allows for sums in another order.

    Raises:
        ModelError: the logits of a token change with a later one.
    """
    was_training = model.training
    model.eval()
    vocab = base_model(model).get_input_embeddings().num_embeddings
    ids = torch.randint(vocab, (1, _LENGTH), generator=torch.Generator().manual_seed(0)).to(device)
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + vocab // 2) % vocab
    change = _last_logits(model, ids) - _last_logits(model, other)
    model.train(was_training)
    before, last = change[:, :-1].norm().item(), change[:, -1].norm().item()
    if before > _rounding(model, device) * last:
        raise ModelError(
            f"{type(base_model(model)).__name__} lets tokens see those after them: with another "
            f"last token, the logits of that token move by {last:.3g}, and those of the tokens "
            f"before it by {before:.3g}. It would see the targets of the loss, and learn to copy "
            "them. Use a model whose attention is causal; if config.json has is_decoder: false or "
            "use_bidirectional_attention, correct it there."
        )


@torch.no_grad()
def check_packing(model: PeftModel, device: torch.device, max_seq_len: int) -> None:
    """Refuse a model in which packed samples see each other; a collective.

    Compares logits of a sample alone, behind two different samples in a packed row, and as the
    first one's continuation: five forwards of a few tokens. Packed, the logits must be those of the
    sample alone, up to rounding: at most a tenth of the change by seeing the first sample. Behind
    the other sample they must not change at all (a thousandth allows for sums in another order):
    of a hybrid model, the attention alone may tell samples apart. The same holds of samples a
    little longer than each length from which on the model computes otherwise, such as a window, if
    a row takes them.

    Raises:
        ModelError: the model's layers do not tell samples apart by their positions.
    """
    was_training = model.training
    model.eval()
    vocab = base_model(model).get_input_embeddings().num_embeddings
    rng = torch.Generator().manual_seed(0)

    def random_ids(length: int) -> Tensor:  # (1, length)
        return torch.randint(vocab, (1, length), generator=rng).to(device)

    first, second, other = (random_ids(_LENGTH) for _ in range(3))

    def leaks_into(second: Tensor) -> tuple[float, float]:
        """Return how far the last logits of a sample move: behind another one; by another one."""
        positions = torch.cat([_positions(first), _positions(second)], dim=1)
        packed, behind_other = (
            _last_logits(model, torch.cat([before, second], dim=1), positions)
            for before in (first, other)
        )
        alone = _last_logits(model, second, _positions(second))
        return (packed - alone).norm().item(), (packed - behind_other).norm().item()

    row = torch.cat([first, second], dim=1)
    alone = _last_logits(model, second, _positions(second))
    effect = (_last_logits(model, row, _positions(row)) - alone).norm().item()
    leaks = {_LENGTH: leaks_into(second)}
    for border in _borders(model):
        if border + 2 * _LENGTH <= max_seq_len:
            leaks[border + _LENGTH] = leaks_into(random_ids(border + _LENGTH))
    model.train(was_training)
    for length, (by_place, by_tokens) in leaks.items():
        # Also if one of them is NaN.
        if not (by_place <= 0.1 * effect and by_tokens <= _rounding(model, device) * effect):
            leak = max(by_place, by_tokens)
            raise ModelError(
                f"data.packing is refused for {type(base_model(model)).__name__}: samples in one "
                f"row would see each other. The logits of a sample of {length:,} tokens move by "
                f"{leak:.3g} behind another one; those of a short one move by {effect:.3g} when it "
                "continues that one. Set data.packing: false."
            )


def _rounding(model: PeftModel, device: torch.device) -> float:
    """Return the largest change of logits that rounding may make, as a share of an effect.

    Other tokens change how many rows the product of an expert has. In 16 bits it may round
    otherwise then, and send a later layer's token to another expert.
    """
    is_rounded = torch.is_autocast_enabled(device.type) and bool(expert_stacks(model))
    return 0.1 if is_rounded else 1e-3


def _borders(model: PeftModel) -> list[int]:
    """Return the lengths from which on layers of the model compute otherwise, in order."""
    config = base_model(model).config.get_text_config()
    values = {getattr(config, key, None) for key in _BORDERS}
    return sorted(value for value in values if isinstance(value, int) and value > 0)


def _positions(ids: Tensor) -> Tensor:  # (1, length)
    return torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)


def _last_logits(model: PeftModel, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """Return the logits of the last tokens, (1, _LENGTH, vocab) float32."""
    positions = {} if position_ids is None else {"position_ids": position_ids}
    # A long row's logits may take gigabytes.
    takes_number = "logits_to_keep" in inspect.signature(base_model(model).forward).parameters
    keep = {"logits_to_keep": _LENGTH} if takes_number else {}
    logits = model(input_ids=input_ids, use_cache=False, **positions, **keep).logits
    return logits[:, -_LENGTH:].float()
