// What differs between nvcc and the block emulator of the tests, in one place: launches, shared memory, the half type.
// The emulator (tests/kernels/cuda_emulator.h, included first) brings its own definitions of these three.
#pragma once

#include <cstdint>

#ifndef ZEST_LAUNCH

// kernel<<<blocks, threads>>>(arguments...) on a stream; errors are fetched by cudaGetLastError afterwards.
#define ZEST_LAUNCH(kernel, blocks, threads, stream, ...) \
    kernel<<<unsigned(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)

// Raw bytes, since a __shared__ variable must not have a constructor.
#define ZEST_SHARED(Type, name, count)                                       \
    __shared__ alignas(16) unsigned char name##_bytes[sizeof(Type) * count]; \
    Type* const name = reinterpret_cast<Type*>(name##_bytes)

namespace zest::cuda {

__device__ inline float half_to_float(uint16_t bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

}  // namespace zest::cuda

#endif
