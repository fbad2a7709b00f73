// Backward of silu(gate) * up: both gradients in one read of g, gate and up, where separate operators make six passes.
//
// All arithmetic is in float32, also of bfloat16, so nothing is rounded between input and result. Bytes moved: those of
// three inputs and two outputs, once. Rows are independent, so the thread count never shows in the result.
#include "cpu/kernels.h"
#include "cpu/load.h"

namespace zest::cpu {
namespace {

constexpr int64_t serial_below = 65536;  // fewer elements than this cost less than waking threads

// e^x within 2 units in the last place, as straight-line code that vectorises; x is kept where e^x is a normal number.
// NaN stays NaN. Cephes' reduction and polynomial: x = n ln 2 + r, |r| <= ln(2) / 2.
ZEST_INLINE float exponential(float x) {
    x = x > 88.f ? 88.f : x;
    x = x < -87.f ? -87.f : x;
    constexpr float round = 12582912.f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
    const float shifted = x * 1.44269504f + round, n = shifted - round;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    uint32_t bits;
    std::memcpy(&bits, &shifted, 4);
    return (p * r * r + r + 1.f) * from_bits((bits + 127u) << 23);
}

ZEST_INLINE void store(float x, float* out) { *out = x; }

// To the nearest, ties to even; NaN stays NaN.
ZEST_INLINE void store(float x, bfloat16* out) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    out->bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

template <class T>
ZEST_INLINE void silu_gated_backward_inline(const T* __restrict g, const T* __restrict gate, const T* __restrict up,
                                            T* __restrict gate_gradient, T* __restrict up_gradient, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        const float dy = widen(g[i]), x = widen(gate[i]);
        const float e = exponential(-x), s = 1.f / (1.f + e);
        store(dy * widen(up[i]) * s * (1.f + x * (e * s)), gate_gradient + i);  // e s = 1 - s, without cancellation
        store(dy * x * s, up_gradient + i);
    }
}

ZEST_CLONES void silu_gated_backward_row(const float* g, const float* gate, const float* up, float* gate_gradient,
                                         float* up_gradient, int64_t n) {
    silu_gated_backward_inline(g, gate, up, gate_gradient, up_gradient, n);
}
ZEST_CLONES void silu_gated_backward_row(const bfloat16* g, const bfloat16* gate, const bfloat16* up,
                                         bfloat16* gate_gradient, bfloat16* up_gradient, int64_t n) {
    silu_gated_backward_inline(g, gate, up, gate_gradient, up_gradient, n);
}

template <class T>
void rows_of(const GatedRows& p, int threads) {
    const auto at = [](const Rows& x, int64_t row) { return reinterpret_cast<T*>(x.data) + row * x.stride; };
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && p.rows * p.columns >= serial_below)
    for (int64_t row = 0; row < p.rows; ++row)
        silu_gated_backward_row(at(p.g, row), at(p.gate, row), at(p.up, row), at(p.gate_gradient, row),
                                at(p.up_gradient, row), p.columns);
}

}  // namespace

void silu_gated_backward(const GatedRows& p, DType dtype, int threads) {
    dtype == DType::bfloat16 ? rows_of<bfloat16>(p, threads) : rows_of<float>(p, threads);
}

}  // namespace zest::cpu
