"""A step of each layer alone, to see what it gains."""
