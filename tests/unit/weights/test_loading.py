"""Loading of stored models: accepted byte for byte, or refused with one message."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qlora_dist.config.schema import ModelConfig
from qlora_dist.errors import ConfigError, ModelError
from qlora_dist.model.nf4 import QuantFormat, QuantizedLinear
from qlora_dist.model.skeleton import build_skeleton
from qlora_dist.weights.loading import load_base_weights, materialize
from qlora_dist.weights.quantize import quantize
from qlora_dist.weights.reader import SafetensorsReader
from tests.support.models import (
    edit_json,
    load_here,
    load_there,
    logits,
    save_with_transformers,
    spoiled,
    tensors_of,
)

Q = "model.layers.1.self_attn.q_proj.weight"
STATE = f"{Q}.quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module")
def tiny_4bit(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """The tiny Llama in nf4 with double quantization."""
    folder = tmp_path_factory.mktemp("stored") / "nf4"
    quantize(str(tiny_llama), str(folder), QuantFormat())
    return folder


def same_parameters(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """True if two models hold equal bytes under equal names."""
    left, right = dict(one.named_parameters()), dict(other.named_parameters())
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name])
        for name in left
    )


@pytest.mark.parametrize(
    ("quant_type", "double_quant", "storage"),
    [
        ("nf4", True, "bfloat16"),
        ("fp4", False, "float16"),
        ("nf4", False, "float32"),
        ("fp4", True, "uint8"),
    ],
)
def test_what_transformers_saved_loads_as_it_is(
    tiny_llama: Path, tmp_path: Path, quant_type: str, double_quant: bool, storage: str
) -> None:
    """A 4-bit model saved by transformers, in any storage type and over several files, loads to the
    bytes of quantizing on load."""
    folder = save_with_transformers(
        tiny_llama,
        tmp_path / "saved",
        max_shard_size="60KB",
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_quant_storage=storage,
    )
    assert len(list(folder.glob("*.safetensors"))) > 1
    config = {"quantization": quant_type, "double_quant": double_quant}
    assert same_parameters(load_here(folder, **config), load_here(tiny_llama, **config))


def test_modules_that_were_skipped_stay_16_bit(tiny_llama: Path, tmp_path: Path) -> None:
    """Layers stored in 16 bits stay so, and a head stored in 4 bits (transformers stores it so when
    a skip list does not name it) is used in 4 bits; logits equal those of transformers."""
    folder = save_with_transformers(
        tiny_llama,
        tmp_path / "saved",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=["q_proj"],
    )
    model = load_here(folder)
    kinds = {
        name.rpartition(".")[2]: type(m)
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear)
    }
    assert kinds["q_proj"] is torch.nn.Linear
    assert kinds["k_proj"] is kinds["lm_head"] is QuantizedLinear
    assert torch.equal(logits(model), logits(load_there(folder)))


@pytest.mark.parametrize("shape", [(1, -1), (-1,)])
def test_other_shapes_of_the_packed_bytes(
    tiny_4bit: Path, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    """Packed weights of shape (1, n) or (n,) load to equal bytes."""

    def reshape(tensors: dict) -> None:
        for name in [name for name in tensors if f"{name}.absmax" in tensors]:
            tensors[name] = tensors[name].reshape(shape)

    folder = spoiled(tiny_4bit, tmp_path / "reshaped", reshape)
    assert same_parameters(load_here(folder), load_here(tiny_4bit))


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_offset_survives_json(value: float) -> None:
    """The mean that double quantization subtracts survives as a JSON number: every float32 returns
    exactly."""
    offset = torch.tensor(value, dtype=torch.float32)
    reread = torch.tensor([json.loads(json.dumps(offset.item()))], dtype=torch.float32)
    assert torch.equal(reread.view(torch.int32), offset.reshape(1).view(torch.int32))


def test_block_size_comes_from_the_file(tiny_llama: Path, tmp_path: Path) -> None:
    """No setting names the block size: the quantization state does."""
    quantize(str(tiny_llama), str(tmp_path / "out"), QuantFormat(block_size=128))
    model = load_here(tmp_path / "out")
    assert {m.format.block_size for m in model.modules() if isinstance(m, QuantizedLinear)} == {128}


def test_only_asked_rows_are_read(tiny_llama: Path) -> None:
    """Reading rows of a matrix counts, and costs, those rows."""
    with SafetensorsReader(tiny_llama) as reader:
        rows = reader.rows(Q, 10, 14)
        assert rows.shape == (4, 64)
        assert reader.bytes_read == 4 * 64 * 2
        assert reader.rows(Q, 3, 3).shape == (0, 64)


# What is refused: the change to the folder, then words of the message.


def set_tensor(name: str, value: torch.Tensor | None) -> Callable[[Path], None]:
    """Replace or (None) remove a tensor in the folder's one file."""

    def change(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
        save_file(tensors, file)

    return change


def with_value(name: str, value: float) -> Callable[[Path], None]:
    """Put one value into the middle of a tensor."""

    def change(folder: Path) -> None:
        tensor = load_file(folder / "model.safetensors")[name].clone()
        tensor.view(-1)[tensor.numel() // 2] = value
        set_tensor(name, tensor)(folder)

    return change


def with_state(**values: object) -> Callable[[Path], None]:
    """Change entries of one quantization state."""

    def change(folder: Path) -> None:
        state = json.loads(bytes(load_file(folder / "model.safetensors")[STATE].tolist()))
        text = json.dumps({**state, **values})
        set_tensor(STATE, torch.tensor(list(text.encode()), dtype=torch.uint8))(folder)

    return change


def with_quantization_config(**values: object) -> Callable[[Path], None]:
    """Change config.json's quantization_config; with nothing given, remove it."""

    def change(folder: Path) -> None:
        def edit(config: dict) -> None:
            if values:
                config["quantization_config"] = {**config.get("quantization_config", {}), **values}
            else:
                del config["quantization_config"]

        edit_json(folder / "config.json", edit)

    return change


def converted_storage(folder: Path) -> None:
    """Model with bfloat16 storage whose values were converted to float16: as many bytes, none of
    them right."""
    tensors = tensors_of(folder)
    for name in [name for name in tensors if f"{name}.absmax" in tensors]:
        tensors[name] = tensors[name].view(-1).view(torch.bfloat16).to(torch.float16).unsqueeze(1)
    save_file(tensors, folder / "model.safetensors")
    with_quantization_config(bnb_4bit_quant_storage="bfloat16")(folder)


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def cut_inside_the_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def with_index(**changes: str | None) -> Callable[[Path], None]:
    """Give the folder an index that names one tensor or file wrongly."""

    def change(folder: Path) -> None:
        weights, part = folder / "model.safetensors", folder / "model-00001-of-00001.safetensors"
        names = dict.fromkeys(load_file(weights), part.name)
        if "file" in changes:
            names[Q] = str(changes["file"])
        if "extra" in changes:
            set_tensor(str(changes["extra"]), None)(folder)
        weights.rename(part)  # beside a file of that name, an index does not count
        index = {"weight_map": None if "map" in changes else names}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def other_architecture(folder: Path) -> None:
    tensors = {
        name.replace("model.layers", "transformer.h").replace("self_attn", "attn"): tensor.clone()
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors")


def other_size(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(intermediate_size=128))


REFUSED_16_BIT = [
    (truncated, ("model.safetensors", "not a readable safetensors file", "Copy")),
    (cut_inside_the_header, ("model.safetensors", "not a readable safetensors file", "Copy")),
    (with_index(file="model-9.safetensors"), ("model-9.safetensors is missing", "index", "Copy")),
    (with_index(extra=Q), ("has no tensor", Q, "index", "copy all")),
    (with_index(map=None), ("index.json", "weight_map", "Copy")),
    (set_tensor(Q, None), (Q, "which its config.json asks for")),
    (
        other_architecture,
        ("LlamaForCausalLM", "27 of the 30", "model.layers.0.self_attn.q_proj", "transformer.h.0"),
    ),
    (other_size, ("mlp.gate_proj.weight", "[112, 64]", "[128, 64]", "same place")),
    (set_tensor(Q, torch.zeros(64, 64, dtype=torch.int32)), (Q, "I32", "BF16", "original 16-bit")),
    (set_tensor(Q, torch.zeros(64, 64).to(torch.float8_e4m3fn)), (Q, "F8_E4M3", "scales")),
    (with_value(Q, float("nan")), (Q, "not finite", "Copy the model again")),
    (with_value(Q, float("-inf")), (Q, "not finite")),
    (
        with_quantization_config(quant_method="gptq", bits=4),
        ("GPTQ", "16-bit", "qlora-dist quantize"),
    ),
    (with_quantization_config(quant_method="awq", bits=4), ("AWQ", "16-bit")),
    (with_quantization_config(quant_method="fp8"), ("FP8", "16-bit")),
    (
        with_quantization_config(quant_method="bitsandbytes", load_in_8bit=True),
        ("8 bits", "LLM.int8", "16-bit"),
    ),
    (with_quantization_config(load_in_8bit=True), ("8 bits", "LLM.int8")),
    (
        with_quantization_config(load_in_4bit=True),
        ("no tensor has a quantization state", "quantize"),
    ),
]
REFUSED_4_BIT = [
    (truncated, ("not a readable safetensors file",)),
    (set_tensor(STATE, None), (Q, "without its quantization state", STATE, "quantize")),
    (set_tensor(f"{Q}.absmax", None), (f"no tensor {Q}.absmax", "4-bit matrix needs")),
    (set_tensor(f"{Q}.nested_absmax", None), (f"no tensor {Q}.nested_absmax",)),
    (
        set_tensor(f"{Q}.absmax", torch.zeros(3, dtype=torch.uint8)),
        (f"{Q}.absmax", "[3]", "64 elements"),
    ),
    (set_tensor(f"{Q}.absmax", torch.zeros(64)), (f"{Q}.absmax", "F32", "U8")),
    (set_tensor(Q, torch.zeros(1024, 1, dtype=torch.uint8)), (Q, "[1024, 1]", "2048 elements")),
    (
        set_tensor(Q, torch.zeros(2048, 1, dtype=torch.bfloat16)),
        (Q, "BF16", "bnb_4bit_quant_storage uint8"),
    ),
    (converted_storage, ("F16", "bnb_4bit_quant_storage bfloat16", "do not survive")),
    (with_quantization_config(bnb_4bit_quant_storage="complex64"), ("complex64", "uint8")),
    (with_value(f"{Q}.nested_absmax", float("nan")), (Q, "not finite")),
    (with_value(f"{Q}.quant_map", 0.123), (f"{Q}.quant_map", "another code book")),
    (with_state(shape=[64, 32]), (Q, "[64, 32]", "[64, 64]")),
    (with_state(nested_offset=float("inf")), (STATE, "offset inf")),
    (with_state(blocksize=48), (STATE, "blocks of 48")),
    (with_state(quant_type="fp4"), (STATE, "fp4", "unlike its own name")),
    (
        set_tensor(STATE, torch.tensor([123, 34], dtype=torch.uint8)),
        (STATE, "not a quantization state"),
    ),
    (with_quantization_config(), ("stored in 4 bits", "no quantization_config")),
    (other_size, ("mlp.gate_proj.weight", "[112, 64]", "[128, 64]")),
]


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [("16", *case) for case in REFUSED_16_BIT] + [("4", *case) for case in REFUSED_4_BIT],
    ids=lambda value: (
        "" if isinstance(value, str) else getattr(value, "__qualname__", "").partition(".")[0]
    ),
)
def test_wrong_files_are_refused(
    tiny_llama: Path,
    tiny_4bit: Path,
    tmp_path: Path,
    kind: str,
    change: Callable[[Path], None],
    words: tuple[str, ...],
) -> None:
    """A wrong file gets one message with the fault, its value, the rule and the remedy."""
    folder = Path(shutil.copytree(tiny_llama if kind == "16" else tiny_4bit, tmp_path / "model"))
    change(folder)
    with pytest.raises(ModelError) as caught:
        load_here(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_plain_constants_that_are_not_finite_are_refused(
    tiny_llama: Path, tmp_path: Path, value: float
) -> None:
    """Without double quantization the block maxima themselves are checked."""
    quantize(str(tiny_llama), str(tmp_path / "out"), QuantFormat(double_quant=False))
    with_value(f"{Q}.absmax", value)(tmp_path / "out")
    with pytest.raises(
        ModelError, match=r"layers\.1\.self_attn\.q_proj\.weight holds values that are not finite"
    ):
        load_here(tmp_path / "out", double_quant=False)


@pytest.mark.parametrize(
    ("stored", "settings", "words"),
    [
        (("fp4", True), {}, ("stored as fp4", "ask for nf4", "set model.quantization: fp4,")),
        (("nf4", False), {}, ("nf4 without", "nf4 with", "set model.double_quant: false")),
        (("fp4", False), {}, ("set model.quantization: fp4 and model.double_quant: false",)),
        (
            ("nf4", True),
            {"quantization": "none"},
            ("stored as nf4", "ask for none", "model.quantization: nf4"),
        ),
    ],
)
def test_settings_that_contradict_the_files_are_refused(
    tiny_llama: Path, tmp_path: Path, stored: tuple, settings: dict, words: tuple[str, ...]
) -> None:
    """The files decide the format; a setting that contradicts them, even a default, is an error
    naming both."""
    quantize(str(tiny_llama), str(tmp_path / "out"), QuantFormat(*stored))
    with pytest.raises(ConfigError) as caught:
        load_here(tmp_path / "out", **settings)
    for word in words:
        assert word in str(caught.value)


def test_all_files_are_looked_at_before_any_is_read(tiny_llama: Path, tmp_path: Path) -> None:
    """A truncated last file is found before a byte of the first one is read, not after an hour of
    loading."""
    folder = save_with_transformers(
        tiny_llama, tmp_path / "saved", max_shard_size="40KB", bnb_4bit_quant_type="nf4"
    )
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-10])
    model = build_skeleton(tiny_llama, ModelConfig(str(tiny_llama), "nf4", double_quant=False))
    materialize(model, torch.device("cpu"), torch.device("cpu"))
    progress: list[int] = []
    with pytest.raises(ModelError, match=rf"{last.name} is not a readable safetensors file"):
        load_base_weights(
            model, folder, torch.device("cpu"), lambda num_bytes, _: progress.append(num_bytes)
        )
    assert progress == []


def test_header_lies_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    """A header that places a tensor outside the file is refused before anything is read through
    it."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header[Q]["data_offsets"][1] += 10**6
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        load_here(folder)
