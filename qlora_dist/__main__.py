"""``python -m qlora_dist``, also what ``accelerate launch -m qlora_dist`` and ``torchrun -m qlora_dist`` run."""

from qlora_dist.cli import main

if __name__ == "__main__":
    main()
