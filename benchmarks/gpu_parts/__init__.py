"""Parts of `benchmarks/gpu.py`. Each case is a function that returns a row of results."""


class NotMeasured(Exception):
    """Reason why a case has no result here, worded for the results."""
