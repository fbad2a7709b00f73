// 64 bytes of elements in as many vectors as an instruction set needs for them, and a function for each of these sets.
//
// The lanes are the same for every width, so results are, too, where multiply-adds fuse (AVX2, AVX-512). One vector of
// 64 bytes for all would be lowered piece by piece where there is no AVX-512, through memory (gcc 12).
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/load.h"

// ZEST_VERSIONS(head of a function, expression): `bytes` is the width of a vector. The loader chooses at start-up.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(ZEST_ONE_VERSION)
#define ZEST_VERSION(set, width, head, ...)                                                \
    __attribute__((target(set))) head {                                                    \
        constexpr int bytes = width;                                                       \
        __VA_ARGS__;                                                                       \
    }
#define ZEST_VERSIONS(head, ...)                           \
    ZEST_VERSION("default", 16, head, __VA_ARGS__)         \
    ZEST_VERSION("arch=x86-64-v3", 32, head, __VA_ARGS__)  \
    ZEST_VERSION("arch=x86-64-v4", 64, head, __VA_ARGS__)
#else
#define ZEST_VERSIONS(head, ...)    \
    head {                          \
        constexpr int bytes = 16;   \
        __VA_ARGS__;                \
    }
#endif

namespace zest::cpu {

template <class C, int bytes>
struct Vector {
    typedef C Part __attribute__((vector_size(bytes)));
    static constexpr int parts = 64 / bytes, lanes = 64 / sizeof(C), lanes_of_part = bytes / sizeof(C);
    Part part[parts];
};

template <class C, int bytes>
ZEST_INLINE Vector<C, bytes> zero() {
    Vector<C, bytes> v;
    for (int i = 0; i < v.parts; ++i) v.part[i] = typename Vector<C, bytes>::Part{};
    return v;
}

// Memory of any alignment.
template <class C, int bytes>
ZEST_INLINE void load(Vector<C, bytes>& v, const C* p) {
    for (int i = 0; i < v.parts; ++i) std::memcpy(&v.part[i], p + i * v.lanes_of_part, bytes);
}
template <class C, int bytes>
ZEST_INLINE void store(const Vector<C, bytes>& v, C* p) {
    for (int i = 0; i < v.parts; ++i) std::memcpy(p + i * v.lanes_of_part, &v.part[i], bytes);
}

template <int bytes>
ZEST_INLINE void load(Vector<float, bytes>& v, const bfloat16* p) {
    float wide[Vector<float, bytes>::lanes];
    for (int i = 0; i < v.lanes; ++i) wide[i] = widen(p[i]);
    load(v, wide);
}

// 2 * lanes elements. Of bfloat16 those at even and at odd places: a shift and a mask of 64 bytes, no shuffle.
template <class C, int bytes>
ZEST_INLINE void load_pair(Vector<C, bytes>& first, Vector<C, bytes>& second, const C* p) {
    load(first, p), load(second, p + first.lanes);
}
template <int bytes>
ZEST_INLINE void load_pair(Vector<float, bytes>& even, Vector<float, bytes>& odd, const bfloat16* p) {
    using Part = typename Vector<float, bytes>::Part;
    Vector<uint32_t, bytes> both;
    for (int i = 0; i < both.parts; ++i) {
        std::memcpy(&both.part[i], p + 2 * i * both.lanes_of_part, bytes);
        even.part[i] = (Part)(both.part[i] << 16), odd.part[i] = (Part)(both.part[i] & 0xffff0000u);
    }
}

template <class C, int bytes>
ZEST_INLINE void add(Vector<C, bytes>& sum, const Vector<C, bytes>& a) {
    for (int i = 0; i < sum.parts; ++i) sum.part[i] += a.part[i];
}
template <class C, int bytes>
ZEST_INLINE void multiply_add(Vector<C, bytes>& sum, const Vector<C, bytes>& a, const Vector<C, bytes>& b) {
    for (int i = 0; i < sum.parts; ++i) sum.part[i] += a.part[i] * b.part[i];
}
template <class C, int bytes>
ZEST_INLINE Vector<C, bytes> product(const Vector<C, bytes>& a, const Vector<C, bytes>& b) {
    Vector<C, bytes> v;
    for (int i = 0; i < v.parts; ++i) v.part[i] = a.part[i] * b.part[i];
    return v;
}
template <class C, int bytes>
ZEST_INLINE Vector<C, bytes> less(const Vector<C, bytes>& a, C b) {
    Vector<C, bytes> v;
    for (int i = 0; i < v.parts; ++i) v.part[i] = a.part[i] - b;
    return v;
}

template <class C>
struct Sign;
template <>
struct Sign<float> {
    using Bits = uint32_t;
    static constexpr Bits none = 0x7fffffffu;
};
template <>
struct Sign<double> {
    using Bits = uint64_t;
    static constexpr Bits none = 0x7fffffffffffffffull;
};
template <class C, int bytes>
ZEST_INLINE Vector<C, bytes> magnitude(const Vector<C, bytes>& a) {
    using Part = typename Vector<C, bytes>::Part;
    using Bits = typename Vector<typename Sign<C>::Bits, bytes>::Part;
    Vector<C, bytes> v;
    for (int i = 0; i < v.parts; ++i) v.part[i] = (Part)((Bits)a.part[i] & Sign<C>::none);
    return v;
}

// sums[i] += lane i, in float64.
template <class C, int bytes>
ZEST_INLINE void add_lanes(const Vector<C, bytes>& v, double* sums) {
    C lane[Vector<C, bytes>::lanes];
    store(v, lane);
    for (int i = 0; i < v.lanes; ++i) sums[i] += double(lane[i]);
}

// Of a few lanes pairwise, in a fixed order.
template <int count>
ZEST_INLINE double add_up(const double* lanes) {
    double sum[count];
    std::memcpy(sum, lanes, sizeof(sum));
    for (int half = count / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
    return sum[0];
}

}  // namespace zest::cpu
