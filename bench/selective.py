"""What SelectiveBackward saves: time of a step beside its share of the FLOPs of full fine-tuning, by where the cut is.

    python -m bench.selective

One layer trains: the query projection of block 0, of the one at a quarter, at half or at three quarters. A step is a
forward and a backward pass, without the optimizer. The claim: time relative to full fine-tuning at most 5 % above the
ratio of the FLOPs, which FlopCounterMode counts in the same steps. The clock is the CPU time of this process, because
it does not count what others do on a shared machine; runs are interleaved. Beside each cut stands the same model frozen
by hand: what is above the limit there too is not the wrapper's. Hashing at wrapping is timed, too.

Two sizes. "base" is that of BERT-base (8 blocks of it), 4 x 128 tokens. "tiny" has a third of its width and 4 x 64
tokens; there the work that no FLOP counts (elementwise operations, Python) weighs most. FLOPs of fused attention are
counted in both passes. The full step has work that counts no FLOPs, either: the dense gradient of the embedding, new
memory for every gradient. The vocabulary is small so that the embedding's, which would favour us, hardly matters.
`zero_grad` frees in both.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench.measure import write_result
from zest_fast.benchmarking.models import Batch, bert, llama
from zest_fast.benchmarking.timing import interleave, median, ratio
from zest_fast.finetuning.digests import Base
from zest_fast.finetuning.selective_backward import SelectiveBackward

BLOCKS, BATCH = 8, 4
CUTS = {"0": 0, "1/4": BLOCKS // 4, "1/2": BLOCKS // 2, "3/4": 3 * BLOCKS // 4}
LIMIT = 1.05  # of the ratio of the FLOPs
QUERY = {"llama": "model.layers.{}.self_attn.q_proj", "bert": "bert.encoder.layer.{}.attention.self.query"}
BUILD: dict[str, Callable[..., tuple[nn.Module, Batch]]] = {
    "llama": partial(llama, num_hidden_layers=BLOCKS, vocab_size=1000),
    "bert": partial(bert, num_hidden_layers=BLOCKS, vocab_size=1000),
}
Size = dict[str, int]
TINY: Size = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4}
BASE: Size = {"tokens": 128, "hidden_size": 768, "num_attention_heads": 12}
SIZES: dict[str, dict[str, Size]] = {  # of a batch of 4
    "base": {
        "llama": {**BASE, "intermediate_size": 2048, "num_key_value_heads": 12},
        "bert": {**BASE, "intermediate_size": 3072},
    },
    "tiny": {
        "llama": {"tokens": 64, **TINY, "num_key_value_heads": 4},
        "bert": {"tokens": 64, **TINY},
    },
}
QUICK: Size = {"tokens": 8, "hidden_size": 96, "intermediate_size": 64}


def step(model: nn.Module, batch: Batch) -> None:
    model(**batch).loss.backward()
    model.zero_grad()


def flops(run: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def measure(name: str, size: str, config: Size, rounds: int) -> dict:
    """Ratios of time and of FLOPs to full fine-tuning for every cut; each has a model of its own."""
    build = partial(BUILD[name], BATCH, **config)
    model, batch = build()
    candidates: dict[str, Callable[[], None]] = {"full": partial(step, model, batch)}
    for cut, block in CUTS.items():
        layer = QUERY[name].format(block)
        wrapped, by_hand = (build()[0] for _ in range(2))
        SelectiveBackward(wrapped, [layer], head=None)
        by_hand.requires_grad_(False).get_submodule(layer).requires_grad_(True)
        candidates |= {cut: partial(step, wrapped, batch), _by_hand(cut): partial(step, by_hand, batch)}
    counted = {cut: flops(candidates[cut]) for cut in ("full", *CUTS)}
    times = interleave(candidates, rounds, clock=time.process_time)
    cuts = {}
    for cut in CUTS:
        share = counted[cut] / counted["full"]
        relative, to_hand = ratio(times, cut, "full"), ratio(times, cut, _by_hand(cut))
        cuts[cut] = {
            "flops": share,
            "time": relative.as_dict(),
            "time_to_flops": relative.median / share,
            "time_to_frozen_by_hand": to_hand.as_dict(),
        }
    return {"model": name, "size": size, "seconds_of_full": median(times["full"]).as_dict(), "cuts": cuts}


def _by_hand(cut: str) -> str:
    return f"{cut}, frozen by hand"


def hashing(megabytes: int) -> dict:
    """CPU seconds for each GB of weights, as at wrapping, in `.verify()` and in `apply_delta`."""
    model = nn.Linear(1024, megabytes * 2**20 // 4096, bias=False)
    start = time.process_time()
    Base(model)
    return {"model": f"{megabytes} MiB", "cpu_seconds_per_gb": (time.process_time() - start) * 1e9 / (megabytes << 20)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.selective", description="time and FLOPs by cut")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="toys, to see that it runs")
    parser.add_argument("--out", type=Path, default=None, help="folder of the JSON (bench/results by default)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    for size, sizes in SIZES.items():
        for name, config in sizes.items():
            results.append(measure(name, size, {**config, **(QUICK if options.quick else {})}, options.rounds))
            _print(results[-1])
    results.append(hashing(16 if options.quick else 256))
    print(f"hashing: {results[-1]['cpu_seconds_per_gb']:.2f} CPU seconds for each GB")
    settings = {"blocks": BLOCKS, "batch": BATCH, "sizes": SIZES, "limit": LIMIT, "clock": "process_time"}
    write_result("selective", settings, results, options.out)


def _print(result: dict) -> None:
    for cut, found in result["cuts"].items():
        word = "ok" if found["time_to_flops"] <= LIMIT else "above the limit"
        print(
            f"{result['size']} {result['model']:6} cut {cut:4} time {found['time']['median']:.3f} "
            f"flops {found['flops']:.3f} of full: {word} ({found['time_to_flops']:.3f}); "
            f"{found['time_to_frozen_by_hand']['median']:.3f} x frozen by hand",
            flush=True,
        )


if __name__ == "__main__":
    main()
