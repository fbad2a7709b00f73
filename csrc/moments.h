// The statistics of one tensor, and of one weight with its gradient: defined here once, for host and device.
//
// Kept are sufficient statistics (count, mean, sum of squares about the mean) of x and of |x|; mean, std, |.|-mean,
// |.|-std and the norm follow from them. Two partial results merge by Chan's formula (Chan, Golub, LeVeque 1983), so
// data whose mean is 1e4 times its deviation lose nothing, as sum(x^2) - sum(x)^2/n would. Merging is exact in any
// order up to rounding; callers merge in a fixed order, which makes results repeatable bit for bit.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define ZEST_HOST_DEVICE __host__ __device__
#else
#define ZEST_HOST_DEVICE
#endif

namespace zest {

struct Moments {
    double count = 0;
    double mean = 0, m2 = 0;          // of x; m2 = sum (x - mean)^2
    double abs_mean = 0, abs_m2 = 0;  // of |x|
    double nonfinite = 0;             // entries that are NaN or infinite; any of them turns the rest into NaN
};

struct GradientMoments {
    Moments gradient;                        // of dW
    double weight_mean = 0, weight_m2 = 0;   // of W
    double weight_nonfinite = 0;
    double product_sum = 0, product_abs_sum = 0;  // sum W*dW and sum |W*dW|
};

// Chan's update of (mean, m2) over na entries by (mean_b, m2_b) over nb; share = nb / (na + nb).
ZEST_HOST_DEVICE inline void chan(double na, double share, double& mean, double& m2, double mean_b, double m2_b) {
    const double delta = mean_b - mean;
    mean += delta * share;
    m2 += m2_b + delta * delta * na * share;
}

ZEST_HOST_DEVICE inline void merge(Moments& a, const Moments& b) {
    if (b.count == 0) return;
    const double share = b.count / (a.count + b.count);
    chan(a.count, share, a.mean, a.m2, b.mean, b.m2);
    chan(a.count, share, a.abs_mean, a.abs_m2, b.abs_mean, b.abs_m2);
    a.nonfinite += b.nonfinite;
    a.count += b.count;
}

ZEST_HOST_DEVICE inline void merge(GradientMoments& a, const GradientMoments& b) {
    if (b.gradient.count == 0) return;
    const double na = a.gradient.count;
    chan(na, b.gradient.count / (na + b.gradient.count), a.weight_mean, a.weight_m2, b.weight_mean, b.weight_m2);
    merge(a.gradient, b.gradient);
    a.weight_nonfinite += b.weight_nonfinite;
    a.product_sum += b.product_sum;
    a.product_abs_sum += b.product_abs_sum;
}

}  // namespace zest
