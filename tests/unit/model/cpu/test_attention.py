"""Attention in blocks of queries: SDPA's values and gradients, and nearer to exact ones."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import FalconConfig, LlamaConfig

from qlora_dist.config.schema import ModelConfig
from qlora_dist.model.cpu import attention as cpu_attention
from qlora_dist.model.cpu.attention import NAME, attend
from qlora_dist.model.skeleton import build_skeleton

Attention = Callable[..., torch.Tensor]
HEADS, KV_HEADS, WIDTH, LENGTH = 4, 2, 16, 300
"""More than two blocks, the last one not full."""


def inputs(
    dtype: torch.dtype = torch.float32, kv_heads: int = KV_HEADS, value_width: int = WIDTH
) -> list[torch.Tensor]:
    """Return query, key, value and gradient of the output of two rows, exact in bfloat16."""
    torch.manual_seed(0)
    widths = ((HEADS, WIDTH), (kv_heads, WIDTH), (kv_heads, value_width), (HEADS, value_width))
    return [torch.randn(2, LENGTH, *width).bfloat16().to(dtype).transpose(1, 2) for width in widths]


def sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attend as transformers does."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None
    ).transpose(1, 2)


def blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attend as this program does."""
    return attend(query, key, value, mask, query.shape[-1] ** -0.5)


def results(
    attention: Attention, tensors: list[torch.Tensor], mask: torch.Tensor | None
) -> list[torch.Tensor]:
    """Return the output, and the gradients of query, key and value."""
    *leaves, grad = (x.detach().requires_grad_() for x in tensors)
    out = attention(*leaves, mask)
    out.backward(grad.detach().transpose(1, 2))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())


CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
SAMPLES = torch.stack([torch.arange(LENGTH).ge(70).int(), torch.arange(LENGTH).ge(140).int()])
"""Two samples in each of two packed rows."""
MASKS = {
    "causal": None,
    "packed": ((SAMPLES.unsqueeze(2) == SAMPLES.unsqueeze(1)) & CAUSAL).unsqueeze(1),
    "sliding window, alike in all rows": (CAUSAL & ~CAUSAL.tril(-40)).view(1, 1, LENGTH, LENGTH),
    "padded behind": (CAUSAL & torch.arange(LENGTH).lt(200)).expand(2, 1, LENGTH, LENGTH),
    "everything": torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("shape", [{}, {"kv_heads": 1}, {"kv_heads": HEADS, "value_width": 24}])
def test_float32_equals_sdpa(name: str, shape: dict[str, int]) -> None:
    """Output and gradients agree to 1e-5 for every mask.

    Keys are shared or separate, and values may have a different width.
    """
    tensors = inputs(**shape)
    for found, expected in zip(
        results(blocks, tensors, MASKS[name]), results(sdpa, tensors, MASKS[name]), strict=True
    ):
        assert error(found, expected) < 1e-5


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kv_heads", [1, KV_HEADS, HEADS])
def test_bfloat16_is_at_least_as_exact_as_sdpa(name: str, kv_heads: int) -> None:
    """Output and gradients are no farther from float32 than SDPA's, also under autocast.

    A CPU with units for bfloat16 rounds the probabilities to it in both, before they meet the
    values. Outputs are then equally far, but for chance: 0.4 % at most over these masks.
    """
    exact = results(sdpa, inputs(kv_heads=kv_heads), MASKS[name])
    tensors = inputs(torch.bfloat16, kv_heads=kv_heads)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(blocks, tensors, MASKS[name])
    for ours, theirs, reference in zip(
        found, results(sdpa, tensors, MASKS[name]), exact, strict=True
    ):
        assert ours.dtype == torch.bfloat16
        assert error(ours, reference) <= 1.01 * error(theirs, reference)


def test_the_setting_of_products_stays_as_it_was() -> None:
    """The setting of float32 products is restored, also when attention fails."""
    before = torch.backends.mkldnn.matmul.fp32_precision
    results(blocks, inputs(torch.bfloat16), None)
    with pytest.raises(RuntimeError), cpu_attention._quick_products(torch.bfloat16):
        torch.zeros(2) @ torch.zeros(3)
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_a_block_never_looks_at_another_sample() -> None:
    """A sample that begins with a block stays finite behind a sample of NaN and infinity."""
    query, key, value, grad = inputs()
    second = torch.arange(LENGTH).ge(cpu_attention.BLOCK)
    key[:, :, ~second], value[:, :, ~second] = torch.nan, torch.inf
    mask = ((second.unsqueeze(1) == second) & CAUSAL).expand(2, 1, LENGTH, LENGTH)
    grad[:, :, ~second] = 0
    out, grad_q, grad_k, grad_v = results(blocks, [query, key, value, grad], mask)
    assert out[:, second].isfinite().all()
    assert all(x[:, :, second].isfinite().all() for x in (grad_q, grad_k, grad_v))


def test_blocks_are_made_once_for_a_mask_and_anew_for_another() -> None:
    """Layers of a step share blocks; a mask at a former mask's address gets its own."""
    tensors = inputs()
    cpu_attention._remembered.clear()
    with mock.patch.object(
        cpu_attention, "_make_blocks", side_effect=cpu_attention._make_blocks
    ) as make:
        mask = CAUSAL.expand(2, 1, LENGTH, LENGTH)
        for _ in range(3):
            results(blocks, tensors, mask)
        assert make.call_count == 1
        other = (CAUSAL & ~CAUSAL.tril(-10)).expand(2, 1, LENGTH, LENGTH)
        of_mask = cpu_attention._remembered.pop((id(mask), 2, LENGTH, KV_HEADS))
        cpu_attention._remembered[id(other), 2, LENGTH, KV_HEADS] = of_mask
        for now in (other, None):
            assert error(results(blocks, tensors, now)[0], results(sdpa, tensors, now)[0]) < 1e-5
        assert make.call_count == 3
        make.reset_mock()  # it holds what it was called with
        del now, other
    assert [key[0] for key in cpu_attention._remembered] == [id(None)]


@pytest.mark.parametrize("hidden", [slice(0, 20), slice(0, 2 * cpu_attention.BLOCK)])
def test_a_query_that_sees_nothing_gets_nothing(hidden: slice) -> None:
    """Queries that see nothing get zeros and finite gradients, in parts of blocks and in whole."""
    mask = CAUSAL.clone()
    mask[hidden] = False
    out, grad_q, grad_k, grad_v = results(blocks, inputs(), mask.expand(2, 1, LENGTH, LENGTH))
    assert not out[:, hidden].any()
    assert not grad_q[:, :, hidden].any()
    assert all(x.isfinite().all() and x.any() for x in (out, grad_q, grad_k, grad_v))


def test_it_is_one_operator_to_a_compiler() -> None:
    """torch's own checks of an operator pass: shapes, derivative, no aliases."""
    query, key, value, _ = inputs()
    leaves = [x[:, :, :40].detach().requires_grad_() for x in (query, key, value)]
    torch.library.opcheck(cpu_attention.cpu_attention, (*leaves, None, 0.25))
    torch.library.opcheck(
        cpu_attention.cpu_attention, (*leaves, MASKS["packed"][..., :40, :40], 0.25)
    )


# --------------------------------------------------------------------------------------------------
# Who attends so.


@pytest.mark.parametrize(
    ("changes", "is_ours"),
    [
        ({}, True),
        (
            {
                "attention_mask": MASKS["packed"],
                "sliding_window": 40,
                "position_ids": torch.arange(3),
            },
            True,
        ),
        ({"dropout": 0.1}, False),
        ({"is_causal": False}, False),
        ({"attention_mask": MASKS["packed"].float()}, False),
        ({"attention_mask": MASKS["packed"].expand(2, HEADS, LENGTH, LENGTH)}, False),
        ({"s_aux": torch.zeros(HEADS)}, False),
        ({"position_bias": torch.zeros(1)}, False),
        ({"output_attentions": True}, False),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_what_it_does_not_know_is_left_to_sdpa(changes: dict[str, object], is_ours: bool) -> None:
    """Dropout, biases, sinks and unusual masks are left to SDPA, never silently different."""
    query, key, value, _ = inputs(torch.bfloat16)
    arguments = {"attention_mask": None, "dropout": 0.0, "scaling": None, **changes}
    with mock.patch.object(cpu_attention, "sdpa_attention_forward", return_value="sdpa") as theirs:
        cpu_attention._forward(SimpleNamespace(is_causal=True), query, key, value, **arguments)
    assert theirs.called != is_ours


@pytest.mark.parametrize("change", ["float32", "cached keys", "one token"])
def test_inputs_of_another_form_are_left_to_sdpa(change: str) -> None:
    """SDPA takes float32, for which it is exact and quick, and queries behind cached keys."""
    query, key, value, _ = inputs(torch.float32 if change == "float32" else torch.bfloat16)
    if change != "float32":
        query = query[:, :, -1:] if change == "one token" else query[:, :, -50:]
    with mock.patch.object(cpu_attention, "sdpa_attention_forward", return_value="sdpa") as theirs:
        cpu_attention._forward(SimpleNamespace(is_causal=True), query, key, value, None)
    assert theirs.called


@pytest.mark.parametrize(
    ("attention", "dtype", "has_gpu", "expected"),
    [
        ("auto", "bfloat16", False, NAME),
        ("sdpa", "bfloat16", False, "sdpa"),
        ("auto", "float32", False, "sdpa"),
        ("auto", "bfloat16", True, "sdpa"),
    ],
)
def test_it_is_chosen_on_a_cpu(
    attention: str, dtype: str, has_gpu: bool, expected: str, tmp_path: Path
) -> None:
    """`auto` chooses blocks on a CPU, in bfloat16; a user's own choice stands."""
    llama = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=32,
        architectures=["LlamaForCausalLM"],
    )
    llama.save_pretrained(tmp_path)
    with mock.patch.object(torch.cuda, "is_available", return_value=has_gpu):
        model = build_skeleton(
            tmp_path, ModelConfig(str(tmp_path), attention=attention, dtype=dtype)
        )
    assert model.config._attn_implementation == expected


def test_a_model_with_its_own_attention_keeps_it(tmp_path: Path) -> None:
    """Falcon keeps its own attention: it does not ask transformers which to call."""
    falcon = FalconConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=32,
        architectures=["FalconForCausalLM"],
    )
    falcon.save_pretrained(tmp_path)
    model = build_skeleton(tmp_path, ModelConfig(str(tmp_path), dtype="bfloat16"))
    assert model.config._attn_implementation == "sdpa"
