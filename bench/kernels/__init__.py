"""Each public kernel beside torch: `python -m bench.kernels`."""
