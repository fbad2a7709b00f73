"""What oneDNN holds on a CPU beside the results of an operator, which no fake tensor shows.

Convolutions of tensors in the usual (not channels-last) order run on copies whose channels lie in blocks: of the input,
the weight and the output, and of their gradients. Recurrent layers keep a workspace for the backward pass and run on
packed weights. Sizes are those of oneDNN 3 with AVX-512, 16 floats a block (src/cpu/rnn/rnn_utils.cpp:
get_good_ld and set_offsets; ATen/native/mkldnn/Conv.cpp): held against counted steps in tests/planning/test_plan.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zest_fast.foundation.torch_private import conv_backends, select_conv_backend

_BLOCK = 16  # channels; floats in a cache line
_PAGE = 4096
_ATEN = torch.ops.aten
_LSTM = 2  # its number among the modes of mkldnn_rnn_layer
_BACKENDS = conv_backends("Mkldnn", "MkldnnTranspose")


def scratch(packet: Any, args: Sequence[Any]) -> int:
    """Most bytes that the operator holds at once on a CPU before its results are all that is left of it, these
    included; 0 where it holds nothing else.
    """
    if packet is _ATEN.convolution:
        x, weight, _, *form = args[:9]
        return _convolution(x, weight, _Form(*form))
    if packet is _ATEN.convolution_backward:
        g, x, weight, _, *form, mask = args[:11]
        return _convolution_backward(g, x, weight, _Form(*form), mask)
    return 0


def is_recurrent(packet: Any) -> bool:
    return packet in (_ATEN.mkldnn_rnn_layer, _ATEN.mkldnn_rnn_layer_backward)


def recurrent_workspace(x: Tensor, hidden: int, mode: int) -> int:
    """Bytes that an LSTM layer in one direction keeps from forward for backward; x [steps, samples, features]."""
    steps, samples, features = x.shape
    gates = {_LSTM: 4}.get(mode, 3)
    wide, entry = _leading(max(features, hidden)), x.element_size()
    parts = [
        steps * _leading(gates * hidden),
        *[2 * (steps + 1) * wide] * 3,  # states of the layer and of time, and the gradients
        *[2 * (steps + 1) * hidden] * 2,  # cells and their gradients
        steps * _leading(hidden),
    ]
    return sum(_pages(samples * part * entry) for part in parts)


def recurrent_scratch(packet: Any, x: Tensor, hidden: int, mode: int) -> int:
    """Bytes beside the results while the layer runs: packed weights and the gates of all steps."""
    steps, samples, features = x.shape
    gates = {_LSTM: 4}.get(mode, 3) * hidden
    packed = (features + hidden) * _leading(gates)
    if packet is _ATEN.mkldnn_rnn_layer_backward:
        packed += sum(gates * _leading(rows) for rows in (features, hidden) if rows != _leading(rows))
    return (packed + steps * samples * _leading(gates)) * x.element_size()


def _leading(width: int) -> int:
    """The distance of rows: whole cache lines, and no multiple of 256, which would fall together in the cache."""
    lines = -(-width // _BLOCK) * _BLOCK
    return lines + _BLOCK if lines % 256 == 0 else lines


def _pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


class _Form(NamedTuple):
    """Of a convolution, in the order in which its operator takes it."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    extra: Sequence[int]  # output_padding
    groups: int

    def channels(self, weight: Tensor) -> int:
        """Of the output."""
        return weight.shape[1] * self.groups if self.transposed else weight.shape[0]


def _convolution(x: Tensor, weight: Tensor, form: _Form) -> int:
    if not _is_blocked(x, weight, form):
        return 0
    out, channels, groups = _output_numel(x, weight, form), form.channels(weight), form.groups
    blocked_out = _blocked(out, channels, groups)
    blocked_in = 0 if x.shape[1] < _BLOCK and groups == 1 else _blocked(x.numel(), x.shape[1], groups)
    return max(blocked_in + _blocked_weight(weight, groups) + blocked_out, blocked_out + out) * x.element_size()


def _convolution_backward(g: Tensor, x: Tensor, weight: Tensor, form: _Form, mask: Sequence[bool]) -> int:
    groups = form.groups
    if not form.transposed and mask[1] and x.dim() == 4 and (_is_channels_last(x) or _is_channels_last(g)):
        return ((x.numel() if mask[0] else 0) + _grouped_weight(weight, groups)) * x.element_size()
    if not _is_blocked(x, weight, form):
        return 0
    blocked_g = _blocked(g.numel(), g.shape[1], groups)
    blocked_x, blocked_w = _blocked(x.numel(), x.shape[1], groups), _blocked_weight(weight, groups)
    dx = x.numel() if mask[0] else 0
    found = 0
    if mask[0]:
        found = max(
            blocked_g + blocked_w + blocked_x,
            (2 if max(form.stride) > 1 and not form.transposed else 1) * blocked_x + dx,
        )
    if mask[1]:
        few = x.shape[1] < _BLOCK and groups == 1
        found = max(found, dx + (0 if few else blocked_x) + blocked_g + blocked_w)
    return found * x.element_size()


def _is_blocked(x: Tensor, weight: Tensor, form: _Form) -> bool:
    """Whether oneDNN runs it, on copies in its own order: not for a product of every point with a matrix."""
    if select_conv_backend is None or not _BACKENDS or x.dim() < 4 or _is_channels_last(x) or _is_channels_last(weight):
        return False
    if set(weight.shape[2:]) == {1} and set(form.stride) == {1} and form.groups == 1:
        return False
    return select_conv_backend(x, weight, None, *form, None) in _BACKENDS


def _is_channels_last(x: Tensor) -> bool:
    order = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return x.is_contiguous(memory_format=order) and not x.is_contiguous()


def _output_numel(x: Tensor, weight: Tensor, form: _Form) -> int:
    sizes = []
    for size, kernel, step, pad, hole, more in zip(
        x.shape[2:], weight.shape[2:], form.stride, form.padding, form.dilation, form.extra, strict=True
    ):
        reach = hole * (kernel - 1) + 1
        sizes.append(
            (size - 1) * step - 2 * pad + reach + more if form.transposed else (size + 2 * pad - reach) // step + 1
        )
    return x.shape[0] * form.channels(weight) * math.prod(sizes)


def _blocked(numel: int, channels: int, groups: int) -> int:
    """Entries with the channels rounded up to whole blocks."""
    if channels % _BLOCK == 0 or channels < _BLOCK or groups not in (1, channels):
        return numel
    return numel // channels * (-(-channels // _BLOCK) * _BLOCK)


def _grouped_weight(weight: Tensor, groups: int) -> int:
    """Entries of a weight's gradient in channels-last order: each group has whole blocks of channels, except where a
    kernel for depthwise convolutions takes over, of up to three by three.
    """
    out, inputs, *kernel = weight.shape
    if groups == 1 or (inputs == 1 and out == groups and max(kernel) <= 3):
        return weight.numel()
    sizes = (-(-size // _BLOCK) * _BLOCK for size in (out // groups, inputs))
    return groups * math.prod(sizes) * math.prod(kernel)


def _blocked_weight(weight: Tensor, groups: int) -> int:
    if groups > 1:
        return weight.numel()
    return math.prod(-(-size // _BLOCK) * _BLOCK for size in weight.shape[:2]) * math.prod(weight.shape[2:])
