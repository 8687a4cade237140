// The Python module pyelastic._C: integers in, nothing allocated, the GIL released.
//
// Pointers come as integers (tensor.data_ptr(), 0 for none), sizes and strides in elements. Shapes,
// dtypes and devices are checked in pyelastic/ops/, which is the only caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings_cuda.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "fira.h"
#include "margin_softmax.h"

namespace py = pybind11;
using pyelastic::Dtype;
using pyelastic::Isa;
using Pointer = std::uintptr_t;
using Int = std::int64_t;

namespace {

template <class T>
T* as(Pointer p) {
  return reinterpret_cast<T*>(p);
}

template <class T>
const pyelastic::MarginSoftmaxKernels<T>& margin_softmax() {
  constexpr bool single = sizeof(T) == sizeof(float);
#ifdef PYELASTIC_HAVE_X86_ISAS
  if constexpr (single) {
    if (pyelastic::isa() == Isa::avx512) return pyelastic::avx512::margin_softmax_float;
    if (pyelastic::isa() == Isa::avx2) return pyelastic::avx2::margin_softmax_float;
  } else {
    if (pyelastic::isa() == Isa::avx512) return pyelastic::avx512::margin_softmax_double;
    if (pyelastic::isa() == Isa::avx2) return pyelastic::avx2::margin_softmax_double;
  }
#endif
  if constexpr (single) {
    return pyelastic::baseline::margin_softmax_float;
  } else {
    return pyelastic::baseline::margin_softmax_double;
  }
}

// One block per op and compute type; `suffix` names the type.
template <class T>
void bind_margin_softmax(py::module_& m, const char* suffix) {
  const auto name = [&](const char* stem) { return std::string("margin_softmax_") + stem + suffix; };
  const py::call_guard<py::gil_scoped_release> nogil;
  m.def(name("normalize").c_str(),
        [](Pointer x, int dtype, Int row_stride, Int col_stride, Pointer index, Int rows, Int dim,
           Pointer out, Pointer inv_norm, int threads) {
          const pyelastic::RowsView view{as<const void>(x), static_cast<Dtype>(dtype), row_stride,
                                         col_stride,        as<const Int>(index),      rows, dim};
          margin_softmax<T>().normalize(view, as<T>(out), as<T>(inv_norm), threads);
        }, nogil);
  m.def(name("target_angle").c_str(),
        [](Pointer e_hat, Pointer w_hat_y, Int rows, Int subcenters, Int dim, Pointer theta, Pointer best,
           int threads) {
          margin_softmax<T>().target_angle(as<const T>(e_hat), as<const T>(w_hat_y), rows, subcenters, dim,
                                           as<T>(theta), as<Int>(best), threads);
        }, nogil);
  m.def(name("accumulate").c_str(),
        [](Pointer cosines, Pointer column_scale, Int ld, Int rows, Int classes, Int subcenters, Int first, Pointer labels,
           Pointer threshold, Pointer hard_map, double scale, Pointer max, Pointer sum, Pointer sum_sq,
           Pointer sum_z, Pointer sum_cos, Pointer rank, Pointer max_cos, Pointer cos_target, bool online,
           int threads) {
          const pyelastic::Tile<T> tile{as<T>(cosines), as<const T>(column_scale), ld, rows, classes, subcenters, first,
                                        as<const Int>(labels), as<const T>(threshold),
                                        as<const T>(hard_map), scale};
          const pyelastic::NegativeStats<T> stats{
              as<double>(max), as<double>(sum), as<double>(sum_sq), as<double>(sum_z),
              as<double>(sum_cos), as<Int>(rank), as<T>(max_cos), as<const T>(cos_target), online};
          margin_softmax<T>().accumulate(tile, stats, threads);
        }, nogil);
  m.def(name("gradient").c_str(),
        [](Pointer cosines, Pointer column_scale, Int ld, Int rows, Int classes, Int subcenters, Int first, Pointer labels,
           Pointer threshold, Pointer hard_map, double scale, Pointer lse_neg, Pointer grad_lse,
           Pointer grad_sum, int threads) {
          const pyelastic::Tile<T> tile{as<T>(cosines), as<const T>(column_scale), ld, rows, classes, subcenters, first,
                                        as<const Int>(labels), as<const T>(threshold),
                                        as<const T>(hard_map), scale};
          margin_softmax<T>().gradient(tile, as<const T>(lse_neg), as<const T>(grad_lse),
                                       as<const T>(grad_sum), threads);
        }, nogil);
  m.def(name("add_target").c_str(),
        [](Pointer a, Pointer b, Pointer theta, Pointer grad_theta, Pointer to, Int rows, Int dim, Int first,
           Int count, Pointer out, int threads) {
          margin_softmax<T>().add_target(as<const T>(a), as<const T>(b), as<const T>(theta),
                                         as<const T>(grad_theta), as<const Int>(to), rows, dim, first,
                                         count, as<T>(out), threads);
        }, nogil);
  m.def(name("project").c_str(),
        [](Pointer d, Pointer x, Int x_stride, bool x_is_unit, Pointer inv_norm, Int rows, Int dim,
           Pointer out, int dtype, Int row_stride, Int col_stride, int threads) {
          margin_softmax<T>().project(as<const T>(d), as<const T>(x), x_stride, x_is_unit,
                                      as<const T>(inv_norm), rows, dim, as<void>(out),
                                      static_cast<Dtype>(dtype), row_stride, col_stride, threads);
        }, nogil);
}

template <class T>
const pyelastic::FiraKernels<T>& fira() {
  constexpr bool single = sizeof(T) == sizeof(float);
#ifdef PYELASTIC_HAVE_X86_ISAS
  if constexpr (single) {
    if (pyelastic::isa() == Isa::avx512) return pyelastic::avx512::fira_float;
    if (pyelastic::isa() == Isa::avx2) return pyelastic::avx2::fira_float;
  } else {
    if (pyelastic::isa() == Isa::avx512) return pyelastic::avx512::fira_double;
    if (pyelastic::isa() == Isa::avx2) return pyelastic::avx2::fira_double;
  }
#endif
  if constexpr (single) {
    return pyelastic::baseline::fira_float;
  } else {
    return pyelastic::baseline::fira_double;
  }
}

// (vectors, dim, rank, left, beta1, beta2, eps, factor, correction, a_r, a_n, a_s)
using FiraProblem = std::tuple<Int, Int, Int, bool, double, double, double, double, double, double, double, double>;
pyelastic::FiraProblem problem(const FiraProblem& p) {
  const auto& [vectors, dim, rank, left, beta1, beta2, eps, factor, correction, a_r, a_n, a_s] = p;
  return {vectors, dim, rank, left, beta1, beta2, eps, factor, correction, a_r, a_n, a_s};
}
// (m, v, dtype, m_scale, v_scale)
using FiraMoments = std::tuple<Pointer, Pointer, int, Pointer, Pointer>;
pyelastic::FiraMoments moments(const FiraMoments& s) {
  const auto& [m, v, dtype, m_scale, v_scale] = s;
  return {as<void>(m), as<void>(v), static_cast<Dtype>(dtype), as<float>(m_scale), as<float>(v_scale)};
}

template <class T>
void bind_fira(py::module_& m, const char* suffix) {
  const auto name = [&](const char* stem) { return std::string("fira_") + stem + suffix; };
  const py::call_guard<py::gil_scoped_release> nogil;
  m.def(name("moments").c_str(),
        [](const FiraProblem& p, Pointer r, int r_dtype, Pointer g, int g_dtype, Int g_stride, const FiraMoments& s,
           Pointer squares, int threads) {
          fira<T>().moments(problem(p), as<const void>(r), static_cast<Dtype>(r_dtype), as<const void>(g),
                            static_cast<Dtype>(g_dtype), g_stride, moments(s), as<double>(squares), threads);
        }, nogil);
  m.def(name("scales").c_str(),
        [](const FiraProblem& p, Pointer squares, Pointer gram, Pointer exact, double before, double gamma,
           bool collapse, bool per_matrix, Pointer f) {
          const auto out = fira<T>().scales(problem(p), as<const double>(squares), as<const double>(gram),
                                            as<const double>(exact), before, gamma, collapse, per_matrix, as<T>(f));
          return std::make_tuple(out.norm, out.kept, out.lim, out.kappa);
        }, nogil);
  m.def(name("coefficients").c_str(),
        [](const FiraProblem& p, const FiraMoments& s, Pointer f, Pointer r, int r_dtype, int threads) {
          fira<T>().coefficients(problem(p), moments(s), as<const T>(f), as<void>(r), static_cast<Dtype>(r_dtype),
                                 threads);
        }, nogil);
  m.def(name("apply").c_str(),
        [](const FiraProblem& p, Pointer t, int t_dtype, Pointer f, Pointer g, Int g_stride, Pointer w, Int w_stride,
           int w_dtype, Int first, Int rows, double size, double keep,
           const std::tuple<bool, std::uint64_t, std::uint32_t, Pointer>& rounding, int threads) {
          const auto& [stochastic, seed, step, remainder] = rounding;
          fira<T>().apply(problem(p), as<const void>(t), static_cast<Dtype>(t_dtype), as<const T>(f),
                          as<const void>(g), g_stride, as<void>(w), w_stride, static_cast<Dtype>(w_dtype), first,
                          rows, size, keep, {stochastic, seed, step, as<void>(remainder)}, threads);
        }, nogil);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of pyelastic. Private: call pyelastic.ops instead.";
  m.def("isa", [] { return pyelastic::isa_name(pyelastic::isa()); });
  m.def("use_openmp", [](Pointer gomp_parallel) { pyelastic::use_openmp(as<void>(gomp_parallel)); });
  bind_margin_softmax<float>(m, "_f32");
  bind_margin_softmax<double>(m, "_f64");
  bind_fira<float>(m, "_f32");
  bind_fira<double>(m, "_f64");
#ifdef PYELASTIC_HAVE_CUDA
  pyelastic::bind_cuda(m);
#endif
}
