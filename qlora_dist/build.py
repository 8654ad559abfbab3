"""Construction of a model from its folder: described on meta, adapted, sharded, filled."""

# Tested by tests/distributed/test_sharding.py and tests/e2e/test_fast_paths.py.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from peft import PeftModel
from transformers import GenerationConfig, PreTrainedTokenizerBase

from qlora_dist.config.schema import TrainConfig
from qlora_dist.data.tokenizer import load_tokenizer
from qlora_dist.memory.recompute import apply_recompute
from qlora_dist.metrics.console import Reporter
from qlora_dist.model.adapters import (
    add_adapters,
    check_adapter_fits,
    init_adapters,
    load_adapter_weights,
    wrap_with_saved_adapter,
)
from qlora_dist.model.compile import compile_layers
from qlora_dist.model.dora import init_magnitudes
from qlora_dist.model.fused_norm_mlp import fuse_norms_and_mlps
from qlora_dist.model.lora_linear import fuse_adapters
from qlora_dist.model.parts import ModelParts, decoder_layers
from qlora_dist.model.positions import check_positions
from qlora_dist.parallel.backend import Backend
from qlora_dist.parallel.checks import check_fits, verify_base
from qlora_dist.run.adapter_folder import AdapterRecord, recorded_base
from qlora_dist.runtime.processes import Runtime
from qlora_dist.weights.description import describe_base
from qlora_dist.weights.files import looks_like_hub_name, model_fingerprint, resolve_model_folder
from qlora_dist.weights.loading import checkpoint_bytes, load_base_weights, materialize
from qlora_dist.weights.names import unused_note


def build_model(
    config: TrainConfig,
    folder: Path,
    backend: Backend,
    reporter: Reporter,
    check_in: Callable[[], None] = lambda: None,
    longest: int = 0,
) -> ModelParts:
    """Build this rank's part of the adapted model; a collective.

    No rank ever holds more of the base than its shard and one layer.

    Args:
        folder: the result of `resolve_model_folder` for `model.path`.
        check_in: called while weights are read, by all ranks alike; may raise to end the loading.
        longest: tokens of the longest sample, which the model's positions must take.

    Raises:
        ModelError, ConfigError: the folder, its weights or the adapter's targets cannot be used.
        LaunchError: `memory.compile` is set and nothing can be compiled here.
        CheckpointError: the adapter at `adapter.path` does not fit the model.
    """
    runtime = backend.runtime
    assert config.model.dtype == runtime.dtype_name, "model.dtype is to be settled before"
    path = config.model.path
    skeleton = describe_base(folder, config.model, reporter.log)
    is_shared = config.data.packing or config.optim.micro_batch_size > 1
    if note := check_positions(skeleton, longest, is_shared):
        reporter.log(note)
    base_path = path if looks_like_hub_name(path) else str(folder.resolve())
    model = add_adapters(skeleton, config.adapter, base_path)
    saved_adapter = None if config.adapter.path is None else Path(config.adapter.path)
    if saved_adapter is not None:
        check_adapter_fits(model, saved_adapter)
        if note := _other_base_note(saved_adapter, folder):
            reporter.log(note)
    if unfused := fuse_adapters(model):
        reporter.log(unfused)
    parts = ModelParts(model)
    # Either or: the compiler fuses more when it sees single operations.
    if config.memory.compile:
        compile_layers(parts.layers, runtime.device)
        reporter.log("decoder layers: compiled in the first steps, which take longer")
    else:
        fuse_norms_and_mlps(model, runtime.device)
    # Before the cut: sharding hooks must wrap the recomputing forward, not be recomputed by it.
    apply_recompute(parts.layers, config.memory)
    check_fits(parts, backend)
    backend.cut(parts)
    materialize(model, backend.home, runtime.device)
    with reporter.loading(checkpoint_bytes(folder), len(parts.layers), check_in) as on_progress:
        stats = load_base_weights(model, folder, runtime.device, on_progress)
    if stats.unused:
        reporter.log(unused_note(stats.unused))
    with reporter.working("checking the weights"):
        verify_base(parts, backend)
    if saved_adapter is not None:
        load_adapter_weights(model, saved_adapter)
    else:
        init_adapters(model, config.seed, config.adapter.init)
        if config.adapter.use_dora:
            # Norms of the loaded weights, so after them: one gathered layer at a time.
            init_magnitudes(backend.whole_layers(parts))
    return parts


def load_trained(
    adapter_folder: Path, recipe: AdapterRecord, *, runtime: Runtime, reporter: Reporter
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load a trained adapter on its 4-bit base, whole on this process's device; and its tokenizer.

    The model is in eval mode. It computes in the runtime's type, whichever it was trained in.

    Raises:
        ModelError: the base model is not at the path that the adapter names, or cannot be loaded.
        CheckpointError: the adapter does not fit that base model.
    """
    folder = resolve_model_folder(recipe.base.path)
    trained_in, note = recipe.base.dtype, runtime.compute_note
    if trained_in not in ("auto", runtime.dtype_name):
        note += f"; the adapter was trained in {trained_in}"
    reporter.log(note)
    if other := _other_base_note(adapter_folder, folder):
        reporter.log(other)
    config = replace(recipe.base, dtype=runtime.dtype_name)
    skeleton = describe_base(folder, config, reporter.log)
    if (folder / "generation_config.json").is_file():
        skeleton.generation_config = GenerationConfig.from_pretrained(folder)
    model = wrap_with_saved_adapter(skeleton, adapter_folder)
    fuse_adapters(model)
    materialize(model, runtime.device, runtime.device)
    with reporter.loading(checkpoint_bytes(folder), len(decoder_layers(model))) as on_progress:
        load_base_weights(model, folder, runtime.device, on_progress)
    load_adapter_weights(model, adapter_folder)
    return model.eval(), load_tokenizer(adapter_folder, recipe.base.trust_remote_code)


def _other_base_note(adapter_folder: Path, folder: Path) -> str | None:
    """Say that a model folder holds other files than an adapter was trained on; else None."""
    if recorded_base(adapter_folder) in ("", model_fingerprint(folder)):
        return None
    return (
        f"model folder {folder}: its files are not those that the adapter {adapter_folder} was "
        "trained on (config.json or weights differ). On another model it means something else; on "
        "the same one in another format, such as 4 bits, it does not"
    )
