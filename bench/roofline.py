"""A roofline model of dW statistics per layer shape: the reducing epilogue against a stored dW and a pass over it.

    python -m bench.roofline

MODELLED, not measured: no GPU is used. Time is the longer of arithmetic and memory traffic at the rates below; the
epilogue adds its instructions (from bench/results/offline.json). "alone": they overlap with nothing, as where one
program fills a processor's registers (the large bf16 tile does); "hidden": wholly behind other programs' products, the
best that any schedule can do. The epilogue's side also reads X and G once more, for ΣdW.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.measure import RESULTS, write_result


@dataclass(frozen=True)
class Card:
    """Peak rates from the vendor's data sheet, and the share of them that a vendor's GEMM reaches (assumed)."""

    name: str
    target: str
    flops: float
    """bf16 tensor cores, dense, per second."""
    bytes_per_second: float
    processors: int
    clock: float
    gemm_share: float
    copy_share: float = 0.9


CARDS = (
    Card("A100 80GB SXM", "sm_80", 312e12, 2.04e12, 108, 1.41e9, 0.83),
    Card("H100 SXM", "sm_90", 989e12, 3.35e12, 132, 1.75e9, 0.68),
)
OUR_SHARE = 0.9  # of the vendor's GEMM rate, assumed for a plain, well-tiled Triton GEMM
WARPS_PER_CLOCK = 4  # instructions that a processor issues a clock
LAUNCH = 3e-6  # seconds a kernel costs where it is too small to hide it

# name -> (outputs, inputs, rows of X in one mini-batch); a convolution as its implicit GEMM
SHAPES = {
    "LLaMA-7B q, k, v, o; T = 512": (4096, 4096, 512),
    "LLaMA-7B q, k, v, o; T = 1024": (4096, 4096, 1024),
    "LLaMA-7B q, k, v, o; T = 4096": (4096, 4096, 4096),
    "LLaMA-7B gate, up; T = 512": (11008, 4096, 512),
    "LLaMA-7B gate, up; T = 1024": (11008, 4096, 1024),
    "LLaMA-7B gate, up; T = 4096": (11008, 4096, 4096),
    "LLaMA-7B down; T = 1024": (4096, 11008, 1024),
    "BERT-base q, k, v, o; 32 x 128": (768, 768, 4096),
    "BERT-base intermediate; 32 x 128": (3072, 768, 4096),
    "BERT-base output; 32 x 128": (768, 3072, 4096),
    "ResNet-50 layer1 3x3; 32 x 56 x 56": (64, 576, 100_352),
    "ResNet-50 layer2 3x3; 32 x 28 x 28": (128, 1152, 25_088),
    "ResNet-50 layer3 3x3; 32 x 14 x 14": (256, 2304, 6_272),
    "ResNet-50 layer4 3x3; 32 x 7 x 7": (512, 4608, 1_568),
    "ResNet-50 fc; 32": (1000, 2048, 32),
}
SIDES = ("alone_us", "hidden_us")
LEAF_ROUTE = "ResNet-50 layer"  # convolutions: the gradient exists as a whole, only its pass is ours


def gemm_seconds(card: Card, outputs: int, inputs: int, rows: int, share: float, written: int) -> float:
    """The longer of arithmetic and traffic of dW = GᵀX in bf16; `written` bytes leave the chip."""
    arithmetic = 2.0 * outputs * inputs * rows / (card.flops * share)
    traffic = (2.0 * rows * (outputs + inputs) + written) / (card.bytes_per_second * card.copy_share)
    return max(arithmetic, traffic) + LAUNCH


def pass_seconds(card: Card, read: float) -> float:
    """One fused pass over `read` bytes."""
    return read / (card.bytes_per_second * card.copy_share) + LAUNCH


def epilogue_seconds(card: Card, outputs: int, inputs: int, instructions_an_entry: float) -> float:
    """Issue time of the epilogue, all processors busy."""
    warps = outputs * inputs / 32
    return warps * instructions_an_entry / (card.processors * WARPS_PER_CLOCK * card.clock)


def instructions_an_entry(folder: Path) -> dict[str, float]:
    """From bench/results/offline.json: instructions of the large bf16 tile's epilogue by target, per entry of dW."""
    path = folder / "offline.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; run python -m bench.offline first")
    rows = json.loads(path.read_text())["results"]
    large = [row for row in rows if row["kernel"] == "dW epilogue bf16 128x128x64"]
    return {row["target"]: row["epilogue"] * row["warps"] * 32 / (128 * 128) for row in large}


def model(card: Card, shape: tuple[int, int, int], instructions: float, leaf: bool) -> dict[str, float | None]:
    """Microseconds of the library's GEMM with a fused pass, and of the reducing epilogue (linear layers only)."""
    outputs, inputs, rows = shape
    entries = outputs * inputs
    stored = gemm_seconds(card, outputs, inputs, rows, card.gemm_share, 2 * entries) + pass_seconds(card, 4.0 * entries)
    found = {"stored_us": 1e6 * stored, "pass_us": 1e6 * pass_seconds(card, 4.0 * entries)}
    if leaf:
        return {**found, "alone_us": None, "hidden_us": None}
    sums = pass_seconds(card, 2.0 * rows * (outputs + inputs))
    weight_read = 2.0 * entries / (card.bytes_per_second * card.copy_share)
    product = gemm_seconds(card, outputs, inputs, rows, card.gemm_share * OUR_SHARE, 0)
    epilogue = max(epilogue_seconds(card, outputs, inputs, instructions), weight_read)
    merge = LAUNCH
    return {
        **found,
        "alone_us": 1e6 * (sums + product + epilogue + merge),
        "hidden_us": 1e6 * (sums + max(product, epilogue) + merge),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=None, help="folder of the JSON (bench/results by default)")
    out = parser.parse_args(arguments).out
    instructions = instructions_an_entry(RESULTS)
    rows = []
    print(f"MODELLED, not measured\n{'card':14} {'layer':36} {'stored + pass':>14} {'alone':>18} {'hidden':>18}")
    for card in CARDS:
        for name, shape in SHAPES.items():
            found = model(card, shape, instructions[card.target], name.startswith(LEAF_ROUTE))
            rows.append({"modelled": True, "card": card.name, "layer": name, "shape": list(shape), **found})
            ours = " ".join(f"{found[k]:8.1f} us {found['stored_us'] / found[k]:5.2f}x" for k in SIDES if found[k])
            print(f"{card.name:14} {name:36} {found['stored_us']:11.1f} us {ours or 'leaf route'}")
    settings = {"modelled": True, "our_share_of_vendor_gemm": OUR_SHARE, "epilogue_instructions_an_entry": instructions}
    write_result("roofline", settings, rows, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
