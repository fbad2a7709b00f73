// Each kernel of csrc/cpu on a fixed input, once inside of `measured`, where callgrind counts; instructions.py builds and
// runs this, and reads what it prints: the instruction set that the loader chose, then elements and name of each case.
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "cpu/kernels.h"

using namespace zest;

namespace {

constexpr int64_t elements = 65536;  // 32 blocks of 2,048: what a block, a chunk and a call cost is in it, as in use

const char* name_of(DType dtype) {
    const char* names[] = {"float32", "float64", "bfloat16", "float16"};
    return names[int(dtype)];
}

// Truncated; below the smallest normal number, zero.
uint16_t half_of(uint32_t bits) {
    const int exponent = int(bits >> 23 & 255) - 112;
    return uint16_t((bits >> 16 & 0x8000) | (exponent <= 0 ? 0 : uint32_t(exponent) << 10 | (bits >> 13 & 0x3ff)));
}

// Values without a random generator: normal enough (a sum of three uniform ones), the same on every machine.
struct Memory {
    DType dtype;
    std::vector<char> bytes;

    Memory(int64_t n, DType dtype, uint32_t seed, double offset = 0) : dtype(dtype), bytes(size_t(n * item_size(dtype))) {
        uint32_t state = seed;
        const auto uniform = [&] { return double((state = state * 1664525u + 1013904223u) >> 8) * 0x1p-24 - 0.5; };
        for (int64_t i = 0; i < n; ++i) put(i, offset + 2 * (uniform() + uniform() + uniform()));
    }
    void put(int64_t i, double x) {
        const float f = float(x);
        uint32_t bits;
        std::memcpy(&bits, &f, 4);
        uint16_t half = uint16_t(bits >> 16);
        if (dtype == DType::float16) half = half_of(bits);
        if (dtype == DType::float64) std::memcpy(&bytes[size_t(i) * 8], &x, 8);
        else if (dtype == DType::float32) std::memcpy(&bytes[size_t(i) * 4], &f, 4);
        else std::memcpy(&bytes[size_t(i) * 2], &half, 2);
    }
    Operand operand() const { return {bytes.data(), dtype}; }
};

struct Case {
    std::string name;
    int64_t elements;  // of one input: a count divided by them is the instructions of one element
    std::function<void()> run;
};

// n elements, `stride` apart: 1 is dense.
Case moments_case(const std::string& name, DType dtype, int64_t stride = 1, double offset = 0) {
    const Memory x(elements * stride, dtype, 1, offset);
    return {"moments, " + name, elements, [=] {
        Layout<1> layout;
        layout.add(elements, {stride});
        cpu::moments(layout, x.operand(), 1);
    }};
}

Case gradient_moments_case(const std::string& name, DType dtype, DType weight_dtype) {
    const Memory dw(elements, dtype, 1), w(elements, weight_dtype, 2);
    return {"gradient_moments, " + name, elements, [=] {
        Layout<2> layout;
        layout.add(elements, {1, 1});
        cpu::gradient_moments(layout, dw.operand(), w.operand(), 1);
    }};
}

// Tokens: [samples, positions, channels] as it lies. Pixels: [samples, channels, positions] in memory.
Case channel_products_case(bool pixels, int64_t samples, int64_t positions, int64_t channels, DType dtype) {
    const int64_t n = samples * positions * channels;
    const Memory y(n, dtype, 1), g(n, dtype, 2);
    const int64_t sample = positions * channels;
    const cpu::Strides3 strides = pixels ? cpu::Strides3{sample, 1, positions} : cpu::Strides3{sample, channels, 1};
    const std::string layout = (pixels ? "pixels " : "tokens ") + std::to_string(samples) + " x " +
                               std::to_string(positions) + " x " + std::to_string(channels);
    return {"channel_products, " + layout + ", " + name_of(dtype), n, [=, out = std::vector<double>(size_t(samples * channels))]() mutable {
        cpu::channel_products(samples, positions, channels, y.operand(), strides, g.operand(), strides, out.data(), 1);
    }};
}

Case gated_case(DType dtype) {
    const int64_t rows = 64, columns = elements / rows;
    const Memory g(elements, dtype, 1);
    std::vector<Memory> operands = {g, {elements, dtype, 2}, {elements, dtype, 3}, g, g};  // the last two are written
    return {std::string("silu_gated_backward, ") + name_of(dtype), elements, [=]() mutable {
        const auto rows_of = [&](int i) { return cpu::Rows{operands[i].bytes.data(), columns}; };
        cpu::silu_gated_backward({rows, columns, rows_of(0), rows_of(1), rows_of(2), rows_of(3), rows_of(4)}, dtype, 1);
    }};
}

Case interval_bits_case(DType dtype) {
    const Memory x(elements, dtype, 1);
    return {std::string("interval_bits, ") + name_of(dtype), elements, [=, bits = std::vector<uint8_t>(elements / 8)]() mutable {
        cpu::interval_bits(x.operand(), elements, 0, 0.5, bits.data(), 1);
    }};
}

Case masked_case(DType dtype) {
    const Memory g(elements, dtype, 1);
    const std::vector<uint8_t> bits(elements / 8, 0xa5);
    return {std::string("masked, ") + name_of(dtype), elements, [=, out = std::vector<char>(g.bytes.size())]() mutable {
        cpu::masked(g.bytes.data(), bits.data(), elements, int(item_size(g.dtype)), out.data(), 1);
    }};
}

std::vector<Case> all_cases() {
    std::vector<Case> cases;
    for (DType dtype : {DType::float32, DType::bfloat16, DType::float16, DType::float64})
        cases.push_back(moments_case(name_of(dtype), dtype));
    cases.push_back(moments_case("bfloat16, every other element", DType::bfloat16, 2));
    cases.push_back(moments_case("float32, mean 100 times its deviation", DType::float32, 1, 100));
    for (DType dtype : {DType::float32, DType::bfloat16, DType::float64})
        cases.push_back(gradient_moments_case(name_of(dtype), dtype, dtype));
    cases.push_back(gradient_moments_case("bfloat16 of a float32 weight", DType::bfloat16, DType::float32));
    for (DType dtype : {DType::float32, DType::bfloat16}) {
        cases.push_back(channel_products_case(false, 8, 10, 768, dtype));
        cases.push_back(channel_products_case(true, 2, 196, 160, dtype));
        cases.push_back(channel_products_case(true, 1, 3136, 20, dtype));
        cases.push_back(channel_products_case(true, 8, 49, 160, dtype));
    }
    for (DType dtype : {DType::float32, DType::bfloat16}) cases.push_back(gated_case(dtype));
    for (DType dtype : {DType::float32, DType::bfloat16, DType::float64}) cases.push_back(interval_bits_case(dtype));
    for (DType dtype : {DType::bfloat16, DType::float32, DType::float64}) cases.push_back(masked_case(dtype));
    return cases;
}

}  // namespace

// callgrind counts inside of this and writes when it returns: neither inlined nor its name mangled.
extern "C" __attribute__((noinline)) void measured(const std::function<void()>& run) {
    run();
    asm volatile("" ::: "memory");  // a tail call would leave it before the kernel has begun
}

int main() {
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    std::printf("%s\n", __builtin_cpu_supports("avx512f") ? "AVX-512" : v3 ? "AVX2" : "baseline");
    for (const Case& c : all_cases()) {
        c.run();  // the runtime of OpenMP starts in the first call
        measured(c.run);
        std::printf("%lld %s\n", static_cast<long long>(c.elements), c.name.c_str());
    }
}
