"""Multi-GPU QLoRA fine-tuning: a hand-written PyTorch loop over a 4-bit base that is sharded over all GPUs."""

__version__ = "0.1.0"
