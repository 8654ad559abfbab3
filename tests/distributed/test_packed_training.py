"""Samples in one row do not see each other: losses and gradients are those of the samples alone."""

import dataclasses
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import FalconH1Config, FalconH1ForCausalLM, LlamaConfig, LlamaForCausalLM

from qlora_dist.config.schema import IGNORE_INDEX, AdapterConfig, ModelConfig, TrainConfig
from qlora_dist.data.batch import MicroBatch, collate
from qlora_dist.data.samples import Sample, join
from qlora_dist.errors import ModelError
from qlora_dist.model import attention
from qlora_dist.model.adapters import adapter_parameters
from qlora_dist.model.loss import target_loss_sum
from qlora_dist.model.packing_check import check_packing
from qlora_dist.runtime.processes import start_runtime
from tests.support.built import build
from tests.support.command import run_rows
from tests.support.families import FAMILIES, GROUPED
from tests.support.processes import run_on_processes
from tests.support.training import lasting_rows, train_here

LENGTHS = (5, 23, 3, 9)
LIMIT = 1e-5
"""Relative distance; float32 sums in another order differ by 1e-6."""


def loss_of(model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
    return target_loss_sum(
        model, batch.input_ids, batch.attention_mask, batch.labels, batch.position_ids
    )


def gradients(model: torch.nn.Module, losses: list[torch.Tensor]) -> torch.Tensor:
    """Gradient of the sum of the losses, in one vector."""
    return torch.cat(
        [
            g.flatten()
            for g in torch.autograd.grad(sum(losses), list(adapter_parameters(model).values()))
        ]
    )


def only_targets_of(samples: list[Sample], chosen: int) -> list[Sample]:
    """The samples with the targets of all but one of them removed."""
    return [
        sample
        if number == chosen
        else Sample(sample.input_ids, [IGNORE_INDEX] * len(sample.labels))
        for number, sample in enumerate(samples)
    ]


def compare_all_families(folders: dict[str, Path]) -> None:
    runtime = start_runtime(seed=0, dtype="float32")
    for family, folder in folders.items():
        config = TrainConfig(
            model=ModelConfig(str(folder), dtype="float32"), adapter=AdapterConfig(rank=4)
        )
        parts, _ = build(config, folder, "single", runtime)
        model = parts.model.train()
        generator = torch.Generator().manual_seed(0)
        for param in adapter_parameters(
            model
        ).values():  # B is zero at first, and A without gradient then
            param.data.normal_(std=0.1, generator=generator)
        rows = [torch.randint(3, 320, (n,), generator=generator).tolist() for n in LENGTHS]
        samples = [Sample(ids, ids) for ids in rows]

        alone = [loss_of(model, collate([sample], 0)) for sample in samples]
        # Two packed rows of unequal length: samples 0, 1, 2 in one, 3 in the other, behind it
        # padding.
        packed = []
        for number in range(len(samples)):
            chosen = only_targets_of(samples, number)
            packed.append(loss_of(model, collate([join(chosen[:3]), join(chosen[3:])], 0)))
        difference = max(
            abs(one / other - 1).item() for one, other in zip(packed, alone, strict=True)
        )
        assert difference <= LIMIT, (family, difference)
        expected = gradients(model, alone)
        found = gradients(
            model, [loss_of(model, collate([join(samples[:3]), join(samples[3:])], 0))]
        )
        assert (found - expected).norm() <= LIMIT * expected.norm(), family

        with mock.patch.object(
            attention, "_BY_LENGTHS", model.config._attn_implementation
        ):  # both rows as one
            behind_each_other = loss_of(model, collate([join(samples[:3]), join(samples[3:])], 0))
        assert abs(behind_each_other / sum(alone) - 1) <= LIMIT, family

        # The same comparison where sample 2 sees its neighbors. By gradients: a loss is one number,
        # which a leak may leave where it was (by 7e-5 in one of 16 draws of weights), a gradient
        # not.
        leaking = collate([join(only_targets_of(samples, 2)[:3])], 0)
        positions = torch.arange(leaking.input_ids.shape[1]).unsqueeze(0)
        leaked = gradients(
            model, [loss_of(model, dataclasses.replace(leaking, position_ids=positions))]
        )
        unseen = gradients(model, [loss_of(model, collate([samples[2]], 0))])
        leak = ((leaked - unseen).norm() / expected.norm()).item()
        assert leak > 1e3 * LIMIT, f"{family}: of a leak this comparison would see only {leak:.1e}"
        check_packing(model, runtime.device, 64)

    forward = type(model).forward

    def without_positions(self, *arguments, position_ids=None, **keywords):
        return forward(self, *arguments, **keywords)

    with (
        mock.patch.object(type(model), "forward", without_positions),
        pytest.raises(ModelError) as error,
    ):
        check_packing(model, runtime.device, 64)
    assert "samples in one row would see each other" in str(error.value)


def leak_in_long_rows(folder: Path) -> None:
    """Run a model with a window of 8 whose samples see each other in rows of over 20 tokens."""
    runtime = start_runtime(seed=0, dtype="float32")
    config = TrainConfig(model=ModelConfig(str(folder), dtype="float32"))
    model = build(config, folder, "single", runtime)[0].model.eval()
    forward = type(model).forward

    def leaking(self, *arguments, position_ids=None, **keywords):
        is_long = position_ids.shape[1] > 20
        return forward(self, *arguments, position_ids=None if is_long else position_ids, **keywords)

    with mock.patch.object(type(model), "forward", leaking):
        check_packing(model, runtime.device, max_seq_len=23)
        with pytest.raises(ModelError, match="of a sample of 16 tokens move by"):
            check_packing(model, runtime.device, max_seq_len=24)


def test_packing_is_checked_beyond_the_window(families: dict[str, Path]) -> None:
    """A model whose samples see each other only in rows longer than its window is refused, where a
    row may be so long."""
    run_on_processes(leak_in_long_rows, 1, families["mistral"])


ROTATIONS = {
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 32,
        "rope_theta": 10000.0,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
}
"""Rotary positions whose frequencies the longest sample of a forward decides, above 32 tokens."""


def compare_micro_batches(root: Path) -> None:
    """Compare micro-batches of one, two and eight samples, and one packed row."""
    runtime = start_runtime(seed=0, dtype="float32")
    generator = torch.Generator().manual_seed(0)
    lengths = (5, 23, 3, 9, 32, 14, 31, 7)
    samples = [
        Sample(ids := torch.randint(3, 320, (n,), generator=generator).tolist(), ids)
        for n in lengths
    ]
    for kind, parameters in ROTATIONS.items():
        torch.manual_seed(0)
        known = 32 if kind == "dynamic" else 128
        text = {**GROUPED, "max_position_embeddings": known, "rope_parameters": parameters}
        folder = root / kind
        LlamaForCausalLM(LlamaConfig(**text)).save_pretrained(folder)
        config = TrainConfig(model=ModelConfig(str(folder), dtype="float32"))
        model = build(config, folder, "single", runtime)[0].model.train()
        losses = {
            size: sum(
                loss_of(model, collate(samples[first : first + size], 0)).item()
                for first in range(0, len(samples), size)
            )
            for size in (1, 2, 8)
        }
        losses["packed"] = loss_of(model, collate([join(samples)], 0)).item()
        for batched in losses.values():
            assert abs(batched / losses[1] - 1) <= LIMIT, (kind, losses)


def test_samples_within_the_positions_do_not_depend_on_their_neighbors(tmp_path: Path) -> None:
    """Within the length from which on LongRoPE and dynamic NTK change their frequencies, the loss
    of samples is the same in micro-batches of 1, 2 and 8, and packed; longer ones are refused."""
    run_on_processes(compare_micro_batches, 1, tmp_path)


def test_packed_samples_are_trained_as_if_alone(families: dict[str, Path]) -> None:
    """In every family each sample's loss, and the gradient of all samples, are within 1e-5 of those
    without packing, with and without padding. A sample that sees its neighbors is noticed, and a
    model whose samples would is refused."""
    assert families.keys() == FAMILIES.keys()
    run_on_processes(compare_all_families, 1, families)


def train_packed(root: Path, model: Path, data: Path, backend: str, processes: int) -> None:
    settings = {
        "model": {"path": str(model), "dtype": "float32"},
        "adapter": {"rank": 4, "alpha": 8},
        "data": {"train": str(data), "eval": str(data), "max_seq_len": 96, "packing": True},
        "optim": {"epochs": 2, "lr": 2e-3, "grad_accum_steps": 4 // processes},
        "checkpoint": {"every": 3},
        "parallel": {"backend": backend},
        "logging": {"tensorboard": False, "profile_steps": 1},
    }
    assert not train_here(root / f"{backend}-{processes}", settings, stop_after=5)
    assert train_here(root / f"{backend}-{processes}", settings)


def test_packed_runs_are_equal_on_any_number_of_ranks(
    tmp_path: Path, tiny_llama: Path, chat_file: Path
) -> None:
    """One process, and two under fsdp and zero3, have equal losses, through a stop; every token of
    every epoch is seen once. The measured values are plausible, and rank 0 alone left files."""
    runs = [("single", 1), ("fsdp", 2)] + [("zero3", 2)] * (find_spec("deepspeed") is not None)
    for backend, processes in runs:
        run_on_processes(
            train_packed, processes, tmp_path, tiny_llama, chat_file, backend, processes
        )
    one, *others = (
        lasting_rows(tmp_path / f"{backend}-{processes}") for backend, processes in runs
    )
    for other in others:
        assert len(one) == len(other)
        for row, reference in zip(other, one, strict=True):
            assert row == pytest.approx(reference, rel=1e-5)
    tokens = sum(row["num_tokens"] for row in one if "loss" in row)
    assert tokens == 2 * 2153  # what the notes say of the file, twice
    for row in run_rows(tmp_path / "fsdp-2"):
        if "loss" in row:
            assert 0 < row["mfu"] < 1
            assert 0 < row["target_tokens_per_second"] < row["tokens_per_second"]
    assert {
        file.name.partition(".")[0] for file in (tmp_path / "fsdp-2" / "profile").iterdir()
    } == {"rank0"}


def test_a_hybrid_model_that_mostly_tells_samples_apart_is_refused(tmp_path: Path) -> None:
    """A FalconH1 has attention, which follows the positions, beside Mamba, which does not: samples
    change each other's logits a little, and the check sees it."""
    config = FalconH1Config(
        **GROUPED,
        mamba_d_ssm=64,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=8,
        mamba_n_groups=1,
        mamba_chunk_size=8,
    )
    torch.manual_seed(0)
    model = FalconH1ForCausalLM(config)
    for param in model.parameters():
        if param.ndim > 1:
            torch.nn.init.normal_(param, std=0.08)
    model.save_pretrained(tmp_path)
    runtime = start_runtime(seed=0, dtype="float32")
    settings = TrainConfig(model=ModelConfig(str(tmp_path), dtype="float32"))
    built = build(settings, tmp_path, "single", runtime)[0].model
    with pytest.raises(ModelError, match="samples in one row would see each other"):
        check_packing(built, runtime.device, 64)
