// Moments of many tensors of any length and dtype in one launch, and of a gradient with its weight.
//
// Bytes moved: those of the inputs, once, in 128-bit loads, plus 48 (88) bytes per chunk of 32,768 elements. Stage one
// reduces a chunk per thread block, stage two merges the chunks of a tensor, by Chan's formula in float64 and in a fixed
// order: no atomics, the same bits every time and on every card.
//
// A thread reads its 128 elements of the chunk in k groups. It centres on the mean of the first group and sums deviations
// from that in float32 (float64 for float64 input), so that an offset costs no digits. Nor can outliers, wherever they
// are: if c is the mean of one group of k, n (c - mean)^2 <= k m2, so the sum of squares about c is at most (1 + k) m2.
// Float64 arithmetic, which is scarce on cards for the desk, is left for the merging. A thread whose values are too large
// or too small for float32 squares, or not finite, reads its elements again and computes in float64.
#include "cuda/formats.h"
#include "cuda/kernels.h"
#include "cuda/reduce.h"
#include "cuda/sums.h"

namespace zest::cuda {
namespace {

// At most 128 registers, which two blocks of 256 threads have on every card.
#define ZEST_BLOCK_BOUNDS __launch_bounds__(threads, 2)

static_assert(sizeof(Moments) == 6 * sizeof(double) && sizeof(GradientMoments) == 11 * sizeof(double),
              "results are rows of float64");
static_assert(chunk_size % (threads * group) == 0 && chunk_size % (threads * pair_group) == 0,
              "a chunk is whole tiles, and every chunk of an aligned tensor starts aligned");

__device__ Span chunk_of(const Operand& x, int64_t numel, int64_t chunk) {
    const int64_t size = x.dtype == DType::float64 ? 8 : x.dtype == DType::float32 ? 4 : 2;
    const int64_t start = chunk * chunk_size, rest = numel - start;
    return {x.data + start * size, x.dtype, int(rest < chunk_size ? rest : chunk_size)};
}

// How many elements of a span, from `first` on, this thread's N registers hold.
template <int N>
__device__ int held_from(int length, int first) {
    int count = 0;
#pragma unroll
    for (int i = 0; i < N; i += packet) {
        const int rest = length - (first + i / packet * stride);
        count += rest < 0 ? 0 : rest < packet ? rest : packet;
    }
    return count;
}

// f(i) for the index i of every element of the chunk that belongs to this thread.
template <class F>
__device__ void for_own(int length, const F& f) {
#pragma unroll 1
    for (int i = threadIdx.x * packet; i < length; i += stride)
#pragma unroll 1
        for (int j = i; j < i + packet && j < length; ++j) f(j);
}

// By definition, in float64: for values that float32 cannot hold, and to count those that are not finite.
__device__ Moments careful_moments(const Span& x, double count) {
    Moments m;
    m.count = count;
    const double inverse = 1 / count;
    for_own(x.length, [&](int i) {
        const double v = load_one(x, i);
        m.nonfinite += !(fabs(v) < INFINITY);
        m.mean += v * inverse;
        m.abs_mean += fabs(v) * inverse;
    });
    for_own(x.length, [&](int i) {
        const double v = load_one(x, i), d = v - m.mean, e = fabs(v) - m.abs_mean;
        m.m2 += d * d;
        m.abs_m2 += e * e;
    });
    return m;
}

__device__ GradientMoments careful_moments(const Span& dw, const Span& w, double count) {
    GradientMoments r;
    r.gradient = careful_moments(dw, count);
    const Moments weight = careful_moments(w, count);
    r.weight_mean = weight.mean, r.weight_m2 = weight.m2, r.weight_nonfinite = weight.nonfinite;
    for_own(w.length, [&](int i) {
        const double product = load_one(dw, i) * load_one(w, i);
        r.product_sum += product;
        r.product_abs_sum += fabs(product);
    });
    return r;
}

template <class C>
__device__ Moments own_moments(const Span& x) {
    Sums<C> sums;
    Moments m;
    const int own = threadIdx.x * packet;
#pragma unroll 1
    for (int first = own; first < x.length; first += threads * group) {
        C v[group];
        load(x, first, v);
        const int held = held_from<group>(x.length, first);
        if (first == own) sums.centre(v, held);
        const int left = x.length - first;
        held == group ? sums.template add<true>(v, left) : sums.template add<false>(v, left);
        m.count += held;
    }
    if (m.count == 0 || sums.all_zero()) return m;
    if (!sums.x.trusted() || !sums.magnitude.trusted()) return careful_moments(x, m.count);
    sums.x.finish(1 / m.count, m.mean, m.m2);
    sums.magnitude.finish(1 / m.count, m.abs_mean, m.abs_m2);
    return m;
}

template <class C>
__device__ GradientMoments own_moments(const Span& dw, const Span& w) {
    PairSums<C> sums;
    GradientMoments r;
    Moments& m = r.gradient;
    const int own = threadIdx.x * packet;
#pragma unroll 1
    for (int first = own; first < w.length; first += threads * pair_group) {
        C g[pair_group], v[pair_group];
        load(dw, first, g);
        load(w, first, v);
        const int held = held_from<pair_group>(w.length, first);
        if (first == own) sums.centre(g, v, held);
        const int left = w.length - first;
        held == pair_group ? sums.template add<true>(g, v, left) : sums.template add<false>(g, v, left);
        m.count += held;
    }
    if (m.count == 0) return r;
    if (!sums.trusted()) return careful_moments(dw, w, m.count);
    sums.gradient.finish(1 / m.count, m.mean, m.m2);
    sums.magnitude.finish(1 / m.count, m.abs_mean, m.abs_m2);
    sums.weight.finish(1 / m.count, r.weight_mean, r.weight_m2);
    r.product_sum = sums.product, r.product_abs_sum = sums.abs_product;
    return r;
}

// The row of the table that a chunk belongs to: the last one that starts at or before it.
__device__ int64_t row_of(int64_t chunk, const Entry* table, int64_t count) {
    int64_t low = 0, high = count;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (table[middle].first_chunk <= chunk ? low : high) = middle;
    }
    return low;
}

__global__ void ZEST_BLOCK_BOUNDS moments_of_chunks(Entry first, const Entry* table, int64_t count, Moments* out) {
    const int64_t chunk = blockIdx.x;
    const Entry row = count == 1 ? first : table[row_of(chunk, table, count)];
    const Operand tensor = {reinterpret_cast<const char*>(row.address), DType(row.dtype)};
    const Span x = chunk_of(tensor, row.numel, chunk - row.first_chunk);
    const bool wide = x.dtype == DType::float64;
    const Moments sum = reduce_block<threads>(wide ? own_moments<double>(x) : own_moments<float>(x));
    if (threadIdx.x == 0) out[chunk] = sum;
}

__global__ void ZEST_BLOCK_BOUNDS
    gradient_moments_of_chunks(Operand dw, Operand w, int64_t numel, GradientMoments* out) {
    const Span g = chunk_of(dw, numel, blockIdx.x), v = chunk_of(w, numel, blockIdx.x);
    const bool wide = g.dtype == DType::float64 || v.dtype == DType::float64;
    const GradientMoments sum = reduce_block<threads>(wide ? own_moments<double>(g, v) : own_moments<float>(g, v));
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// Stage two, one block for each tensor: every thread merges a run of neighbouring chunks, then the block its threads.
template <class Result>
__device__ void merge_chunks(const Result* of_chunk, int64_t count, Result* out) {
    Result sum;
    const int64_t end = (threadIdx.x + 1) * count / threads;
    for (int64_t i = threadIdx.x * count / threads; i < end; ++i) merge(sum, of_chunk[i]);
    sum = reduce_block<threads>(sum);
    if (threadIdx.x == 0) *out = sum;
}

__global__ void ZEST_BLOCK_BOUNDS
    moments_of_tensors(Entry first, const Entry* table, int64_t count, const Moments* of_chunk, Moments* out) {
    const Entry row = count == 1 ? first : table[blockIdx.x];
    merge_chunks(of_chunk + row.first_chunk, chunks(row.numel), out + blockIdx.x);
}

__global__ void ZEST_BLOCK_BOUNDS
    gradient_moments_of_tensor(const GradientMoments* of_chunk, int64_t count, GradientMoments* out) {
    merge_chunks(of_chunk, count, out);
}

}  // namespace

int moments(const Entry& first, const Entry* table, int64_t count, int64_t total_chunks, Moments* workspace, Moments* out,
            void* stream) {
    if (count == 0) return 0;
    if (total_chunks > 0) ZEST_LAUNCH(moments_of_chunks, total_chunks, threads, stream, first, table, count, workspace);
    ZEST_LAUNCH(moments_of_tensors, count, threads, stream, first, table, count, workspace, out);
    return int(cudaGetLastError());
}

int gradient_moments(const Operand& dw, const Operand& w, int64_t numel, GradientMoments* workspace, GradientMoments* out,
                     void* stream) {
    const int64_t count = chunks(numel);
    if (count > 0) ZEST_LAUNCH(gradient_moments_of_chunks, count, threads, stream, dw, w, numel, workspace);
    ZEST_LAUNCH(gradient_moments_of_tensor, 1, threads, stream, workspace, count, out);
    return int(cudaGetLastError());
}

int runs_here() {
    cudaFuncAttributes attributes;
    return int(cudaFuncGetAttributes(&attributes, moments_of_chunks));
}

}  // namespace zest::cuda
