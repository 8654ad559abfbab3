"""Useful arithmetic of a step: the formula agrees with PyTorch's own counter."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from qlora_dist.config.schema import IGNORE_INDEX
from qlora_dist.data.batch import MicroBatch, collate
from qlora_dist.data.samples import Sample, join
from qlora_dist.model.logits import logits_transform
from qlora_dist.model.loss import target_loss_sum
from qlora_dist.model.mfu import flops_of
from qlora_dist.model.parts import ModelParts

D, HEADS, KV, HEAD_DIM, MLP, VOCAB, LAYERS, RANK = 32, 4, 2, 16, 48, 160, 3, 4
MATRICES = {
    "q_proj": (D, HEADS * HEAD_DIM),
    "k_proj": (D, KV * HEAD_DIM),
    "v_proj": (D, KV * HEAD_DIM),
    "o_proj": (HEADS * HEAD_DIM, D),
    "gate_proj": (D, MLP),
    "up_proj": (D, MLP),
    "down_proj": (MLP, D),
}


def tiny(family: str = "Qwen3", targets: tuple[str, ...] = tuple(MATRICES), **more: object):
    """Build a model with adapters whose heads are wider than d / heads.

    Its eager attention makes every product that the formula counts.
    """
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCAB,
        hidden_size=D,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV,
        head_dim=HEAD_DIM,
        max_position_embeddings=128,
        pad_token_id=0,
        **more,
    )
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager"
    ).requires_grad_(False)
    return get_peft_model(model, LoraConfig(r=RANK, target_modules=list(targets))).train()


def sample(length: int, num_targets: int) -> Sample:
    ids = list(range(3, 3 + length))
    return Sample(ids, [IGNORE_INDEX] * (length - num_targets) + ids[length - num_targets :])


def operations(model: torch.nn.Module, batch: MicroBatch) -> int:
    return flops_of(ModelParts(model)).of(
        batch.attention_mask, batch.position_ids, batch.num_tokens, batch.num_targets
    )


def test_the_formula_is_what_pytorch_counts() -> None:
    """The formula is PyTorch's count of forward and backward of one row, up to two differences.

    Eager attention computes the pairs that causality hides. The first layer's first matrices are
    spared the gradients of their input.
    """
    model, length = tiny(), 24
    batch = collate([sample(length, 7)], pad_token_id=0)
    logits_transform(model)  # asks the model, once
    with FlopCounterMode(display=False) as counter:
        target_loss_sum(model, batch.input_ids, batch.attention_mask, batch.labels).backward()
    hidden_pairs = length * length - length * (length + 1) // 2
    spared = sum(
        2 * length * (i * o + i * RANK)
        for i, o in (MATRICES[name] for name in ("q_proj", "k_proj", "v_proj"))
    )
    attention = 12 * LAYERS * HEADS * HEAD_DIM * hidden_pairs
    difference = counter.get_total_flops() - attention + spared - operations(model, batch)
    rotary_angles = (
        2 * length * HEAD_DIM // 2
    )  # a matrix product in transformers 5.17, no longer one in 5.23
    assert difference in (0, rotary_angles)


def test_the_formula_in_the_words_of_its_documentation() -> None:
    """The formula is 4 P + 6 P_lora per token, 4 d V per target, 12 w per pair and layer.

    An adapter on the head counts per target.
    """
    frozen = LAYERS * sum(i * o for i, o in MATRICES.values())
    adapters = LAYERS * sum(RANK * (i + o) for i, o in MATRICES.values())
    flops = flops_of(ModelParts(tiny()))
    assert flops.per_token == 4 * frozen + 6 * adapters
    assert flops.per_target == 4 * D * VOCAB
    assert flops.attention == ((12 * HEADS * HEAD_DIM, None),) * LAYERS
    on_head = flops_of(ModelParts(tiny(targets=("lm_head",))))
    assert on_head.per_token == 4 * frozen
    assert on_head.per_target == 4 * D * VOCAB + 6 * RANK * (D + VOCAB)


def test_samples_count_not_rows() -> None:
    """Padding needs no operations, and packed samples need as many as alone."""
    model = tiny()
    samples = [sample(5, 2), sample(20, 6), sample(9, 3)]
    alone = sum(operations(model, collate([one], 0)) for one in samples)
    assert operations(model, collate(samples, 0)) == alone
    assert operations(model, collate([join(samples)], 0)) == alone
    assert operations(model, collate([join(samples[:2]), samples[2]], 0)) == alone
    assert operations(model, collate([], 0)) == 0


@pytest.mark.parametrize(
    ("family", "more", "windows"),
    [
        ("Qwen3", {}, [None] * LAYERS),
        ("Mistral", {"sliding_window": 4}, [4] * LAYERS),
        ("Mistral", {"sliding_window": None}, [None] * LAYERS),
        ("Gemma2", {"sliding_window": 4}, [4, None, 4]),
    ],
)
def test_nothing_is_counted_outside_of_a_window(
    family: str, more: dict, windows: list[int | None]
) -> None:
    """A layer with a sliding window counts the pairs within it.

    In a row of six with a window of four: 1 + 2 + 3 and three times 4, of 21.
    """
    flops = flops_of(ModelParts(tiny(family, **more)))
    assert [window for _, window in flops.attention] == windows
    pairs = {None: 21, 4: 18}
    found = (
        flops.of(torch.ones(1, 6, dtype=torch.int64), None, num_tokens=6, num_targets=0)
        - 6 * flops.per_token
    )
    assert found == sum(12 * HEADS * HEAD_DIM * pairs[window] for window in windows)
