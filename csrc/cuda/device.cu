// Choosing a device, and what CUDA says when that fails. Nothing here runs before the first use of a kernel.
#include "cuda/kernels.h"

namespace zest::cuda {

int use_device(int device) { return int(cudaSetDevice(device)); }

int build_version() { return CUDART_VERSION; }

int driver_version() {
    int version = 0;
    cudaDriverGetVersion(&version);
    return version;
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace zest::cuda
