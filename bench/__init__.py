"""Benchmarks, run from the checkout as `python -m bench.NAME`; bench/README.md lists them."""
