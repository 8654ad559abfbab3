"""Models that are supported, and refusals of others with the reason."""

# Tested by tests/distributed/test_families.py.

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from qlora_dist.errors import ModelError
from qlora_dist.model.parts import decoder_layers


def check_supported(model: PreTrainedModel, folder: Path) -> None:
    """Refuse a model whose decoder layers cannot be kept in 4 bits with adapters.

    Raises:
        ModelError: they have fused experts or convolutions, or no linear layers.
    """
    layers = decoder_layers(model)
    fused = [name for layer in layers for name, param in layer.named_parameters() if param.ndim > 2]
    if fused:
        raise ModelError(
            f"model.path {folder}: {type(model).__name__} keeps fused experts or convolutions "
            f"({fused[0]} and {len(fused) - 1} more) instead of nn.Linear layers. They would stay "
            "in 16 bits and get no adapters, so it is refused. "
            "Use a dense model, such as Llama, Mistral, Qwen, Gemma or Phi."
        )
    if not any(isinstance(module, nn.Linear) for layer in layers for module in layer.modules()):
        kinds = sorted({type(module).__name__ for layer in layers for module in layer.modules()})
        raise ModelError(
            f"model.path {folder}: {type(model).__name__} has no nn.Linear in its decoder layers "
            f"(it uses {', '.join(kinds[:6])}), so there is nothing to quantize and nowhere to put "
            "adapters. "
            "Use a model with nn.Linear projections, such as Llama, Mistral, Qwen, Gemma or Phi."
        )


def check_positions(
    model: PreTrainedModel, max_seq_len: int, is_shared: bool = False
) -> str | None:
    """Hold the longest row against the positions that the model knows.

    Args:
        is_shared: several samples go through one forward, in a row or in a micro-batch.

    Returns:
        a line for the log if rows may be longer than the model was trained for.

    Raises:
        ModelError: positions are learned, and rows may be longer than there are; or the longest
            row of a forward decides the rotations of all.
    """
    if is_shared and (border := _border_of_rotations(model)) and max_seq_len > border[1]:
        raise ModelError(
            f"{type(model).__name__} has {border[0]} rotary positions: as soon as one row is "
            f"longer than {border[1]:,}, all rows of the same forward get other rotations, and a "
            "sample's loss depends on its neighbors. Set data.packing: false and "
            f"optim.micro_batch_size: 1, or data.max_seq_len: {border[1]} (now {max_seq_len:,})."
        )
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(known, int) or max_seq_len <= known:
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
                f"data.max_seq_len is {max_seq_len:,}, but {type(model).__name__} has {known:,} "
                f"learned positions ({name}), and none beyond them. Set data.max_seq_len: {known}, "
                "or less."
            )
    return (
        f"data.max_seq_len is {max_seq_len:,}, more than the {known:,} positions that the model "
        "was made for (max_position_embeddings). It computes them, but was not trained on them: "
        f"data.max_seq_len: {known} stays within"
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
