"""`python -m bench.readme` writes the figures of bench/results into README.md and docs/; `--check` compares them.

A page holds a pair of markers for each block, <!-- bench:NAME:begin --> and <!-- bench:NAME:end -->; what lies
between them is generated, so no figure is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from bench import pictures
from bench.adapters import adapters_text
from bench.choose import choose_text
from bench.finetune import report as finetune_report
from bench.finetune.report import finetune_text
from bench.landing_report import landing_text
from bench.layerbench import report as layerbench_report
from bench.lean.report import lean_text
from bench.llama7b.report import llama7b_text
from bench.measure import RESULTS, ROOT
from bench.memory_table.report import memory_text
from bench.part_of_a_sweep import part_text
from bench.prefix_cache import cache_text
from bench.probe_blind import blind_text
from bench.probe_controls import controls_text
from bench.probe_share import share_text
from bench.profile.where import cells as where_cells
from bench.reselect import reselect_text
from bench.start_up import start_up_text
from bench.stream.report import compared_text, pair_text, stream_text
from bench.sweep_speed import OVERHEAD, PHASES
from bench.versions import versions_text
from bench.watch.report import watch_text
from zest_fast.foundation.text_table import markdown_table

MIB = 2**20
KERNEL_SIZES = (4 * MIB, 256 * MIB)  # of the four sizes measured: cache-resident, and far beyond


def main() -> None:
    """Parse the command line; exit status 1 where --check finds a page out of date."""
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description="figures of README.md and docs/")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is out of date")
    parser.add_argument("--readme", type=Path, action="append", help="this page alone (may be given several times)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    pages = options.readme or [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    found = {page: page.read_text(encoding="utf-8") for page in pages}
    wanted = {page: render(text, options.results) for page, text in found.items()}
    stale = [page for page in pages if found[page] != wanted[page]]
    if not options.check:
        for page in stale:
            page.write_text(wanted[page], encoding="utf-8")
        draw_plots(options.results)
    elif stale or not plots_are_drawn(options.results):
        names = ", ".join(page.name for page in stale or pages)
        sys.exit(f"{names}: not the figures (or plots) of bench/results; run python -m bench.readme")


def render(page: str, results: Path) -> str:
    """The text of a page with every block as the results say.

    Raises ValueError for a marker of an unknown block, or one without its end.
    """
    for name in re.findall(r"<!-- bench:(\w+):begin -->", page):
        if name not in BLOCKS:
            raise ValueError(f"marker bench:{name}: no such block; there are {', '.join(BLOCKS)}")
        start, end = f"<!-- bench:{name}:begin -->", f"<!-- bench:{name}:end -->"
        before, _, rest = page.partition(start)
        if end not in rest:
            raise ValueError(f"marker bench:{name}: {end} is missing after its begin")
        _, _, after = rest.partition(end)
        page = f"{before}{start}\n{_block(name, results)}\n{end}{after}"
    return page


def draw_plots(results: Path) -> None:
    """An SVG beside every JSON of PLOTS that is there and has none. Raises ImportError without matplotlib."""
    for source, draw in _plots(results):
        if not pictures.is_drawn(source.read_bytes(), source.with_suffix(".svg")):
            draw(source.read_bytes(), source.with_suffix(".svg"))


def plots_are_drawn(results: Path) -> bool:
    """Whether the plots are those of the figures; each holds the hash of its JSON."""
    return all(pictures.is_drawn(source.read_bytes(), source.with_suffix(".svg")) for source, _ in _plots(results))


def _plots(results: Path) -> list[tuple[Path, Callable[[bytes, Path], None]]]:
    found = [(results / file, draw) for file, draw in PLOTS.items()]
    return [(source, draw) for source, draw in found if source.exists()]


def _block(name: str, results: Path) -> str:
    sources, table = BLOCKS[name]
    for file, command in sources.items():
        if not (results / file).exists():
            return f"*Not measured yet: `{command}` writes `bench/results/{file}`.*"
    documents = [json.loads((results / file).read_text(encoding="utf-8")) for file in sources]
    origins = "\n".join(map(_origin, documents, sources.values()))
    return "\n\n".join(part for part in (table(*documents), LEGENDS.get(name), origins) if part)


def _origin(document: dict, command: str) -> str:
    machine, versions = document.get("machine", {}), document.get("versions", {})
    where = [
        machine.get("cpu", machine.get("platform", "")),
        f"{machine.get('cores', '?')} cores, {machine.get('threads', machine.get('torch_threads', '?'))} threads",
        f"{machine.get('cpu_capability', machine.get('vector', ''))}",
        f"torch {versions.get('torch', '?')}",
        document.get("date", ""),
        ", ".join(f"some rows of {date}" for date in sorted(_later_dates(document))),
    ]
    return f"*`{document.get('command', command)}` on {'; '.join(part for part in where if part)}.*"


def _later_dates(document: dict) -> set[str]:
    """Of rows that were added to a file that was there."""
    results = document.get("results", [])
    return {row["date"] for row in results if isinstance(row, dict) and row.get("date") not in (None, document["date"])}


def profile_table(document: dict) -> str:
    """Seconds of a plain pass and, as multiples of it, profile and its peers with their intervals."""
    peers = {
        "profile": "**profile**",
        "hook_and_drop": "(b) hooks, best torch",
        "after_backward": "(a) after backward",
        "zero_cost_nas": "(c) zero-cost-nas, 4 metrics",
        "backpack": "(d) BackPACK",
        "opacus": "(d) Opacus",
    }
    rows = []
    for result in document["results"]:
        ratios = result["ratio_to_plain"]
        cells = [_interval(ratios[name]) if name in ratios else _failure(result, name) for name in peers]
        plain = f"{result['seconds']['plain']['median']:.2f}"
        to_peer = _interval(result["profile_to_hook_and_drop"])
        rows.append([f"{result['model']} {result['shape']}", plain, *cells, to_peer])
    return markdown_table(["model, batch", "plain, s", *peers.values(), "profile / (b)"], rows)


def where_table(document: dict) -> str:
    """What a profile spends above a plain pass, in percent of that, by parts."""
    parts = ("around", "hooks", "moments of Y", "Σ Y⊙G", "dW and W")
    head = ["model, batch", "plain, ms", "profile", *(f"{part}, %" for part in parts), "hooks, µs a layer", "MiB read"]
    return markdown_table(head, [[f"{r['model']} {r['shape']}", *where_cells(r)] for r in document["results"]])


def _failure(result: dict, name: str) -> str:
    why = result["failed"].get(name, "")
    return "not installed" if why.startswith("ModuleNotFoundError") else "does not run" if why else ""


def _interval(value: dict) -> str:
    return f"{value['median']:.2f} ({value['low']:.2f} to {value['high']:.2f})"


def memory_table(document: dict) -> str:
    """Peak MiB beyond model and batch: the peer that drops each gradient, and profile relative to it."""
    rows = []
    for result in document["results"]:
        for mode, peaks in result["peak_bytes"].items():
            peer, fisher = peaks["drop_gradients"], peaks["profile"] - peaks["profile_without_fisher"]
            rows.append(
                [
                    f"{result['model']} {result['shape']}" + (", checkpointed" if mode == "checkpointed" else ""),
                    *(_mib(peaks[name]) for name in ("plain", "drop_gradients", "drop_gradients_profiled_only")),
                    _mib(peaks["profile_without_fisher"]),
                    f"{(peaks['profile_without_fisher'] - peer) / MIB:+.0f}",
                    f"{fisher / MIB:+.0f}",
                    _mib(peaks["outputs_nobody_keeps"]) if "outputs_nobody_keeps" in peaks else "",
                ]
            )
    head = ["peak MiB", "plain", "gradients dropped", "same, profiled weights only", "profile without fisher"]
    return markdown_table([*head, "against dropped", "fisher adds", "outputs that nobody else keeps"], rows)


def _mib(count: int) -> str:
    return f"{count / MIB:.0f}"


def kernels_table(document: dict) -> str:
    """The kernels at two sizes, all threads: GB/s, share of the read bandwidth, and how much faster than torch."""
    results = document["results"]
    threads = max((r["threads"] for r in results), default=1)
    rows = [_kernel_row(r) for r in results if r["threads"] == threads and _is_shown(r)]
    head = ["kernel", "input", "dtype", "ms", "GB/s", "limit reached"]
    return markdown_table([*head, "x separate torch", "x lean torch", "x torch.compile"], rows)


def _is_shown(result: dict) -> bool:
    return "time_to_bare_mm" in result or any(0.9 < result["bytes"] / size <= 1 for size in KERNEL_SIZES)


def _kernel_row(result: dict) -> list[str]:
    if "time_to_bare_mm" in result:
        limit = f"{_interval(result['time_to_bare_mm'])} x bare torch.mm"
    else:
        limit = f"{100 * result['share_of_read_bandwidth']['median']:.0f} % of {result['read_gb_per_s']:.0f} GB/s read"
    speedups = [result["speedup"].get(f"torch_{peer}") for peer in ("separate", "lean", "compiled")]
    return [
        result["kernel"],
        " x ".join(map(str, result["shape"])),
        result["dtype"],
        f"{result['seconds']['zest_fast']['median'] * 1e3:.2f}",
        f"{result['gb_per_s']:.1f}",
        limit,
        *(f"{speedup['median']:.1f}" if speedup else "" for speedup in speedups),
    ]


def instructions_table(document: dict) -> str:
    """Instructions of each CPU kernel, of one call and for each element of one operand."""
    rows = [
        [r["kernel"], r["input"], f"{r['instructions']:,}", f"{r['instructions'] / r['elements']:.1f}"]
        for r in document["results"]
    ]
    return markdown_table(["kernel", "input", "instructions", "for each element"], rows)


def demo_table(document: dict) -> str:
    """The arms of the demo: accuracy with its standard error, trained parameters, time and peak of a step."""
    rows = []
    for arm in document.get("arms", []):
        error = arm.get("standard_error")
        accuracy = f"{100 * arm['test_accuracy']:.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")
        cost = [arm.get(key) for key in ("trainable_parameters", "seconds_per_step", "relative_seconds", "peak_bytes")]
        forms: list[Callable[[float], str]] = ["{:,.0f}".format, "{:.3f}".format, "{:.2f}".format, _mib]
        cells = ["" if value is None else form(value) for form, value in zip(forms, cost, strict=True)]
        rows.append([arm["name"], accuracy, *cells])
    table = markdown_table(["arm", "test accuracy, %", "trained parameters", "s / step", "x full", "peak MiB"], rows)
    return "\n\n".join(part for part in (document.get("title"), table, document.get("finding")) if part)


def sweep_speed_table(document: dict) -> str:
    """Processor seconds of a sweep with reuse of frozen prefixes and without, and how far the scores differ."""
    rows = [
        [
            result["pair"],
            str(result["layers"]),
            *(f"{result['seconds'][name]['median']:.0f}" for name in ("naive", "reuse")),
            _interval(result["ratio"]),
            f"{result['largest_difference_of_a_score']:.0e}",
        ]
        for result in document["results"]
    ]
    table = markdown_table(
        ["model/data", "layers", "naive loop, s", "sweep, s", "ratio", "largest difference of a score"], rows
    )
    phases = _sweep_phases(
        [result for result in document["results"] if "phases" in result]
    )  # a file of before has none
    return f"{table}\n\n{phases}" if phases else table


def _sweep_phases(results: list[dict]) -> str:
    """Where the seconds go (sweep / naive loop), and the ratio if what the naive loop does not have cost nothing."""
    if not results:
        return ""
    rows = []
    for result in results:
        naive, reuse = (result["phases"][name] for name in ("naive", "reuse"))
        work = sum(seconds for part, seconds in reuse.items() if part not in OVERHEAD)
        parts = [f"{reuse[part]:.1f} / {naive[part]:.1f}" for part in PHASES if part not in OVERHEAD]
        overhead = [f"{reuse[part]:.1f}" for part in OVERHEAD]
        rows.append([result["pair"], *overhead, *parts, f"{work / result['seconds']['naive']['median']:.2f}"])
    return markdown_table(
        ["model/data", *(f"{part}, s" for part in PHASES), "ratio without planning, caches and checks"], rows
    )


LEGENDS = {
    "adapters": "One run of each task: five layers by the Ranker and the head, trained for 150 steps. *Error*: the "
    "Frobenius norm of what is missing by that of the difference, over all adapted weights, and in the layer where it "
    "is largest. Accuracy of the adapter as PEFT loads it.",
    "profile": "Multiples of the plain pass, with the interval of the median. (a): keep all gradients, then one torch "
    "expression per metric. (b): hooks that reduce each gradient with the fastest separate torch reductions and drop "
    "it at once. (c): four of the fifteen metrics, a pass each, as published. (d): the norm of each sample's gradient, "
    "another quantity, for orientation.",
    "profile_where": "Medians, in percent of the plain pass. *Around*: before the first pass and after the last. "
    "*Hooks*: Python in forward and backward, without the kernels, which are the next three. The rest is the pass "
    "itself, which forms fewer gradients and finds the caches filled with other things. *MiB read* by the kernels, "
    "cached or not.",
    "memory": "Beyond model and batch, from the allocator's own events. *Gradients dropped*: all parameters trainable, "
    "each gradient dropped in a post-accumulate hook. The claim: without fisher at most 16 MiB more than that; fisher "
    "adds at most the outputs that nobody else keeps.",
    "sweep_speed": "Processor seconds of a quarter of one seed. Naive loop: the same recipe and head, all else frozen, "
    "each pass from the input. Planning and the passes that fill the caches count; head and profiles do not. The "
    "range is that of the rounds.",
    "prefix_cache": "Processor time of one thread. *A step* of a later epoch, interleaved with the same step without "
    "the cache and with one of full fine-tuning. *At best*: that step without its forward pass up to the cut, which is "
    "what reading in no time would leave. *4 epochs*: all steps of a run, the first epoch's computing and "
    "writing among them; not interleaved. Both runs start from the same seed and see the same batches.",
    "kernels": "All threads. The read bandwidth is that of the fastest of three read-only torch passes over as many "
    "bytes in the same rounds. *Lean torch*: shared sums over cache-sized blocks; it and torch.compile lose digits on "
    "offset data, the kernels do not.",
    "instructions": "One thread, AVX2: valgrind knows no AVX-512. Counted by callgrind in one call on about 65,536 "
    "elements, so they are the same on a busy machine; they say nothing of waiting for memory. Sizes of channel "
    "products: samples x positions x channels.",
}
PLOTS = {"layerbench.json": layerbench_report.draw, "finetune.json": finetune_report.draw}
_PROFILE = {"profile.json": "python -m bench.profile"}
_FINETUNE = {"finetune.json": "python -m bench.finetune"}
_METHODS = {"memory_table.json": "python -m bench.memory_table --check"}
BLOCKS: dict[str, tuple[dict[str, str], Callable[..., str]]] = {
    "landing": ({**_FINETUNE, **_METHODS}, landing_text),
    "profile": (_PROFILE, profile_table),
    "profile_epyc": ({"profile_epyc.json": "python -m bench.profile --no-large"}, profile_table),
    "profile_where": ({"profile_where.json": "python -m bench.profile --where"}, where_table),
    "memory": (_PROFILE, memory_table),
    "kernels": ({"kernels.json": "python -m bench.kernels"}, kernels_table),
    "instructions": ({"instructions.json": "python -m bench.kernels.instructions"}, instructions_table),
    "start_up": ({"start_up.json": "python -m bench.start_up --wheel"}, start_up_text),
    "sweep_speed": ({"sweep_speed.json": "python -m bench.sweeps --speed"}, sweep_speed_table),
    "probe_blind": ({"probe_blind.json": "python -m bench.probe_blind"}, blind_text),
    "probe_controls": ({"probe_controls.json": "python -m bench.probe_controls"}, controls_text),
    "probe_share": ({"probe_share.json": "python -m bench.probe_share"}, share_text),
    "part_of_a_sweep": ({"part_of_a_sweep.json": "python -m bench.part_of_a_sweep"}, part_text),
    "ranking": ({"layerbench.json": "python -m bench.layerbench evaluate"}, layerbench_report.layerbench_text),
    "finetune": (_FINETUNE, finetune_text),
    "choose": ({"choose.json": "python -m bench.choose"}, choose_text),
    "adapters": ({"adapters.json": "python -m bench.adapters"}, adapters_text),
    "lean": ({"lean.json": "python -m bench.lean"}, lean_text),
    "methods": (_METHODS, memory_text),
    "llama7b": ({"llama7b.json": "python -m bench.llama7b"}, llama7b_text),
    "stream": ({"stream.json": "python -m bench.stream shape"}, stream_text),
    "stream_compared": ({"stream_compared.json": "python -m bench.stream compare"}, compared_text),
    "stream_pair": ({"stream_pair.json": "python -m bench.stream pair"}, pair_text),
    "versions": ({"versions.json": "nox -s versions"}, versions_text),
    "watch": ({"watch.json": "python -m bench.watch"}, watch_text),
    "reselect": ({"reselect.json": "python -m bench.reselect"}, reselect_text),
    "prefix_cache": ({"prefix_cache.json": "python -m bench.prefix_cache"}, cache_text),
    "demo": ({"demo.json": "zest-fast demo --full"}, demo_table),
    "demo_minilm": ({"demo_minilm.json": "zest-fast demo --full --task minilm"}, demo_table),
    "demo_smollm2": ({"demo_smollm2.json": "zest-fast demo --full --task smollm2"}, demo_table),
}
"""Of a block: the files that it shows, each with the command that writes it, and who makes the text of them."""


if __name__ == "__main__":
    main()
