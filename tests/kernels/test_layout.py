"""Numbers of dtypes and rows of moments: Python, csrc/layout.h, csrc/moments.h and the compiled extension agree."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from zest_fast import _native  # type: ignore[attr-defined]
from zest_fast.kernels import DTYPES, Collector, layout, reference
from zest_fast.kernels.moments import GradientMoments, Moments

CSRC = Path(__file__).parents[2] / "csrc"


def members(struct: str) -> list[str]:
    """Names of a struct of csrc/moments.h, in order."""
    (body,) = re.findall(rf"struct {struct} {{\n(.*?)\n}};", (CSRC / "moments.h").read_text(), re.DOTALL)
    declared = re.findall(r"^\s*\w+ ([^;]+);", body, re.MULTILINE)
    return [name.split("=")[0].strip() for line in declared for name in line.split(",")]


def test_numbers_of_dtypes_are_those_of_the_header() -> None:
    (body,) = re.findall(r"enum class DType : int {(.*?)}", (CSRC / "layout.h").read_text())
    declared = {name: int(number) for name, number in re.findall(r"(\w+) = (\d+)", body)}
    assert {str(dtype).removeprefix("torch."): number for dtype, number in layout.DTYPE_NUMBER.items()} == declared
    assert tuple(layout.DTYPE_NUMBER) == DTYPES


def test_rows_are_the_structs_of_the_header() -> None:
    for kind, struct in ((Moments, "Moments"), (GradientMoments, "GradientMoments")):
        assert [field.name for field in dataclasses.fields(kind)] == members(struct)
    assert len(members("Moments")) == layout.MOMENTS
    assert len(members("Moments")) + len(members("GradientMoments")) - 1 == layout.GRADIENT_MOMENTS


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_extension_reads_each_dtype_and_writes_such_rows(dtype: torch.dtype) -> None:
    w, dw = torch.tensor([[1.0, -2.0, 4.0]], dtype=dtype), torch.tensor([[0.5, 3.0, -1.0]], dtype=dtype)
    number = layout.DTYPE_NUMBER[dtype]
    row = _native.moments(w.data_ptr(), number, w.shape, w.stride(), 1)
    assert len(row) == layout.MOMENTS
    assert row == pytest.approx(dataclasses.astuple(reference.moments(w)))
    arguments = (dw.data_ptr(), number, dw.stride(), w.data_ptr(), number, w.stride(), w.shape, 1)
    row, expected = _native.gradient_moments(*arguments), reference.gradient_moments(dw, w)
    assert len(row) == layout.GRADIENT_MOMENTS
    others = dataclasses.astuple(expected)[1:]
    assert row == pytest.approx((*dataclasses.astuple(expected.gradient), *others))
    assert GradientMoments.from_row(*row).gradient.mean == pytest.approx(expected.gradient.mean)


def test_the_reference_squares_products_a_block_of_samples_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    y, g = torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(0)), torch.ones(7, 3, 5)
    monkeypatch.setattr(reference, "_PRODUCT_ENTRIES", 10)
    expected = float(y.double().sum(1).square().sum())
    assert reference.squared_channel_products(y, g, 2) == pytest.approx(expected, rel=1e-12)
    assert Collector("reference").squared_channel_products(y, g, 2)() == pytest.approx(expected, rel=1e-12)
    assert reference.squared_channel_products(y[:0], g[:0], 2) == 0.0
