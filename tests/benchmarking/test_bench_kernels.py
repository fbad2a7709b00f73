"""Kernels are judged before they are timed, and what times them flushes, rotates and captures. No speed is asserted."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from fake_cuda import FakeCuda

from zest_fast.benchmarking import kernel_cases, kernels
from zest_fast.benchmarking.accuracy import TOLERANCE, tolerance_of
from zest_fast.benchmarking.kernel_cases import LAYOUTS, SIGNATURES, Candidate, candidates_of, own_candidate, problem_of
from zest_fast.benchmarking.kernels import Site, measure_kernel
from zest_fast.benchmarking.machine import last_level_cache
from zest_fast.benchmarking.results import Measured
from zest_fast.benchmarking.timers import CpuTimer, CudaTimer
from zest_fast.benchmarking.torch_reductions import separate_channel_products, separate_moments

pytestmark = pytest.mark.usefixtures("one_thread")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
KINDS = [(name, layout) for name in SIGNATURES for layout in (LAYOUTS if name == "channel_products" else ("",))]
SIZE, CACHE = 1 << 14, 1 << 16


def site(**options) -> Site:
    return Site(CPU, rounds=6, cache=CACHE, **options)


def measured_with(function, kernel: str = "moments", **options) -> dict[str, Measured]:
    problem = problem_of(kernel, SIZE, "float32", "tokens" if kernel == "channel_products" else "")
    ours, *_ = candidates_of(problem, CPU)
    case = measure_kernel(problem, [ours, own_candidate("mine", function)], site(**options))
    return {one.name: one for one in case.measured}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kernel", "layout"), KINDS)
def test_all_that_is_compared_computes_the_same(kernel, layout, dtype):
    problem = problem_of(kernel, 1 << 16, dtype, layout)
    tensors = problem.inputs(CPU)
    assert sum(x.nbytes for x in tensors) == problem.bytes
    for device in (CPU, CUDA):  # of a GPU what is queued there, on tensors of the CPU
        for candidate in candidates_of(problem, device):
            if candidate.read is None:
                assert candidate.role == "floor"
                continue
            verdict = problem.judge(candidate.read(candidate.call(*tensors)), *tensors)
            assert verdict.match, (candidate.name, verdict)
            assert verdict.tolerance == TOLERANCE or (dtype == "bfloat16" and candidate.role == "peer")


def test_what_torch_cannot_hold_in_half_precision_is_wrong():
    problem = problem_of("moments", 1 << 20, "float16")
    found = {one.name: one for one in measure_kernel(problem, candidates_of(problem, CPU), site()).measured}
    assert found["zest_fast"].match and found["zest_fast"].seconds is not None
    assert found["torch_lean"].match is False and found["torch_lean"].seconds is None
    assert found["torch_lean"].why.startswith("wrong: ") and found["torch_lean"].error is None  # an infinite one


def test_a_result_may_be_as_inexact_as_the_type_of_the_input_and_no_more():
    assert tolerance_of(torch.bfloat16, torch.bfloat16) == 4 * 2**-7
    for of_input, of_result in [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, None),
    ]:
        assert tolerance_of(of_input, of_result) == TOLERANCE


def test_a_right_kernel_is_timed_beside_ours_with_interval_and_ratio():
    found = measured_with(separate_moments)
    for one in found.values():
        assert one.match and one.why == "" and one.error <= TOLERANCE
        assert 0 < one.seconds.low <= one.seconds.median <= one.seconds.high
        assert (one.seconds.n, one.ratio.n) == (6, 6) and one.seconds.coverage > 0.95
        assert one.figures["gb_per_s"] == pytest.approx(SIZE / one.seconds.median / 1e9)
    assert found["zest_fast"].ratio.median == 1.0 and found["mine"].role == "own"


def changes_its_input(x):
    found = separate_moments(x)
    x[-1] += 1e-3
    return found


def changes_its_shape(x):
    found = separate_moments(x)
    x.resize_(1)
    return found


def changes_the_threads(x):
    torch.set_num_threads(3)
    return separate_moments(x)


WRONG = {
    "a deviation of the wrong correction": lambda x: {**separate_moments(x), "std": x.std(correction=1) * 1.001},
    "a mean that is left out": lambda x: {**separate_moments(x), "mean": 0.0},
    "NaN": lambda x: {**separate_moments(x), "abs_std": math.nan},
}
REFUSED = {
    "no mapping": (lambda x: x.mean(), "raises TypeError: it returned a Tensor; a mapping of mean, std"),
    "a name too few": (lambda x: {"mean": x.mean()}, "returned no std, abs_mean, abs_std"),
    "a name too many": (
        lambda x: {**separate_moments(x), "sdt": 0.0},
        "returned 'sdt', which is unknown; nearest: 'std'",
    ),
    "no number": (lambda x: {**separate_moments(x), "std": x}, "returned 'std' of shape [4096]; one number is needed"),
    "an error": (lambda x: {}["layer"], "raises KeyError: 'layer'"),
    "an end": (lambda x: sys.exit("bye"), "raises SystemExit: bye"),
    "another signature": (lambda x, y: separate_moments(x), "raises TypeError"),
    "a changed input": (changes_its_input, "changes its input (argument 1)"),
    "a changed shape": (changes_its_shape, "changes its input (argument 1)"),
    "changed threads": (changes_the_threads, "changes the number of torch's threads to 3"),
}


@pytest.mark.parametrize("function", WRONG.values(), ids=WRONG)
def test_a_wrong_kernel_is_named_and_never_timed(function):
    calls = []
    found = measured_with(lambda x: calls.append(1) or function(x))
    assert found["mine"].match is False and found["mine"].seconds is None and found["mine"].why.startswith("wrong: ")
    assert len(calls) == 1 and found["zest_fast"].seconds is not None


@pytest.mark.parametrize(("function", "why"), REFUSED.values(), ids=REFUSED)
def test_a_kernel_that_raises_or_changes_what_is_not_its_own_is_named_and_never_timed(function, why):
    found = measured_with(function)
    assert found["mine"].match is False and found["mine"].seconds is None and why in found["mine"].why
    assert found["zest_fast"].match and found["zest_fast"].seconds is not None
    assert torch.get_num_threads() == 1


def test_products_of_another_shape_are_refused_and_wrong_ones_are_wrong():
    transposed = measured_with(lambda y, g: separate_channel_products(y, g, [1]).t(), "channel_products")["mine"]
    assert "S [N, K] is needed" in transposed.why
    halved = measured_with(lambda y, g: separate_channel_products(y, g, [1]) / 2, "channel_products")["mine"]
    assert halved.why.startswith("wrong: S is off by")


def test_a_kernel_that_fails_later_has_no_figure():
    calls = []

    def fails_at_the_fifth(x):
        calls.append(1)
        if len(calls) == 5:
            raise MemoryError("no more")
        return separate_moments(x)

    found = measured_with(fails_at_the_fifth)
    assert found["mine"].seconds is None and found["mine"].why == "raises MemoryError: no more (while it was timed)"
    assert len(calls) == 5


def test_a_kernel_that_keeps_its_first_result_is_found_out():
    kept = []

    def keeps(x):
        kept.append(separate_moments(x)) if not kept else None
        return kept[0]

    found = measured_with(keeps)["mine"]
    assert found.match is False and found.seconds is None
    assert found.why.startswith("wrong: ") and "on another input, after it was timed" in found.why


def test_a_kernel_that_keeps_results_by_address_is_found_out():
    kept = {}

    def keeps(x):
        if x.data_ptr() not in kept:
            kept[x.data_ptr()] = x, separate_moments(x)  # no other tensor gets the address of this one
        return kept[x.data_ptr()][1]

    found = measured_with(keeps)["mine"]
    assert found.seconds is None and "on another input, after it was timed" in found.why


@pytest.mark.parametrize("place", [0, 1], ids=["the first half", "the second half"])
def test_a_kernel_that_reads_a_part_of_a_large_input_is_wrong(place):
    problem = problem_of("moments", 8 << 20, "float32")
    ours, *_ = candidates_of(problem, CPU)
    half = own_candidate("mine", lambda x: separate_moments(x.chunk(2)[place]))
    own = measure_kernel(problem, [ours, half], site()).measured[1]
    assert own.seconds is None and own.why.startswith("wrong: ")


def test_a_kernel_that_changes_the_threads_later_has_no_figure():
    calls = []

    def changes(x):
        calls.append(1)
        if len(calls) > 4:
            torch.set_num_threads(3)
        return separate_moments(x)

    found = measured_with(changes)
    assert found["mine"].seconds is None and found["mine"].why.endswith("threads to 3 (while it was timed)")
    assert found["zest_fast"].seconds is not None and torch.get_num_threads() == 1


def test_inputs_rotate_and_the_cache_is_flushed_unless_warm():
    seen, flushed = set(), []
    timer = CpuTimer(lambda: flushed.append(1))

    def looks(x):
        seen.add(x.data_ptr())
        return separate_moments(x)

    measured_with(looks, timer=timer)
    copies = -(-2 * CACHE // SIZE)
    assert len(seen) >= copies and copies * SIZE >= 2 * CACHE and len(flushed) >= 6 * 5  # two candidates, three readers
    warm = site(warm=True)
    assert warm.copies(SIZE) == 1 and warm._flush is None and site()._flush is not None
    assert site().copies(1 << 30) == 2  # of a large input, two are more than the cache already


def test_what_lies_above_the_roof_is_a_warning():
    figures = {"read_gb_per_s": 10.0, "mm_gflop_per_s": 100.0}
    rows = [
        Measured("at the roof", "ours", True, figures={"gb_per_s": 10.4, "gflop_per_s": 100.0}),
        Measured("reads too fast", "own", True, figures={"gb_per_s": 10.6}),
        Measured("multiplies too fast", "peer", True, figures={"gb_per_s": 1.0, "gflop_per_s": 106.0}),
    ]
    said = list(kernels._above_the_roof(rows, figures))
    assert [text.split(":")[0] for text in said] == ["reads too fast", "multiplies too fast"]
    assert all("above the roofline" in text for text in said)


def test_the_largest_cache_is_that_of_the_system(tmp_path):
    for index, size in enumerate(["32K", "1024K", "32768K", "what"]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert last_level_cache(CPU, str(tmp_path)) == 32 << 20
    assert last_level_cache(CPU, str(tmp_path / "none")) == 64 << 20


def working(cuda: FakeCuda, candidate: Candidate) -> Candidate:
    """The same, as if each call were one kernel on the device."""

    def call(*tensors):
        cuda.work()
        return candidate.call(*tensors)

    return Candidate(candidate.name, candidate.role, call, candidate.numbers, candidate.read)


@pytest.mark.parametrize("captures", [True, False])
def test_a_gpu_is_timed_by_events_around_a_graph_where_one_can_be_made(captures):
    cuda, flushed = FakeCuda(captures), []
    problem = problem_of("moments", SIZE, "float32")
    candidates = [working(cuda, one) for one in candidates_of(problem, CUDA)]
    case = measure_kernel(problem, candidates, site(timer=CudaTimer(lambda: flushed.append(1), cuda=cuda)))
    assert {one.name for one in case.measured} == {"zest_fast", "torch_separate", "torch_lean"}
    for one in case.measured:
        assert one.match and one.seconds.median == pytest.approx(1e-6, rel=1e-3)  # the fake clock's microsecond a call
    assert (cuda.log.count("captured") > 0) == captures == ("replay" in cuda.log)
    assert any("no CUDA graph could be made" in text for text in case.warnings) != captures
    assert cuda.log.count("side stream") == 6 and len(flushed) > 6 * 6  # three candidates, three readers
    assert cuda.recording is None


def test_whole_passes_are_never_captured():
    cuda = FakeCuda()
    timer = CudaTimer(graphs=False, cuda=cuda)
    window = cuda.work
    assert timer.seconds(window) == pytest.approx(1e-6, rel=1e-3) and timer.how(window) == "events"
    assert "captured" not in cuda.log


def test_inputs_are_the_same_at_each_call_and_not_the_same_as_each_other():
    problem = problem_of("gradient_moments", SIZE, "float32")
    (dw, w), again = problem.inputs(CPU), problem.inputs(CPU)
    assert torch.equal(dw, again[0]) and not torch.equal(dw, w)
    assert kernel_cases.random_numbers(3, 5, dtype=torch.float64).shape == (3, 5)
