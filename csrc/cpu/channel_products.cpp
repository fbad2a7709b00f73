// S[n, k] = sum over p of y[n, p, k] * g[n, p, k]: what fisher needs, in one read of y and g.
//
// Two shapes of the loop, by which dimension is dense: channels (Linear, channels_last), where a tile of channels
// accumulates in float32 over 32 positions before it moves to float64; or positions (convolutions), where each channel
// is one dot product over blocks of 2,048. Any other stride is gathered into dense blocks first. Every (n, tile) is one
// task of its own, so the result does not depend on the thread count.
#include "cpu/kernels.h"
#include "cpu/load.h"

namespace zest::cpu {
namespace {

constexpr int64_t channel_tile = 512;
constexpr int64_t positions_per_flush = 32;
constexpr int64_t dot_block = 2048;
constexpr int64_t serial_below = 65536;

template <class C>
ZEST_INLINE double dot_inline(const C* y, const C* g, int64_t n) {
    typedef C V __attribute__((vector_size(64)));
    constexpr int64_t width = 64 / sizeof(C);
    V a = {}, b = {};
    int64_t i = 0;
    for (; i + 2 * width <= n; i += 2 * width) {
        V y0, y1, g0, g1;
        std::memcpy(&y0, y + i, 64), std::memcpy(&g0, g + i, 64);
        std::memcpy(&y1, y + i + width, 64), std::memcpy(&g1, g + i + width, 64);
        a += y0 * g0, b += y1 * g1;
    }
    double sum = 0;
    for (int64_t lane = 0; lane < width; ++lane) sum += double(a[lane]) + double(b[lane]);
    for (; i < n; ++i) sum += double(y[i]) * double(g[i]);
    return sum;
}

template <class C>
ZEST_INLINE void multiply_add_inline(const C* y, const C* g, int64_t n, C* sum) {
    for (int64_t i = 0; i < n; ++i) sum[i] += y[i] * g[i];
}

ZEST_CLONES double dot(const float* y, const float* g, int64_t n) { return dot_inline(y, g, n); }
ZEST_CLONES double dot(const double* y, const double* g, int64_t n) { return dot_inline(y, g, n); }
ZEST_CLONES void multiply_add(const float* y, const float* g, int64_t n, float* sum) { multiply_add_inline(y, g, n, sum); }
ZEST_CLONES void multiply_add(const double* y, const double* g, int64_t n, double* sum) {
    multiply_add_inline(y, g, n, sum);
}

// n elements from offset on, in place where they are dense and of the computing type.
template <class C>
const C* run(const Operand& x, int64_t offset, int64_t stride, int64_t n, C* buffer) {
    if (stride == 1 && x.dtype == (sizeof(C) == 8 ? DType::float64 : DType::float32))
        return reinterpret_cast<const C*>(x.data) + offset;
    copy_run(x, offset, stride, n, buffer);
    return buffer;
}

template <class C>
void products(int64_t samples, int64_t positions, int64_t channels, const Operand& y, Strides3 ys, const Operand& g,
              Strides3 gs, double* out, int threads) {
    const bool channels_dense = ys.channel == 1 || positions == 1;
    const int64_t tile = channels_dense ? channel_tile : std::max<int64_t>(1, 65536 / std::max<int64_t>(positions, 1));
    const int64_t tiles = (channels + tile - 1) / tile;
#pragma omp parallel for num_threads(threads) schedule(static) \
    if (threads > 1 && samples * positions * channels >= serial_below)
    for (int64_t task = 0; task < samples * tiles; ++task) {
        const int64_t n = task / tiles, first = task % tiles * tile, count = std::min(tile, channels - first);
        double* row = out + n * channels + first;
        const int64_t y0 = n * ys.sample + first * ys.channel, g0 = n * gs.sample + first * gs.channel;
        if (channels_dense) {
            C sum[channel_tile], y_buffer[channel_tile], g_buffer[channel_tile];
            std::fill(row, row + count, 0.0);
            for (int64_t p = 0; p < positions; p += positions_per_flush) {
                std::fill(sum, sum + count, C(0));
                for (int64_t q = p; q < std::min(p + positions_per_flush, positions); ++q)
                    multiply_add(run(y, y0 + q * ys.position, ys.channel, count, y_buffer),
                                 run(g, g0 + q * gs.position, gs.channel, count, g_buffer), count, sum);
                for (int64_t k = 0; k < count; ++k) row[k] += double(sum[k]);
            }
        } else {
            C y_buffer[dot_block], g_buffer[dot_block];
            for (int64_t k = 0; k < count; ++k) {
                row[k] = 0;
                for (int64_t p = 0; p < positions; p += dot_block) {
                    const int64_t length = std::min(dot_block, positions - p);
                    row[k] += dot(run(y, y0 + k * ys.channel + p * ys.position, ys.position, length, y_buffer),
                                  run(g, g0 + k * gs.channel + p * gs.position, gs.position, length, g_buffer), length);
                }
            }
        }
    }
}

}  // namespace

void channel_products(int64_t samples, int64_t positions, int64_t channels, const Operand& y, Strides3 y_strides,
                      const Operand& g, Strides3 g_strides, double* out, int threads) {
    if (y.dtype == DType::float64 || g.dtype == DType::float64)
        products<double>(samples, positions, channels, y, y_strides, g, g_strides, out, threads);
    else
        products<float>(samples, positions, channels, y, y_strides, g, g_strides, out, threads);
}

}  // namespace zest::cpu
