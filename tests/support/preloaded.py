"""Imports that every process of a test needs; see processes.py."""

import importlib
import os
from importlib.util import find_spec

os.environ.update(
    OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu"
)

from qlora_dist.commands.startup import quiet_third_parties

quiet_third_parties()
for name in ("tests.support.training", "deepspeed"):
    if find_spec(name) is not None:
        importlib.import_module(name)
