"""Files that would make another model than their config.json says: named, or refused."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    ApertusConfig,
    AutoModelForCausalLM,
    FalconConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
)

from qlora_dist.build import build_model
from qlora_dist.config.schema import ModelConfig, TrainConfig
from qlora_dist.errors import ModelError
from qlora_dist.metrics.console import Reporter
from qlora_dist.model.nf4 import QuantFormat, QuantizedLinear
from qlora_dist.model.parts import base_model
from qlora_dist.parallel.choice import make_backend
from qlora_dist.runtime.processes import start_runtime
from qlora_dist.weights.description import describe_base
from qlora_dist.weights.files import weight_files
from qlora_dist.weights.quantize import quantize
from tests.support.families import GROUPED

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Path) -> Path:
    """A copy of a model folder, to be spoiled."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Write tensors into the folder's file; None removes one. Two underscores stand for a dot."""
    weights = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor is None:
            weights.pop(name.replace("__", "."))
        else:
            weights[name.replace("__", ".")] = tensor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def set_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def build(folder: Path, **model: object) -> tuple[torch.nn.Module, str]:
    """Load a folder as a run does; returns the model and the log."""
    runtime, log = start_runtime(seed=0, dtype="float32"), io.StringIO()
    config = TrainConfig(model=ModelConfig(str(folder), dtype="float32", **model))
    backend = make_backend("single", config, runtime)
    return build_model(config, folder, backend, Reporter(True, file=log)).model, log.getvalue()


def test_model_safetensors_counts_alone(folder: Path) -> None:
    """A copy beside it, and an index of other files, are not read; the log names the copy."""
    zeros = {
        name: torch.zeros_like(t) for name, t in load_file(folder / "model.safetensors").items()
    }
    save_file(zeros, folder / "older.safetensors")
    index = {"weight_map": dict.fromkeys(zeros, "older.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert {path.name for path in weight_files(folder).values()} == {"model.safetensors"}
    model, log = build(folder)
    assert "older.safetensors is not read" in log
    assert base_model(model).get_input_embeddings().weight.norm() > 0


def test_two_files_with_one_tensor_are_refused(folder: Path) -> None:
    """Without an index and without `model.safetensors` nothing says which of them counts."""
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    with pytest.raises(ModelError, match=r"a\.safetensors and .*b\.safetensors both hold the"):
        weight_files(folder)


def shard(folder: Path, **extra: torch.Tensor) -> None:
    """Spread the folder's tensors over two files and an index; `extra` goes to the first file, and
    not into the index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        more = {k.replace("__", "."): v for k, v in extra.items()} if file[0] == "a" else {}
        save_file({**{name: weights[name] for name in part}, **more}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_tensors_that_an_index_does_not_list_are_seen(folder: Path, tmp_path: Path) -> None:
    """transformers reads them: a bias of a decoder layer is refused, another tensor is named."""
    layers = Path(shutil.copytree(folder, tmp_path / "layers"))
    shard(layers, model__layers__0__self_attn__q_proj__bias=torch.ones(64))
    with pytest.raises(ModelError, match=r"no place for, such as .*q_proj\.bias"):
        build(layers)
    shard(folder, model__norm__bias=torch.ones(64))
    assert "are not read: model.norm.bias" in build(folder)[1]


def test_a_tensor_in_another_file_than_the_index_says_is_refused(folder: Path) -> None:
    """transformers would take the one of the last file: the message names tensor and files."""
    name = "model.layers.0.mlp.down_proj.weight"
    assert sorted(load_file(folder / "model.safetensors")).index(name) % 2 == 1
    shard(folder, **{name: torch.zeros(64, 112, dtype=torch.bfloat16)})
    with pytest.raises(ModelError, match=rf"a\.safetensors holds .*{name}, but .* b\.safetensors"):
        build(folder)


def test_an_index_without_tensors_is_refused(folder: Path) -> None:
    """The message names the index."""
    shard(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(ModelError, match=r"index\.json has no weight_map"):
        build(folder)


@pytest.mark.parametrize("suffix", ["quant_map", "scale"])
def test_quantization_left_over_beside_16_bit_weights_is_refused(folder: Path, suffix: str) -> None:
    """Nothing would read it, and the weights may mean something else without it."""
    name = f"model.layers.1.mlp.up_proj.weight.{suffix}"
    change(folder, **{name: torch.ones(16)})
    with pytest.raises(ModelError, match=rf"no place for, such as {name}"):
        build(folder)


@pytest.mark.parametrize("is_same", [True, False])
def test_a_head_of_its_own_stays(folder: Path, is_same: bool) -> None:
    """A tied model whose files hold another head keeps it, and the log says so."""
    embedding = load_file(folder / "model.safetensors")[EMBEDDING]
    change(folder, lm_head__weight=embedding.clone() if is_same else embedding + 1)
    set_config(folder, tie_word_embeddings=True)
    model, log = build(folder)
    base = base_model(model)
    head, ours = base.get_output_embeddings().weight, base.get_input_embeddings().weight
    assert (head is ours) == is_same
    assert ("lm_head.weight with other values" in log) != is_same
    stored = load_file(folder / "model.safetensors")[HEAD].float()
    assert torch.equal(head, stored)


def test_a_tied_weight_is_found_under_its_other_name(folder: Path) -> None:
    """Files that hold the head alone give the embedding its values."""
    embedding = load_file(folder / "model.safetensors")[EMBEDDING]
    change(folder, lm_head__weight=embedding + 1, model__embed_tokens__weight=None)
    set_config(folder, tie_word_embeddings=True)
    base = base_model(build(folder)[0])
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
    stored = load_file(folder / "model.safetensors")[HEAD].float()
    assert torch.equal(base.get_input_embeddings().weight, stored)


@pytest.mark.parametrize(
    "name", ["model.layers.3.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"]
)
def test_decoder_weights_without_a_place_are_refused(folder: Path, name: str) -> None:
    """A layer more than config.json describes, or a bias: the model would be another one."""
    change(folder, **{name.replace(".", "__"): torch.ones(4)})
    with pytest.raises(
        ModelError, match=r"decoder weights that its config\.json has no place"
    ) as e:
        build(folder)
    assert name in str(e.value)


def test_other_tensors_without_a_place_are_named(folder: Path) -> None:
    """A tower that text does not need is not read; what older files computed needs no word."""
    rotations = {
        f"model__layers__{i}__self_attn__rotary_emb__inv_freq": torch.ones(2) for i in (0, 1)
    }
    change(folder, tower__patch__weight=torch.ones(2), **rotations)
    _, log = build(folder)
    assert "the files hold 1 tensors that this model has no place for" in log
    assert "tower.patch.weight" in log


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_of_wrappers_are_understood(folder: Path, prefix: str) -> None:
    """Weights saved from a data-parallel or compiled model are those of the model."""
    plain, _ = build(folder)
    weights = load_file(folder / "model.safetensors")
    save_file({prefix + name: t for name, t in weights.items()}, folder / "model.safetensors")
    wrapped, log = build(folder)
    for (name, one), other in zip(plain.named_parameters(), wrapped.parameters(), strict=True):
        assert ".lora_A." in name or torch.equal(one, other)
    assert "no place" not in log


@pytest.mark.parametrize("prefix", ["module.", "language_model."])
def test_names_of_4_bit_files_are_those_of_the_model(
    folder: Path, tmp_path: Path, prefix: str
) -> None:
    """4-bit layers are found under other names as well: those of a wrapper, and those that
    transformers writes for a language model inside a multimodal one."""
    if prefix == "language_model.":
        folder = tmp_path / "wrapped"
        save_multimodal(folder)
    stored = tmp_path / "stored"
    quantize(str(folder), str(stored), QuantFormat("nf4", double_quant=True))
    weights = load_file(stored / "model.safetensors")
    if prefix == "module.":
        renamed = {prefix + name: tensor for name, tensor in weights.items()}
    else:  # as transformers names them in files: language_model.model.layers
        renamed = {
            name.replace("model.language_model.", "language_model.model."): tensor
            for name, tensor in weights.items()
        }
    assert renamed.keys() != weights.keys()
    save_file(renamed, stored / "model.safetensors", metadata={"format": "pt"})
    ours, on_load = build(stored)[0], build(folder)[0]
    ids = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(ours.eval()(ids).logits, on_load.eval()(ids).logits)
    assert any(isinstance(module, QuantizedLinear) for module in ours.modules())


def save_multimodal(folder: Path) -> None:
    """Write a Gemma 3 with a vision tower."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    }
    text = {**GROUPED, "head_dim": 16, "sliding_window": 8}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)


def test_one_tensor_under_two_names_is_refused(folder: Path) -> None:
    """Nothing says which of two tensors counts that have one name in the model."""
    weights = load_file(folder / "model.safetensors")
    change(folder, _orig_mod__model__embed_tokens__weight=weights[EMBEDDING] + 1)
    with pytest.raises(ModelError, match=rf"{EMBEDDING} twice, as _orig_mod\.{EMBEDDING} and as"):
        build(folder)


def test_a_merged_model_with_an_entry_left_over(folder: Path) -> None:
    """16-bit weights under a 4-bit config.json: the message says which entry to remove."""
    set_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(ModelError, match=r"remove quantization_config from its config\.json"):
        build(folder)


def test_linear_layers_of_another_class_are_in_4_bits(tmp_path: Path) -> None:
    """Falcon's are a subclass of `nn.Linear`: all of its decoder layers are quantized."""
    config = FalconConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=False
    )
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path)
    said: list[str] = []
    model = describe_base(tmp_path, ModelConfig(str(tmp_path), dtype="float32"), said.append)
    quantized = [name for name, m in model.named_modules() if isinstance(m, QuantizedLinear)]
    assert len(quantized) == 2 * 4
    loaded, _ = build(tmp_path)
    logits = loaded(input_ids=torch.arange(8).unsqueeze(0)).logits
    assert logits.isfinite().all()


def test_saved_buffers_are_read(tmp_path: Path) -> None:
    """Numbers that are saved with a model, but are no parameters, have the values of the files: an
    Apertus with other constants in its activations has the logits that transformers gives it."""
    config = ApertusConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    beta = "model.layers.1.mlp.act_fn.beta"
    weights = load_file(tmp_path / "model.safetensors")
    change(tmp_path, **{beta: weights[beta] + 2})
    ids = torch.arange(8).unsqueeze(0)
    ours, log = build(tmp_path, quantization="none")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        torch.testing.assert_close(ours.eval()(input_ids=ids).logits, expected)
    assert "no place" not in log
