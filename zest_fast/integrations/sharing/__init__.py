"""A delta in the forms that other tools take: adapters of LoRA, GGUF, weights for an inference server, the hub."""
