"""LLaMA-7B on a CPU, resident memory and time: `python -m bench.llama7b`."""
