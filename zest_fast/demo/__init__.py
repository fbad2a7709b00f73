"""The whole job on real weights and real data, from installed packages: profile, rank, fine-tune, compare."""

from zest_fast.demo.run import run_demo

__all__ = ["run_demo"]
