// One bit for each element: where a piecewise linear activation has slope one, and a gradient kept only there.
//
// Each reads its input once; what is unpacked lives in registers. Bit i of a byte belongs to element i of its eight.
// Elements are independent, so the thread count never shows in the result.
#include "cpu/kernels.h"
#include "cpu/load.h"

namespace zest::cpu {
namespace {

constexpr int64_t serial_below = 65536;  // fewer elements than this cost less than waking threads
constexpr int64_t block = 64;            // elements of which the bytes of a mask are formed at a time
constexpr int64_t run = 1024 * block;    // elements of a thread's turn, whole bytes

// Eight bytes of 0 or 1 are one word; the product moves them into its top byte.
ZEST_INLINE uint8_t gathered(const uint8_t* mask) {
    uint64_t word;
    std::memcpy(&word, mask, 8);
    return uint8_t((word * 0x0102040810204080u) >> 56);
}

template <class T, class C>
ZEST_INLINE void mark_inside(const T* __restrict x, int64_t count, C low, C high, uint8_t* __restrict mask) {
    for (int64_t i = 0; i < count; ++i) {
        const C value = widen(x[i]);
        mask[i] = uint8_t(!(value <= low) & !(value >= high));
    }
}

template <class T, class C>
ZEST_INLINE void interval_bits_inline(const T* __restrict x, int64_t n, C low, C high, uint8_t* __restrict bits) {
    uint8_t mask[block];
    for (int64_t first = 0; first < n; first += block) {
        const int64_t count = n - first < block ? n - first : block;
        if (count == block) {
            mark_inside(x + first, block, low, high, mask);  // a constant count, which vectorises
        } else {
            std::memset(mask, 0, block);
            mark_inside(x + first, count, low, high, mask);
        }
        for (int64_t byte = 0; byte < (count + 7) / 8; ++byte) bits[first / 8 + byte] = gathered(mask + 8 * byte);
    }
}

ZEST_CLONES void interval_bits_run(const float* x, int64_t n, double low, double high, uint8_t* bits) {
    interval_bits_inline(x, n, float(low), float(high), bits);
}
ZEST_CLONES void interval_bits_run(const double* x, int64_t n, double low, double high, uint8_t* bits) {
    interval_bits_inline(x, n, low, high, bits);
}
ZEST_CLONES void interval_bits_run(const bfloat16* x, int64_t n, double low, double high, uint8_t* bits) {
    interval_bits_inline(x, n, float(low), float(high), bits);
}

// The element where its bit is set, zero elsewhere, whatever the type: the bits of the number are moved, not counted.
template <class U>
ZEST_INLINE void masked_inline(const U* __restrict g, const uint8_t* __restrict bits, int64_t n, U* __restrict out) {
    const int64_t whole = n - n % block;
    for (int64_t first = 0; first < whole; first += block) {
        uint8_t mask[block];  // not zero where the bit is set
        for (int64_t byte = 0; byte < block / 8; ++byte) {
            const uint64_t word = (bits[first / 8 + byte] * 0x0101010101010101u) & 0x8040201008040201u;
            std::memcpy(mask + 8 * byte, &word, 8);
        }
        for (int64_t i = 0; i < block; ++i) out[first + i] = mask[i] ? g[first + i] : U(0);
    }
    for (int64_t i = whole; i < n; ++i) out[i] = (bits[i / 8] >> (i % 8)) & 1 ? g[i] : U(0);
}

ZEST_CLONES void masked_run(const uint16_t* g, const uint8_t* bits, int64_t n, uint16_t* out) {
    masked_inline(g, bits, n, out);
}
ZEST_CLONES void masked_run(const uint32_t* g, const uint8_t* bits, int64_t n, uint32_t* out) {
    masked_inline(g, bits, n, out);
}
ZEST_CLONES void masked_run(const uint64_t* g, const uint8_t* bits, int64_t n, uint64_t* out) {
    masked_inline(g, bits, n, out);
}

template <class F>
void in_runs(int64_t n, int threads, const F& work) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && n >= serial_below)
    for (int64_t first = 0; first < n; first += run) work(first, n - first < run ? n - first : run);
}

template <class T>
void interval_bits_of(const char* x, int64_t n, double low, double high, uint8_t* bits, int threads) {
    in_runs(n, threads, [=](int64_t first, int64_t count) {
        interval_bits_run(reinterpret_cast<const T*>(x) + first, count, low, high, bits + first / 8);
    });
}

template <class U>
void masked_of(const char* g, const uint8_t* bits, int64_t n, char* out, int threads) {
    in_runs(n, threads, [=](int64_t first, int64_t count) {
        masked_run(reinterpret_cast<const U*>(g) + first, bits + first / 8, count, reinterpret_cast<U*>(out) + first);
    });
}

}  // namespace

void interval_bits(const Operand& x, int64_t n, double low, double high, uint8_t* bits, int threads) {
    switch (x.dtype) {
        case DType::float32: return interval_bits_of<float>(x.data, n, low, high, bits, threads);
        case DType::float64: return interval_bits_of<double>(x.data, n, low, high, bits, threads);
        default: return interval_bits_of<bfloat16>(x.data, n, low, high, bits, threads);
    }
}

void masked(const char* g, const uint8_t* bits, int64_t n, int element_size, char* out, int threads) {
    switch (element_size) {
        case 2: return masked_of<uint16_t>(g, bits, n, out, threads);
        case 4: return masked_of<uint32_t>(g, bits, n, out, threads);
        default: return masked_of<uint64_t>(g, bits, n, out, threads);
    }
}

}  // namespace zest::cpu
