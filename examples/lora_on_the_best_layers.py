"""LoRA + ZEST, as in the paper: adapters of rank 8, but only on the five best layers. Runs as it is:

python examples/lora_on_the_best_layers.py
"""

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import zest_fast
from zest_fast.integrations.peft import lora_config


def main() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes))
    tokens = torch.randint(100, (8, 16))
    batch = {"input_ids": tokens, "labels": tokens}

    ranking = zest_fast.rank(zest_fast.profile(model, batch), by="snip")
    tuned = get_peft_model(model, lora_config(ranking, model, n=5, r=8))
    tuned.print_trainable_parameters()
    optimizer = torch.optim.AdamW((p for p in tuned.parameters() if p.requires_grad), lr=1e-3)
    for step in range(5):
        loss = tuned(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
