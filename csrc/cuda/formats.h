// Reading float32, float64, bfloat16 and float16 as float or double, 128 bits at a time where that is possible.
//
// A thread owns packets of 8 elements, whatever the dtype: 1 vector of 128 bits for 16-bit entries, 2 for float32, 4 for
// float64. So a gradient and a weight of different dtypes meet in the same thread, a bfloat16 tensor gives the same bits
// as its float32 copy, and one body of arithmetic serves every dtype.
#pragma once

#include "cuda/compiler.h"
#include "layout.h"

namespace zest::cuda {

constexpr int threads = 256;
constexpr int packet = 8;
constexpr int stride = threads * packet;  // from one packet of a thread to its next

// Up to chunk_size elements of one tensor.
struct Span {
    const char* data;
    DType dtype;
    int length;
};

struct Float32 {
    using bits = uint32_t;
    __device__ static float widen(bits b) { return __uint_as_float(b); }
};
struct Float64 {
    using bits = uint64_t;
    __device__ static double widen(bits b) { return __longlong_as_double(static_cast<long long>(b)); }
};
struct BFloat16 {
    using bits = uint16_t;
    __device__ static float widen(bits b) { return __uint_as_float(uint32_t(b) << 16); }
};
struct Float16 {
    using bits = uint16_t;
    __device__ static float widen(bits b) { return half_to_float(b); }
};

// Entry j of a vector, as bits.
template <class Bits>
__device__ Bits pick(const uint4& v, int j) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
    if constexpr (sizeof(Bits) == 2) return Bits(words[j / 2] >> (16 * (j % 2)));
    if constexpr (sizeof(Bits) == 4) return words[j];
    if constexpr (sizeof(Bits) == 8) return words[2 * j] | uint64_t(words[2 * j + 1]) << 32;
}

template <class Format, class C, int N>
__device__ void load_as(const Span& span, int first, C (&x)[N]) {
    using Bits = typename Format::bits;
    constexpr int per_vector = 16 / sizeof(Bits), vectors = packet / per_vector;
    const Bits* data = reinterpret_cast<const Bits*>(span.data) + first;
    const bool aligned = reinterpret_cast<uintptr_t>(span.data) % 16 == 0;
    if (aligned && first + (N / packet - 1) * stride + packet <= span.length) {
        uint4 raw[N / per_vector];  // all loads first, so that they are in flight together
#pragma unroll
        for (int k = 0; k < N / per_vector; ++k)
            raw[k] = __ldg(reinterpret_cast<const uint4*>(data + k / vectors * stride + k % vectors * per_vector));
#pragma unroll
        for (int i = 0; i < N; ++i) x[i] = C(Format::widen(pick<Bits>(raw[i / per_vector], i % per_vector)));
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const int offset = i / packet * stride + i % packet;
            x[i] = first + offset < span.length ? C(Format::widen(__ldg(data + offset))) : C(0);
        }
    }
}

// x = the N / packet packets of this thread from `first` on, zeros past the end of the span.
template <class C, int N>
__device__ void load(const Span& span, int first, C (&x)[N]) {
    switch (span.dtype) {
        case DType::float64:
            if constexpr (sizeof(C) == 8) return load_as<Float64>(span, first, x);
            return;  // float is never asked for float64
        case DType::bfloat16: return load_as<BFloat16>(span, first, x);
        case DType::float16: return load_as<Float16>(span, first, x);
        case DType::float32: return load_as<Float32>(span, first, x);
    }
}

template <class Format>
__device__ double load_one_as(const Span& span, int i) {
    return Format::widen(__ldg(reinterpret_cast<const typename Format::bits*>(span.data) + i));
}

__device__ inline double load_one(const Span& span, int i) {
    switch (span.dtype) {
        case DType::float64: return load_one_as<Float64>(span, i);
        case DType::bfloat16: return load_one_as<BFloat16>(span, i);
        case DType::float16: return load_one_as<Float16>(span, i);
        default: return load_one_as<Float32>(span, i);
    }
}

}  // namespace zest::cuda
