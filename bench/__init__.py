"""Benchmarks, run from the checkout: `python -m bench.profile`, `python -m bench.kernels`, `python -m bench.readme`."""
