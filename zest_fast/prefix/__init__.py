"""Where a forward pass can be taken up, what of the calls before it the rest needs, and keeping that on disk."""
