"""What the counter of real allocations sees, and what it does not count twice."""

import pytest
import torch

from zest_fast.planning.counted_memory import held_bytes, peak_bytes

MIB = 2**20


def test_peak_counts_what_is_alive_together_and_nothing_from_before():
    before = torch.zeros(MIB)  # noqa: F841  alive all along

    def run():
        a = torch.empty(2 * MIB, dtype=torch.uint8)
        b = torch.empty(3 * MIB, dtype=torch.uint8)
        del a
        torch.empty(MIB, dtype=torch.uint8)
        return b

    assert peak_bytes(run) == pytest.approx(5 * MIB, abs=4096)


def test_peak_sees_gradients_and_scratch_that_operators_do_not_return():
    weight = torch.randn(512, 512, requires_grad=True)  # 1 MiB
    x = torch.randn(4, 512)

    def backward():
        (x @ weight).sum().backward()
        weight.grad = None

    assert MIB <= peak_bytes(backward) < MIB + 64 * 1024
    # the two halves of x.sort(): values (float32) and indices (int64) are returned, the sorting buffers are not
    assert peak_bytes(lambda: torch.randn(MIB).median()) >= 2 * 4 * MIB


def test_what_is_held_counts_each_storage_once():
    ones, empty = torch.ones(100), torch.empty(0)
    assert held_bytes([ones, ones[:50], ones.view(10, 10), empty, torch.empty(0), None, 3]) == 400
    assert held_bytes([ones, torch.ones(10, dtype=torch.float64)]) == 480
