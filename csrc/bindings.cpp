// Python sees addresses, sizes, strides and dtype numbers; zest_fast/kernels/cpu.py hands them in and checks them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "cpu/kernels.h"

namespace py = pybind11;
using namespace zest;
using Dims = std::vector<int64_t>;

namespace {

Operand operand(std::uintptr_t address, int dtype) {
    if (dtype < 0 || dtype > 3) throw std::invalid_argument("unknown dtype number");
    return {reinterpret_cast<const char*>(address), static_cast<DType>(dtype)};
}

py::tuple moments(std::uintptr_t x, int dtype, const Dims& sizes, const Dims& strides, int threads) {
    Layout<1> layout;
    for (size_t d = 0; d < sizes.size(); ++d) layout.add(sizes[d], {strides.at(d)});
    layout.collapse();
    Moments m;
    {
        py::gil_scoped_release nogil;
        m = cpu::moments(layout, operand(x, dtype), threads);
    }
    return py::make_tuple(m.count, m.mean, m.m2, m.abs_mean, m.abs_m2, m.nonfinite);
}

py::tuple gradient_moments(std::uintptr_t dw, int dw_dtype, const Dims& dw_strides, std::uintptr_t w, int w_dtype,
                           const Dims& w_strides, const Dims& sizes, int threads) {
    Layout<2> layout;
    for (size_t d = 0; d < sizes.size(); ++d) layout.add(sizes[d], {dw_strides.at(d), w_strides.at(d)});
    layout.collapse();
    GradientMoments m;
    {
        py::gil_scoped_release nogil;
        m = cpu::gradient_moments(layout, operand(dw, dw_dtype), operand(w, w_dtype), threads);
    }
    const Moments& d = m.gradient;
    return py::make_tuple(d.count, d.mean, d.m2, d.abs_mean, d.abs_m2, d.nonfinite, m.weight_mean, m.weight_m2,
                          m.weight_nonfinite, m.product_sum, m.product_abs_sum);
}

double channel_products(std::uintptr_t y, int y_dtype, const Dims& y_strides, std::uintptr_t g, int g_dtype,
                        const Dims& g_strides, const Dims& sizes, std::uintptr_t out, int threads) {
    const cpu::Strides3 ys = {y_strides.at(0), y_strides.at(1), y_strides.at(2)};
    const cpu::Strides3 gs = {g_strides.at(0), g_strides.at(1), g_strides.at(2)};
    const int64_t samples = sizes.at(0), positions = sizes.at(1), channels = sizes.at(2);
    py::gil_scoped_release nogil;
    return cpu::channel_products(samples, positions, channels, operand(y, y_dtype), ys, operand(g, g_dtype), gs,
                                 reinterpret_cast<double*>(out), threads);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "Torch-free kernels of zest_fast; use them through zest_fast.kernels.";
    m.def("moments", &moments);
    m.def("gradient_moments", &gradient_moments);
    m.def("channel_products", &channel_products);
}
