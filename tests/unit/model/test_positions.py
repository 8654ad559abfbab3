"""Models that are refused for their positions, and those that get a line in the log."""

import pytest
import torch
from accelerate import init_empty_weights
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedModel,
)

from qlora_dist.errors import ModelError
from qlora_dist.model.positions import check_positions, forget_longest

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}


def described(config) -> PreTrainedModel:
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_positions=32, n_embd=32, n_layer=1, n_head=2, vocab_size=64),
        OPTConfig(max_position_embeddings=32, ffn_dim=64, word_embed_proj_dim=32, **SIZES),
    ],
    ids=lambda config: config.model_type,
)
@pytest.mark.parametrize("is_shared", [True, False])
def test_learned_positions_are_all_there_are(config, is_shared: bool) -> None:
    """A sample that is longer is refused with both numbers, one that fits is not."""
    model = described(config)
    assert check_positions(model, 32, is_shared) is None
    with pytest.raises(ModelError, match=r"has 33 tokens.* has 32 learned positions.*max_seq_len"):
        check_positions(model, 33, is_shared)


def test_rotary_positions_go_on() -> None:
    """A sample beyond what the model was trained on trains, and the log says so."""
    model = described(LlamaConfig(max_position_embeddings=32, intermediate_size=64, **SIZES))
    assert check_positions(model, 32, True) is None
    note = check_positions(model, 1024, True)
    assert note is not None
    assert "1,024 tokens, more than the 32 positions" in note


@pytest.mark.parametrize(
    "config",
    [
        Phi3Config(
            max_position_embeddings=256,
            original_max_position_embeddings=32,
            rope_scaling={"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8},
            pad_token_id=0,
            intermediate_size=64,
            **SIZES,
        ),
        LlamaConfig(
            max_position_embeddings=32,
            intermediate_size=64,
            rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
            **SIZES,
        ),
    ],
    ids=["longrope", "dynamic"],
)
def test_rotations_by_the_longest_sample_are_not_shared(config) -> None:
    """Several samples in a forward are refused once one of them is longer than the border."""
    model = described(config)
    assert check_positions(model, 32, True) is None
    check_positions(model, 33, False)
    with pytest.raises(ModelError, match=r"packing: false and .*micro_batch_size: 1"):
        check_positions(model, 33, True)


def test_rotations_do_not_depend_on_samples_before() -> None:
    """With dynamic NTK a sample has the logits of a fresh model, whatever was computed before it:
    shorter and longer samples, on either side of the border."""
    config = LlamaConfig(
        max_position_embeddings=32,
        intermediate_size=64,
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
        **SIZES,
    )
    ids = torch.randint(64, (1, 100), generator=torch.Generator().manual_seed(0))

    def fresh() -> PreTrainedModel:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()

    used = fresh()
    forget_longest(used)
    with torch.no_grad():
        for length in (20, 100, 50, 32, 33, 20):
            expected = fresh()(ids[:, :length], use_cache=False).logits
            assert torch.equal(used(ids[:, :length], use_cache=False).logits, expected), length
