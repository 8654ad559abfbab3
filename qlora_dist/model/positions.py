"""Positions that a model knows, held against the samples' lengths."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from qlora_dist.errors import ModelError


def forget_longest(model: PreTrainedModel) -> None:
    """Let dynamic NTK's frequencies follow from the forward at hand, not from longer ones before.

    transformers keeps those of the longest sample so far until a sample is shorter than the length
    that the model was made for: a sample's loss would depend on the order of samples.
    """

    def forget(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            setattr(module, name, 0)

    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = kinds.values() if isinstance(kinds, dict) else (kinds,)
        if any(isinstance(kind, str) and "dynamic" in kind for kind in kinds):
            module.register_forward_pre_hook(forget)


def check_positions(model: PreTrainedModel, longest: int, is_shared: bool) -> str | None:
    """Hold the longest sample against the positions that the model knows.

    Args:
        longest: its tokens.
        is_shared: several samples go through one forward, in a row or in a micro-batch.

    Returns:
        a line for the log if samples are longer than the model was made for.

    Raises:
        ModelError: positions are learned, and there are fewer; or the longest sample of a forward
            decides the rotations of all.
    """
    kind, border = _border_of_rotations(model) or ("", longest)
    if is_shared and longest > border:
        raise ModelError(
            f"{type(model).__name__} has {kind} rotary positions: as soon as one sample is longer "
            f"than {border:,}, all samples of the same forward get other rotations, and the loss "
            f"of each depends on its neighbors. The longest one has {longest:,} tokens. Set "
            "data.packing: false and optim.micro_batch_size: 1, or data.max_seq_len: "
            f"{border}."
        )
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(known, int) or longest <= known:
        return None
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        is_of_positions = leaf in ("wpe", "position_embeddings") or "position" in leaf
        # Some (OPT's) have a few rows more, for an offset.
        if (
            isinstance(module, nn.Embedding)
            and is_of_positions
            and module.num_embeddings < known + 9
        ):
            raise ModelError(
                f"the longest sample has {longest:,} tokens, but {type(model).__name__} has "
                f"{known:,} learned positions ({name}), and none beyond them. Set "
                f"data.max_seq_len: {known}, or less."
            )
    return (
        f"the longest sample has {longest:,} tokens, more than the {known:,} positions that the "
        "model was made for (max_position_embeddings). It computes them, but was not trained on "
        f"them: data.max_seq_len: {known} stays within"
    )


def _border_of_rotations(model: PreTrainedModel) -> tuple[str, int] | None:
    """Return the type of rotations that depend on the longest row, and the length from which."""
    config = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    # Of one kind, or by kind of layer.
    for one in (parameters, *(p for p in parameters.values() if isinstance(p, dict))):
        kind = one.get("rope_type", one.get("type"))
        if kind in ("longrope", "dynamic"):
            original = one.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            return kind, int(original or config.max_position_embeddings)
    return None
