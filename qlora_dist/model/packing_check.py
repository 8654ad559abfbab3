"""Whether samples that share a row see each other: asked of the model itself, before it trains on packed rows."""

from __future__ import annotations

import torch
from peft import PeftModel

from qlora_dist.errors import ModelError
from qlora_dist.model.parts import base_model

_LENGTH = 8


@torch.no_grad()
def check_packing(model: PeftModel, device: torch.device) -> None:
    """Compare logits of a sample alone, behind another one in a packed row, and as the other's continuation.

    Packed, they must be those of the sample alone, up to rounding: at most a tenth of what seeing the other sample
    changes. Three forwards of a few tokens, by all ranks together.

    Raises:
        ModelError: the model's layers do not tell samples apart by their positions.
    """
    was_training = model.training
    model.eval()
    vocab = base_model(model).get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    first, second = (
        torch.randint(vocab, (1, _LENGTH), generator=generator).to(device) for _ in range(2)
    )
    both = torch.cat([first, second], dim=1)
    positions = torch.arange(2 * _LENGTH, device=device).unsqueeze(0)  # (1, 2 * _LENGTH)
    alone = _logits(model, second, positions[:, :_LENGTH])
    packed = _logits(model, both, positions % _LENGTH)[:, _LENGTH:]
    seeing = _logits(model, both, positions)[:, _LENGTH:]
    model.train(was_training)
    leak, effect = (packed - alone).norm().item(), (seeing - alone).norm().item()
    if not leak <= 0.1 * effect:
        raise ModelError(
            f"samples packed into one row would see each other in {type(base_model(model)).__name__}: logits of a "
            f"sample behind another one move by {leak:.3g}, of {effect:.3g} when it is that one's continuation. "
            "Set data.packing: false."
        )


def _logits(model: PeftModel, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits.float()
