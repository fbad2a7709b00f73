"""Correctness, kernels and whole profiles on a GPU: `python -m bench.gpu`."""
