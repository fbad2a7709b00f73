"""LLaMAs of any size whose weights stay on disk, resident memory and time: `python -m bench.stream`."""
