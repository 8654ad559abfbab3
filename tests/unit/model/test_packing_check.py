"""Models in which tokens see those after them are refused, and all others are not."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, PreTrainedConfig

from qlora_dist.config.schema import ModelConfig, TrainConfig
from qlora_dist.errors import ModelError
from qlora_dist.model.packing_check import check_causal
from qlora_dist.runtime.processes import start_runtime
from tests.support.built import build
from tests.support.families import COMMON


def check(config: PreTrainedConfig, folder: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    runtime = start_runtime(seed=0, dtype="float32")
    settings = TrainConfig(model=ModelConfig(str(folder), dtype="float32"))
    check_causal(build(settings, folder, "single", runtime)[0].model, runtime.device)


def test_an_encoder_is_no_language_model(tmp_path: Path) -> None:
    """A BERT is refused, as its config.json usually is; with `is_decoder` it is accepted."""
    with pytest.raises(ModelError, match=r"sees? those after them.*is_decoder: false"):
        check(BertConfig(**COMMON), tmp_path / "encoder")
    check(BertConfig(**COMMON, is_decoder=True), tmp_path / "decoder")


def test_families_are_causal(families: dict[str, Path]) -> None:
    """No token's logits change with a later one in any supported family, in its compute type."""
    for folder in families.values():
        for dtype in ("float32", "bfloat16"):
            runtime = start_runtime(seed=0, dtype=dtype)
            settings = TrainConfig(model=ModelConfig(str(folder), dtype=dtype))
            parts, _ = build(settings, folder, "single", runtime)
            with runtime.autocast():
                check_causal(parts.model, runtime.device)
