"""How many instructions each CPU kernel executes on fixed data, by callgrind: a figure that no other process disturbs.

python -m bench.kernels.instructions          # writes bench/results/instructions.json; needs g++ and valgrind

One call of one thread, built as CMakeLists.txt builds the extension. Valgrind knows no AVX-512, so the AVX2 path is what
is counted. `pytest -m slow tests/bench/test_bench_instructions.py` compares with the file, within 3 %.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from bench.measure import write_result

ROOT = Path(__file__).parents[2]
ELEMENTS = 4 * 3136 * 16
"""Of every operand, as in instructions.cpp."""
CASES = (
    *(("moments", dtype) for dtype in ("float32", "bfloat16", "float16", "float64")),
    *(("moments, transposed", dtype) for dtype in ("float32", "bfloat16")),
    *(
        (kernel, dtype)
        for kernel in (
            "gradient_moments",
            "channel_products (pixels)",
            "channel_products (tokens)",
            "silu_gated_backward",
            "interval_bits",
        )
        for dtype in ("float32", "bfloat16")
    ),
)


def main() -> None:
    for tool in ("g++", "valgrind"):
        if shutil.which(tool) is None:
            raise SystemExit(f"{tool} is not installed (apt-get install g++ valgrind)")
    results = [{"kernel": kernel, "dtype": dtype, "instructions": n} for (kernel, dtype), n in count().items()]
    settings = {"compiler": compiler(), "valgrind": _first_line("valgrind"), "path": "AVX2", "elements": ELEMENTS}
    print(write_result("instructions", settings, results, module="kernels.instructions"))


def compiler() -> str:
    return _first_line("g++")


def _first_line(tool: str) -> str:
    return subprocess.run([tool, "--version"], check=True, capture_output=True, text=True).stdout.splitlines()[0]


def count() -> dict[tuple[str, str], int]:
    """Instructions of one call, by kernel and dtype."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "program")
        sources = [*(ROOT / "csrc/cpu").glob("*.cpp"), Path(__file__).with_suffix(".cpp")]
        flags = ["-std=c++17", "-fopenmp", f"-I{ROOT / 'csrc'}", *_flags_of_the_extension()]
        subprocess.run(["g++", *flags, *map(str, sources), "-o", str(program)], check=True)
        return {case: _count(program, case) for case in CASES}


def _flags_of_the_extension() -> list[str]:
    """What CMakeLists.txt compiles the CPU kernels with."""
    found = re.search(r"target_compile_options\(zest_cpu PRIVATE ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())
    assert found, "CMakeLists.txt sets no options of zest_cpu"
    return found[1].split()


def _count(program: Path, case: tuple[str, str]) -> int:
    out = program.with_suffix(".out")
    only = ["--collect-atstart=no", "--toggle-collect=counted"]
    command = ["valgrind", "--tool=callgrind", *only, f"--callgrind-out-file={out}", str(program), *case]
    subprocess.run(command, check=True, capture_output=True)
    found = re.search(r"^summary: (\d+)", out.read_text(), re.MULTILINE)
    assert found and int(found[1]), f"callgrind counted nothing of {case}"
    return int(found[1])


if __name__ == "__main__":
    main()
