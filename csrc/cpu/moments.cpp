// Moments of a tensor, and of a gradient with its weight, in one pass over memory.
//
// Pieces of 2,048 elements are summed in vector lanes of float32 (float64 for float64 input): x, |x| and x^2, which are
// a handful of instructions per vector and keep up with memory; the lanes of four pieces, a block, add up in float64.
// Where a block's mean outweighs its deviation, so that sum x^2 - (sum x)^2 / n would lose digits, the block, still in
// the cache, is read again about its mean; where its values are too large or too small for float32 squares, in float64.
// A block's result is float64, and blocks merge by Chan's formula. At most 128 additions per lane keep float32 sums
// within 1e-6. Bytes moved: those of the inputs, once; dense bfloat16 is widened in registers, other strides and float16
// piece by piece. Blocks belong to at most 256 chunks whose borders depend on the length only, and chunks merge in order,
// so the thread count never shows in the result.
#include <cmath>
#include <limits>

#include "cpu/kernels.h"
#include "cpu/vectors.h"

namespace zest::cpu {
namespace {

constexpr int64_t piece_size = 2048;
constexpr int64_t block_size = 4 * piece_size;
constexpr int64_t max_chunks = 256;
constexpr int64_t serial_below = 65536;  // fewer elements than this cost less than waking threads

// Keeps memory busy while a block is being finished. An address beyond the end is harmless.
template <class T, class C>
ZEST_INLINE void prefetch_ahead(const T* p) {
    const char* ahead = reinterpret_cast<const char*>(p + piece_size);
    __builtin_prefetch(ahead);
    if (sizeof(T) == sizeof(C)) __builtin_prefetch(ahead + 64);  // a pair of vectors is two cache lines
}

// Sums of a block, each in 16 lanes of float64 (float64 input uses eight).
template <int count>
struct LaneSums {
    double lane[count][16] = {};

    double operator[](int which) const { return add_up<16>(lane[which]); }
};

// Sums of x, |x| and x^2 over a piece.
template <class C, int bytes, class T>
ZEST_INLINE void add_piece_as(const T* x, int64_t n, LaneSums<3>& sums) {
    using V = Vector<C, bytes>;
    constexpr int64_t step = 2 * V::lanes;
    const int64_t whole = n - n % step;
    V s0 = zero<C, bytes>(), s1 = s0, a0 = s0, a1 = s0, q0 = s0, q1 = s0, u, v;
    for (int64_t i = 0; i < whole; i += step) {
        load_pair(u, v, x + i);
        prefetch_ahead<T, C>(x + i);
        add(s0, u), add(s1, v);
        add(a0, magnitude(u)), add(a1, magnitude(v));
        multiply_add(q0, u, u), multiply_add(q1, v, v);
    }
    add_lanes(s0, sums.lane[0]), add_lanes(s1, sums.lane[0]);
    add_lanes(a0, sums.lane[1]), add_lanes(a1, sums.lane[1]);
    add_lanes(q0, sums.lane[2]), add_lanes(q1, sums.lane[2]);
    for (int64_t i = whole; i < n; ++i) {
        const double u = double(widen(x[i]));
        sums.lane[0][0] += u, sums.lane[1][0] += std::fabs(u), sums.lane[2][0] += u * u;
    }
}

// Sums of dw, |dw|, dw^2, w, w^2, w dw and |w dw| over a piece.
template <class C, int bytes, class T>
ZEST_INLINE void add_pieces_as(const T* dw, const T* w, int64_t n, LaneSums<7>& sums) {
    using V = Vector<C, bytes>;
    constexpr int64_t step = 2 * V::lanes;
    const int64_t whole = n - n % step;
    V s = zero<C, bytes>(), a = s, q = s, t = s, qw = s, p = s, pa = s, g[2], u[2];
    for (int64_t i = 0; i < whole; i += step) {
        load_pair(g[0], g[1], dw + i), load_pair(u[0], u[1], w + i);
        prefetch_ahead<T, C>(dw + i), prefetch_ahead<T, C>(w + i);
        for (int half = 0; half < 2; ++half) {
            const V both = product(g[half], u[half]);
            add(s, g[half]), add(a, magnitude(g[half])), multiply_add(q, g[half], g[half]);
            add(t, u[half]), multiply_add(qw, u[half], u[half]);
            add(p, both), add(pa, magnitude(both));
        }
    }
    add_lanes(s, sums.lane[0]), add_lanes(a, sums.lane[1]), add_lanes(q, sums.lane[2]);
    add_lanes(t, sums.lane[3]), add_lanes(qw, sums.lane[4]);
    add_lanes(p, sums.lane[5]), add_lanes(pa, sums.lane[6]);
    for (int64_t i = whole; i < n; ++i) {
        const double g = double(widen(dw[i])), u = double(widen(w[i])), product = g * u;
        sums.lane[0][0] += g, sums.lane[1][0] += std::fabs(g), sums.lane[2][0] += g * g;
        sums.lane[3][0] += u, sums.lane[4][0] += u * u;
        sums.lane[5][0] += product, sums.lane[6][0] += std::fabs(product);
    }
}

// Sums of d = x - centre (or |x| - centre) and of d^2 over a piece.
template <class C, int bytes, bool absolute, class T>
ZEST_INLINE void add_centred_as(const T* x, int64_t n, C centre, LaneSums<2>& sums) {
    using V = Vector<C, bytes>;
    constexpr int64_t step = 2 * V::lanes;
    const int64_t whole = n - n % step;
    V d = zero<C, bytes>(), q = d, u[2];
    for (int64_t i = 0; i < whole; i += step) {
        load_pair(u[0], u[1], x + i);
        for (int half = 0; half < 2; ++half) {
            const V away = less(absolute ? magnitude(u[half]) : u[half], centre);
            add(d, away), multiply_add(q, away, away);
        }
    }
    add_lanes(d, sums.lane[0]), add_lanes(q, sums.lane[1]);
    for (int64_t i = whole; i < n; ++i) {
        const double u = double(widen(x[i])), away = (absolute ? std::fabs(u) : u) - double(centre);
        sums.lane[0][0] += away, sums.lane[1][0] += away * away;
    }
}
template <class C, int bytes, class T>
ZEST_INLINE void add_centred_as(const T* x, int64_t n, bool absolute, double near_mean, LaneSums<2>& sums) {
    absolute ? add_centred_as<C, bytes, true>(x, n, C(near_mean), sums)
             : add_centred_as<C, bytes, false>(x, n, C(near_mean), sums);
}

// Everything above is inlined into these.
ZEST_VERSIONS(void add_piece(const float* x, int64_t n, LaneSums<3>& s), add_piece_as<float, bytes>(x, n, s))
ZEST_VERSIONS(void add_piece(const double* x, int64_t n, LaneSums<3>& s), add_piece_as<double, bytes>(x, n, s))
ZEST_VERSIONS(void add_piece(const bfloat16* x, int64_t n, LaneSums<3>& s), add_piece_as<float, bytes>(x, n, s))
ZEST_VERSIONS(void add_pieces(const float* dw, const float* w, int64_t n, LaneSums<7>& s),
              add_pieces_as<float, bytes>(dw, w, n, s))
ZEST_VERSIONS(void add_pieces(const double* dw, const double* w, int64_t n, LaneSums<7>& s),
              add_pieces_as<double, bytes>(dw, w, n, s))
ZEST_VERSIONS(void add_pieces(const bfloat16* dw, const bfloat16* w, int64_t n, LaneSums<7>& s),
              add_pieces_as<float, bytes>(dw, w, n, s))
ZEST_VERSIONS(void add_centred(const float* x, int64_t n, bool absolute, double near_mean, LaneSums<2>& s),
              add_centred_as<float, bytes>(x, n, absolute, near_mean, s))
ZEST_VERSIONS(void add_centred(const double* x, int64_t n, bool absolute, double near_mean, LaneSums<2>& s),
              add_centred_as<double, bytes>(x, n, absolute, near_mean, s))
ZEST_VERSIONS(void add_centred(const bfloat16* x, int64_t n, bool absolute, double near_mean, LaneSums<2>& s),
              add_centred_as<float, bytes>(x, n, absolute, near_mean, s))

// From here on a block is a function (start, n) -> its elements [start, start + n), which hold until the next call.

template <class Use>
void for_each_piece(int64_t n, const Use& use) {
    for (int64_t start = 0; start < n; start += piece_size) use(start, std::min(piece_size, n - start));
}

// Plain two-pass moments in float64: for blocks that float32 cannot hold, and to count entries that are not finite.
template <class Block>
Moments careful_moments(const Block& x, int64_t n) {
    Moments m;
    m.count = double(n);
    for_each_piece(n, [&](int64_t start, int64_t count) {
        const auto* piece = x(start, count);
        for (int64_t i = 0; i < count; ++i) {
            const double u = double(widen(piece[i]));
            m.nonfinite += !std::isfinite(u);
            m.mean += u / double(n);
            m.abs_mean += std::fabs(u) / double(n);
        }
    });
    for_each_piece(n, [&](int64_t start, int64_t count) {
        const auto* piece = x(start, count);
        for (int64_t i = 0; i < count; ++i) {
            const double u = double(widen(piece[i])), d = u - m.mean, a = std::fabs(u) - m.abs_mean;
            m.m2 += d * d;
            m.abs_m2 += a * a;
        }
    });
    return m;
}

template <class Block, class WeightBlock>
GradientMoments careful_gradient_moments(const Block& dw, const WeightBlock& w, int64_t n) {
    GradientMoments r;
    r.gradient = careful_moments(dw, n);
    const Moments weight = careful_moments(w, n);
    r.weight_mean = weight.mean, r.weight_m2 = weight.m2, r.weight_nonfinite = weight.nonfinite;
    for_each_piece(n, [&](int64_t start, int64_t count) {
        const auto *g = dw(start, count), *u = w(start, count);
        for (int64_t i = 0; i < count; ++i) {
            const double product = double(widen(g[i])) * double(widen(u[i]));
            r.product_sum += product;
            r.product_abs_sum += std::fabs(product);
        }
    });
    return r;
}

// Below this a float32 sum of squares has lost digits to underflow (also where the CPU flushes subnormals to zero).
constexpr double smallest_trusted_sum = 1e-28;

template <class C>
bool trusted(double sum) {
    return sum < std::numeric_limits<double>::infinity() && (sizeof(C) == 8 || sum >= smallest_trusted_sum);
}

// Sums over one block: of d = x - centre, and of its square. From them the mean and the squares about the mean.
struct Sums {
    double centre = 0, d = 0, dd = 0;

    double squares_about_mean(double n) const { return std::fmax(dd - d * d / n, 0.0); }

    // Whether dd - d^2 / n keeps its digits: it loses as many as the mean's square exceeds the variance.
    bool cancels(double n) const { return d * d / n > (1 - 1.0 / most_cancellation) * dd; }
    static constexpr double most_cancellation = 16;

    void finish(double n, double& mean, double& m2) const {
        mean = centre + d / n;
        m2 = squares_about_mean(n);
    }
};

// The sums of x (or of |x|) about a centre near their mean: for blocks whose sums about zero cancel.
template <class C, class Block>
Sums centred_sums(const Block& x, int64_t n, bool absolute, double near_mean) {
    LaneSums<2> sums;
    for_each_piece(n, [&](int64_t start, int64_t count) {
        add_centred(x(start, count), count, absolute, near_mean, sums);
    });
    return {double(C(near_mean)), sums[0], sums[1]};
}

// Means and squares from sums about zero where those are good enough, else from another look at the block.
// False where float32 cannot hold the squares.
template <class C, class Block>
bool settle(const Block& x, int64_t n, bool absolute, double sum, double square, double& mean, double& m2) {
    Sums s = {0, sum, square};
    if (s.cancels(double(n))) s = centred_sums<C>(x, n, absolute, sum / double(n));
    s.finish(double(n), mean, m2);
    return trusted<C>(s.dd);
}

template <class C, class Block>
Moments block_moments(const Block& x, int64_t n) {
    LaneSums<3> sums;
    for_each_piece(n, [&](int64_t start, int64_t count) { add_piece(x(start, count), count, sums); });
    const double sum = sums[0], abs_sum = sums[1], square = sums[2];
    Moments m;
    m.count = double(n);
    if (abs_sum == 0) return m;  // all zero
    const bool fits = settle<C>(x, n, false, sum, square, m.mean, m.m2) &&
                      settle<C>(x, n, true, abs_sum, square, m.abs_mean, m.abs_m2);
    return fits ? m : careful_moments(x, n);
}

template <class C, class Block, class WeightBlock>
GradientMoments block_gradient_moments(const Block& dw, const WeightBlock& w, int64_t n) {
    LaneSums<7> sums;
    for_each_piece(n, [&](int64_t start, int64_t count) {
        add_pieces(dw(start, count), w(start, count), count, sums);
    });
    const double sum = sums[0], abs_sum = sums[1], square = sums[2], weight_sum = sums[3], weight_square = sums[4];
    GradientMoments r;
    r.gradient.count = double(n);
    r.product_sum = sums[5], r.product_abs_sum = sums[6];
    Moments& d = r.gradient;
    const bool no_gradient = abs_sum == 0 && r.product_abs_sum == 0;  // exact zeros need no care
    const bool fits = settle<C>(w, n, false, weight_sum, weight_square, r.weight_mean, r.weight_m2) &&
                      (no_gradient || (settle<C>(dw, n, false, sum, square, d.mean, d.m2) &&
                                       settle<C>(dw, n, true, abs_sum, square, d.abs_mean, d.abs_m2) &&
                                       trusted<C>(r.product_abs_sum)));
    return fits ? r : careful_gradient_moments(dw, w, n);
}

// result = block(start, n) merged over all blocks of n <= block_size elements, in a fixed order.
template <class Result, class Block>
Result reduce(int64_t numel, int threads, const Block& block) {
    const int64_t blocks = (numel + block_size - 1) / block_size;
    const int64_t chunks = std::min(blocks, max_chunks);
    Result partial[max_chunks];
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && numel >= serial_below)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        Result sum;
        for (int64_t b = chunk * blocks / chunks; b < (chunk + 1) * blocks / chunks; ++b)
            merge(sum, block(b * block_size, std::min(block_size, numel - b * block_size)));
        partial[chunk] = sum;
    }
    Result total;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) merge(total, partial[chunk]);
    return total;
}

// The block of an operand that begins at `first`: in place where it is dense bfloat16 or of the computing type.
template <int N, class C>
auto block_of(const Layout<N>& layout, int o, const Operand& x, int64_t first, C* buffer) {
    return [=, &layout, &x](int64_t start, int64_t n) { return read_block(layout, o, x, first + start, n, buffer); };
}
auto block_of(const bfloat16* x, int64_t first) {
    return [=](int64_t start, int64_t) { return x + first + start; };
}

template <int N>
const bfloat16* dense_bfloat16(const Layout<N>& layout, const Operand& x) {
    return layout.contiguous() && x.dtype == DType::bfloat16 ? reinterpret_cast<const bfloat16*>(x.data) : nullptr;
}

template <class C>
Moments moments_as(const Layout<1>& layout, const Operand& x, int threads) {
    const bfloat16* narrow = dense_bfloat16(layout, x);
    return reduce<Moments>(layout.numel, threads, [&](int64_t first, int64_t n) {
        if (narrow) return block_moments<float>(block_of(narrow, first), n);
        C buffer[piece_size];
        return block_moments<C>(block_of(layout, 0, x, first, buffer), n);
    });
}

template <class C>
GradientMoments gradient_moments_as(const Layout<2>& layout, const Operand& dw, const Operand& w, int threads) {
    const bfloat16 *narrow = dense_bfloat16(layout, dw), *narrow_weight = dense_bfloat16(layout, w);
    return reduce<GradientMoments>(layout.numel, threads, [&](int64_t first, int64_t n) {
        if (narrow && narrow_weight)
            return block_gradient_moments<float>(block_of(narrow, first), block_of(narrow_weight, first), n);
        C buffer[piece_size], weight_buffer[piece_size];
        return block_gradient_moments<C>(block_of(layout, 0, dw, first, buffer),
                                         block_of(layout, 1, w, first, weight_buffer), n);
    });
}

}  // namespace

// Conversions live beside the clones that use them, so that they vectorise for the same instruction sets.
ZEST_CLONES static void widen_run(const float* x, int64_t s, int64_t n, float* out) { copy_run(x, s, n, out); }
ZEST_CLONES static void widen_run(const bfloat16* x, int64_t s, int64_t n, float* out) { copy_run(x, s, n, out); }
ZEST_CLONES static void widen_run(const float16* x, int64_t s, int64_t n, float* out) {
    s == 1 ? copy_dense(x, n, out) : copy_run(x, s, n, out);
}

void copy_run(const Operand& x, int64_t offset, int64_t stride, int64_t n, float* out) {
    switch (x.dtype) {
        case DType::bfloat16: return widen_run(reinterpret_cast<const bfloat16*>(x.data) + offset, stride, n, out);
        case DType::float16: return widen_run(reinterpret_cast<const float16*>(x.data) + offset, stride, n, out);
        default: return widen_run(reinterpret_cast<const float*>(x.data) + offset, stride, n, out);
    }
}

// float64 with a narrower partner (a float64 gradient of a float32 weight, say).
void copy_run(const Operand& x, int64_t offset, int64_t stride, int64_t n, double* out) {
    switch (x.dtype) {
        case DType::float64: return copy_run(reinterpret_cast<const double*>(x.data) + offset, stride, n, out);
        case DType::bfloat16: return copy_run(reinterpret_cast<const bfloat16*>(x.data) + offset, stride, n, out);
        case DType::float16: return copy_run(reinterpret_cast<const float16*>(x.data) + offset, stride, n, out);
        default: return copy_run(reinterpret_cast<const float*>(x.data) + offset, stride, n, out);
    }
}

Moments moments(const Layout<1>& layout, const Operand& x, int threads) {
    Moments m = x.dtype == DType::float64 ? moments_as<double>(layout, x, threads) : moments_as<float>(layout, x, threads);
    const double repeat = double(layout.repeat);
    m.count *= repeat, m.m2 *= repeat, m.abs_m2 *= repeat, m.nonfinite *= repeat;
    return m;
}

GradientMoments gradient_moments(const Layout<2>& layout, const Operand& dw, const Operand& w, int threads) {
    return dw.dtype == DType::float64 || w.dtype == DType::float64 ? gradient_moments_as<double>(layout, dw, w, threads)
                                                                   : gradient_moments_as<float>(layout, dw, w, threads);
}

}  // namespace zest::cpu
