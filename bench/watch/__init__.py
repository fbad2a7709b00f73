"""What a watch costs a training loop, beside what people do without it: `python -m bench.watch`."""
