"""Triton's kernels compiled for GPUs that are not there: no spills, tensor cores, wide loads, a short epilogue."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.offline.sass import Program

ROOT = Path(__file__).parents[2]

LOOP_AND_TWO_WAYS_OUT = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   HMMA.16816.F32 R4, R4, R8, R4 ;
        /*0020*/              @!P0 BRA `(.L_x_0) ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
        /*0040*/                   FADD R4, R4, R5 ;
        /*0050*/                   STG.E [R2.64], R4 ;
        /*0060*/                   EXIT ;
.L_x_1:
        /*0070*/                   FADD R4, R4, R6 ;
        /*0080*/                   FADD R4, R4, R7 ;
        /*0090*/              @!P2 FADD R4, R4, R7 ;
        /*00a0*/                   STG.E.128 [R2.64], R4 ;
        /*00b0*/                   EXIT ;
"""


def test_the_shortest_way_from_the_matrix_loop_to_the_exit_is_counted() -> None:
    program = Program(LOOP_AND_TWO_WAYS_OUT)
    assert program.epilogue_length() == 4  # the branch, FADD, STG, EXIT
    assert (program.count("FADD"), program.count("HMMA"), program.count(r"STG\S*\.128")) == (4, 1, 1)


def test_a_loop_left_by_a_far_jump_is_followed() -> None:
    far = LOOP_AND_TWO_WAYS_OUT.replace("@!P0 BRA `(.L_x_0) ;", "@P0 CALL.REL.NOINC `(.L_x_1) ;", 1)
    far = far.replace("        /*0030*/               @P1 BRA `(.L_x_1) ;", "        /*0030*/ BRA `(.L_x_0) ;")
    assert Program(far).epilogue_length() == 5


def test_code_without_matrix_instructions_has_no_epilogue() -> None:
    with pytest.raises(RuntimeError, match="matrix"):
        Program("        /*0000*/  EXIT ;\n").epilogue_length()


def compile_offline(folder: Path, *arguments: str) -> None:
    """In a process of its own: Triton compiles or interprets, as it was told when it was imported."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.offline", "--out", str(folder), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = json.loads((folder / "offline.json").read_text())["results"]
    assert {row["target"] for row in rows} == {"sm_80", "sm_90"}
    assert not any(row["misses"] or row["spills"] or row["local_bytes"] for row in rows)
    assert done.stdout.splitlines()[-1].startswith(f"offline: {len(rows)} of {len(rows)} kernels")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("kernel", ["bf16 128x128", "moments, any"])
def test_the_main_kernels_meet_the_requirements_on_both_architectures(kernel: str, tmp_path: Path) -> None:
    compile_offline(tmp_path, "--match", kernel)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_every_kernel_meets_the_requirements_on_both_architectures(tmp_path: Path) -> None:
    compile_offline(tmp_path)
