"""What Triton's kernels compile to, without a GPU: registers, spills, tensor-core instructions, wide loads.

    python -m bench.offline

Compiles every configuration that zest_fast launches for sm_80 (A100) and sm_90 (H100), with no driver, and reads the
machine code. It requires: no spills and no local memory; tensor-core instructions in every GEMM (HMMA on sm_80, HGMMA
on sm_90); 128-bit loads in the others; and an epilogue of at most 60 % of the instructions of the naive one
(bench/offline/naive_epilogue.py), counted on the way that a whole tile takes. Exits non-zero on a miss.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.measure import write_result
from bench.offline.naive_epilogue import naive_reduced_gradient
from bench.offline.sass import Program
from zest_fast.kernels import triton_channels, triton_gradient, triton_lean, triton_linear, triton_moments

ARCHITECTURES = (80, 90)
LONGEST_EPILOGUE = 0.60  # of the naive one
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_POINTERS = {
    "gradient_sums": "*fp64",
    "sums": "*fp32",
    "careful_sums": "*fp64",
    "partials": "*fp64",
    "out": "*fp64",
    "table": "*i64",
}
GEMM_TYPES = (("bf16", "bf16", 2), ("bf16", "fp32", 2), ("fp16", "fp16", 2), ("fp16", "fp32", 2), ("fp32", "fp32", 4))
"""X and G, W (under autocast it is wider), bytes per entry of X."""


@dataclass(frozen=True)
class Kernel:
    """One kernel with everything that its compilation needs."""

    name: str
    function: triton.JITFunction
    constants: dict[str, object]
    pointers: dict[str, str]
    warps: int
    stages: int = 3
    ones: tuple[str, ...] = ()
    """Arguments that are 1 at launch: Triton compiles a kernel of its own for that."""


@dataclass(frozen=True)
class Compiled:
    """What the machine code of a kernel holds."""

    registers: int
    spills: int
    local_bytes: int
    shared_bytes: int
    matrix_instructions: int
    wide_loads: int
    epilogue: int | None


def compile_for(architecture: int, kernel: Kernel) -> Compiled:
    """Compiles as a launch on aligned tensors whose strides are multiples of 16 would, and reads the result."""
    names = kernel.function.arg_names
    types = {**_POINTERS, **kernel.pointers}
    signature = {n: "constexpr" if n in kernel.constants or n in kernel.ones else types.get(n, "i32") for n in names}
    constants = {(names.index(n),): value for n, value in kernel.constants.items()}
    constants.update({(names.index(n),): 1 for n in kernel.ones})
    aligned = [n for n in names if signature[n] != "constexpr" and (n in types or not n.startswith(("rows", "tiles")))]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    binary = triton.compile(
        ASTSource(kernel.function, signature, constants, attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": kernel.warps, "num_stages": kernel.stages, "enable_fp_fusion": True},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        usage = _run("cuobjdump", "-res-usage", file.name)
        program = Program(_run("nvdisasm", "-c", file.name))
    matrix = program.count(r"HGMMA" if architecture >= 90 else r"HMMA")
    return Compiled(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spills=program.count(r"(STL|LDL)\b"),
        local_bytes=int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1]),
        shared_bytes=binary.metadata.shared,
        matrix_instructions=matrix,
        wide_loads=program.count(r"LDG\S*\.128|LDGSTS\S*\.128|UTMALDG"),
        epilogue=program.epilogue_length() if matrix else None,
    )


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def gemm(dtype: str, w: str, tile: triton_linear.Tile, *, naive: bool = False) -> Kernel:
    """``reduced_gradient`` as it is launched for X and G of one dtype and W, or the naive yardstick of that tile."""
    types = dtype if w == dtype else f"{dtype}, W {w}"
    return Kernel(
        f"dW epilogue {types} {tile.rows}x{tile.columns}x{tile.depth}",
        naive_reduced_gradient if naive else triton_linear.reduced_gradient,
        {
            "BLOCK_O": tile.rows,
            "BLOCK_I": tile.columns,
            "BLOCK_T": tile.depth,
            "BAND": 8,
            "SUM_LANES": 512,
            "PRECISION": "tf32x3" if dtype == "fp32" else "ieee",
        },
        {"x": f"*{dtype}", "g": f"*{dtype}", "w": f"*{w}"},
        tile.warps,
        tile.stages,
    )


def gemms() -> list[tuple[Kernel, Kernel]]:
    """Every GEMM configuration with the naive kernel beside it."""
    return [
        (gemm(dtype, w, tile), gemm(dtype, w, tile, naive=True))
        for dtype, w, size in GEMM_TYPES
        for tile in triton_linear.TILES[size]
    ]


def reductions() -> list[Kernel]:
    """The moments kernels and channel products, as launched."""
    found = [Kernel("moments, any dtype", triton_moments.moments_of_chunks, {}, {}, triton_moments.WARPS)]
    for dw, w in (("bf16", "bf16"), ("fp32", "fp32"), ("bf16", "fp32")):
        constants = {"DENSE": True, "VECTOR": 8 if dw == w == "bf16" else 4, "COMPUTE": triton.language.float32}
        pointers = {"dw": f"*{dw}", "w": f"*{w}"}
        found.append(Kernel(f"gradient moments {dw}, {w}", triton_gradient.gradient_chunks, constants, pointers, 4))
    for dtype in ("bf16", "fp32"):
        for layout, (positions, channels, dense) in {
            "channels": (16, 128, ("y_channel", "g_channel")),
            "positions": (256, 8, ("y_position", "g_position")),
        }.items():
            constants = {"POSITIONS": positions, "CHANNELS": channels, "COMPUTE": triton.language.float32}
            pointers = {"y": f"*{dtype}", "g": f"*{dtype}"}
            function = triton_channels.products_of_part
            found.append(Kernel(f"channel products {dtype}, {layout}", function, constants, pointers, 4, ones=dense))
    return found


def leans() -> list[Kernel]:
    """The kernels of lean saving: every activation; norms of short, usual and the widest rows."""
    found = []
    for dtype in ("bf16", "fp32"):
        for activation in ("silu", "gelu", "gelu_tanh"):
            constants = {"ACTIVATION": activation, "BLOCK": triton_lean.GATED_BLOCK}
            pointers = dict.fromkeys(("g", "gate", "up", "d_gate", "d_up"), f"*{dtype}")
            found.append(Kernel(f"lean {activation} {dtype}", triton_lean.gated_gradients, constants, pointers, 4))
        for columns, centred in ((128, False), (4096, False), (4096, True), (triton_lean.WIDEST_ROW, True)):
            rows, block, warps = triton_lean.norm_tile(columns)
            constants = {"EPS": 1e-6, "OFFSET": 0.0, "CENTRED": centred, "ROWS": rows, "COLUMNS": block}
            pointers = dict.fromkeys(("g", "x", "weight", "out"), f"*{dtype}")
            name = f"lean {'layer' if centred else 'RMS'} norm {dtype} {columns}"
            found.append(Kernel(name, triton_lean.norm_gradients, constants, pointers, warps))
    return found


def misses(compiled: Compiled, *, matrix: bool, naive: Compiled | None = None) -> list[str]:
    """What a kernel fails of the requirements."""
    found = []
    if compiled.spills or compiled.local_bytes:
        found.append(f"{compiled.spills} spills, {compiled.local_bytes} bytes of local memory")
    if matrix and not compiled.matrix_instructions:
        found.append("no tensor-core instructions")
    if not compiled.wide_loads:
        found.append("no 128-bit loads")
    if naive is not None and compiled.epilogue > LONGEST_EPILOGUE * naive.epilogue:
        found.append(f"epilogue {compiled.epilogue / naive.epilogue:.0%} of the naive one")
    return found


def examine(architecture: int, kernel: Kernel, naive_kernel: Kernel | None) -> dict:
    """One row of the table."""
    compiled = compile_for(architecture, kernel)
    naive = compile_for(architecture, naive_kernel) if naive_kernel else None
    row = {"target": f"sm_{architecture}", "kernel": kernel.name, "warps": kernel.warps, **asdict(compiled)}
    row["naive_epilogue"] = naive.epilogue if naive else None
    row["misses"] = misses(compiled, matrix=naive is not None, naive=naive)
    return row


def print_row(row: dict) -> None:
    share = f"{row['epilogue']}/{row['naive_epilogue']}" if row["naive_epilogue"] else "-"
    print(
        f"{row['target']:6} {row['kernel']:34} {row['warps']:5} {row['registers']:5} {row['spills']:6} "
        f"{row['local_bytes']:5} {row['shared_bytes'] / 1024:6.0f} KB {row['matrix_instructions']:4} "
        f"{row['wide_loads']:5} {share:>10}  {'; '.join(row['misses']) or 'ok'}",
        flush=True,
    )


def summary(rows: list[dict]) -> str:
    """One line: how many kernels meet everything, and how long their epilogues are."""
    good = sum(not row["misses"] for row in rows)
    line = f"offline: {good} of {len(rows)} kernels meet every requirement"
    line += f"; no spills in {sum(not row['spills'] for row in rows)}"
    if shares := [row["epilogue"] / row["naive_epilogue"] for row in rows if row["naive_epilogue"]]:
        line += f"; epilogue {min(shares):.1%} to {max(shares):.1%} of the naive one"
    return line


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.offline", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=None, help="folder of the JSON (bench/results by default)")
    parser.add_argument("--match", default="", help="only kernels whose name holds this")
    options = parser.parse_args(arguments)
    print(
        f"{'target':6} {'kernel':34} {'warps':>5} {'regs':>5} {'spills':>6} {'local':>5} {'shared':>9} {'MMA':>4} "
        f"{'128b':>5} {'epi/naive':>10}"
    )
    rows = []
    for architecture in ARCHITECTURES:
        pairs = [*gemms(), *((kernel, None) for kernel in [*reductions(), *leans()])]
        for kernel, naive in pairs:
            if options.match not in kernel.name:
                continue
            rows.append(examine(architecture, kernel, naive))
            print_row(rows[-1])
    if not rows:
        parser.error(f"--match {options.match!r}: no kernel has that in its name")
    write_result("offline", {"triton": triton.__version__, "longest_epilogue": LONGEST_EPILOGUE}, rows, options.out)
    failed = [row for row in rows if row["misses"]]
    print(summary(rows))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
