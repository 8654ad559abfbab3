"""Experts in 4 bits compute what transformers and peft compute on the same weights."""

from pathlib import Path
from unittest import mock

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from qlora_dist.config.schema import AdapterConfig, ModelConfig
from qlora_dist.errors import ConfigError
from qlora_dist.memory.policy import Recompute
from qlora_dist.memory.recompute import set_recompute
from qlora_dist.model import expert_products
from qlora_dist.model.adapters import adapter_parameters, add_adapters
from qlora_dist.model.experts import (
    QuantizedStack,
    expert_stacks,
    experts_per_token,
    take_token_counts,
)
from qlora_dist.model.inventory import Inventory
from qlora_dist.model.nf4 import QuantFormat
from qlora_dist.model.parts import ModelParts, lora_layers
from qlora_dist.model.skeleton import build_skeleton
from qlora_dist.runtime.processes import Runtime, start_runtime
from tests.support.adapted import build_adapted
from tests.support.expert_families import EXPERT_FAMILIES, write_expert_family
from tests.support.models import dequantized_there, mend_bitsandbytes


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return start_runtime(seed=0, dtype="float32")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("experts")
    return {name: write_expert_family(name, root / name) for name in EXPERT_FAMILIES}


def random_ids() -> torch.Tensor:
    return torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(3))


def in_peft(ours: nn.Module, folder: Path) -> nn.Module:
    """Return the adapted model in stock transformers and peft, with our weights as numbers."""
    config = ours.peft_config["default"]
    base = dequantized_there(ours, folder).requires_grad_(False)
    there = get_peft_model(
        base,
        LoraConfig(
            r=config.r,
            lora_alpha=config.lora_alpha,
            target_modules=config.target_modules,
            target_parameters=config.target_parameters,
        ),
    )
    mine, theirs = adapter_parameters(ours), adapter_parameters(there)
    assert mine.keys() == theirs.keys()
    for name, param in mine.items():
        theirs[name].data.copy_(param.data)
    return there.train()


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_loss_and_gradients_are_those_of_peft(
    folders: dict[str, Path], runtime: Runtime, family: str
) -> None:
    """In each family the loss is that of transformers and peft on the same dequantized weights, and
    so is the gradient of each adapter; each matrix has the bytes of bitsandbytes."""
    ours = build_adapted(folders[family], runtime)
    there = in_peft(ours, folders[family])
    ids = random_ids()
    loss, expected = ours(input_ids=ids, labels=ids).loss, there(input_ids=ids, labels=ids).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    theirs = adapter_parameters(there)
    for name, param in adapter_parameters(ours).items():
        difference = (param.grad - theirs[name].grad).norm()
        assert difference <= 1e-5 * theirs[name].grad.norm(), name


def test_a_matrix_has_the_bytes_of_bitsandbytes(folders: dict[str, Path], runtime: Runtime) -> None:
    """Each expert's matrix is quantized by itself, with a mean of its own for its constants."""
    from transformers import AutoModelForCausalLM

    ours = build_adapted(folders["mixtral"], runtime).get_base_model()
    plain = AutoModelForCausalLM.from_pretrained(folders["mixtral"], dtype=torch.bfloat16)
    stacks = {name.replace(".base_layer", ""): one for name, one in expert_stacks(ours).items()}
    assert stacks.keys() == expert_stacks(plain).keys()
    for name, matrices in expert_stacks(plain).items():
        stack = stacks[name]
        for number, matrix in enumerate(matrices.data):
            packed, state = bnb.functional.quantize_4bit(
                matrix, quant_type="nf4", compress_statistics=True
            )
            each = {
                key: getattr(stack, key).view(stack.shape[0], -1)[number]
                for key in ("weight", "absmax", "absmax_scale", "absmax_offset")
            }
            assert torch.equal(each["weight"], packed.view(-1))
            assert torch.equal(each["absmax"], state.absmax)
            assert torch.equal(each["absmax_scale"], state.state2.absmax)
            assert torch.equal(each["absmax_offset"], state.offset.view(1))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_no_other_reading_of_the_stacks_passes(
    folders: dict[str, Path], runtime: Runtime, family: str
) -> None:
    """With a constant of its own in each row of A and column of B, for each expert and rank, the
    logits are those of peft; with experts and ranks swapped in B or A they are not."""
    ours = build_adapted(folders[family], runtime)
    adapters = {
        name: param for name, param in adapter_parameters(ours).items() if "experts" in name
    }
    for name, param in adapters.items():
        values = torch.linspace(-1.0, 1.0, param.shape[0 if "lora_A" in name else 1])
        param.data.copy_(values[:, None] if "lora_A" in name else values[None]).mul_(0.1)
    ids = random_ids()
    with torch.no_grad():
        expected = in_peft(ours, folders[family])(input_ids=ids).logits
        assert torch.allclose(ours(input_ids=ids).logits, expected, atol=1e-3)
        for kind in ("lora_A", "lora_B"):
            for name, param in adapters.items():
                if kind in name:
                    dim = 0 if kind == "lora_A" else 1
                    apart = (8, 4) if dim == 0 else (4, 8)
                    swapped = param.data.unflatten(dim, apart).transpose(dim, dim + 1)
                    before = param.data
                    param.data = swapped.flatten(dim, dim + 1).contiguous()
                    moved = (ours(input_ids=ids).logits - expected).abs().max()
                    param.data = before
                    assert moved > 5e-3, name


@pytest.mark.parametrize("group_bytes", [1, 2 * 64 * 96 * 4, 2**28])
@pytest.mark.parametrize("is_grouped", [False, True])
def test_groups_and_kernels_do_not_change_the_result(
    folders: dict[str, Path], runtime: Runtime, group_bytes: int, is_grouped: bool
) -> None:
    """One expert at a time or all at once, one product or one kernel for all: the same loss and
    gradients."""
    ids, found = random_ids(), []
    for arguments in ((2**28, False), (group_bytes, is_grouped)):
        with (
            mock.patch.object(expert_products, "_GROUP_BYTES", arguments[0]),
            mock.patch.object(expert_products, "_is_grouped", lambda *_, use=arguments[1]: use),
        ):
            model = build_adapted(folders["gpt_oss"], runtime)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            grads = [param.grad.flatten() for param in adapter_parameters(model).values()]
            found.append((loss.item(), torch.cat(grads)))
    (loss, grad), (other_loss, other_grad) = found
    assert other_loss == pytest.approx(loss, rel=1e-6)
    assert (grad - other_grad).norm() <= 1e-5 * grad.norm()


@pytest.mark.parametrize("family", ["llama4", "gpt_oss", "deepseek_v3"])
def test_recomputation_keeps_the_bits(
    folders: dict[str, Path], runtime: Runtime, family: str
) -> None:
    """Layers that keep everything, recompute selectively or fully have equal losses and gradients,
    and each token counts once for each of its experts."""
    ids, found, counts = random_ids(), [], []
    for kind in ("none", "selective", "full"):
        model = build_adapted(folders[family], runtime, recompute="full")
        parts = ModelParts(model)
        number = len(parts.layers)
        choices = {"none": (0, 0), "selective": (number, 0), "full": (0, number)}
        set_recompute(parts.layers, Recompute(number, *choices[kind]))
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        grads = [param.grad.flatten() for param in adapter_parameters(model).values()]
        found.append(torch.cat([loss.detach().view(1), *grads]))
        counts.append(take_token_counts(parts.base))
    assert all(torch.equal(one, found[0]) for one in found)
    assert all(torch.equal(one, counts[0]) for one in counts)
    num_layers = len(counts[0]) // 8
    assert counts[0].sum() == ids.numel() * experts_per_token(parts.dimensions) * num_layers


def test_experts_without_tokens_are_not_dequantized(
    folders: dict[str, Path], runtime: Runtime
) -> None:
    """One token makes each product of a layer dequantize two of eight experts."""
    model = build_adapted(folders["mixtral"], runtime)
    asked: list[int] = []
    run = QuantizedStack.dequantized

    def counted(self: QuantizedStack, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        asked.append(last - first)
        return run(self, first, last, dtype)

    with mock.patch.object(QuantizedStack, "dequantized", counted), torch.no_grad():
        model(input_ids=torch.tensor([[5]]))
    assert sum(asked) == 2 * 2 * 2  # layers, products, experts


def test_a_grouped_kernel_that_is_wrong_is_not_used() -> None:
    """A device whose grouped products differ from single ones, or that has none, gets the loop."""
    device = torch.device("cpu")
    expert_products.groups_are_right.cache_clear()
    assert expert_products.groups_are_right(device, torch.float32)
    run = nn.functional.grouped_mm
    for wrong in (lambda *a, **k: run(*a, **k) * 1.1, mock.Mock(side_effect=RuntimeError("none"))):
        expert_products.groups_are_right.cache_clear()
        with mock.patch.object(nn.functional, "grouped_mm", wrong):
            assert not expert_products.groups_are_right(device, torch.float32)
    expert_products.groups_are_right.cache_clear()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(3, 64, 96), (3, 10, 10), (2, 5, 7)])
def test_dequantized_experts_are_the_matrices(
    quant_type: str, double_quant: bool, shape: tuple[int, int, int]
) -> None:
    """Any range of experts dequantizes to what bitsandbytes makes of each, blocks cut or not."""
    mend_bitsandbytes()
    fmt = QuantFormat(quant_type, double_quant)
    stack = QuantizedStack(torch.Size(shape), fmt, torch.float32).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    matrices, parts = torch.randn(shape, generator=generator).bfloat16(), []
    for matrix in matrices:
        packed, state = bnb.functional.quantize_4bit(
            matrix, quant_type=quant_type, compress_statistics=double_quant
        )
        state.dtype = torch.float32
        parts.append((packed, state))
    stack.weight.copy_(torch.cat([packed for packed, _ in parts]))
    stack.absmax.copy_(torch.cat([state.absmax for _, state in parts]))
    if double_quant:
        stack.absmax_scale.copy_(torch.cat([state.state2.absmax for _, state in parts]))
        stack.absmax_offset.copy_(torch.stack([state.offset for _, state in parts]))
    expected = [bnb.functional.dequantize_4bit(*part) for part in parts]
    for first, last in ((0, shape[0]), (1, 2)):
        found = stack.dequantized(first, last, torch.float32)
        assert torch.equal(found, torch.stack(expected[first:last]))


def skeleton(folder: Path):
    return build_skeleton(folder, ModelConfig(path=str(folder)))


def test_attention_only_leaves_the_experts_alone(folders: dict[str, Path]) -> None:
    """The short form adapts the projections of attention, and says so of the stacks."""
    config = AdapterConfig(rank=4, target_modules="attention-only")
    model = add_adapters(skeleton(folders["qwen3_moe"]), config, "base")
    found = Inventory.of(ModelParts(model))
    assert {name.rpartition(".")[2] for name in found.adapted} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    reason = "not in adapter.target_modules"
    assert found.without_adapter["model.layers.*.mlp.experts.down_proj"] == (2, reason)


def test_single_stacks_can_be_named(folders: dict[str, Path]) -> None:
    """A list may name one stack beside layers."""
    config = AdapterConfig(rank=4, target_modules=["q_proj", "experts.down_proj"])
    model = add_adapters(skeleton(folders["mixtral"]), config, "base")
    found = Inventory.of(ModelParts(model))
    assert set(found.adapted) == {
        "model.layers.*.self_attn.q_proj",
        "model.layers.*.mlp.experts.down_proj",
    }
    assert len(list(lora_layers(model))) == 4


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({"dropout": 0.1}, "adapter.dropout is 0.1.*Set it to 0"),
        ({"use_dora": True}, "adapter.use_dora is True.*Set it to false"),
        ({"target_modules": ["gate_proj"]}, "takes for layers of experts.*experts.gate_up_proj"),
    ],
)
def test_what_adapters_on_experts_cannot_do_is_refused(
    folders: dict[str, Path], adapter: dict, words: str
) -> None:
    """Dropout, DoRA, and names that peft takes for others, with the remedy."""
    with pytest.raises(ConfigError, match=words):
        add_adapters(skeleton(folders["qwen3_moe"]), AdapterConfig(rank=4, **adapter), "base")
