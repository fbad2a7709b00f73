"""GPU kernels compiled without a GPU, and their machine code read: `python -m bench.offline`."""
