"""What a training step of each method needs: `python -m bench.memory_table`."""
