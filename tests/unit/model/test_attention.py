"""Choice of the attention that a model runs with, and the log's line about it."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from transformers import BloomConfig, Gemma2Config, LlamaConfig

from qlora_dist.config.schema import ModelConfig
from qlora_dist.errors import ConfigError
from qlora_dist.model import attention, skeleton


@pytest.mark.parametrize(
    ("asked", "dtype", "has_gpu", "has_package", "cap", "expected"),
    [
        ("auto", "bfloat16", True, True, None, {"attn_implementation": "flash_attention_2"}),
        ("auto", "bfloat16", True, True, 50.0, {"attn_implementation": "flash_attention_2"}),
        ("auto", "float32", True, True, None, {}),  # its kernels know 16-bit types only
        ("auto", "bfloat16", False, True, None, {}),
        ("auto", "bfloat16", True, False, None, {}),
        ("auto", "bfloat16", True, False, 50.0, {"attn_implementation": "eager"}),
        ("eager", "bfloat16", True, True, None, {"attn_implementation": "eager"}),
        ("sdpa", "bfloat16", True, True, None, {"attn_implementation": "sdpa"}),
    ],
)
def test_flash_attention_is_taken_where_it_can_be(
    asked: str, dtype: str, has_gpu: bool, has_package: bool, cap: float | None, expected: dict
) -> None:
    """`auto` takes flash-attn on a GPU, in 16 bits, with the package.

    Otherwise the model chooses, unless it would choose SDPA and leave out the cap of its scores. A
    user's own choice stands.
    """
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=has_gpu),
        mock.patch.object(attention, "is_flash_attn_2_available", return_value=has_package),
        mock.patch.object(attention, "is_flash_attn_greater_or_equal", return_value=has_package),
    ):
        model = Gemma2Config(attn_logit_softcapping=cap)
        found = attention.attention_arguments(ModelConfig("m", dtype=dtype, attention=asked), model)
    assert found == expected


def test_flash_attention_is_not_taken_where_it_would_fail() -> None:
    """Classes without support do not take flash-attn, nor do capped scores before it can cap."""
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(attention, "is_flash_attn_2_available", return_value=True),
        mock.patch.object(
            attention, "is_flash_attn_greater_or_equal", lambda version: version <= "2.5.9"
        ),
    ):
        config = ModelConfig("m", dtype="bfloat16")
        assert attention.attention_arguments(config, BloomConfig()) == {}
        assert attention.attention_arguments(config, Gemma2Config()) == {
            "attn_implementation": "eager"
        }


@pytest.fixture(
    params=["ImportError('undefined symbol: _ZN3c104')", "RuntimeError('no kernel')", None]
)
def installed_package(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str | None]:
    """Package flash_attn that raises the parameter on import, on a machine with a GPU."""
    (tmp_path / "flash_attn").mkdir()
    text = "" if request.param is None else f"raise {request.param}"
    (tmp_path / "flash_attn" / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: True)  # by its metadata
    attention.flash_attention_problem.cache_clear()
    yield request.param
    attention.flash_attention_problem.cache_clear()
    sys.modules.pop("flash_attn", None)


def test_a_package_that_cannot_be_imported_is_not_taken(installed_package: str | None) -> None:
    """With a flash-attn for a different torch the run goes on with SDPA, and the log says why."""
    found = attention.attention_arguments(ModelConfig("m"), LlamaConfig())
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(_attn_implementation="sdpa"))
    with mock.patch.object(attention, "base_model", return_value=SimpleNamespace(config=config)):
        notes = [
            attention.attention_note(
                torch.nn.Module(), ModelConfig("m", attention=asked), is_packed=False
            )
            for asked in ("auto", "sdpa")
        ]
    if installed_package is None:
        assert found == {"attn_implementation": "flash_attention_2"}
        assert "cannot be imported" not in notes[0]
        return
    assert found == {}
    kind, _, message = installed_package.rstrip(")'").partition("('")
    assert notes[0].endswith(f"installed, but cannot be imported ({kind}: {message})")
    assert "cannot be imported" not in notes[1]


def test_sdpa_is_refused_where_it_would_leave_out_the_cap(families: dict[str, Path]) -> None:
    """SDPA is refused for Gemma 2, whose soft cap it would leave out.

    transformers 5.17 would not say so.
    """
    with pytest.raises(
        ConfigError, match=r"model.attention is sdpa.*attn_logit_softcapping is 50.*Use auto, eager"
    ):
        skeleton.build_skeleton(families["gemma2"], ModelConfig("m", attention="sdpa"))


@pytest.mark.parametrize(
    ("name", "asked", "is_packed", "expected"),
    [
        (
            "sdpa",
            "auto",
            True,
            "attention: sdpa (chosen by model.attention: auto); samples in a packed row are kept "
            "apart by a mask over the row",
        ),
        (
            "flash_attention_2",
            "flash_attention_2",
            True,
            "attention: flash_attention_2; samples in a packed row are "
            "kept apart by their lengths, with variable-length kernels",
        ),
        ("eager", "eager", False, "attention: eager"),
    ],
)
def test_the_log_says_which_it_is(name: str, asked: str, is_packed: bool, expected: str) -> None:
    """The log has the attention's name, who chose it, and how it keeps packed samples apart."""
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(_attn_implementation=name))
    with mock.patch.object(attention, "base_model", return_value=SimpleNamespace(config=config)):
        note = attention.attention_note(
            torch.nn.Module(), ModelConfig("m", attention=asked), is_packed=is_packed
        )
    assert note == expected


@pytest.mark.parametrize(
    ("name", "rows", "is_packed", "is_on_gpu", "expected"),
    [
        ("sdpa", 1, True, True, 64),
        ("sdpa", 3, True, True, 192),
        ("sdpa", 3, False, True, 192),
        ("sdpa", 1, False, True, 0),
        ("sdpa", 3, True, False, 0),
        ("flash_attention_2", 3, True, True, 0),
        ("eager", 3, True, True, 0),
    ],
)
def test_what_sdpa_keeps_of_a_mask(
    name: str, rows: int, is_packed: bool, is_on_gpu: bool, expected: int
) -> None:
    """On a GPU SDPA keeps the square of each row's 8 tokens, packed or padded.

    A single row that is not packed has no mask.
    """
    with mock.patch.object(attention, "_implementation", return_value=name):
        found = attention.mask_elements(
            torch.nn.Module(), rows, 8, is_packed=is_packed, is_on_gpu=is_on_gpu
        )
    assert found == expected


def test_packed_rows_follow_each_other_for_variable_length_kernels() -> None:
    """Variable-length kernels get all tokens in one row, in which positions still begin anew.

    SDPA keeps the rows, and takes no mask when they are packed.
    """
    ids, positions = torch.arange(6).view(2, 3), torch.tensor([[0, 1, 0], [0, 1, 2]])
    mask = torch.ones_like(ids)
    with mock.patch.object(attention, "_implementation", return_value="flash_attention_2"):
        inputs = attention.model_inputs(torch.nn.Module(), ids, mask, positions)
    assert inputs["input_ids"].tolist() == [[0, 1, 2, 3, 4, 5]]
    assert inputs["position_ids"].tolist() == [[0, 1, 0, 0, 1, 2]]
    assert set(inputs) == {"input_ids", "position_ids"}
    with mock.patch.object(attention, "_implementation", return_value="sdpa"):
        assert attention.model_inputs(torch.nn.Module(), ids, mask, positions)["input_ids"] is ids
        assert set(attention.model_inputs(torch.nn.Module(), ids, mask, None)) == {
            "input_ids",
            "attention_mask",
        }
