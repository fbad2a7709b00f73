"""The whole zest_fast.profile() beside a plain pass and its peers: `python -m bench.profile`."""
