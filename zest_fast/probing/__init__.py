"""A little real training of each layer alone, to see what it gains."""
