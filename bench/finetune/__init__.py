"""Accuracy, time and memory of fine-tuning a few layers on real data: `python -m bench.finetune`."""
