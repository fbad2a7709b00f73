// The sums that one thread keeps of its elements, in registers: float for the narrow dtypes, double for float64.
#pragma once

#include "cuda/formats.h"

namespace zest::cuda {

constexpr int group = 32;       // elements that a thread holds at a time: eight 128-bit loads in flight for float32
constexpr int pair_group = 16;  // of each of two tensors

// Sums of deviations d = x - c, and of their squares, about a centre c near the mean.
template <class C>
struct Deviations {
    C centre = 0, sum = 0, square = 0;

    __device__ void add(C x) {
        const C d = x - centre;
        sum += d;
        square += d * d;
    }
    __device__ void add(const Deviations& tile) {
        sum += tile.sum;
        square += tile.square;
    }
    __device__ Deviations empty() const { return {centre, 0, 0}; }
    // Neither overflowed nor below 1e-28, where float32 squares lose digits to underflow. Zero is exact if the centre is
    // large enough for its last digit to have a square.
    __device__ bool trusted() const {
        if constexpr (sizeof(C) == 8) return square < INFINITY;
        return square < INFINITY && (square >= C(1e-28) || (square == 0 && fabs(centre) > C(1e-10)));
    }
    __device__ void finish(double inverse_count, double& mean, double& m2) const {
        const double s = double(sum);
        mean = double(centre) + s * inverse_count;
        m2 = fmax(double(square) - s * s * inverse_count, 0.0);
    }
};

// The sums of one thread over one tensor. A tile is summed apart first, so that no chain of additions grows long.
template <class C>
struct Sums {
    Deviations<C> x, magnitude;

    __device__ void centre(const C (&v)[group], int held) {
        C sum = 0, abs_sum = 0;
#pragma unroll
        for (int i = 0; i < group; ++i) sum += v[i], abs_sum += fabs(v[i]);  // zeros past the end
        x.centre = sum / C(held), magnitude.centre = abs_sum / C(held);
    }
    template <bool whole>
    __device__ void add(const C (&v)[group], int left) {
        Sums tile{x.empty(), magnitude.empty()};
#pragma unroll
        for (int i = 0; i < group; ++i)
            if (whole || i / packet * stride + i % packet < left) tile.x.add(v[i]), tile.magnitude.add(fabs(v[i]));
        x.add(tile.x), magnitude.add(tile.magnitude);
    }
    __device__ bool all_zero() const { return magnitude.centre == 0 && magnitude.sum == 0; }
};

// The sums of one thread over a gradient g and a weight w.
template <class C>
struct PairSums {
    Deviations<C> gradient, magnitude, weight;
    C product = 0, abs_product = 0;

    __device__ void centre(const C (&g)[pair_group], const C (&w)[pair_group], int held) {
        C sum = 0, abs_sum = 0, weight_sum = 0;
#pragma unroll
        for (int i = 0; i < pair_group; ++i) sum += g[i], abs_sum += fabs(g[i]), weight_sum += w[i];
        gradient.centre = sum / C(held), magnitude.centre = abs_sum / C(held), weight.centre = weight_sum / C(held);
    }
    template <bool whole>
    __device__ void add(const C (&g)[pair_group], const C (&w)[pair_group], int left) {
        PairSums tile{gradient.empty(), magnitude.empty(), weight.empty()};
#pragma unroll
        for (int i = 0; i < pair_group; ++i)
            if (whole || i / packet * stride + i % packet < left) {
                const C p = g[i] * w[i];
                tile.gradient.add(g[i]), tile.magnitude.add(fabs(g[i])), tile.weight.add(w[i]);
                tile.product += p, tile.abs_product += fabs(p);
            }
        gradient.add(tile.gradient), magnitude.add(tile.magnitude), weight.add(tile.weight);
        product += tile.product, abs_product += tile.abs_product;
    }
    // An all-zero gradient needs no care; products that underflowed do.
    __device__ bool trusted() const {
        if (!weight.trusted()) return false;
        if (magnitude.centre == 0 && magnitude.sum == 0) return true;
        const bool product_trusted = abs_product < INFINITY && (sizeof(C) == 8 || abs_product >= C(1e-28));
        return gradient.trusted() && magnitude.trusted() && product_trusted;
    }
};

}  // namespace zest::cuda
