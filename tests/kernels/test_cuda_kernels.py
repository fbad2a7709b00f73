"""The CUDA kernels against the float64 specification: under the block emulator everywhere, on the GPU where one is.

The emulator (cuda_emulator.h) needs g++ only; the compiler's report needs nvcc, but no GPU and no driver.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_kernels import VIEWS, assert_close, assert_gradient_close
from torch import Tensor

from zest_fast import _native
from zest_fast.kernels import GradientMoments, Moments, cuda, reference

TESTS = Path(__file__).parent
CSRC = TESTS.parents[1] / "csrc"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CHUNK, TILE, PAIR_TILE = 32768, 8192, 4096
POSITIONS = 512
# One element, one off a packet (8), a warp's packets (256), a tile, a chunk, and several chunks.
LENGTHS = [
    1,
    2,
    7,
    8,
    9,
    255,
    257,
    PAIR_TILE - 1,
    PAIR_TILE + 1,
    TILE - 1,
    TILE,
    TILE + 1,
    CHUNK,
    CHUNK + 1,
    3 * CHUNK + 77,
]


class Emulated:
    """csrc/cuda compiled by g++ under the block emulator."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        for name in ("moments", "gradient_moments", "channel_products", "faulty"):
            getattr(self.library, name).restype = ctypes.c_char_p
        self.device = torch.device("cpu")

    def rows(
        self, tensors: Sequence[Tensor], *, descending: bool = False, first_block: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Statistics of every chunk [chunks, 6] and of every tensor [len(tensors), 6]."""
        tensors = [cuda.dense(x) for x in tensors]
        table, chunks = cuda.pointer_table(tensors, CHUNK)
        table = torch.tensor(table, dtype=torch.int64)
        of_chunk = torch.full((chunks, 6), math.nan, dtype=torch.float64)
        out = torch.full((len(tensors), 6), math.nan, dtype=torch.float64)
        self._call("moments", table, len(tensors), chunks, of_chunk, out, descending, ctypes.c_int64(first_block))
        return of_chunk, out

    def moments(self, tensors: Sequence[Tensor], **options: bool) -> list[Moments]:
        return [Moments.checked(*row) for row in self.rows(tensors, **options)[1].tolist()]

    def gradient_moments(self, dw: Tensor, w: Tensor, *, descending: bool = False) -> GradientMoments:
        dw, w = cuda.dense_in_one_order(dw, w)
        of_chunk = torch.full((-(-dw.numel() // CHUNK), 11), math.nan, dtype=torch.float64)
        out = torch.full((11,), math.nan, dtype=torch.float64)
        numbers = [cuda.DTYPE_NUMBER[x.dtype] for x in (dw, w)]
        self._call(
            "gradient_moments", dw, numbers[0], w, numbers[1], ctypes.c_int64(dw.numel()), of_chunk, out, descending
        )
        return gradient_moments_of(out)

    def channel_products(self, y: Tensor, g: Tensor) -> Tensor:
        samples, positions, channels = y.shape
        out = torch.full((samples, channels), math.nan, dtype=torch.float64)
        of_chunk = torch.full((samples, -(-positions // POSITIONS), channels), math.nan, dtype=torch.float64)
        strides, sizes = torch.tensor([*y.stride(), *g.stride()]), torch.tensor(y.shape)
        self._call("channel_products", y, g, cuda.DTYPE_NUMBER[y.dtype], strides, sizes, of_chunk, out)
        return out

    def faulty(self, which: int) -> tuple[str, Tensor]:
        """What the emulator says of a faulty kernel on 64 threads, and the result."""
        x, out = torch.arange(64, dtype=torch.float64), torch.zeros(64, dtype=torch.float64)
        return self.library.faulty(which, *(ctypes.c_void_p(t.data_ptr()) for t in (x, out))).decode(), out

    def _call(self, name: str, *arguments: object) -> None:
        error = getattr(self.library, name)(
            *(ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments)
        )
        assert not error, error.decode()


class OnGpu:
    """The backend itself, through zest_fast.kernels.cuda."""

    device = torch.device("cuda")

    def moments(self, tensors: Sequence[Tensor], *, descending: bool = False) -> list[Moments]:
        out = torch.full((len(tensors), 6), math.nan, dtype=torch.float64, device=self.device)
        cuda.moments_into(tensors, out)
        return [Moments.checked(*row) for row in out.tolist()]

    def gradient_moments(self, dw: Tensor, w: Tensor, *, descending: bool = False) -> GradientMoments:
        out = torch.full((11,), math.nan, dtype=torch.float64, device=self.device)
        cuda.gradient_moments_into(dw, w, out)
        return gradient_moments_of(out)

    def channel_products(self, y: Tensor, g: Tensor) -> Tensor:
        return cuda.channel_products(y, g)


def gradient_moments_of(row: Tensor) -> GradientMoments:
    values = row.tolist()
    return GradientMoments.checked(Moments.checked(*values[:6]), *values[6:])


def compiled_for_the_emulator(folder: Path, *options: str) -> Emulated:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not on PATH")
    library = folder / "emulated.so"
    command = [compiler, "-std=c++17", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    command += ["-Wno-unknown-pragmas", "-Wno-clobbered"]  # unrolling is nvcc's; fibres return twice by design
    sources = [f"-I{CSRC}", f"-I{TESTS}", str(TESTS / "cuda_emulator.cpp"), "-o", str(library)]
    subprocess.run([*command, *options, *sources], check=True)
    return Emulated(library)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    return compiled_for_the_emulator(tmp_path_factory.mktemp("emulator"), "-O2")


@pytest.fixture(scope="module")
def sanitised(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    return compiled_for_the_emulator(tmp_path_factory.mktemp("ubsan"), "-O1", "-fsanitize=undefined")


@pytest.fixture(params=["emulator", "gpu"] if cuda.availability() else ["emulator"])
def kernels(request: pytest.FixtureRequest) -> Emulated | OnGpu:
    return OnGpu() if request.param == "gpu" else request.getfixturevalue("emulated")


def placed(x: Tensor, device: torch.device, offset: int = 0) -> Tensor:
    """x on a device, `offset` elements behind an aligned address."""
    buffer = torch.empty(x.numel() + offset, dtype=x.dtype, device=device)
    return buffer[offset:].copy_(x)


def compare(kernels: Emulated | OnGpu, *tensors: Tensor, offset: int = 0) -> None:
    found = kernels.moments([placed(x, kernels.device, offset) for x in tensors])
    for m, x in zip(found, tensors, strict=True):
        assert_close(m, reference.moments(x))


def compare_pair(kernels: Emulated | OnGpu, dw: Tensor, w: Tensor, *, offsets: tuple[int, int] = (0, 0)) -> None:
    found = kernels.gradient_moments(*(placed(x, kernels.device, o) for x, o in zip((dw, w), offsets, strict=True)))
    assert_gradient_close(found, reference.gradient_moments(dw, w))


def compare_products(kernels: Emulated | OnGpu, y: Tensor, g: Tensor) -> None:
    found, expected = kernels.channel_products(y, g), reference.channel_products(y, g)
    assert found.shape == expected.shape and found.dtype == torch.float64
    assert bool(((found - expected).abs() <= 1e-6 * reference.channel_products(y.abs(), g.abs())).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LENGTHS)
def test_moments(kernels: Emulated | OnGpu, n: int, dtype: torch.dtype) -> None:
    torch.manual_seed(n)
    compare(kernels, (torch.randn(n) * 0.02 + 0.01).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LENGTHS)
def test_gradient_moments(kernels: Emulated | OnGpu, n: int, dtype: torch.dtype) -> None:
    torch.manual_seed(n)
    compare_pair(kernels, torch.randn(n).to(dtype), torch.randn(n).to(dtype))


@pytest.mark.parametrize("w_dtype", DTYPES)
@pytest.mark.parametrize("dw_dtype", DTYPES)
def test_dtypes_may_differ_between_gradient_and_weight(
    kernels: Emulated | OnGpu, dw_dtype: torch.dtype, w_dtype: torch.dtype
) -> None:
    compare_pair(kernels, torch.randn(5_003).to(dw_dtype), torch.randn(5_003).to(w_dtype))


@pytest.mark.parametrize("view", VIEWS)
def test_strides(kernels: Emulated | OnGpu, view: str) -> None:
    torch.manual_seed(0)
    x = VIEWS[view](torch.randn(6, 5, 7, 33, device=kernels.device))
    assert_close(kernels.moments([x])[0], reference.moments(x))
    if x.numel() > 1:
        other = torch.randn(x.shape, device=kernels.device, dtype=torch.float64)
        for dw, w in ((x, other), (other, x), (x, x)):
            assert_gradient_close(kernels.gradient_moments(dw, w), reference.gradient_moments(dw, w))


def test_only_what_is_not_dense_is_copied() -> None:
    x = torch.randn(6, 5, 7, 33)
    for view in ("transposed", "channels_last", "one row", "of size one", "empty"):
        y = VIEWS[view](x)
        assert cuda.dense(y) is y, view
    for view in ("sliced", "every third", "expanded", "expanded scalar"):
        y = VIEWS[view](x)
        assert cuda.dense(y) is not y, view
    pointwise = torch.randn(8, 4, 1, 1)
    gradient = pointwise.clone(memory_format=torch.channels_last)  # other strides, same memory
    assert cuda.dense_in_one_order(gradient, pointwise)[0] is gradient


def test_many_tensors_of_different_dtype_in_one_launch(kernels: Emulated | OnGpu) -> None:
    torch.manual_seed(0)
    lengths = [0, 1, CHUNK + 1, 0, 0, 9, 2 * CHUNK, 40, 0]
    compare(kernels, *(torch.randn(n).to(DTYPES[i % 4]) + i for i, n in enumerate(lengths)))
    compare(kernels, *(torch.randn(3).to(DTYPES[i % 4]) for i in range(40)))
    compare(kernels)
    compare(kernels, torch.empty(0))


def test_empty_pair(kernels: Emulated | OnGpu) -> None:
    found = kernels.gradient_moments(*(torch.empty(0, device=kernels.device) for _ in range(2)))
    assert found.gradient.count == found.product_abs_sum == found.weight_m2 == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_start_in_memory_gives_the_same_bits(kernels: Emulated | OnGpu, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2, CHUNK + 1000).to(dtype)
    results = []
    for offset in (0, 1, 3):
        a, b = placed(x, kernels.device, offset), placed(w, kernels.device, 2 * offset)
        results.append((kernels.moments([b, a]), kernels.gradient_moments(a, b)))
    assert results[0] == results[1] == results[2]
    assert_close(results[0][0][1], reference.moments(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_dtype_gives_the_bits_of_its_float32_copy(kernels: Emulated | OnGpu, dtype: torch.dtype) -> None:
    x = torch.randn(TILE + 77).to(dtype)
    narrow, wide = kernels.moments([placed(x, kernels.device), placed(x.float(), kernels.device)])
    assert narrow == wide


def test_repeatable_bit_for_bit_in_any_order_of_threads_and_tensors(kernels: Emulated | OnGpu) -> None:
    torch.manual_seed(0)
    x, w = (placed(t, kernels.device) for t in torch.randn(2, 2 * CHUNK + 5_001))
    first = kernels.moments([x])[0]
    assert kernels.moments([w, x], descending=True)[1] == first
    assert kernels.gradient_moments(x, w) == kernels.gradient_moments(x, w, descending=True)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_offset_data_keep_their_deviation(kernels: Emulated | OnGpu, sign: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = sign * (1e4 + torch.randn(CHUNK + 3_001, dtype=torch.float64)).to(dtype)
    compare(kernels, x)
    compare_pair(kernels, x, x)


@pytest.mark.parametrize("outlier", [1e3, -1e4, 1e6])
@pytest.mark.parametrize("where", [slice(0, 1), slice(0, 8), slice(9_000, 9_001)])
def test_outliers_do_not_spoil_their_chunk(kernels: Emulated | OnGpu, where: slice, outlier: float) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2, CHUNK)
    x[where] = outlier
    compare(kernels, x)
    compare_pair(kernels, x, w)
    compare_pair(kernels, w, x)


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-15, 1e-7, 1e15, 1e30])
def test_values_whose_squares_do_not_fit_float32(kernels: Emulated | OnGpu, scale: float) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2, 20_000)
    compare(kernels, x * scale)
    compare_pair(kernels, x * scale, w)
    compare_pair(kernels, w, x * scale)
    compare_pair(kernels, x * scale, w / scale)


def test_equal_entries(kernels: Emulated | OnGpu) -> None:
    w = torch.randn(20_000)
    for value in (0.0, 1.0, -3e-9, 1e-20, 0.1, 1e30):
        compare(kernels, torch.full((20_000,), value))
        compare_pair(kernels, torch.full((20_000,), value), w)
    front = w.clone()
    front[:TILE] = 0  # the centre of every thread is 0
    compare(kernels, front, front * 1e-30)
    compare_pair(kernels, front, w)
    compare_pair(kernels, front * 1e-30, w)


def test_products_that_float32_cannot_hold(kernels: Emulated | OnGpu) -> None:
    """Squares of either are in range, but where dw is not 0, w is tiny: a product has few digits in float32."""
    torch.manual_seed(0)
    dw, w = torch.randn(2, 5_000)
    dw[1::2] = 0
    w[::2] *= 1e-43
    compare_pair(kernels, dw, w)


def test_signs_of_equal_size(kernels: Emulated | OnGpu) -> None:
    torch.manual_seed(0)
    compare(kernels, torch.where(torch.rand(9_000) < 0.3, -1.0, 1.0) + 1e-3 * torch.randn(9_000))


def test_every_finite_float16(kernels: Emulated | OnGpu) -> None:
    bits = torch.arange(65_536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    compare(kernels, bits[bits.isfinite()], torch.arange(1, 1024, dtype=torch.int16).view(torch.float16), bits)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [[0], [17, 18], [9_000], [9_999]])
def test_entries_that_are_not_finite_are_counted(kernels: Emulated | OnGpu, bad: float, where: list[int]) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2, 10_000)
    x[where] = bad
    spoilt, clean = kernels.moments([placed(t, kernels.device) for t in (x, w)])
    assert spoilt.nonfinite == len(where) and math.isnan(spoilt.mean) and math.isnan(spoilt.abs_m2)
    assert_close(clean, reference.moments(w))
    x, w = placed(x, kernels.device), placed(w, kernels.device)
    g = kernels.gradient_moments(x, w)
    assert (g.gradient.nonfinite, g.weight_nonfinite) == (len(where), 0)
    assert g.weight_std == pytest.approx(w.std(correction=0).item(), rel=1e-5)
    g = kernels.gradient_moments(w, x)
    assert (g.gradient.nonfinite, g.weight_nonfinite) == (0, len(where))
    assert g.gradient.std == pytest.approx(w.std(correction=0).item(), rel=1e-5)


SHAPES = [(1, 1, 1), (2, 1, 40), (3, 7, 33), (1, 511, 5), (2, 513, 31), (2, 1_100, 64), (0, 3, 4), (2, 0, 3), (2, 3, 0)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_channel_products(kernels: Emulated | OnGpu, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    y, g = torch.randn(2, *shape, device=kernels.device).to(dtype)
    convolution = y.transpose(1, 2).contiguous().transpose(1, 2)  # positions dense
    compare_products(kernels, y, g)
    compare_products(kernels, convolution, g)
    compare_products(kernels, g, convolution)
    compare_products(kernels, y[:, :1].expand(shape), g.flip(0)[:, :, : shape[2]])
    if shape[1] > 2:
        compare_products(kernels, convolution[:, 1:-1, ::2], convolution[:, 2:, ::2])


def test_offsets_beyond_2_31_elements(emulated: Emulated) -> None:
    """Only the last chunks of 4 GiB are touched, so only they take memory."""
    first_block, tail = 2**31 // CHUNK, CHUNK + 5
    x = torch.empty(2**31 + tail, dtype=torch.bfloat16)
    x[-tail:] = torch.randn(tail)
    of_chunk, _ = emulated.rows([x], first_block=first_block)
    last = [Moments.checked(*row) for row in of_chunk[first_block:].tolist()]
    assert_close(last[0].merge(last[1]), reference.moments(x[-tail:]))


def test_more_than_2_31_elements_on_the_gpu() -> None:
    if not (able := cuda.availability()):
        pytest.skip(able.reason)
    if torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("6 GiB of free GPU memory are needed")
    x = torch.zeros(2**31 + 5, dtype=torch.bfloat16, device="cuda")
    x[-4:] = 1
    found = OnGpu().moments([x])[0]
    assert (found.count, found.nonfinite) == (2**31 + 5, 0)
    assert found.sum == pytest.approx(4, rel=1e-9) and found.norm == pytest.approx(2, rel=1e-9)


def test_undefined_behaviour(sanitised: Emulated, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    for dtype in DTYPES:
        x, w = torch.randn(2, CHUNK + 300).to(dtype)
        x[:8], w[9] = 1e4, math.nan
        compare(sanitised, x, w, x[:3], offset=1)
        compare_pair(sanitised, x, x, offsets=(0, 1))
        compare_pair(sanitised, (x * 1e-30).to(torch.float64), x)
        y = torch.randn(2, 37, 600, dtype=torch.float64).to(dtype)
        compare_products(sanitised, y, y)
        compare_products(sanitised, y.transpose(1, 2), y.transpose(1, 2))
    assert "runtime error" not in capfd.readouterr().err


def test_the_emulator_catches_what_a_device_would_do_wrong(emulated: Emulated) -> None:
    """It would prove nothing if it let these pass."""
    error, out = emulated.faulty(0)  # reads what other threads write, without a barrier
    assert not error and out.isnan().sum() == 32
    error, _ = emulated.faulty(1)  # a barrier behind an early return
    assert "a barrier that only 32 of 64 threads reach" in error
    error, _ = emulated.faulty(2)  # half of each warp returns, then a shuffle of the whole warp
    assert "a shuffle names lane 16, which has left" in error
    assert_close(emulated.moments([torch.ones(9)])[0], reference.moments(torch.ones(9)))  # usable after an error


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


@needs_nvcc
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", sorted(p.name for p in (CSRC / "cuda").glob("*.cu")))
def test_nvcc_needs_no_local_memory(source: str, target: str, tmp_path: Path) -> None:
    report = compiled_by_nvcc(source, target, tmp_path / "kernel.cubin").stderr
    assert not re.search("warning|error", report), report
    kernels = report.count("Compiling entry function")
    assert kernels == len(re.findall(r"\b0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", report))
    assert all(int(r) <= 128 for r in re.findall(r"Used (\d+) registers", report))
    assert (kernels > 0) == ("__global__" in (CSRC / "cuda" / source).read_text())


@needs_nvcc
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_inputs_are_read_128_bits_at_a_time(target: str, tmp_path: Path) -> None:
    tool = cuobjdump()
    if tool is None:
        pytest.skip("cuobjdump is neither on PATH nor beside nvcc nor in triton")
    compiled_by_nvcc("moments.cu", target, tmp_path / "kernel.cubin")
    command = [tool, "-sass", str(tmp_path / "kernel.cubin")]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    loads = {
        name: len(re.findall(r"LDG\.E\.128", body))
        for name, body in re.findall(
            r"Function : \S*?(\d\d[a-z_]+_of_chunks)\S*(.*?)(?=Function :|\Z)", sass, re.DOTALL
        )
    }
    # 32 elements are 8 vectors of float32, 16 of float64, 4 of bfloat16 and 4 of float16. Of a pair, 16 elements each:
    # 4 + 2 + 2 for either as float, 4 + 8 + 2 + 2 for either as double.
    assert {name[2:]: n for name, n in loads.items()} == {"moments_of_chunks": 32, "gradient_moments_of_chunks": 48}
    assert not re.search(r"\b(LDL|STL)\b", sass)


def compiled_by_nvcc(source: str, target: str, out: Path) -> subprocess.CompletedProcess[str]:
    command = ["nvcc", "-std=c++17", f"-I{CSRC}", f"-arch={target}", "-cubin", "-Xptxas=-v", "-o", str(out)]
    return subprocess.run([*command, str(CSRC / "cuda" / source)], capture_output=True, text=True, check=True)


def cuobjdump() -> str | None:
    found = shutil.which("cuobjdump")
    if found is None:
        triton = Path(torch.__file__).parent.parent / "triton" / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(triton) if triton.is_file() else None
    return found


def test_the_extension_loads_without_a_driver() -> None:
    """Neither libcuda nor libcudart is linked: a wheel built with nvcc works on a machine that has no GPU."""
    code = "from zest_fast import _native; print('libcuda' in open('/proc/self/maps').read(), _native.has_cuda)"
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split()[0] == "False"


def test_cuda_reports_its_state_instead_of_raising() -> None:
    if not _native.has_cuda:
        pytest.skip(cuda.availability().reason)
    problem = _native.cuda_status(0)
    assert isinstance(problem, str) and (problem or _native.cuda_driver_version() > 0)
    assert "ordinal" in _native.cuda_status(999) or problem
    if problem:
        with pytest.raises(RuntimeError, match=re.escape(problem)):
            _native.cuda_moments((0, 0, 0, 0), 0, 1, 0, 0, 0, 0, 0)


def test_arguments_fit_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as that shows without a driver: CUDA refuses after the arguments were taken."""
    if not _native.has_cuda or not _native.cuda_status(0):
        pytest.skip("needs an extension built with nvcc and no GPU")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(cuda, "_device_and_stream", lambda: (0, 0))
    x, out = torch.ones(2, 3, 4), torch.empty(11, dtype=torch.float64)
    for call in (
        lambda: cuda.moments_into([x], out[:6].view(1, 6)),
        lambda: cuda.gradient_moments_into(x, x, out),
        lambda: cuda.channel_products(x, x),
    ):
        with pytest.raises(RuntimeError, match=r"^CUDA: "):
            call()


def test_why_the_kernels_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_native", SimpleNamespace(has_cuda=False))
    assert cuda.availability().reason == "zest_fast was built without nvcc (install it from source with nvcc on PATH)"

    old_driver = SimpleNamespace(
        has_cuda=True,
        cuda_status=lambda index: "CUDA driver version is insufficient for CUDA runtime version",
        cuda_driver_version=lambda: 12040,
        cuda_build_version=lambda: 13000,
    )
    monkeypatch.setattr(cuda, "_native", old_driver)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda.availability().reason == f"PyTorch {torch.__version__} was built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "12.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.availability().reason == "PyTorch finds no usable CUDA device"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    monkeypatch.setattr(cuda, "_usable", cuda._usable.__wrapped__)  # without its memory
    assert cuda.availability(torch.device("cuda", 1)).reason == (
        "CUDA driver version is insufficient for CUDA runtime version on NVIDIA A100 (sm_80): "
        "the driver knows CUDA up to 12.4, the kernels were built with CUDA 13.0"
    )


BAD: dict[str, tuple[Callable[[], None], str]] = {
    "another device": (
        lambda: cuda.moments_into([torch.ones(2)], torch.ones(1, 6, device="meta", dtype=torch.float64)),
        r"tensors\[0\] is on cpu, out on meta",
    ),
    "too few rows": (
        lambda: cuda.moments_into([torch.ones(2)], torch.ones(0, 6, dtype=torch.float64)),
        r"out has shape \(0, 6\)",
    ),
    "rows of float32": (lambda: cuda.gradient_moments_into(torch.ones(2), torch.ones(2), torch.ones(11)), "float32"),
    "shapes": (
        lambda: cuda.gradient_moments_into(torch.ones(2), torch.ones(3), torch.ones(11, dtype=torch.float64)),
        r"dw has shape \(2,\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
