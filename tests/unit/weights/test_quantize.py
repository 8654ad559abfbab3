"""`quantize` writes what bitsandbytes would make of each matrix, in files that both programs
load."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qlora_dist.weights.quantize
from qlora_dist.errors import ModelError
from qlora_dist.model.nf4 import QuantFormat
from qlora_dist.weights.quantize import quantize
from tests.support.command import run_command, run_forked
from tests.support.expert_families import write_expert_family
from tests.support.families import gemma3_wrapper
from tests.support.models import (
    load_here,
    load_there,
    logits,
    save_with_transformers,
    spoiled,
    tensors_of,
)


@pytest.fixture(scope="module")
def tied_with_biases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 Qwen2 with biases on three projections and a tied head."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config)
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.1)
    folder = tmp_path_factory.mktemp("tied")
    model.save_pretrained(folder)
    return folder


def compare_everywhere(source: Path, out: Path, fmt: QuantFormat) -> None:
    """Check that `out` is `source` in 4 bits: parameters of quantizing on load, equal logits here
    and in transformers."""
    config = {"quantization": fmt.quant_type, "double_quant": fmt.double_quant}
    stored = load_here(out, **config)
    if fmt.block_size == 64:
        on_load = load_here(source, **config)
        expected, found = dict(on_load.named_parameters()), dict(stored.named_parameters())
        assert expected.keys() == found.keys()
        for name, param in expected.items():
            assert param.dtype == found[name].dtype
            assert torch.equal(param, found[name]), name
    there = load_there(out)
    assert there.is_loaded_in_4bit
    assert torch.equal(logits(stored), logits(there))
    assert logits(stored).std() > 0.05


@pytest.mark.parametrize(
    "fmt",
    [QuantFormat(), QuantFormat("fp4", False), QuantFormat("nf4", True, 128)],
    ids=["nf4", "fp4", "128"],
)
def test_both_programs_load_the_same_model(
    tiny_llama: Path, tmp_path: Path, fmt: QuantFormat
) -> None:
    """The stored bytes are those of quantizing on load; logits here and in transformers have equal
    bits."""
    quantize(str(tiny_llama), str(tmp_path / "out"), fmt)
    compare_everywhere(tiny_llama, tmp_path / "out", fmt)


def test_tied_heads_biases_and_float32_sources(tied_with_biases: Path, tmp_path: Path) -> None:
    """Biases stay 16-bit tensors, a tied head is stored once, and a float32 source is cast before
    it is quantized."""
    quantize(str(tied_with_biases), str(tmp_path / "out"), QuantFormat())
    compare_everywhere(tied_with_biases, tmp_path / "out", QuantFormat())
    tensors = tensors_of(tmp_path / "out")
    assert "lm_head.weight" not in tensors
    assert tensors["model.layers.0.self_attn.q_proj.bias"].dtype == torch.bfloat16


def test_file_is_what_transformers_would_save(tiny_llama: Path, tmp_path: Path) -> None:
    """Tensor names, types, bytes and quantization_config are those of quantizing and saving with
    transformers."""
    quantize(str(tiny_llama), str(tmp_path / "ours"), QuantFormat())
    save_with_transformers(
        tiny_llama, tmp_path / "theirs", bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    ours, theirs = tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name
    configs = [
        json.loads((tmp_path / who / "config.json").read_text()) for who in ("ours", "theirs")
    ]
    assert configs[0]["quantization_config"].pop("llm_int8_skip_modules") == ["lm_head"]
    assert configs[1]["quantization_config"].pop("llm_int8_skip_modules") is None
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert configs[0]["dtype"] == "bfloat16"


def test_output_is_cut_into_files(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file is larger than the limit unless one tensor is; the index names every tensor; both
    programs load it."""
    monkeypatch.setattr(qlora_dist.weights.writer, "MAX_FILE_BYTES", 50_000)
    out = tmp_path / "out"
    quantize(str(tiny_llama), str(out), QuantFormat())
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    assert [file.name for file in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert all(file.stat().st_size < 50_000 + 20_000 for file in files), (
        "the header comes on top of the tensors"
    )
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert index == {name: file.name for file in files for name in load_file(file)}
    compare_everywhere(tiny_llama, out, QuantFormat())


def test_command_copies_what_belongs_to_the_model(tiny_llama: Path, tmp_path: Path) -> None:
    """The command takes MODEL and OUT by position; tokenizer and generation config are copied;
    other users can read all files."""
    out = tmp_path / "deep" / "out"
    done = run_command(
        "quantize", tiny_llama, out, "--quantization", "fp4", "--double_quant", "false"
    )
    assert done.returncode == 0, done.stderr
    assert "MiB" in done.stdout
    assert {file.name for file in tiny_llama.iterdir()} == {file.name for file in out.iterdir()}
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (tiny_llama / name).read_bytes()
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["bnb_4bit_quant_type"], config["bnb_4bit_use_double_quant"]) == ("fp4", False)
    umask = os.umask(0)
    os.umask(umask)
    assert {file.stat().st_mode & 0o777 for file in out.iterdir()} == {0o666 & ~umask}
    assert [path.name for path in out.parent.iterdir()] == ["out"]

    again = run_forked("quantize", tiny_llama, out)
    assert again.returncode == 2
    assert "not empty" in again.stderr


def test_nothing_is_left_when_it_fails(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A matrix with a NaN is named and refused; neither OUT nor a partial folder remains, not even
    a stale one."""

    def put_nan(tensors: dict) -> None:
        tensors["model.layers.2.mlp.up_proj.weight"][7, 3] = float("nan")

    monkeypatch.setattr(
        qlora_dist.weights.writer, "MAX_FILE_BYTES", 10_000
    )  # some files are written before it is met
    source = spoiled(tiny_llama, tmp_path / "source", put_nan)
    work = tmp_path / "work"
    (work / ".out.partial").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"layers\.2\.mlp\.up_proj\.weight .*not finite"):
        quantize(str(source), str(work / "out"), QuantFormat())
    assert list(work.iterdir()) == []


def test_out_may_be_an_empty_folder_behind_a_link(tiny_llama: Path, tmp_path: Path) -> None:
    """If OUT is a link, often to a larger disk, the link stays and the model appears behind it."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    quantize(str(tiny_llama), str(tmp_path / "out"), QuantFormat())
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "model.safetensors").is_file()


def test_full_disk_is_said(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that fails, or that could not fit, ends with a message and leaves nothing."""

    def no_space(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(qlora_dist.weights.writer, "save_file", no_space)
        with pytest.raises(ModelError, match="No space left on device"):
            quantize(str(tiny_llama), str(tmp_path / "out"), QuantFormat())
    usage = type(qlora_dist.weights.quantize.shutil.disk_usage(tmp_path))(
        10**12, 10**12 - 1000, 1000
    )
    monkeypatch.setattr(qlora_dist.weights.quantize.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ModelError, match="GiB free"):
        quantize(str(tiny_llama), str(tmp_path / "out"), QuantFormat())
    assert list(tmp_path.iterdir()) == []


def test_4_bit_sources_and_full_targets_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    """Quantizing twice would lose precision twice, so a 4-bit source is refused; OUT is never
    overwritten."""
    quantize(str(tiny_llama), str(tmp_path / "out"), QuantFormat())
    with pytest.raises(ModelError, match="4 bits already"):
        quantize(str(tmp_path / "out"), str(tmp_path / "again"), QuantFormat())
    with pytest.raises(ModelError, match="not empty"):
        quantize(str(tiny_llama), str(tmp_path / "out"), QuantFormat())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ModelError, match="a file"):
        quantize(str(tiny_llama), str(tmp_path / "file"), QuantFormat())


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def with_own_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors[HEAD] = tensors[EMBEDDING] + 1


def with_names_of_wrappers(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[f"_orig_mod.module.{name}"] = tensors.pop(name)


def with_head_alone(tensors: dict[str, torch.Tensor]) -> None:
    tensors[HEAD] = tensors.pop(EMBEDDING)


@pytest.mark.parametrize("change", [with_own_head, with_names_of_wrappers, with_head_alone])
def test_what_training_reads_is_what_is_quantized(
    tied_with_biases: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None]
) -> None:
    """A head of its own in the files of a tied model, names of wrappers, and a tied weight under
    its other name: the 4-bit model is the one that training would make of these files."""
    source = spoiled(tied_with_biases, tmp_path / "source", change)
    quantize(str(source), str(tmp_path / "out"), QuantFormat())
    out = load_there(tmp_path / "out")
    head, embedding = out.get_output_embeddings().weight, out.get_input_embeddings().weight
    expected = tensors_of(tied_with_biases)[EMBEDDING].to(torch.bfloat16)
    assert torch.equal(embedding, expected)
    is_own = change is with_own_head
    assert torch.equal(head, tensors_of(source)[HEAD].to(torch.bfloat16) if is_own else expected)
    assert torch.equal(logits(out), logits(load_here(tmp_path / "out")))


def test_a_multimodal_wrapper_stays_whole(tmp_path: Path) -> None:
    """The language model of a wrapper is in 4 bits; its towers, which training does not read, stay
    in 16 bits, so that transformers misses nothing."""
    from transformers import AutoModelForCausalLM, Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(gemma3_wrapper()).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    quantize(str(tmp_path / "source"), str(tmp_path / "out"), QuantFormat())
    out = tmp_path / "out"
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    there = load_there(out)
    theirs = dict(there.named_parameters())
    towers = {name: param for name, param in model.named_parameters() if "language" not in name}
    assert len(towers) > 10
    for name, param in towers.items():
        if "lm_head" not in name:
            assert torch.equal(theirs[name], param), name
    assert theirs["model.language_model.layers.0.mlp.up_proj.weight"].dtype == torch.uint8
    assert torch.equal(logits(there), logits(load_here(out)))


def test_experts_stay_in_16_bits(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """transformers knows no experts in 4 bits: they are written in 16, which the log says, and a
    run that loads them quantizes them to the bytes of the 16-bit model's."""
    source = write_expert_family("mixtral", tmp_path / "source")
    quantize(str(source), str(tmp_path / "out"), QuantFormat())
    assert "experts stay in 16 bits" in capfd.readouterr().out
    out = load_there(tmp_path / "out")
    assert dict(out.named_parameters())["model.layers.0.mlp.experts.down_proj"].ndim == 3
    expected, found = (
        dict(load_here(folder).named_parameters()) for folder in (source, tmp_path / "out")
    )
    assert expected.keys() == found.keys()
    for name, param in expected.items():
        assert torch.equal(param, found[name]), name


def test_layers_that_transformers_keeps_in_16_bits_are_refused(tmp_path: Path) -> None:
    """Falcon's linear layers are of a class of their own, which transformers does not read in 4
    bits: the message says how to train all the same."""
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    FalconForCausalLM(config).save_pretrained(tmp_path / "source")
    with pytest.raises(ModelError, match=r"is a FalconLinear.*Train with the 16-bit model"):
        quantize(str(tmp_path / "source"), str(tmp_path / "out"), QuantFormat())
    assert not (tmp_path / "out").exists()
