"""What a step keeps and costs, plain and lean: `python -m bench.lean`."""
