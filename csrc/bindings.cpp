// Python sees addresses, sizes, strides and dtype numbers; zest_fast/kernels/cpu.py and cuda.py hand them in and check them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#ifdef ZEST_CUDA
#include "cuda/kernels.h"
#endif

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

// Of tensors of any number of dimensions, samples first: where the channels are is told, and all other dimensions are
// positions. None where those of an operand do not lie on one stride.
std::optional<double> squared_channel_products(std::uintptr_t y, int y_dtype, const Dims& y_strides, std::uintptr_t g,
                                               int g_dtype, const Dims& g_strides, const Dims& sizes, size_t channel,
                                               int threads) {
    if (sizes.empty() || channel == 0 || channel >= sizes.size())
        throw std::invalid_argument("squared_channel_products: samples come first, and channels in another dimension");
    cpu::Strides3 ys = {y_strides.at(0), 1, y_strides.at(channel)}, gs = {g_strides.at(0), 1, g_strides.at(channel)};
    int64_t positions = 1;
    for (size_t d = sizes.size() - 1; d > 0; --d) {  // from the innermost one outwards
        if (d == channel || sizes[d] == 1) continue;
        if (positions == 1) {
            ys.position = y_strides.at(d), gs.position = g_strides.at(d);
        } else if (y_strides.at(d) != ys.position * positions || g_strides.at(d) != gs.position * positions) {
            return std::nullopt;
        }
        positions *= sizes[d];
    }
    py::gil_scoped_release nogil;
    return cpu::channel_products(sizes[0], positions, sizes[channel], operand(y, y_dtype), ys, operand(g, g_dtype), gs,
                                 nullptr, threads);
}

void silu_gated_backward(const std::array<std::uintptr_t, 5>& addresses, const std::array<int64_t, 5>& strides,
                         int64_t rows, int64_t columns, int dtype, int threads) {
    if (dtype != int(DType::float32) && dtype != int(DType::bfloat16))
        throw std::invalid_argument("silu_gated_backward: float32 or bfloat16 is needed");
    const auto view = [&](int i) { return cpu::Rows{reinterpret_cast<char*>(addresses[i]), strides[i]}; };
    py::gil_scoped_release nogil;
    cpu::silu_gated_backward({rows, columns, view(0), view(1), view(2), view(3), view(4)}, DType(dtype), threads);
}

void interval_bits(std::uintptr_t x, int dtype, int64_t n, double low, double high, std::uintptr_t bits, int threads) {
    const Operand values = operand(x, dtype);
    if (values.dtype == DType::float16) throw std::invalid_argument("interval_bits: float16 is not supported");
    py::gil_scoped_release nogil;
    cpu::interval_bits(values, n, low, high, reinterpret_cast<uint8_t*>(bits), threads);
}

void masked(std::uintptr_t g, std::uintptr_t bits, int64_t n, int element_size, std::uintptr_t out, int threads) {
    if (element_size != 2 && element_size != 4 && element_size != 8)
        throw std::invalid_argument("masked: elements of 2, 4 or 8 bytes are needed");
    py::gil_scoped_release nogil;
    cpu::masked(reinterpret_cast<const char*>(g), reinterpret_cast<const uint8_t*>(bits), n, element_size,
                reinterpret_cast<char*>(out), threads);
}

#ifdef ZEST_CUDA

void check(int error) {
    if (error) throw std::runtime_error(std::string("CUDA: ") + cuda::error_text(error));
}

// Why the kernels cannot run on a device; empty if they can.
std::string cuda_status(int device) {
    int error = cuda::use_device(device);
    if (!error) error = cuda::runs_here();
    return error ? cuda::error_text(error) : "";
}

void cuda_moments(const std::array<int64_t, 4>& first, std::uintptr_t table, int64_t count, int64_t chunks,
                  std::uintptr_t workspace, std::uintptr_t out, int device, std::uintptr_t stream) {
    py::gil_scoped_release nogil;
    check(cuda::use_device(device));
    check(cuda::moments({first[0], first[1], first[2], first[3]}, reinterpret_cast<const cuda::Entry*>(table), count,
                        chunks, reinterpret_cast<Moments*>(workspace), reinterpret_cast<Moments*>(out),
                        reinterpret_cast<void*>(stream)));
}

void cuda_gradient_moments(std::uintptr_t dw, int dw_dtype, std::uintptr_t w, int w_dtype, int64_t numel,
                           std::uintptr_t workspace, std::uintptr_t out, int device, std::uintptr_t stream) {
    py::gil_scoped_release nogil;
    check(cuda::use_device(device));
    check(cuda::gradient_moments(operand(dw, dw_dtype), operand(w, w_dtype), numel,
                                 reinterpret_cast<GradientMoments*>(workspace), reinterpret_cast<GradientMoments*>(out),
                                 reinterpret_cast<void*>(stream)));
}

void cuda_channel_products(std::uintptr_t y, const std::array<int64_t, 3>& y_strides, std::uintptr_t g,
                           const std::array<int64_t, 3>& g_strides, int dtype, const std::array<int64_t, 3>& sizes,
                           std::uintptr_t workspace, std::uintptr_t out, int device, std::uintptr_t stream) {
    const cuda::View3 y_view = {operand(y, dtype).data, y_strides[0], y_strides[1], y_strides[2]};
    const cuda::View3 g_view = {operand(g, dtype).data, g_strides[0], g_strides[1], g_strides[2]};
    py::gil_scoped_release nogil;
    check(cuda::use_device(device));
    check(cuda::channel_products(y_view, g_view, DType(dtype), {sizes[0], sizes[1], sizes[2]},
                                 reinterpret_cast<double*>(workspace), reinterpret_cast<double*>(out),
                                 reinterpret_cast<void*>(stream)));
}

void bind_cuda(py::module_& m) {
    m.attr("has_cuda") = true;
    m.attr("cuda_chunk_size") = cuda::chunk_size;
    m.attr("cuda_positions_per_chunk") = cuda::positions_per_chunk;
    m.def("cuda_status", &cuda_status);
    m.def("cuda_build_version", &cuda::build_version);
    m.def("cuda_driver_version", &cuda::driver_version);
    m.def("cuda_moments", &cuda_moments);
    m.def("cuda_gradient_moments", &cuda_gradient_moments);
    m.def("cuda_channel_products", &cuda_channel_products);
}

#else

void bind_cuda(py::module_& m) { m.attr("has_cuda") = false; }

#endif

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "Torch-free kernels of zest_fast; use them through zest_fast.kernels.";
#ifdef _OPENMP
    m.attr("has_openmp") = true;
#else
    m.attr("has_openmp") = false;  // one thread, whatever `threads` says
#endif
    m.def("moments", &moments);
    m.def("gradient_moments", &gradient_moments);
    m.def("channel_products", &channel_products);
    m.def("squared_channel_products", &squared_channel_products);
    m.def("silu_gated_backward", &silu_gated_backward);
    m.def("interval_bits", &interval_bits);
    m.def("masked", &masked);
    bind_cuda(m);
}
