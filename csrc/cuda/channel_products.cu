// S[n, k] = sum over p of y[n, p, k] * g[n, p, k]: what fisher needs, in one read of y and g, whatever their strides.
//
// A block takes 32 channels of one sample over 512 positions, and its lanes run along the dimension that is dense:
// channels (Linear, channels_last) or positions (convolutions), so that a warp reads one run of memory. A thread adds at
// most 64 products in float32 (float64 for float64 input), the rest is float64. Chunks of positions are summed in order by
// a second kernel: no atomics, the same bits every time.
#include "cuda/formats.h"
#include "cuda/kernels.h"

namespace zest::cuda {
namespace {

constexpr int tile = 32;  // channels
constexpr int warps = threads / 32;

template <class Format>
__device__ auto product(const View3& y, int64_t y_offset, const View3& g, int64_t g_offset) {
    using Bits = typename Format::bits;
    return Format::widen(__ldg(reinterpret_cast<const Bits*>(y.data) + y_offset)) *
           Format::widen(__ldg(reinterpret_cast<const Bits*>(g.data) + g_offset));
}

template <class Format>
__global__ void __launch_bounds__(threads)
    products_of_chunks(View3 y, View3 g, Shape3 shape, bool positions_dense, double* out) {
    using C = decltype(Format::widen(0));
    ZEST_SHARED(double, partial, threads);
    const int64_t tiles = (shape.channels + tile - 1) / tile, chunks = position_chunks(shape.positions);
    const int64_t first_channel = blockIdx.x % tiles * tile, row = blockIdx.x / tiles;  // row: of [sample, chunk]
    const int64_t sample = row / chunks, first = row % chunks * positions_per_chunk, rest = shape.positions - first;
    const int count = int(rest < positions_per_chunk ? rest : positions_per_chunk);
    const int64_t y0 = sample * y.sample + first * y.position, g0 = sample * g.sample + first * g.position;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    double* sums = out + row * shape.channels;

    if (positions_dense) {
        for (int64_t k = first_channel + warp; k < first_channel + tile && k < shape.channels; k += warps) {
            C sum = 0;
#pragma unroll 4
            for (int p = lane; p < count; p += 32)
                sum += product<Format>(y, y0 + k * y.channel + p * y.position, g, g0 + k * g.channel + p * g.position);
            double total = sum;
            for (int half = 16; half > 0; half /= 2) total += __shfl_down_sync(0xffffffffu, total, half);
            if (lane == 0) sums[k] = total;
        }
        return;
    }
    const int64_t k = first_channel + lane;
    C sum = 0;
    if (k < shape.channels)
#pragma unroll 8
        for (int p = warp; p < count; p += warps)
            sum += product<Format>(y, y0 + k * y.channel + p * y.position, g, g0 + k * g.channel + p * g.position);
    partial[threadIdx.x] = sum;
    __syncthreads();
    if (warp > 0 || k >= shape.channels) return;
    double total = 0;
    for (int w = 0; w < warps; ++w) total += partial[w * 32 + lane];
    sums[k] = total;
}

__global__ void __launch_bounds__(threads)
    products_of_samples(const double* of_chunk, int64_t chunks, int64_t samples, int64_t channels, double* out) {
    const int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x;
    if (i >= samples * channels) return;
    const double* sums = of_chunk + i / channels * chunks * channels + i % channels;
    double total = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total += sums[chunk * channels];
    out[i] = total;
}

template <class Format>
void launch(const View3& y, const View3& g, const Shape3& shape, double* out, void* stream) {
    const int64_t blocks = shape.samples * position_chunks(shape.positions) * ((shape.channels + tile - 1) / tile);
    const bool positions_dense = shape.positions > 1 && y.position < y.channel;
    if (blocks > 0) ZEST_LAUNCH(products_of_chunks<Format>, blocks, threads, stream, y, g, shape, positions_dense, out);
}

}  // namespace

int channel_products(const View3& y, const View3& g, DType dtype, const Shape3& shape, double* workspace, double* out,
                     void* stream) {
    const int64_t chunks = position_chunks(shape.positions), sums = shape.samples * shape.channels;
    if (sums == 0) return 0;
    double* of_chunk = chunks == 1 ? out : workspace;
    switch (dtype) {
        case DType::float32: launch<Float32>(y, g, shape, of_chunk, stream); break;
        case DType::float64: launch<Float64>(y, g, shape, of_chunk, stream); break;
        case DType::bfloat16: launch<BFloat16>(y, g, shape, of_chunk, stream); break;
        case DType::float16: launch<Float16>(y, g, shape, of_chunk, stream); break;
    }
    if (chunks != 1)
        ZEST_LAUNCH(products_of_samples, (sums + threads - 1) / threads, threads, stream, workspace, chunks, shape.samples,
                    shape.channels, out);
    return int(cudaGetLastError());
}

}  // namespace zest::cuda
