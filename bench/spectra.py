"""Singular values of pretrained weights, as Spectrum and KappaTune rank layers by them: bench/results/spectra.json.

python -m bench.spectra                 # every model of bench.data; seconds each
python -m bench.spectra --models minilm

Convolutions are flattened to [out, in x kernel], as PEFT does it; both methods were made for Linear layers.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.data import MODELS
from bench.measure import RESULTS
from zest_fast.foundation.replacing import replacing
from zest_fast.profiling.layers import find_layers

CACHE = RESULTS / "spectra.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="MODEL")
    parser.add_argument("--out", type=Path, default=CACHE)
    options = parser.parse_args()
    for model in options.models:
        found = load_spectra([model], options.out)
        print(f"{model}: {len(found[model])} layers")


def load_spectra(models: list[str], path: Path = CACHE) -> dict[str, dict[str, dict[str, float | None]]]:
    """model -> layer -> {"snr", "condition_number"}, from the file; what it lacks is computed and written there.

    snr is None where no singular value is noise. Raises RuntimeError, with the line that installs them, where weights
    are needed and not there; ValueError for a model that bench.data does not know.
    """
    spectra = json.loads(path.read_text()) if path.exists() else {}
    for name in models:
        if name in spectra:
            continue
        if name not in MODELS:
            raise ValueError(f"{path.name} has no spectra of {name!r}, and bench.data no such model to compute them of")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the head is drawn
            spectra[name] = of_model(MODELS[name].load(2))
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(dict(sorted(spectra.items())), indent=1, allow_nan=False) + "\n")
    return {name: spectra[name] for name in models}


def of_model(model: nn.Module) -> dict[str, dict[str, float | None]]:
    """Of every layer but embeddings; the head, which is drawn, included."""
    layers = [layer for layer in find_layers(dict(model.named_modules())) if not layer.is_embedding]
    found = {}
    for layer in layers:
        weight = layer.weight.parameter.detach().float()
        singular = torch.linalg.svdvals(weight.reshape(len(weight), -1))
        ratio = signal_to_noise(singular, weight.shape[0], weight.numel() // weight.shape[0])
        found[layer.name] = {
            "snr": _rounded(ratio) if math.isfinite(ratio) else None,
            "condition_number": _rounded(condition_number(singular)),
        }
    return found


def signal_to_noise(singular: Tensor, rows: int, columns: int) -> float:
    """Spectrum's ratio: singular values beyond the Marchenko-Pastur edge over the others, by the largest one.

    The edge is σ (1 + √β), β = the shorter side over the longer, σ = (interquartile range of the values) / 1.349, as in
    the published code; infinite where no value lies within. singular: [min(rows, columns)].
    """
    quartiles = torch.quantile(singular, singular.new_tensor([0.25, 0.75]))
    sigma = (quartiles[1] - quartiles[0]) / 1.349
    edge = sigma * (1 + math.sqrt(min(rows, columns) / max(rows, columns)))
    signal, noise = singular[singular > edge].sum(), singular[singular <= edge].sum()
    return float(signal / noise / singular.max()) if noise > 0 else math.inf


def condition_number(singular: Tensor) -> float:
    """KappaTune's: the largest over the smallest singular value, with PEFT's 1e-8 below."""
    return float(singular.max() / (singular.min() + 1e-8))


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


if __name__ == "__main__":
    main()
