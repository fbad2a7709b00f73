// S[n, k] = sum over p of y[n, p, k] * g[n, p, k], and the sum of its squares, which is fisher: in one read of y and g.
//
// Two shapes of the loop, by which dimension is dense: channels (Linear, channels_last), where a tile of channels
// accumulates in float32 over 32 positions before it moves to float64; or positions (convolutions), where each channel
// is one dot product over blocks of 2,048, channel after channel as they lie in memory. Dense bfloat16 is widened in
// registers; any other stride, and float16, is gathered into dense blocks first. Every (n, tile) is one
// task; tasks belong to at most 256 chunks and chunks add up in order, so the result does not depend on the thread count.
// A task whose sums are so small that float32 products may have underflowed, or are not finite, since they may have
// overflowed, is done again in float64.
#include <cmath>

#include "cpu/kernels.h"
#include "cpu/vectors.h"

namespace zest::cpu {
namespace {

constexpr int64_t channel_tile = 1024;
constexpr int64_t positions_per_flush = 32;
constexpr int64_t dot_block = 2048;
constexpr int64_t max_chunks = 256;
constexpr int64_t serial_below = 65536;
constexpr int64_t prefetch_ahead = 1024;  // elements
constexpr double smallest_trusted_sum = 1e-28;

template <class C, int bytes, class T>
ZEST_INLINE double dot(const T* y, const T* g, int64_t n) {
    using V = Vector<C, bytes>;
    constexpr int64_t step = 2 * V::lanes;
    double sum = 0;
    int64_t i = 0;
    if (n >= V::lanes) {
        V a = zero<C, bytes>(), b = a, y0, y1, g0, g1;
        for (; i + step <= n; i += step) {
            load_pair(y0, y1, y + i), load_pair(g0, g1, g + i);
            // The next row usually lies ahead: keep memory busy while this one is being finished.
            __builtin_prefetch(y + i + prefetch_ahead), __builtin_prefetch(g + i + prefetch_ahead);
            if (sizeof(T) == sizeof(C)) {
                __builtin_prefetch(y + i + prefetch_ahead + V::lanes);
                __builtin_prefetch(g + i + prefetch_ahead + V::lanes);
            }
            multiply_add(a, y0, g0), multiply_add(b, y1, g1);
        }
        if (i + V::lanes <= n) {
            load(y0, y + i), load(g0, g + i);
            multiply_add(a, y0, g0), i += V::lanes;
        }
        double lanes[V::lanes] = {};
        add_lanes(a, lanes), add_lanes(b, lanes);
        sum = add_up<V::lanes>(lanes);
    }
    for (; i < n; ++i) sum += double(widen(y[i])) * double(widen(g[i]));
    return sum;
}

// out[k] += y[k] . g[k] for rows of n dense elements; the loop over k is inside, since rows may be short.
template <class C, int bytes, class T>
ZEST_INLINE void dot_rows_as(const T* y, int64_t y_row, const T* g, int64_t g_row, int64_t rows, int64_t n,
                             double* out) {
    for (int64_t k = 0; k < rows; ++k)
        for (int64_t from = 0; from < n; from += dot_block)
            out[k] += dot<C, bytes>(y + k * y_row + from, g + k * g_row + from, std::min(dot_block, n - from));
}

// Products of rows q of n dense elements, added to n sums; four rows at a time, so that sums are loaded and stored once
// for each four. The sums lie as load_pair has the elements: see add_sums.
template <class C, int bytes, class T>
ZEST_INLINE void add_products_as(const T* y, int64_t y_row, const T* g, int64_t g_row, int64_t rows, int64_t n, C* sum) {
    using V = Vector<C, bytes>;
    constexpr int64_t step = 2 * V::lanes;
    const int64_t whole = n - n % step;
    const auto add_row = [&](int64_t q, int64_t k, V& a, V& b) __attribute__((always_inline)) {
        V y0, y1, g0, g1;
        load_pair(y0, y1, y + q * y_row + k), load_pair(g0, g1, g + q * g_row + k);
        multiply_add(a, y0, g0), multiply_add(b, y1, g1);
    };
    for (int64_t q = 0; q < rows; q += 4)
        for (int64_t k = 0; k < whole; k += step) {
            V a, b;
            load_pair(a, b, sum + k);
            if (q + 4 <= rows)
                add_row(q, k, a, b), add_row(q + 1, k, a, b), add_row(q + 2, k, a, b), add_row(q + 3, k, a, b);
            else
                for (int64_t rest = q; rest < rows; ++rest) add_row(rest, k, a, b);
            store(a, sum + k), store(b, sum + k + V::lanes);
        }
    for (int64_t q = 0; q < rows; ++q)
        for (int64_t k = whole; k < n; ++k) sum[k] += widen(y[q * y_row + k]) * widen(g[q * g_row + k]);
}

// row[k] += the sum of channel k; of bfloat16 vectors, even channels lie before odd ones.
template <class T, class C>
void add_sums(const C* sum, int64_t n, double* row) {
    const int64_t paired = sizeof(T) == 2 ? n - n % 32 : 0;
    for (int64_t k = 0; k < paired; k += 32)
        for (int64_t i = 0; i < 16; ++i) {
            row[k + 2 * i] += double(sum[k + i]);
            row[k + 2 * i + 1] += double(sum[k + 16 + i]);
        }
    for (int64_t k = paired; k < n; ++k) row[k] += double(sum[k]);
}

ZEST_VERSIONS(void dot_rows(const float* y, int64_t y_row, const float* g, int64_t g_row, int64_t rows, int64_t n, double* out),
              dot_rows_as<float, bytes>(y, y_row, g, g_row, rows, n, out))
ZEST_VERSIONS(void dot_rows(const double* y, int64_t y_row, const double* g, int64_t g_row, int64_t rows, int64_t n, double* out),
              dot_rows_as<double, bytes>(y, y_row, g, g_row, rows, n, out))
ZEST_VERSIONS(void dot_rows(const bfloat16* y, int64_t y_row, const bfloat16* g, int64_t g_row, int64_t rows, int64_t n, double* out),
              dot_rows_as<float, bytes>(y, y_row, g, g_row, rows, n, out))
ZEST_VERSIONS(void add_products(const float* y, int64_t y_row, const float* g, int64_t g_row, int64_t rows, int64_t n, float* out),
              add_products_as<float, bytes>(y, y_row, g, g_row, rows, n, out))
ZEST_VERSIONS(void add_products(const double* y, int64_t y_row, const double* g, int64_t g_row, int64_t rows, int64_t n, double* out),
              add_products_as<double, bytes>(y, y_row, g, g_row, rows, n, out))
ZEST_VERSIONS(void add_products(const bfloat16* y, int64_t y_row, const bfloat16* g, int64_t g_row, int64_t rows, int64_t n, float* out),
              add_products_as<float, bytes>(y, y_row, g, g_row, rows, n, out))

template <class T>
const T* at(const Operand& x, int64_t offset) {
    return reinterpret_cast<const T*>(x.data) + offset;
}

template <class T>
bool holds(const Operand& x) {
    return x.dtype == (sizeof(T) == 8 ? DType::float64 : sizeof(T) == 4 ? DType::float32 : DType::bfloat16);
}

// n elements from offset on, in place where they are dense and of the computing type.
template <class C>
const C* run(const Operand& x, int64_t offset, int64_t stride, int64_t n, C* buffer) {
    if (stride == 1 && holds<C>(x)) return at<C>(x, offset);
    copy_run(x, offset, stride, n, buffer);
    return buffer;
}

struct Problem {
    int64_t samples, positions, channels;
    Operand y, g;
    Strides3 ys, gs;

    bool channels_dense() const { return ys.channel == 1 || positions == 1; }

    // Whether the inner dimension is read where it lies: both are of this type and dense.
    template <class T>
    bool in_place() const {
        const bool dense = channels_dense() ? ys.channel == 1 && gs.channel == 1 : ys.position == 1 && gs.position == 1;
        return dense && holds<T>(y) && holds<T>(g);
    }
};

// Adds the products of `count` channels from offsets y0 and g0 on to row; T: as they lie in memory.
template <class C, class T>
void in_place_task(const Problem& p, int64_t y0, int64_t g0, int64_t count, double* row) {
    if (!p.channels_dense()) {
        dot_rows(at<T>(p.y, y0), p.ys.channel, at<T>(p.g, g0), p.gs.channel, count, p.positions, row);
        return;
    }
    C sum[channel_tile];
    for (int64_t from = 0; from < p.positions; from += positions_per_flush) {
        std::fill(sum, sum + count, C(0));
        add_products(at<T>(p.y, y0 + from * p.ys.position), p.ys.position, at<T>(p.g, g0 + from * p.gs.position),
                     p.gs.position, std::min(positions_per_flush, p.positions - from), count, sum);
        add_sums<T>(sum, count, row);
    }
}

// The same of other strides and types, gathered piece by piece.
template <class C>
void gathered_task(const Problem& p, int64_t y0, int64_t g0, int64_t count, double* row) {
    if (p.channels_dense()) {
        C sum[channel_tile], y_buffer[channel_tile], g_buffer[channel_tile];
        for (int64_t from = 0; from < p.positions; from += positions_per_flush) {
            std::fill(sum, sum + count, C(0));
            for (int64_t q = from; q < std::min(from + positions_per_flush, p.positions); ++q)
                add_products(run(p.y, y0 + q * p.ys.position, p.ys.channel, count, y_buffer), 0,
                             run(p.g, g0 + q * p.gs.position, p.gs.channel, count, g_buffer), 0, 1, count, sum);
            add_sums<C>(sum, count, row);
        }
        return;
    }
    C y_buffer[dot_block], g_buffer[dot_block];
    for (int64_t k = 0; k < count; ++k)
        for (int64_t from = 0; from < p.positions; from += dot_block) {
            const int64_t length = std::min(dot_block, p.positions - from);
            dot_rows(run(p.y, y0 + k * p.ys.channel + from * p.ys.position, p.ys.position, length, y_buffer), 0,
                     run(p.g, g0 + k * p.gs.channel + from * p.gs.position, p.gs.position, length, g_buffer), 0, 1,
                     length, row + k);
        }
}

// Channels [first, first + count) of sample n.
template <class C>
void one_task(const Problem& p, int64_t n, int64_t first, int64_t count, double* row) {
    const int64_t y0 = n * p.ys.sample + first * p.ys.channel, g0 = n * p.gs.sample + first * p.gs.channel;
    std::fill(row, row + count, 0.0);
    if (p.in_place<C>()) return in_place_task<C, C>(p, y0, g0, count, row);
    if constexpr (sizeof(C) == 4)
        if (p.in_place<bfloat16>()) return in_place_task<C, bfloat16>(p, y0, g0, count, row);
    gathered_task<C>(p, y0, g0, count, row);
}

bool may_have_underflowed(const double* row, int64_t count) {
    for (int64_t k = 0; k < count; ++k)
        if (std::fabs(row[k]) >= smallest_trusted_sum) return false;  // the first, as a rule
    return true;
}

// In four sums, which do not wait for each other.
double sum_of_squares(const double* row, int64_t count) {
    double sum[4] = {};
    for (int64_t k = 0; k < count; ++k) sum[k % 4] += row[k] * row[k];
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Calls use(offset into S, count, row of S, sum of its squares) for every task of one chunk.
template <class C, class Use>
void for_each_task(const Problem& p, int64_t chunk, int64_t chunks, const Use& use) {
    const int64_t tiles = (p.channels + channel_tile - 1) / channel_tile, tasks = p.samples * tiles;
    for (int64_t task = chunk * tasks / chunks; task < (chunk + 1) * tasks / chunks; ++task) {
        const int64_t n = task / tiles, first = task % tiles * channel_tile;
        const int64_t count = std::min(channel_tile, p.channels - first);
        double row[channel_tile];
        one_task<C>(p, n, first, count, row);
        double squares = sum_of_squares(row, count);
        if (sizeof(C) == 4 && (!std::isfinite(squares) || may_have_underflowed(row, count))) {
            one_task<double>(p, n, first, count, row);
            squares = sum_of_squares(row, count);
        }
        use(n * p.channels + first, count, row, squares);
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
        for_each_task<C>(p, chunk, chunks, [&](int64_t at, int64_t count, const double* row, double squares) {
            if (out != nullptr) std::copy(row, row + count, out + at);
            sum += squares;
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
