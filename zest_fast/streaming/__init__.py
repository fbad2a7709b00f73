"""Frozen weights that stay on disk: mapped, read ahead of their use and dropped after it. On the CPU only."""
