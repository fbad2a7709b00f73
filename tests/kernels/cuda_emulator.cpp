// The CUDA kernels as a library for ctypes that needs no GPU, and three faulty kernels that the emulator must catch.
#include "cuda_emulator.h"

#include "cuda/channel_products.cu"
#include "cuda/moments.cu"

using namespace zest;

namespace {

constexpr int lanes = 64;

__global__ void without_barrier(const double* x, double* out) {
    ZEST_SHARED(double, shared, lanes);
    shared[threadIdx.x] = x[threadIdx.x];
    out[threadIdx.x] = shared[lanes - 1 - threadIdx.x];
}

__global__ void divergent_barrier(const double* x, double* out) {
    if (threadIdx.x >= 32) return;
    __syncthreads();
    out[threadIdx.x] = x[threadIdx.x];
}

__global__ void shuffle_with_lanes_that_left(const double* x, double* out) {
    if (threadIdx.x % 32 >= 16) return;
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, x[threadIdx.x], 1);
}

const char* finish() {
    static std::string message;
    message = emulator::error;
    emulator::error.clear();
    emulator::first_block = 0;
    return message.c_str();
}

}  // namespace

extern "C" {

int64_t chunk_size() { return cuda::chunk_size; }

// Blocks before first_block are left out, of both stages.
const char* moments(const cuda::Entry* table, int64_t count, int64_t chunks, Moments* workspace, Moments* out,
                    int descending, int64_t first_block) {
    emulator::descending = descending;
    emulator::first_block = first_block;
    cuda::moments(table[0], table, count, chunks, workspace, out, nullptr);
    return finish();
}

const char* gradient_moments(const char* dw, int dw_dtype, const char* w, int w_dtype, int64_t numel,
                             GradientMoments* workspace, GradientMoments* out, int descending) {
    emulator::descending = descending;
    cuda::gradient_moments({dw, DType(dw_dtype)}, {w, DType(w_dtype)}, numel, workspace, out, nullptr);
    return finish();
}

// strides: of y, then of g
const char* channel_products(const char* y, const char* g, int dtype, const int64_t* strides, const int64_t* sizes,
                             double* workspace, double* out) {
    emulator::descending = false;
    cuda::channel_products({y, strides[0], strides[1], strides[2]}, {g, strides[3], strides[4], strides[5]}, DType(dtype),
                           {sizes[0], sizes[1], sizes[2]}, workspace, out, nullptr);
    return finish();
}

const char* faulty(int which, const double* x, double* out) {
    void (*kernels[])(const double*, double*) = {without_barrier, divergent_barrier, shuffle_with_lanes_that_left};
    emulator::descending = false;
    ZEST_LAUNCH(kernels[which], 1, lanes, nullptr, x, out);
    return finish();
}
}
