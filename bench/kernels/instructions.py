"""`python -m bench.kernels.instructions`: how many instructions each CPU kernel executes, counted by callgrind.

Counts are the same on a busy machine and on an idle one: a change of a few percent shows where times say nothing. They
are of one thread and a fixed input, and of what valgrind can run: it knows no AVX-512, so the loader takes the clones
for AVX2. They are no times: a kernel that waits for memory is not slower for some instructions more.

instructions.cpp calls the kernels; it is built from csrc/cpu with the flags of CMakeLists.txt. valgrind and g++ have to
be there. Writes bench/results/instructions.json; --check compares with that file instead, and exits non-zero where a
count is more than 3 % off. Counts of two compilers are not comparable: --check says so.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.measure import RESULTS, ROOT, write_result

RECORDED = RESULTS / "instructions.json"
TOLERANCE = 0.03
"""Of a count, either way: fewer are a reason to write the file again, not an error of the kernel."""
_FOREIGN = ("compiler", "valgrind", "instruction_set")  # not the flags: whoever changes those changes the kernels
_DRIVER = Path(__file__).with_name("instructions.cpp")


@dataclass(frozen=True)
class Counts:
    """What was counted, with all that the counts depend on."""

    settings: dict[str, object]
    """compiler, flags, valgrind, instruction_set."""
    results: list[dict]
    """Of each case kernel, input, elements (of one operand) and instructions."""


def main() -> None:
    """Count, print, and write or compare."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels.instructions", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with bench/results/instructions.json")
    parser.add_argument("--out", type=Path, help="folder for the JSON (default bench/results)")
    options = parser.parse_args()
    if reason := cannot_count():
        sys.exit(f"bench.kernels.instructions: {reason}")
    counts = count()
    Console(width=100).print(_table(counts))
    if not options.check:
        path = write_result("instructions", counts.settings, counts.results, options.out, "kernels.instructions")
        print(f"wrote {path}")
    elif reason := not_comparable(counts, recorded()):
        sys.exit(f"bench.kernels.instructions: {reason}")
    elif changed := changes(counts, recorded()):
        sys.exit("\n".join(changed))


def cannot_count() -> str:
    """The tool that is missing here; empty if none is."""
    missing = [tool for tool in ("g++", "valgrind") if shutil.which(tool) is None]
    return f"{' and '.join(missing)} not installed" if missing else ""


def recorded() -> Counts:
    """The counts of bench/results/instructions.json."""
    document = json.loads(RECORDED.read_text())
    return Counts(document["settings"], document["results"])


def not_comparable(found: Counts, before: Counts) -> str:
    """In what two runs differ that changes counts without any change of the kernels; empty if in nothing."""
    differing = [key for key in _FOREIGN if found.settings[key] != before.settings[key]]
    return "; ".join(
        f"{key} is {found.settings[key]}, the recorded counts have {before.settings[key]}" for key in differing
    )


def changes(found: Counts, before: Counts) -> list[str]:
    """A line for each case whose count is off by more than `TOLERANCE`, or that only one of the two has."""
    now, then = ({(r["kernel"], r["input"]): r["instructions"] for r in counts.results} for counts in (found, before))
    lines = []
    for case in dict.fromkeys((*then, *now)):
        if case not in now or case not in then:
            lines.append(f"{', '.join(case)}: {'not counted any more' if case in then else 'not recorded'}")
        elif abs(now[case] / then[case] - 1) > TOLERANCE:
            lines.append(f"{', '.join(case)}: {now[case]} instructions, {now[case] / then[case]:.3f} of {then[case]}")
    return lines


def count() -> Counts:
    """Build the kernels and their driver, and run it under callgrind: half a minute.

    Raises subprocess.CalledProcessError with what the compiler or valgrind said.
    """
    with tempfile.TemporaryDirectory() as folder:
        driver = _build(Path(folder))
        out = Path(folder) / "callgrind"
        lines = _run(
            "valgrind",
            "--tool=callgrind",
            "--toggle-collect=measured",
            "--dump-after=measured",
            f"--callgrind-out-file={out}",
            str(driver),
        ).splitlines()
        instruction_set, cases = lines[0], lines[1:]
        # One dump for each call of `measured`, in their order.
        dumps = [out.with_name(f"callgrind.{i + 1}").read_text() for i in range(len(cases))]
    settings: dict[str, object] = {
        "compiler": _run("g++", "--version").splitlines()[0],
        "flags": " ".join(_flags()),
        "valgrind": _run("valgrind", "--version").strip(),
        "instruction_set": instruction_set,
    }
    return Counts(settings, [_result(case, dump) for case, dump in zip(cases, dumps, strict=True)])


def _result(case: str, dump: str) -> dict:
    elements, name = case.split(" ", 1)
    kernel, data = name.split(", ", 1)
    total = re.search(r"^totals: (\d+)$", dump, re.MULTILINE)
    assert total is not None, "callgrind's format has a line of totals"
    return {"kernel": kernel, "input": data, "elements": int(elements), "instructions": int(total[1])}


def _build(folder: Path) -> Path:
    sources = [*sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), _DRIVER]
    flags = ("-std=c++17", "-fPIC", "-fopenmp", *_flags(), f"-I{ROOT / 'csrc'}")
    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(lambda source: _compiled(source, flags, folder), sources))
    # All symbols bound at start-up: the loader's work is not that of the first kernel.
    _run("g++", "-fopenmp", "-Wl,-z,now", *map(str, objects), "-o", str(folder / "instructions"))
    return folder / "instructions"


def _compiled(source: Path, flags: tuple[str, ...], folder: Path) -> Path:
    target = folder / f"{source.stem}.o"
    _run("g++", *flags, "-c", str(source), "-o", str(target))
    return target


def _flags() -> list[str]:
    """The options of the kernels in CMakeLists.txt."""
    options = re.search(r"target_compile_options\(zest_cpu PRIVATE ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())
    assert options is not None, "CMakeLists.txt sets the options of zest_cpu"
    return options[1].split()


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, f"{command[0]}: {done.stderr[-2000:]}")
    return done.stdout


def _table(counts: Counts) -> Table:
    title = f"{counts.settings['instruction_set']}, {counts.settings['compiler']}"
    table = Table("kernel", "input", "instructions", "per element", title=title)
    for r in counts.results:
        each = f"{r['instructions'] / r['elements']:.2f}"
        table.add_row(r["kernel"], r["input"], f"{r['instructions']:,}", each)
    return table


if __name__ == "__main__":
    main()
