"""Benchmarks, run from the checkout as `python -m bench.NAME`: profile, kernels, offline, roofline; readme reports."""
