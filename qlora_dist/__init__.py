"""Multi-GPU QLoRA fine-tuning: a hand-written PyTorch loop over a sharded 4-bit base."""

__version__ = "0.1.0"
