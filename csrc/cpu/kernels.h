// The CPU kernels. They allocate nothing, keep no state and give the same bits for any number of threads.
#pragma once

#include "layout.h"
#include "moments.h"

namespace zest::cpu {

Moments moments(const Layout<1>& layout, const Operand& x, int threads);

GradientMoments gradient_moments(const Layout<2>& layout, const Operand& dw, const Operand& w, int threads);

// y and g are [samples, positions, channels] with these strides (elements); out [samples, channels], contiguous, or
// null where only the sum of its squares, which is returned, is wanted.
struct Strides3 {
    int64_t sample, position, channel;
};
double channel_products(int64_t samples, int64_t positions, int64_t channels, const Operand& y, Strides3 y_strides,
                        const Operand& g, Strides3 g_strides, double* out, int threads);

// Rows of dense elements, `stride` elements apart.
struct Rows {
    char* data;
    int64_t stride;
};
struct GatedRows {
    int64_t rows, columns;
    Rows g, gate, up, gate_gradient, up_gradient;  // the last two are written; float32 or bfloat16, all alike
};
void silu_gated_backward(const GatedRows& p, DType dtype, int threads);

// Bit i of byte i / 8 of `bits` [ceil(n / 8)]: not x[i] <= low and not x[i] >= high, so NaN counts as inside and a bound
// that is NaN is none. x is dense: float32, float64 or bfloat16.
void interval_bits(const Operand& x, int64_t n, double low, double high, uint8_t* bits, int threads);

// out[i] = g[i] where bit i is set and zero elsewhere; both dense, of elements of 2, 4 or 8 bytes.
void masked(const char* g, const uint8_t* bits, int64_t n, int element_size, char* out, int threads);

}  // namespace zest::cpu
