"""The parts of `benchmarks/gpu.py`: each function runs in a process of its own and returns a row of results."""
