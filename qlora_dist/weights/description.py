"""The model that a folder holds, described on meta: config.json held against the files."""

# Tested by tests/unit/weights/test_another_model.py.

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel

from qlora_dist.config.schema import ModelConfig
from qlora_dist.model.skeleton import build_skeleton
from qlora_dist.weights.files import unread_files
from qlora_dist.weights.names import in_model, own_head
from qlora_dist.weights.prequantized import formats_in


def describe_base(folder: Path, config: ModelConfig, log: Callable[[str], None]) -> PreTrainedModel:
    """Describe the model that the files of `folder` hold, on meta; log where they differ from it.

    Raises:
        ModelError, ConfigError: see `build_skeleton` and `formats_in`.
    """
    if note := unread_files(folder):
        log(note)
    formats = formats_in(folder, config)
    model = build_skeleton(folder, config, formats)
    if formats and (renamed := in_model(formats, model)) != formats:
        formats = renamed
        model = build_skeleton(folder, config, formats)
    if name := own_head(model, folder):
        log(
            f"model folder {folder}: its config.json says that the output head is the embedding "
            f"(tie_word_embeddings), but the files hold {name} with other values. The two stay "
            "apart, as in transformers. Set tie_word_embeddings to false in config.json to say so"
        )
        model = build_skeleton(folder, config, formats, is_tied=False)
    return model
