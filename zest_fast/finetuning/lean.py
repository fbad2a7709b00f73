"""The former place of `zest_fast.apply_lean`, kept for code that imports it from here."""

from zest_fast.lean.apply import LeanHandle, apply_lean

__all__ = ["LeanHandle", "apply_lean"]
