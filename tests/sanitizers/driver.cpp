// The CPU kernels on random shapes, strides, offsets, dtypes and values: against plain loops in double, and with four
// threads against one, bit for bit. Buffers end where the last element ends, so that a sanitizer sees one read too far.
// run.sh builds this with the sanitizers, and without any for processors that lack AVX-512 or AVX2.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "cpu/kernels.h"

using namespace zest;

namespace {

std::mt19937_64 generator;
int64_t below(int64_t n) { return int64_t(generator() % uint64_t(n)); }
double normal() { return std::normal_distribution<double>()(generator); }

int failures = 0;
void check(bool right, const char* what, int seed) {
    if (right) return;
    std::printf("seed %d: %s\n", seed, what);
    ++failures;
}
bool close(double a, double b, double scale) {
    return (std::isnan(a) && std::isnan(b)) || std::fabs(a - b) <= 1e-5 * std::fabs(b) + 1e-5 * scale;
}
template <class T>
bool same_bits(const T& a, const T& b) {
    return std::memcmp(&a, &b, sizeof(T)) == 0;
}

uint16_t half_bits(float x, DType dtype) {  // truncated: any bits are a value to be read back
    uint32_t u;
    std::memcpy(&u, &x, 4);
    if (dtype == DType::bfloat16) return uint16_t(u >> 16);
    const int exponent = int(u >> 23 & 255) - 112;
    const uint32_t magnitude = exponent <= 0 ? 0 : exponent >= 31 ? 0x7bff : uint32_t(exponent) << 10 | (u >> 13 & 0x3ff);
    return uint16_t(u >> 16 & 0x8000) | uint16_t(magnitude);
}
double half_value(uint16_t h, DType dtype) {
    if (dtype == DType::bfloat16) {
        const uint32_t u = uint32_t(h) << 16;
        float x;
        std::memcpy(&x, &u, 4);
        return x;
    }
    const int exponent = h >> 10 & 31, mantissa = h & 1023;
    const double magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                             : exponent == 0 ? std::ldexp(mantissa, -24)
                                             : std::ldexp(1024 + mantissa, exponent - 25);
    return h & 0x8000 ? -magnitude : magnitude;
}

// Memory of exactly n elements that begins where the offset of a view would put it, and what it holds as double.
struct Memory {
    DType dtype;
    std::vector<char> bytes;
    Memory(int64_t n, DType dtype) : dtype(dtype), bytes(size_t(n * item_size(dtype))) {}
    void put(int64_t i, double x) {
        if (dtype == DType::float64) return void(std::memcpy(&bytes[i * 8], &x, 8));
        const float f = float(x);
        const uint16_t h = half_bits(f, dtype);
        dtype == DType::float32 ? std::memcpy(&bytes[i * 4], &f, 4) : std::memcpy(&bytes[i * 2], &h, 2);
    }
    double at(int64_t i) const {
        double x;
        float f;
        uint16_t h;
        switch (dtype) {
            case DType::float64: return std::memcpy(&x, &bytes[i * 8], 8), x;
            case DType::float32: return std::memcpy(&f, &bytes[i * 4], 4), f;
            default: return std::memcpy(&h, &bytes[i * 2], 2), half_value(h, dtype);
        }
    }
    Operand from(int64_t offset) const { return {bytes.data() + offset * item_size(dtype), dtype}; }
};

DType any_dtype() { return DType(below(4)); }

// Sizes of a tensor, and strides of a view that visits each of its elements once.
struct Shape {
    std::vector<int64_t> size;
    int64_t numel = 1;
};
Shape any_shape() {
    Shape s;
    const int64_t dims = below(5), limit = dims < 2 ? 70000 : dims == 2 ? 400 : 24;
    for (int64_t d = 0; d < dims; ++d) s.size.push_back(below(20) ? 1 + below(limit) : below(2)), s.numel *= s.size[d];
    return s;
}
struct View {
    std::vector<int64_t> stride;
    int64_t offset, extent;  // the extent ends with the last element
};
View any_view(const Shape& s) {
    std::vector<size_t> order(s.size.size());
    for (size_t d = 0; d < order.size(); ++d) order[d] = d;
    if (below(2)) std::shuffle(order.begin(), order.end(), generator);
    View v{std::vector<int64_t>(order.size()), below(3) ? 0 : below(17), 0};
    int64_t step = below(3) ? 1 : 1 + below(3), last = 0;
    for (size_t i = order.size(); i-- > 0;) {
        const size_t d = order[i];
        v.stride[d] = step;
        last += std::max<int64_t>(0, s.size[d] - 1) * step;
        step *= std::max<int64_t>(1, s.size[d]) + (below(3) ? 0 : below(4));
    }
    v.extent = v.offset + (s.numel ? last + 1 : 0);
    return v;
}
template <class Each>
void visit(const Shape& s, const View& v, const Each& each) {
    for (int64_t i = 0; i < s.numel; ++i) {
        int64_t rest = i, place = v.offset;
        for (size_t d = s.size.size(); d-- > 0;) place += rest % s.size[d] * v.stride[d], rest /= s.size[d];
        each(i, place);
    }
}

double special() {
    const double all[] = {NAN, INFINITY, -INFINITY, 0.0, -0.0, 1e-40, 3e38};
    return all[below(7)];
}
Memory any_memory(int64_t n, DType dtype, bool specials) {
    Memory m(n, dtype);
    for (int64_t i = 0; i < n; ++i) m.put(i, specials && below(200) == 0 ? special() : normal());
    return m;
}

void moments_case(int seed) {
    const Shape s = any_shape();
    const bool specials = below(3) == 0;
    const View v = any_view(s), u = any_view(s);
    const Memory x = any_memory(v.extent, any_dtype(), specials), w = any_memory(u.extent, any_dtype(), specials);
    Layout<1> one;
    Layout<2> two;
    for (size_t d = 0; d < s.size.size(); ++d) one.add(s.size[d], {v.stride[d]}), two.add(s.size[d], {v.stride[d], u.stride[d]});
    one.collapse(), two.collapse();
    std::vector<double> a(s.numel), b(s.numel);
    visit(s, v, [&](int64_t i, int64_t place) { a[i] = x.at(place); });
    visit(s, u, [&](int64_t i, int64_t place) { b[i] = w.at(place); });

    const Moments m = cpu::moments(one, x.from(v.offset), 1);
    const GradientMoments g = cpu::gradient_moments(two, x.from(v.offset), w.from(u.offset), 1);
    check(same_bits(m, cpu::moments(one, x.from(v.offset), 4)), "moments: four threads give other bits", seed);
    check(same_bits(g, cpu::gradient_moments(two, x.from(v.offset), w.from(u.offset), 4)),
          "gradient_moments: four threads give other bits", seed);

    double nonfinite = 0, other = 0, sum = 0, m2 = 0, product = 0, magnitude = 0;
    for (double one : a) nonfinite += !std::isfinite(one), sum += one;
    for (double one : b) other += !std::isfinite(one);
    check(m.count == double(s.numel) && m.nonfinite == nonfinite, "moments: count or nonfinite", seed);
    check(g.gradient.nonfinite == nonfinite && g.weight_nonfinite == other, "gradient_moments: nonfinite", seed);
    if (nonfinite || other || specials || s.numel == 0) return;
    const double mean = sum / double(s.numel);
    for (int64_t i = 0; i < s.numel; ++i)
        m2 += (a[i] - mean) * (a[i] - mean), product += a[i] * b[i], magnitude += std::fabs(a[i] * b[i]);
    check(close(m.mean, mean, std::sqrt(m2 / double(s.numel))) && close(m.m2, m2, 1e-9), "moments: values", seed);
    check(close(g.product_sum, product, magnitude) && close(g.product_abs_sum, magnitude, 0), "gradient_moments: sums", seed);
}

void channel_products_case(int seed) {
    const int64_t n = below(5), positions = below(60), channels = 1 + below(300);
    const Shape s{{n, positions, channels}, n * positions * channels};
    const View v = any_view(s), u = any_view(s);
    const Memory y = any_memory(v.extent, any_dtype(), false), g = any_memory(u.extent, any_dtype(), false);
    const cpu::Strides3 ys{v.stride[0], v.stride[1], v.stride[2]}, gs{u.stride[0], u.stride[1], u.stride[2]};
    std::vector<double> expected(n * channels), scale(n * channels), found[2];
    std::vector<double> a(s.numel);
    visit(s, v, [&](int64_t i, int64_t place) { a[i] = y.at(place); });
    visit(s, u, [&](int64_t i, int64_t place) {
        const int64_t k = i / (positions * channels) * channels + i % channels;
        expected[k] += a[i] * g.at(place), scale[k] += std::fabs(a[i] * g.at(place));
    });
    double squares[2];
    for (int t = 0; t < 2; ++t) {
        found[t].assign(n * channels, -1);
        const auto run = [&](double* out) {
            return cpu::channel_products(n, positions, channels, y.from(v.offset), ys, g.from(u.offset), gs, out, t ? 4 : 1);
        };
        run(found[t].data());
        squares[t] = run(nullptr);
    }
    check(found[0] == found[1] && squares[0] == squares[1], "channel_products: four threads give other bits", seed);
    for (size_t k = 0; k < expected.size(); ++k)
        check(close(found[0][k], expected[k], scale[k]), "channel_products: values", seed);
}

void gated_case(int seed) {
    const DType dtype = below(2) ? DType::float32 : DType::bfloat16;
    const int64_t rows = 1 + below(60), columns = 1 + below(3000), wide = columns + below(3) * below(9), size = item_size(dtype);
    const int64_t extent = (rows - 1) * wide + columns;
    Memory g = any_memory(extent, dtype, false), gate = any_memory(extent, dtype, false), up = any_memory(extent, dtype, false);
    std::vector<Memory> out(4, Memory(rows * columns, dtype));
    for (int t = 0; t < 2; ++t)
        cpu::silu_gated_backward({rows, columns, {g.bytes.data(), wide}, {gate.bytes.data(), wide}, {up.bytes.data(), wide},
                                  {out[2 * t].bytes.data(), columns}, {out[2 * t + 1].bytes.data(), columns}}, dtype, t ? 4 : 1);
    check(out[0].bytes == out[2].bytes && out[1].bytes == out[3].bytes, "silu_gated_backward: four threads give other bits", seed);
    const double rounding = size == 2 ? 1.0 / 256 : 0;  // of what is written; the rest is float32's, of terms that cancel
    for (int64_t i = 0; i < rows * columns; ++i) {
        const int64_t place = i / columns * wide + i % columns;
        const double x = gate.at(place), s = 1 / (1 + std::exp(-x)), d = g.at(place);
        const double for_up = d * x * s, for_gate = d * up.at(place) * s * (1 + x * (1 - s));
        const double terms = std::fabs(d * up.at(place)) * s * (1 + std::fabs(x) * (1 - s));
        check(std::fabs(out[1].at(i) - for_up) <= (rounding + 1e-6) * std::fabs(for_up) + 1e-37 &&
              std::fabs(out[0].at(i) - for_gate) <= rounding * std::fabs(for_gate) + 1e-6 * terms + 1e-37,
              "silu_gated_backward: values", seed);
    }
}

void bits_case(int seed) {
    const DType dtypes[] = {DType::float32, DType::float64, DType::bfloat16}, dtype = dtypes[below(3)];
    const int64_t n = below(3) ? below(5000) : below(200000), offset = below(9);
    const Memory x = any_memory(n + offset, dtype, true);
    const double low = below(5) ? -0.5 : NAN, high = below(5) ? 0.5 : NAN;
    std::vector<uint8_t> bits((n + 7) / 8), again(bits);
    cpu::interval_bits(x.from(offset), n, low, high, bits.data(), 1);
    cpu::interval_bits(x.from(offset), n, low, high, again.data(), 4);
    check(bits == again, "interval_bits: four threads give other bits", seed);
    std::vector<char> out[2] = {std::vector<char>(n * item_size(dtype), 1), std::vector<char>(n * item_size(dtype), 2)};
    for (int t = 0; t < 2; ++t)
        cpu::masked(x.from(offset).data, bits.data(), n, int(item_size(dtype)), out[t].data(), t ? 4 : 1);
    check(out[0] == out[1], "masked: four threads give other bits", seed);
    for (int64_t i = 0; i < n; ++i) {
        const double value = x.at(i + offset);
        const bool inside = !(value <= low) && !(value >= high), bit = bits[i / 8] >> i % 8 & 1;
        check(bit == inside, "interval_bits: values", seed);
        const int64_t size = item_size(dtype);
        bool zero = true;
        for (int64_t b = 0; b < size; ++b) zero = zero && out[0][i * size + b] == 0;
        check(inside ? std::memcmp(&out[0][i * size], x.from(offset + i).data, size) == 0 : zero, "masked: values", seed);
    }
}

}  // namespace

int main(int count, char** arguments) {
    const int cases = count > 1 ? std::atoi(arguments[1]) : 1000;
    for (int seed = 0; seed < cases; ++seed) {
        generator.seed(uint64_t(seed));
        void (*const kinds[])(int) = {moments_case, moments_case, channel_products_case, gated_case, bits_case};
        kinds[seed % 5](seed);
    }
#ifdef __x86_64__
    const char* widest = __builtin_cpu_supports("avx512f") ? "AVX-512" : __builtin_cpu_supports("avx2") ? "AVX2" : "baseline";
#else
    const char* widest = "not x86-64";
#endif
    std::printf("%d cases, %d failures, processor: %s\n", cases, failures, widest);
    return failures != 0;
}
