"""Fine-tune the five best layers in a plain loop under accelerate. Runs as it is, on a tiny model and random tokens:

accelerate launch examples/accelerate_loop.py

The order matters: choose and wrap the bare model, give the optimizer what trains, then `prepare`. Several processes
have to choose the same layers, so the main one ranks and tells the others.
"""

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import zest_fast


def main() -> None:
    accelerator = Accelerator()
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes)).to(accelerator.device)
    tokens = torch.randint(100, (64, 16))
    loader = DataLoader([{"input_ids": row, "labels": row} for row in tokens], batch_size=8, shuffle=True)

    chosen = [None]
    if accelerator.is_main_process:
        batch = {name: tensor.to(accelerator.device) for name, tensor in next(iter(loader)).items()}
        chosen = [zest_fast.rank(zest_fast.profile(model, batch), by="snip").top(5)]
    chosen = broadcast_object_list(chosen)[0]

    tuned = zest_fast.SelectiveBackward(model, chosen)  # before the optimizer, and before prepare()
    accelerator.print(tuned.summary())
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for epoch in range(2):
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        tuned.save("delta.safetensors")  # the bare model holds the trained weights, whatever prepare() put around it


if __name__ == "__main__":
    main()
