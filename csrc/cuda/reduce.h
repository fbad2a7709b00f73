// One result per thread -> one per block, merged in a fixed order: a tree in shared memory, its last levels by shuffles.
#pragma once

#include <cstring>

#include "cuda/compiler.h"

namespace zest::cuda {

// The result of the lane `offset` above, moved as the float64 that it is made of.
template <class Result>
__device__ Result from_lane_above(const Result& mine, int offset) {
    constexpr int fields = sizeof(Result) / sizeof(double);
    double field[fields];
    memcpy(field, &mine, sizeof(Result));
#pragma unroll
    for (int i = 0; i < fields; ++i) field[i] = __shfl_down_sync(0xffffffffu, field[i], offset);
    Result other;
    memcpy(&other, field, sizeof(Result));
    return other;
}

// Thread 0 returns the merged result, the others nothing of use. Every thread of the block must call it, once per kernel.
template <int threads, class Result>
__device__ Result reduce_block(const Result& mine) {
    ZEST_SHARED(Result, partial, threads);
    const int t = threadIdx.x;
    partial[t] = mine;
    __syncthreads();
    for (int half = threads / 2; half >= 32; half /= 2) {
        if (t < half) merge(partial[t], partial[t + half]);
        __syncthreads();
    }
    Result sum = partial[t % 32];
    if (t < 32)
        for (int half = 16; half > 0; half /= 2) merge(sum, from_lane_above(sum, half));
    return sum;
}

}  // namespace zest::cuda
