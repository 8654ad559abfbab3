"""Keeps what libraries print about themselves away from the user; imports none of them."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_third_parties() -> None:
    """Silence banners, progress bars and deprecation warnings of the libraries; call before importing them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # it logs, at length, the errors that it then raises
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    if not any(os.path.exists(f"/dev/{name}") for name in ("nvidiactl", "kfd", "dri", "dxg")):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, where installed, warns that it found no GPU
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    warnings.filterwarnings("ignore")
    for name in ("bitsandbytes", "accelerate", "peft", "torch.distributed", "datasets", "root"):
        logging.getLogger(name).setLevel(logging.ERROR)
