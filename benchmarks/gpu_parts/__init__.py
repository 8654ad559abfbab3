"""The parts of `benchmarks/gpu.py`: each case is a function that returns a row of results."""


class NotMeasured(Exception):
    """Why a case has no result here, in words that go into the results."""
