// How one or two tensors of the same shape lie in memory, with as few dimensions as that needs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>

namespace zest {

enum class DType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

inline int64_t item_size(DType t) { return t == DType::float64 ? 8 : t == DType::float32 ? 4 : 2; }

struct Operand {
    const char* data = nullptr;
    DType dtype = DType::float32;
};

// Statistics do not depend on the order of elements, so dimensions may be reordered: largest stride outermost,
// neighbours merged where every operand allows it. A contiguous, channels_last or transposed tensor becomes one
// dimension of stride 1.
template <int N>
struct Layout {
    static constexpr int max_dims = 64;  // torch's own limit
    int ndim = 0;
    int64_t size[max_dims];
    int64_t stride[N][max_dims];  // in elements
    int64_t numel = 1;            // elements visited
    int64_t repeat = 1;           // times that each stands for (dimensions expanded by stride 0, one operand only)

    void add(int64_t dim_size, const int64_t (&dim_stride)[N]) {
        if (ndim == max_dims) throw std::invalid_argument("more than 64 dimensions");
        if (dim_size == 1) return;
        if (N == 1 && dim_stride[0] == 0 && dim_size > 0) {
            repeat *= dim_size;
            return;
        }
        size[ndim] = dim_size;
        for (int o = 0; o < N; ++o) stride[o][ndim] = dim_stride[o];
        ++ndim;
        numel *= dim_size;
    }

    void collapse() {
        for (int i = 1; i < ndim; ++i)  // insertion sort: few dimensions, stable
            for (int j = i; j > 0 && outer_of(j, j - 1); --j) swap_dims(j, j - 1);
        int last = 0;
        for (int i = 1; i < ndim; ++i) {
            if (mergeable(last, i)) {
                size[last] *= size[i];
                for (int o = 0; o < N; ++o) stride[o][last] = stride[o][i];
            } else {
                ++last;
                size[last] = size[i];
                for (int o = 0; o < N; ++o) stride[o][last] = stride[o][i];
            }
        }
        ndim = ndim == 0 ? 0 : last + 1;
    }

    bool contiguous() const {
        if (ndim == 0) return true;
        if (ndim > 1) return false;
        for (int o = 0; o < N; ++o)
            if (stride[o][0] != 1) return false;
        return true;
    }

private:
    bool outer_of(int a, int b) const {
        for (int o = 0; o < N; ++o)
            if (stride[o][a] != stride[o][b]) return stride[o][a] > stride[o][b];
        return false;
    }
    void swap_dims(int a, int b) {
        std::swap(size[a], size[b]);
        for (int o = 0; o < N; ++o) std::swap(stride[o][a], stride[o][b]);
    }
    bool mergeable(int outer, int inner) const {
        for (int o = 0; o < N; ++o)
            if (stride[o][outer] != stride[o][inner] * size[inner]) return false;
        return true;
    }
};

}  // namespace zest
