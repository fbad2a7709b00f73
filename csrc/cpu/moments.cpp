// Moments of a tensor, and of a gradient with its weight, in one pass over memory.
//
// Blocks of 2,048 elements are summed in vector lanes of float32 (float64 for float64 input): x, |x| and x^2, which are
// a handful of instructions per vector and keep up with memory. Where a block's mean outweighs its deviation, so that
// sum x^2 - (sum x)^2 / n would lose digits, the block, still in the first-level cache, is read again about its mean;
// where its values are too large or too small for float32 squares, in float64. A block's result is float64, and blocks
// merge by Chan's formula. At most 128 additions per lane keep float32 sums within 1e-6. Bytes moved: those of the
// inputs, once. Blocks belong to at most 256 chunks whose borders depend on the length only, and chunks merge in order,
// so the thread count never shows in the result.
#include <cmath>
#include <limits>

#include "cpu/kernels.h"
#include "cpu/load.h"

namespace zest::cpu {
namespace {

constexpr int64_t block_size = 2048;
constexpr int64_t max_chunks = 256;
constexpr int64_t serial_below = 65536;  // fewer elements than this cost less than waking threads

template <class C>
struct Lanes;
template <>
struct Lanes<float> {
    typedef float vector __attribute__((vector_size(64)));
    typedef uint32_t bits __attribute__((vector_size(64)));
    typedef double wide __attribute__((vector_size(128)));
    static constexpr uint32_t no_sign = 0x7fffffffu;
    static constexpr int width = 16;
};
template <>
struct Lanes<double> {
    typedef double vector __attribute__((vector_size(64)));
    typedef uint64_t bits __attribute__((vector_size(64)));
    typedef double wide __attribute__((vector_size(64)));
    static constexpr uint64_t no_sign = 0x7fffffffffffffffull;
    static constexpr int width = 8;
};

template <class C>
ZEST_INLINE typename Lanes<C>::vector load(const C* p) {
    typename Lanes<C>::vector v;
    std::memcpy(&v, p, 64);
    return v;
}

// Keeps memory busy while a block is being finished. An address beyond the end is harmless.
template <class C>
ZEST_INLINE void prefetch_next_block(const C* p) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + block_size * sizeof(C));
}

template <class C>
ZEST_INLINE typename Lanes<C>::vector magnitude(typename Lanes<C>::vector x) {
    return (typename Lanes<C>::vector)((typename Lanes<C>::bits)x & Lanes<C>::no_sign);
}

// The lanes of a and b added in float64, pairwise in a fixed order.
template <class C>
ZEST_INLINE double sum_lanes(typename Lanes<C>::vector a, typename Lanes<C>::vector b) {
    auto lanes = __builtin_convertvector(a, typename Lanes<C>::wide) + __builtin_convertvector(b, typename Lanes<C>::wide);
    double sum[Lanes<C>::width];
    std::memcpy(sum, &lanes, sizeof(sum));
    for (int half = Lanes<C>::width / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
    return sum[0];
}

// Below this a float32 sum of squares has lost digits to underflow (also where the CPU flushes subnormals to zero).
constexpr double smallest_trusted_sum = 1e-28;

template <class C>
ZEST_INLINE bool trusted(double sum) {
    return sum < std::numeric_limits<double>::infinity() && (sizeof(C) == 8 || sum >= smallest_trusted_sum);
}

// Plain two-pass moments in float64: for blocks that float32 cannot hold, and to count entries that are not finite.
template <class C>
Moments careful_moments(const C* x, int64_t n) {
    Moments m;
    m.count = double(n);
    for (int64_t i = 0; i < n; ++i) {
        m.nonfinite += !std::isfinite(x[i]);
        m.mean += double(x[i]) / double(n);
        m.abs_mean += std::fabs(double(x[i])) / double(n);
    }
    for (int64_t i = 0; i < n; ++i) {
        const double d = double(x[i]) - m.mean, a = std::fabs(double(x[i])) - m.abs_mean;
        m.m2 += d * d;
        m.abs_m2 += a * a;
    }
    return m;
}

template <class C>
GradientMoments careful_gradient_moments(const C* dw, const C* w, int64_t n) {
    GradientMoments r;
    r.gradient = careful_moments(dw, n);
    const Moments weight = careful_moments(w, n);
    r.weight_mean = weight.mean, r.weight_m2 = weight.m2, r.weight_nonfinite = weight.nonfinite;
    for (int64_t i = 0; i < n; ++i) {
        const double product = double(dw[i]) * double(w[i]);
        r.product_sum += product;
        r.product_abs_sum += std::fabs(product);
    }
    return r;
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

template <class C, bool absolute>
ZEST_INLINE typename Lanes<C>::vector value(typename Lanes<C>::vector x) {
    return absolute ? magnitude<C>(x) : x;
}

// The sums of x (or of |x|) about a centre near their mean: for blocks whose sums about zero cancel.
template <class C, bool absolute>
ZEST_INLINE Sums centred_sums(const C* x, int64_t n, double near_mean) {
    using V = typename Lanes<C>::vector;
    constexpr int64_t step = Lanes<C>::width;
    const int64_t whole = n - n % step;
    const C c = C(near_mean);
    V d = {}, q = {};
    const V zero = {};
    for (int64_t i = 0; i < whole; i += step) {
        const V u = value<C, absolute>(load(x + i)) - c;
        d += u, q += u * u;
    }
    Sums s = {double(c), sum_lanes<C>(d, zero), sum_lanes<C>(q, zero)};
    for (int64_t i = whole; i < n; ++i) {
        const double u = (absolute ? std::fabs(double(x[i])) : double(x[i])) - double(c);
        s.d += u, s.dd += u * u;
    }
    return s;
}

// Means and squares from sums about zero where those are good enough, else from another look at the block.
// False where float32 cannot hold the squares.
template <class C, bool absolute>
ZEST_INLINE bool settle(const C* x, int64_t n, double sum, double square, double& mean, double& m2) {
    Sums s = {0, sum, square};
    if (s.cancels(double(n))) s = centred_sums<C, absolute>(x, n, sum / double(n));
    s.finish(double(n), mean, m2);
    return trusted<C>(s.dd);
}

template <class C>
ZEST_INLINE Moments block_moments(const C* x, int64_t n) {
    using V = typename Lanes<C>::vector;
    constexpr int64_t step = 2 * Lanes<C>::width;
    const int64_t whole = n - n % step;
    V s0 = {}, s1 = {}, a0 = {}, a1 = {}, q0 = {}, q1 = {};
    for (int64_t i = 0; i < whole; i += step) {
        const V u = load(x + i), v = load(x + i + step / 2);
        prefetch_next_block(x + i), prefetch_next_block(x + i + step / 2);
        s0 += u, s1 += v;
        a0 += magnitude<C>(u), a1 += magnitude<C>(v);
        q0 += u * u, q1 += v * v;
    }
    double sum = sum_lanes<C>(s0, s1), abs_sum = sum_lanes<C>(a0, a1), square = sum_lanes<C>(q0, q1);
    for (int64_t i = whole; i < n; ++i) {
        const double u = double(x[i]);
        sum += u, abs_sum += std::fabs(u), square += u * u;
    }
    Moments m;
    m.count = double(n);
    if (abs_sum == 0) return m;  // all zero
    const bool fits = settle<C, false>(x, n, sum, square, m.mean, m.m2) &&
                      settle<C, true>(x, n, abs_sum, square, m.abs_mean, m.abs_m2);
    return fits ? m : careful_moments(x, n);
}

template <class C>
ZEST_INLINE GradientMoments block_gradient_moments(const C* dw, const C* w, int64_t n) {
    using V = typename Lanes<C>::vector;
    constexpr int64_t step = Lanes<C>::width;
    const int64_t whole = n - n % step;
    V s = {}, a = {}, q = {}, t = {}, qw = {}, p = {}, pa = {};
    const V zero = {};
    for (int64_t i = 0; i < whole; i += step) {
        const V g = load(dw + i), u = load(w + i), product = g * u;
        prefetch_next_block(dw + i), prefetch_next_block(w + i);
        s += g, a += magnitude<C>(g), q += g * g;
        t += u, qw += u * u;
        p += product, pa += magnitude<C>(product);
    }
    double sum = sum_lanes<C>(s, zero), abs_sum = sum_lanes<C>(a, zero), square = sum_lanes<C>(q, zero);
    double weight_sum = sum_lanes<C>(t, zero), weight_square = sum_lanes<C>(qw, zero);
    GradientMoments r;
    r.gradient.count = double(n);
    r.product_sum = sum_lanes<C>(p, zero), r.product_abs_sum = sum_lanes<C>(pa, zero);
    for (int64_t i = whole; i < n; ++i) {
        const double g = double(dw[i]), u = double(w[i]), product = g * u;
        sum += g, abs_sum += std::fabs(g), square += g * g;
        weight_sum += u, weight_square += u * u;
        r.product_sum += product, r.product_abs_sum += std::fabs(product);
    }
    Moments& d = r.gradient;
    const bool no_gradient = abs_sum == 0 && r.product_abs_sum == 0;  // exact zeros need no care
    const bool fits = settle<C, false>(w, n, weight_sum, weight_square, r.weight_mean, r.weight_m2) &&
                      (no_gradient || (settle<C, false>(dw, n, sum, square, d.mean, d.m2) &&
                                       settle<C, true>(dw, n, abs_sum, square, d.abs_mean, d.abs_m2) &&
                                       trusted<C>(r.product_abs_sum)));
    return fits ? r : careful_gradient_moments(dw, w, n);
}

// One clone per instruction set; everything above is inlined into these.
ZEST_CLONES Moments reduce_block(const float* x, int64_t n) { return block_moments(x, n); }
ZEST_CLONES Moments reduce_block(const double* x, int64_t n) { return block_moments(x, n); }
ZEST_CLONES GradientMoments reduce_block(const float* dw, const float* w, int64_t n) {
    return block_gradient_moments(dw, w, n);
}
ZEST_CLONES GradientMoments reduce_block(const double* dw, const double* w, int64_t n) {
    return block_gradient_moments(dw, w, n);
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

template <class C>
Moments moments_as(const Layout<1>& layout, const Operand& x, int threads) {
    return reduce<Moments>(layout.numel, threads, [&](int64_t start, int64_t n) {
        C buffer[block_size];
        return reduce_block(read_block(layout, 0, x, start, n, buffer), n);
    });
}

template <class C>
GradientMoments gradient_moments_as(const Layout<2>& layout, const Operand& dw, const Operand& w, int threads) {
    return reduce<GradientMoments>(layout.numel, threads, [&](int64_t start, int64_t n) {
        C dw_buffer[block_size], w_buffer[block_size];
        const C* d = read_block(layout, 0, dw, start, n, dw_buffer);
        return reduce_block(d, read_block(layout, 1, w, start, n, w_buffer), n);
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
