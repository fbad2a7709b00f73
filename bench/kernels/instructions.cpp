// One call of one CPU kernel on fixed data, by its name: for valgrind, which counts what `counted` executes.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "cpu/kernels.h"

using namespace zest;

namespace {

constexpr int64_t samples = 4, positions = 3136, channels = 16;         // of a convolution
constexpr int64_t tokens = 64, width = 784;                             // of a Linear: as many elements
constexpr int64_t elements = samples * positions * channels;            // 200,704

// Values about zero from a linear congruence: the same everywhere.
std::vector<float> values(uint32_t seed) {
    std::vector<float> x(elements);
    for (float& v : x) {
        float sum = 0;
        for (int i = 0; i < 4; ++i) sum += float((seed = seed * 1664525u + 1013904223u) >> 8) * 0x1p-24f - 0.5f;
        v = sum;
    }
    return x;
}

std::vector<char> stored(const std::vector<float>& x, DType dtype) {
    std::vector<char> bytes(x.size() * size_t(item_size(dtype)));
    for (size_t i = 0; i < x.size(); ++i) {
        const double wide = x[i];
        uint32_t bits;
        std::memcpy(&bits, &x[i], 4);
        const uint16_t half = dtype == DType::bfloat16 ? uint16_t(bits >> 16)
                                                       : uint16_t((bits >> 16 & 0x8000) | (((bits >> 13) - 0x1c000) & 0x7fff));
        if (dtype == DType::float64) std::memcpy(&bytes[i * 8], &wide, 8);
        else if (dtype == DType::float32) std::memcpy(&bytes[i * 4], &x[i], 4);
        else std::memcpy(&bytes[i * 2], &half, 2);
    }
    return bytes;
}

Layout<1> dense() {
    Layout<1> layout;
    layout.add(elements, {1});
    return layout;
}

}  // namespace

extern "C" __attribute__((noinline)) double counted(const std::string& kernel, const Operand& x, const Operand& y, char* out) {
    if (kernel == "moments") return cpu::moments(dense(), x, 1).m2;
    if (kernel == "moments, transposed") {
        Layout<1> layout;
        layout.add(width, {2}), layout.add(elements / width / 2, {2 * width});
        return cpu::moments(layout, x, 1).m2;
    }
    if (kernel == "gradient_moments") {
        Layout<2> layout;
        layout.add(elements, {1, 1});
        return cpu::gradient_moments(layout, x, y, 1).gradient.m2;
    }
    const auto products = reinterpret_cast<double*>(out);
    if (kernel == "channel_products (pixels)") {
        const cpu::Strides3 strides = {positions * channels, 1, positions};
        return cpu::channel_products(samples, positions, channels, x, strides, y, strides, products, 1);
    }
    if (kernel == "channel_products (tokens)") {
        const cpu::Strides3 strides = {tokens * width, width, 1};
        return cpu::channel_products(elements / tokens / width, tokens, width, x, strides, y, strides, products, 1);
    }
    const cpu::Rows g = {const_cast<char*>(x.data), width}, gate = {const_cast<char*>(y.data), width};
    if (kernel == "silu_gated_backward")
        return cpu::silu_gated_backward({elements / width, width, g, gate, g, {out, width}, {out, width}}, x.dtype, 1), 0;
    if (kernel == "interval_bits") return cpu::interval_bits(x, elements, -0.5, 0.5, reinterpret_cast<uint8_t*>(out), 1), 0;
    std::printf("no such kernel: %s\n", kernel.c_str());
    std::exit(2);
}

int main(int count, char** arguments) {
    const std::map<std::string, DType> dtypes = {{"float32", DType::float32},
                                                 {"float64", DType::float64},
                                                 {"bfloat16", DType::bfloat16},
                                                 {"float16", DType::float16}};
    if (count != 3) return 2;
    const DType dtype = dtypes.at(arguments[2]);
    const std::vector<char> x = stored(values(1), dtype), y = stored(values(2), dtype);
    std::vector<char> out(size_t(elements) * 8);
    std::printf("%.17g\n", counted(arguments[1], {x.data(), dtype}, {y.data(), dtype}, out.data()));
}
