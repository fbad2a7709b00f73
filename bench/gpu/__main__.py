"""`python -m bench.gpu`: correctness, kernels and whole profiles on a GPU, in one JSON; under eight minutes.

Writes bench/results/gpu.json: rows of the sections "correctness" (bench/gpu/correctness.py), "kernels"
(bench/gpu/kernels.py) and "profiles" (bench/gpu/profiles.py). Exits with 1 where a kernel does not match the reference
or there is no GPU. `--dry-run` runs the same code on a CPU, under Triton's interpreter and at toy sizes, to show that
it runs: no figure of it means anything.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.gpu import correctness, kernels, profiles
from bench.gpu.site import Site
from bench.measure import write_result

MIB = 2**20
SECTIONS = {
    "correctness": correctness.check,
    "kernels": kernels.measure,
    "profiles": profiles.measure,
}
Row = dict[str, object]


def main() -> int:
    """Parse the command line, measure, print and write; the exit status."""
    options = _options()
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    elif not torch.cuda.is_available():
        print("no CUDA device: not measured")
        return 0 if options.allow_none else 1
    device = torch.device("cpu") if options.dry_run else torch.device("cuda", torch.cuda.current_device())
    site = Site(device, options.dry_run, options.rounds)
    console = Console(width=140)
    results: list[Row] = []
    seconds: dict[str, float] = {}
    for name in options.sections:
        start = time.perf_counter()
        for row in SECTIONS[name](site):
            results.append({"dry_run": True, **row} if options.dry_run else row)
        seconds[name] = round(time.perf_counter() - start, 1)
        console.print(TABLES[name]("dry run: " * options.dry_run, [row for row in results if row["section"] == name]))
    for row in results:
        for warning in row.get("warnings", ()):
            console.print(f"warning: {row['kernel']} {row['shape']} {row['dtype']}: {warning}")
    settings = {"rounds": options.rounds, "sections": options.sections, "seconds": seconds, **site.describe()}
    console.print("dry run: " * options.dry_run + f"wrote {write_result('gpu', settings, results, options.out)}")
    return 0 if all(row.get("match", True) for row in results) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="kernels and profiles on a GPU")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=11, help="interleaved rounds (default 11)")
    parser.add_argument("--dry-run", action="store_true", help="the same code at toy sizes on a CPU; needs --out")
    parser.add_argument("--allow-none", action="store_true", help="without a GPU exit with 0")
    parser.add_argument("--out", type=Path, help="folder for the JSON (default bench/results)")
    options = parser.parse_args()
    if options.dry_run and options.out is None:
        parser.error("--dry-run: --out is needed, since its figures are no results")
    return options


def _correctness_table(title: str, rows: list[Row]) -> Table:
    table = Table("kernel", "backend", "dtype", "error", "Match", title=f"{title}against the float64 reference")
    for row in rows:
        error = "not finite" if row["error"] is None else f"{row['error']:.1e}"
        table.add_row(row["kernel"], row["backend"], row["dtype"], error, "yes" if row["match"] else "NO")
    return table


def _kernel_table(title: str, rows: list[Row]) -> Table:
    headings = (
        "kernel",
        "shape",
        "dtype",
        "candidate",
        "µs",
        "95 % interval",
        "x baseline",
        "TFLOP/s",
        "GB/s",
        "% peak",
    )
    table = Table(*headings, title=f"{title}kernels")
    for row in rows:
        for name, seconds in row["seconds"].items():
            rate, relative = row["rates"][name], row["ratio"].get(name)
            share = max(rate["share_of_peak_flops"] or 0, rate["share_of_peak_bandwidth"] or 0)
            table.add_row(
                row["kernel"],
                "x".join(map(str, row["shape"])),
                row["dtype"],
                name,
                f"{seconds['median'] * 1e6:.1f}",
                f"{seconds['low'] * 1e6:.1f} to {seconds['high'] * 1e6:.1f}",
                f"{relative['median']:.3f}" if relative else "",
                f"{rate['tflops']:.1f}" if rate["tflops"] else "",
                f"{rate['gb_per_s']:.1f}",
                f"{share * 100:.0f}" if share else "",
            )
        for name, reason in row["failed"].items():
            table.add_row(row["kernel"], "x".join(map(str, row["shape"])), row["dtype"], name, reason)
    return table


def _profile_table(title: str, rows: list[Row]) -> Table:
    table = Table("model", "dtype", "candidate", "ms", "x plain", "peak MiB by cap", title=f"{title}whole profiles")
    for row in rows:
        for name, seconds in row.get("seconds", {}).items():
            relative = row["ratio_to_plain"].get(name)
            peaks = [found.get(name) for found in row["peak_bytes"].values()]
            table.add_row(
                f"{row['model']} {row['shape']}",
                row["dtype"],
                name,
                f"{seconds['median'] * 1e3:.1f}",
                f"{relative['median']:.3f} ({relative['low']:.3f} to {relative['high']:.3f})" if relative else "",
                ", ".join(f"{p / MIB:.1f}" if isinstance(p, int) else str(p) for p in peaks),
            )
        for name, reason in row["failed"].items():
            table.add_row(f"{row['model']} {row['shape']}", row["dtype"], name, reason)
        if row.get("waits"):
            places = row["waits"]["places"]
            waits = ", ".join(f"{place} ({count})" for place, count in places.items()) or "nowhere"
            table.add_row("", "", "waits", row["waits"]["refused_at"] or "", "", waits)
    return table


TABLES = {"correctness": _correctness_table, "kernels": _kernel_table, "profiles": _profile_table}

if __name__ == "__main__":
    sys.exit(main())
