// Moments of a tensor, and of a gradient with its weight, in one pass over memory.
//
// Blocks of 2,048 elements stay in the first-level cache and are read there twice: plain sums give a centre near the
// mean, then deviations from that centre give mean and squares without cancellation, whatever the offset or outliers.
// Lanes are float32 (float64 for float64 input); a block's result is float64 and blocks merge by Chan's formula. Bytes
// moved: those of the inputs, once (two inputs: 8 B per float32 pair). At most 128 additions per lane keep float32 sums
// within 1e-6; a block whose values are too large or too small for float32 squares is done again in float64. Blocks belong to at most 256 chunks whose borders depend on the length
// only, and chunks merge in order, so the thread count never shows in the result.
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

// From sums of deviations d = x - c about a centre c near the mean: the mean itself and the squares about it.
ZEST_INLINE void recentre(double n, double c, double sum_d, double sum_dd, double& mean, double& m2) {
    mean = c + sum_d / n;
    m2 = std::fmax(sum_dd - sum_d * sum_d / n, 0.0);
}

template <class C>
ZEST_INLINE Moments block_moments(const C* x, int64_t n) {
    using V = typename Lanes<C>::vector;
    constexpr int64_t step = 2 * Lanes<C>::width;
    const int64_t whole = n - n % step;

    V s0 = {}, s1 = {}, a0 = {}, a1 = {};
    for (int64_t i = 0; i < whole; i += step) {
        const V u = load(x + i), v = load(x + i + step / 2);
        s0 += u, s1 += v;
        a0 += magnitude<C>(u), a1 += magnitude<C>(v);
    }
    double sum = sum_lanes<C>(s0, s1), abs_sum = sum_lanes<C>(a0, a1);
    for (int64_t i = whole; i < n; ++i) sum += double(x[i]), abs_sum += std::fabs(double(x[i]));

    Moments m;
    m.count = double(n);
    if (abs_sum == 0) return m;  // all zero

    const C c = C(sum / m.count), ca = C(abs_sum / m.count);
    V d0 = {}, d1 = {}, q0 = {}, q1 = {}, e0 = {}, e1 = {}, p0 = {}, p1 = {};
    for (int64_t i = 0; i < whole; i += step) {
        const V u = load(x + i), v = load(x + i + step / 2);
        const V du = u - c, dv = v - c, eu = magnitude<C>(u) - ca, ev = magnitude<C>(v) - ca;
        d0 += du, d1 += dv, q0 += du * du, q1 += dv * dv;
        e0 += eu, e1 += ev, p0 += eu * eu, p1 += ev * ev;
    }
    double d = sum_lanes<C>(d0, d1), square = sum_lanes<C>(q0, q1);
    double e = sum_lanes<C>(e0, e1), abs_square = sum_lanes<C>(p0, p1);
    for (int64_t i = whole; i < n; ++i) {
        const double du = double(x[i]) - c, eu = std::fabs(double(x[i])) - ca;
        d += du, square += du * du, e += eu, abs_square += eu * eu;
    }
    if (!(trusted<C>(square) && trusted<C>(abs_square))) return careful_moments(x, n);
    recentre(m.count, double(c), d, square, m.mean, m.m2);
    recentre(m.count, double(ca), e, abs_square, m.abs_mean, m.abs_m2);
    return m;
}

template <class C>
ZEST_INLINE GradientMoments block_gradient_moments(const C* dw, const C* w, int64_t n) {
    using V = typename Lanes<C>::vector;
    constexpr int64_t step = Lanes<C>::width;
    const int64_t whole = n - n % step;

    V s = {}, a = {}, t = {}, p = {}, pa = {};
    const V zero = {};
    for (int64_t i = 0; i < whole; i += step) {
        const V g = load(dw + i), u = load(w + i), product = g * u;
        s += g, a += magnitude<C>(g), t += u;
        p += product, pa += magnitude<C>(product);
    }
    double sum = sum_lanes<C>(s, zero), abs_sum = sum_lanes<C>(a, zero), weight_sum = sum_lanes<C>(t, zero);
    GradientMoments r;
    r.gradient.count = double(n);
    r.product_sum = sum_lanes<C>(p, zero), r.product_abs_sum = sum_lanes<C>(pa, zero);
    for (int64_t i = whole; i < n; ++i) {
        const double product = double(dw[i]) * double(w[i]);
        sum += double(dw[i]), abs_sum += std::fabs(double(dw[i])), weight_sum += double(w[i]);
        r.product_sum += product, r.product_abs_sum += std::fabs(product);
    }

    const double count = double(n);
    const C c = C(sum / count), ca = C(abs_sum / count), cw = C(weight_sum / count);
    V d = {}, q = {}, e = {}, qa = {}, f = {}, qw = {};
    for (int64_t i = 0; i < whole; i += step) {
        const V g = load(dw + i), du = g - c, eu = magnitude<C>(g) - ca, fu = load(w + i) - cw;
        d += du, q += du * du, e += eu, qa += eu * eu, f += fu, qw += fu * fu;
    }
    double sum_d = sum_lanes<C>(d, zero), square = sum_lanes<C>(q, zero);
    double sum_e = sum_lanes<C>(e, zero), abs_square = sum_lanes<C>(qa, zero);
    double sum_f = sum_lanes<C>(f, zero), weight_square = sum_lanes<C>(qw, zero);
    for (int64_t i = whole; i < n; ++i) {
        const double du = double(dw[i]) - c, eu = std::fabs(double(dw[i])) - ca, fu = double(w[i]) - cw;
        sum_d += du, square += du * du, sum_e += eu, abs_square += eu * eu, sum_f += fu, weight_square += fu * fu;
    }
    const bool no_gradient = abs_sum == 0 && r.product_abs_sum == 0;  // exact zeros need no care
    if (!(trusted<C>(weight_square) && (no_gradient || (trusted<C>(square) && trusted<C>(abs_square) &&
                                                        trusted<C>(r.product_abs_sum)))))
        return careful_gradient_moments(dw, w, n);
    recentre(count, double(c), sum_d, square, r.gradient.mean, r.gradient.m2);
    recentre(count, double(ca), sum_e, abs_square, r.gradient.abs_mean, r.gradient.abs_m2);
    recentre(count, double(cw), sum_f, weight_square, r.weight_mean, r.weight_m2);
    return r;
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
