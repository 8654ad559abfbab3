"""Entry point of ``python -m qlora_dist``, ``accelerate launch -m …`` and ``torchrun -m …``."""

from qlora_dist.cli import main

if __name__ == "__main__":
    main()
