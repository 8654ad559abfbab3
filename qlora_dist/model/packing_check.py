"""Check that samples in a shared row do not see each other, by running the model on such rows."""

# Tested by tests/distributed/test_packed_training.py.

from __future__ import annotations

import torch
from peft import PeftModel
from torch import Tensor

from qlora_dist.errors import ModelError
from qlora_dist.model.parts import base_model

_LENGTH = 8


@torch.no_grad()
def check_packing(model: PeftModel, device: torch.device) -> None:
    """Refuse a model in which packed samples see each other; a collective.

    Compares logits of a sample alone, behind a different sample in a packed row, and as that
    sample's continuation: three forwards of a few tokens. Packed, the logits must be those of the
    sample alone, up to rounding: at most a tenth of the change by seeing the first sample.

    Raises:
        ModelError: the model's layers do not tell samples apart by their positions.
    """
    was_training = model.training
    model.eval()
    vocab = base_model(model).get_input_embeddings().num_embeddings
    rng = torch.Generator().manual_seed(0)
    first, second = (torch.randint(vocab, (1, _LENGTH), generator=rng).to(device) for _ in range(2))
    both = torch.cat([first, second], dim=1)
    positions = torch.arange(2 * _LENGTH, device=device).unsqueeze(0)  # (1, 2 * _LENGTH)
    alone = _logits(model, second, positions[:, :_LENGTH])
    packed = _logits(model, both, positions % _LENGTH)[:, _LENGTH:]
    seeing = _logits(model, both, positions)[:, _LENGTH:]
    model.train(was_training)
    leak, effect = (packed - alone).norm().item(), (seeing - alone).norm().item()
    if not leak <= 0.1 * effect:  # also if either is NaN
        raise ModelError(
            "samples packed into one row would see each other in "
            f"{type(base_model(model)).__name__}: logits of a sample behind another one move by "
            f"{leak:.3g}, of {effect:.3g} when it is that one's continuation. "
            "Set data.packing: false."
        )


def _logits(model: PeftModel, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    return model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits.float()
