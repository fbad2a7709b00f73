"""What packages of registries carry, one module for each kind: data sets, and models with their weights."""
