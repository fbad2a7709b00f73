// S[n, k] = sum over p of y[n, p, k] * g[n, p, k], and the sum of its squares, which is fisher: in one read of y and g.
//
// Two shapes of the loop, by which dimension is dense: channels (Linear, channels_last), where a tile of channels
// accumulates in float32 over 32 positions before it moves to float64; or positions (convolutions), where each channel
// is one dot product over blocks of 2,048. Any other stride is gathered into dense blocks first. Every (n, tile) is one
// task; tasks belong to at most 256 chunks and chunks add up in order, so the result does not depend on the thread count.
// A task whose sums are so small that float32 products may have underflowed is done again in float64.
#include <cmath>

#include "cpu/kernels.h"
#include "cpu/load.h"

namespace zest::cpu {
namespace {

constexpr int64_t channel_tile = 512;
constexpr int64_t positions_per_flush = 32;
constexpr int64_t dot_block = 2048;
constexpr int64_t max_chunks = 256;
constexpr int64_t serial_below = 65536;
constexpr int64_t prefetch_ahead = 1024;  // elements
constexpr double smallest_trusted_sum = 1e-28;

template <class C>
ZEST_INLINE double dot(const C* y, const C* g, int64_t n) {
    typedef C V __attribute__((vector_size(64)));
    constexpr int64_t width = 64 / sizeof(C);
    double sum = 0;
    int64_t i = 0;
    if (n >= width) {
        V a = {}, b = {}, y0, y1, g0, g1;
        for (; i + 2 * width <= n; i += 2 * width) {
            std::memcpy(&y0, y + i, 64), std::memcpy(&g0, g + i, 64);
            std::memcpy(&y1, y + i + width, 64), std::memcpy(&g1, g + i + width, 64);
            // The next row usually lies ahead: keep memory busy while this one is being finished.
            __builtin_prefetch(y + i + prefetch_ahead), __builtin_prefetch(y + i + prefetch_ahead + width);
            __builtin_prefetch(g + i + prefetch_ahead), __builtin_prefetch(g + i + prefetch_ahead + width);
            a += y0 * g0, b += y1 * g1;
        }
        if (i + width <= n) {
            std::memcpy(&y0, y + i, 64), std::memcpy(&g0, g + i, 64);
            a += y0 * g0, i += width;
        }
        typedef double Wide __attribute__((vector_size(8 * width)));
        const Wide wide = __builtin_convertvector(a, Wide) + __builtin_convertvector(b, Wide);
        double lanes[width];
        std::memcpy(lanes, &wide, sizeof(lanes));
        for (int64_t half = width / 2; half > 0; half /= 2)
            for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
        sum = lanes[0];
    }
    for (; i < n; ++i) sum += double(y[i]) * double(g[i]);
    return sum;
}

// out[k] = y[k] . g[k] for rows of n dense elements; the loop over k is inside, since rows may be short.
template <class C>
ZEST_INLINE void dot_rows_inline(const C* y, int64_t y_row, const C* g, int64_t g_row, int64_t rows, int64_t n,
                                 double* out) {
    for (int64_t k = 0; k < rows; ++k) out[k] += dot(y + k * y_row, g + k * g_row, n);
}

template <class C>
ZEST_INLINE void multiply_add_inline(const C* y, const C* g, int64_t n, C* sum) {
    for (int64_t i = 0; i < n; ++i) sum[i] += y[i] * g[i];
}

ZEST_CLONES void dot_rows(const float* y, int64_t y_row, const float* g, int64_t g_row, int64_t rows, int64_t n,
                          double* out) {
    dot_rows_inline(y, y_row, g, g_row, rows, n, out);
}
ZEST_CLONES void dot_rows(const double* y, int64_t y_row, const double* g, int64_t g_row, int64_t rows, int64_t n,
                          double* out) {
    dot_rows_inline(y, y_row, g, g_row, rows, n, out);
}
ZEST_CLONES void multiply_add(const float* y, const float* g, int64_t n, float* sum) { multiply_add_inline(y, g, n, sum); }
ZEST_CLONES void multiply_add(const double* y, const double* g, int64_t n, double* sum) {
    multiply_add_inline(y, g, n, sum);
}

template <class C>
bool native(const Operand& x) {
    return x.dtype == (sizeof(C) == 8 ? DType::float64 : DType::float32);
}

template <class C>
const C* at(const Operand& x, int64_t offset) {
    return reinterpret_cast<const C*>(x.data) + offset;
}

// n elements from offset on, in place where they are dense and of the computing type.
template <class C>
const C* run(const Operand& x, int64_t offset, int64_t stride, int64_t n, C* buffer) {
    if (stride == 1 && native<C>(x)) return at<C>(x, offset);
    copy_run(x, offset, stride, n, buffer);
    return buffer;
}

struct Problem {
    int64_t samples, positions, channels;
    Operand y, g;
    Strides3 ys, gs;

    bool channels_dense() const { return ys.channel == 1 || positions == 1; }
};

// Channels [first, first + count) of sample n.
template <class C>
void one_task(const Problem& p, int64_t n, int64_t first, int64_t count, double* row) {
    const int64_t y0 = n * p.ys.sample + first * p.ys.channel, g0 = n * p.gs.sample + first * p.gs.channel;
    std::fill(row, row + count, 0.0);
    if (p.channels_dense()) {
        C sum[channel_tile], y_buffer[channel_tile], g_buffer[channel_tile];
        for (int64_t from = 0; from < p.positions; from += positions_per_flush) {
            std::fill(sum, sum + count, C(0));
            for (int64_t q = from; q < std::min(from + positions_per_flush, p.positions); ++q)
                multiply_add(run(p.y, y0 + q * p.ys.position, p.ys.channel, count, y_buffer),
                             run(p.g, g0 + q * p.gs.position, p.gs.channel, count, g_buffer), count, sum);
            for (int64_t k = 0; k < count; ++k) row[k] += double(sum[k]);
        }
        return;
    }
    const bool dense = p.ys.position == 1 && p.gs.position == 1 && native<C>(p.y) && native<C>(p.g);
    for (int64_t from = 0; from < p.positions; from += dot_block) {
        const int64_t length = std::min(dot_block, p.positions - from);
        if (dense) {
            dot_rows(at<C>(p.y, y0 + from), p.ys.channel, at<C>(p.g, g0 + from), p.gs.channel, count, length, row);
            continue;
        }
        C y_buffer[dot_block], g_buffer[dot_block];
        for (int64_t k = 0; k < count; ++k)
            dot_rows(run(p.y, y0 + k * p.ys.channel + from * p.ys.position, p.ys.position, length, y_buffer), 0,
                     run(p.g, g0 + k * p.gs.channel + from * p.gs.position, p.gs.position, length, g_buffer), 0, 1,
                     length, row + k);
    }
}

bool may_have_underflowed(const double* row, int64_t count) {
    double largest = 0;
    for (int64_t k = 0; k < count; ++k) largest = std::fmax(largest, std::fabs(row[k]));
    return largest < smallest_trusted_sum;
}

// Calls use(offset into S, count, row of S) for every task of one chunk.
template <class C, class Use>
void for_each_task(const Problem& p, int64_t chunk, int64_t chunks, const Use& use) {
    const int64_t tiles = (p.channels + channel_tile - 1) / channel_tile, tasks = p.samples * tiles;
    for (int64_t task = chunk * tasks / chunks; task < (chunk + 1) * tasks / chunks; ++task) {
        const int64_t n = task / tiles, first = task % tiles * channel_tile;
        const int64_t count = std::min(channel_tile, p.channels - first);
        double row[channel_tile];
        one_task<C>(p, n, first, count, row);
        if (sizeof(C) == 4 && may_have_underflowed(row, count)) one_task<double>(p, n, first, count, row);
        use(n * p.channels + first, count, row);
    }
}

template <class C>
double products(const Problem& p, double* out, int threads) {
    const int64_t tasks = p.samples * ((p.channels + channel_tile - 1) / channel_tile);
    const int64_t chunks = std::min(tasks, max_chunks);
    double squares[max_chunks];
#pragma omp parallel for num_threads(threads) schedule(static) \
    if (threads > 1 && p.samples * p.positions * p.channels >= serial_below)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        double sum = 0;
        for_each_task<C>(p, chunk, chunks, [&](int64_t at, int64_t count, const double* row) {
            if (out != nullptr) std::copy(row, row + count, out + at);
            for (int64_t k = 0; k < count; ++k) sum += row[k] * row[k];
        });
        squares[chunk] = sum;
    }
    double total = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total += squares[chunk];
    return total;
}

}  // namespace

double channel_products(int64_t samples, int64_t positions, int64_t channels, const Operand& y, Strides3 y_strides,
                        const Operand& g, Strides3 g_strides, double* out, int threads) {
    const Problem p = {samples, positions, channels, y, g, y_strides, g_strides};
    return y.dtype == DType::float64 || g.dtype == DType::float64 ? products<double>(p, out, threads)
                                                                  : products<float>(p, out, threads);
}

}  // namespace zest::cpu
