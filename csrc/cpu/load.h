// Reading any supported dtype and any strides as dense blocks of float (or double for float64).
#pragma once

#include <cstring>

#include "layout.h"

// One binary, three instruction sets, chosen by the loader at start-up: before ThreadSanitizer is, which gets one.
#if defined(ZEST_ONE_VERSION)
#define ZEST_CLONES
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ZEST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ZEST_CLONES
#endif
#define ZEST_INLINE inline __attribute__((always_inline))

namespace zest::cpu {

ZEST_INLINE float widen(float x) { return x; }
ZEST_INLINE double widen(double x) { return x; }

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

ZEST_INLINE float from_bits(uint32_t u) {
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}

ZEST_INLINE float widen(bfloat16 x) { return from_bits(uint32_t(x.bits) << 16); }

// Arithmetic on the bits, so that it vectorises on every instruction set and keeps subnormals under flush-to-zero.
ZEST_INLINE float widen(float16 x) {
    const uint32_t magnitude = x.bits & 0x7fffu, sign = uint32_t(x.bits & 0x8000u) << 16;
    const float subnormal = float(int32_t(magnitude)) * 0x1p-24f;
    uint32_t subnormal_bits;
    std::memcpy(&subnormal_bits, &subnormal, 4);
    // An exponent of 31 (infinity, NaN) becomes 255: 112 more than the rebias of 112 gives.
    const uint32_t normal_bits = (magnitude << 13) + ((magnitude >= 0x7c00u ? 224u : 112u) << 23);
    return from_bits((magnitude < 0x400u ? subnormal_bits : normal_bits) | sign);
}

// out[i] = x[i * stride] for i < n.
template <class T, class C>
ZEST_INLINE void copy_run(const T* x, int64_t stride, int64_t n, C* out) {
    if (stride == 1)
        for (int64_t i = 0; i < n; ++i) out[i] = widen(x[i]);
    else
        for (int64_t i = 0; i < n; ++i) out[i] = widen(x[i * stride]);
}

// Dense float16 by explicit vectors: gcc 12 leaves the loop above scalar (20 times slower).
ZEST_INLINE void copy_dense(const float16* x, int64_t n, float* out) {
    typedef uint16_t V16 __attribute__((vector_size(32)));
    typedef uint32_t V32 __attribute__((vector_size(64)));
    typedef float VF __attribute__((vector_size(64)));
    const int64_t whole = n - n % 16;
    for (int64_t i = 0; i < whole; i += 16) {
        V16 raw;
        std::memcpy(&raw, x + i, sizeof(raw));
        const V32 wide = __builtin_convertvector(raw, V32), magnitude = wide & 0x7fffu;
        const V32 subnormal = (V32)(__builtin_convertvector(magnitude, VF) * 0x1p-24f);
        const V32 normal = (magnitude << 13) + (magnitude >= 0x7c00u ? V32{} + (224u << 23) : V32{} + (112u << 23));
        const V32 bits = (magnitude < 0x400u ? subnormal : normal) | ((wide & 0x8000u) << 16);
        std::memcpy(out + i, &bits, sizeof(bits));
    }
    copy_run(x + whole, 1, n - whole, out + whole);
}

void copy_run(const Operand& x, int64_t offset, int64_t stride, int64_t n, float* out);
void copy_run(const Operand& x, int64_t offset, int64_t stride, int64_t n, double* out);

// The elements [start, start + n) of operand o in the order of the layout; in place where they are dense already.
template <int N, class C>
const C* read_block(const Layout<N>& layout, int o, const Operand& x, int64_t start, int64_t n, C* buffer) {
    const bool native = x.dtype == (sizeof(C) == 8 ? DType::float64 : DType::float32);
    if (layout.ndim <= 1) {
        const int64_t stride = layout.ndim == 0 ? 1 : layout.stride[o][0];
        if (native && stride == 1) return reinterpret_cast<const C*>(x.data) + start;
        copy_run(x, start * stride, stride, n, buffer);
        return buffer;
    }
    int64_t index[Layout<N>::max_dims], offset = 0, rest = start;
    for (int d = layout.ndim - 1; d >= 0; --d) {
        index[d] = rest % layout.size[d];
        rest /= layout.size[d];
        offset += index[d] * layout.stride[o][d];
    }
    const int inner = layout.ndim - 1;
    for (int64_t done = 0; done < n;) {
        const int64_t run = std::min(n - done, layout.size[inner] - index[inner]);
        copy_run(x, offset, layout.stride[o][inner], run, buffer + done);
        done += run;
        index[inner] += run;
        offset += run * layout.stride[o][inner];
        for (int d = inner; d > 0 && index[d] == layout.size[d]; --d) {  // carry, as an odometer does
            offset += layout.stride[o][d - 1] - index[d] * layout.stride[o][d];
            index[d] = 0;
            ++index[d - 1];
        }
    }
    return buffer;
}

}  // namespace zest::cpu
