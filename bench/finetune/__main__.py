"""Accuracy, time and memory of fine-tuning a few layers on real data: `python -m bench.finetune`."""

import os

from bench.finetune.run import main

if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
