// The CUDA kernels as seen from the host. They allocate nothing, keep no state, never synchronise, and give the same
// bits on every device: what is added to what depends on the length of a tensor only.
//
// Addresses are on the current device and `stream` is a cudaStream_t. Each function returns a cudaError_t, 0 if the
// launch was accepted; error_text says what it means.
#pragma once

#include "layout.h"
#include "moments.h"

namespace zest::cuda {

// A row of the pointer table. The entries must be dense in memory, in any dimension order.
struct Entry {
    int64_t address, numel;
    int64_t first_chunk;  // chunks of all rows before
    int64_t dtype;        // a DType
};

constexpr int64_t chunk_size = 32768;  // elements that one thread block reduces
ZEST_HOST_DEVICE constexpr int64_t chunks(int64_t numel) { return (numel + chunk_size - 1) / chunk_size; }

// Moments of `count` tensors of total_chunks chunks together -> out [count] (device). `table` (device) may be null where
// there is one tensor: then `first`, its row, is enough. workspace: total_chunks * sizeof(Moments) bytes.
int moments(const Entry& first, const Entry* table, int64_t count, int64_t total_chunks, Moments* workspace, Moments* out,
            void* stream);

// dw and w: numel entries each, in the same order. workspace: chunks(numel) * sizeof(GradientMoments) bytes.
int gradient_moments(const Operand& dw, const Operand& w, int64_t numel, GradientMoments* workspace, GradientMoments* out,
                     void* stream);

// A tensor [samples, positions, channels] with these strides, in elements.
struct View3 {
    const char* data;
    int64_t sample, position, channel;
};
struct Shape3 {
    int64_t samples, positions, channels;
};
constexpr int64_t positions_per_chunk = 512;
ZEST_HOST_DEVICE constexpr int64_t position_chunks(int64_t positions) {
    return (positions + positions_per_chunk - 1) / positions_per_chunk;
}

// out [samples, channels] = sum over positions of y * g, both of `dtype`. workspace: position_chunks(positions) times
// the bytes of out.
int channel_products(const View3& y, const View3& g, DType dtype, const Shape3& shape, double* workspace, double* out,
                     void* stream);

// Makes `device` current: an error where there is none, or its driver is older than this runtime.
int use_device(int device);

// An error where these kernels were not compiled for the current device.
int runs_here();

// As CUDA counts: 13000 is 13.0. That of the driver is the newest that it runs; 0 where there is no driver.
int build_version();
int driver_version();

const char* error_text(int error);

}  // namespace zest::cuda
