"""Frozen weights that stay on disk: mapped, read ahead of their use and dropped after it."""
