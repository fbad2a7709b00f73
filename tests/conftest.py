import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test uses the network; it is read when transformers is first imported
