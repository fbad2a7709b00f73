"""The paper's experiments for those with a hub and a GPU: python -m bench.paper --help."""
