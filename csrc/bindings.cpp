// The Python module pyelastic._C: integers in, nothing allocated, the GIL released.
//
// Pointers come as integers (tensor.data_ptr(), 0 for none), sizes and strides in elements. Shapes,
// dtypes and devices are checked in pyelastic/ops/, which is the only caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings_cuda.h"
#include "bindings_norm_linear_attention.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "fira.h"
#include "gemm.h"
#include "margin_softmax.h"
#include "maxsim.h"
#include "projection.h"

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

// The table of this machine's instruction set.
#ifdef PYELASTIC_HAVE_X86_ISAS
#define PYELASTIC_CHOOSE(table)                                      \
  (pyelastic::isa() >= Isa::avx512 ? pyelastic::avx512::table        \
   : pyelastic::isa() == Isa::avx2 ? pyelastic::avx2::table          \
                                   : pyelastic::baseline::table)
#else
#define PYELASTIC_CHOOSE(table) pyelastic::baseline::table
#endif

// A pointer to the table of products, which knows more sets, or null without AVX2.
#ifdef PYELASTIC_HAVE_AMX
#define PYELASTIC_AMX_OR(table, other) (pyelastic::isa() == Isa::amx ? &pyelastic::amx::table : other)
#else
#define PYELASTIC_AMX_OR(table, other) other
#endif
#ifdef PYELASTIC_HAVE_X86_ISAS
#define PYELASTIC_CHOOSE_BFLOAT16(table, other) \
  PYELASTIC_AMX_OR(table, (pyelastic::isa() == Isa::avx512bf16 ? &pyelastic::avx512bf16::table : other))
#define PYELASTIC_CHOOSE_PRODUCTS(table)                                                  \
  PYELASTIC_CHOOSE_BFLOAT16(table, (pyelastic::isa() == Isa::avx512 ? &pyelastic::avx512::table \
                                    : pyelastic::isa() == Isa::avx2 ? &pyelastic::avx2::table   \
                                                                    : nullptr))
#else
#define PYELASTIC_CHOOSE_BFLOAT16(table, other) other
#define PYELASTIC_CHOOSE_PRODUCTS(table) nullptr
#endif

template <class T>
const pyelastic::FiraKernels<T>& fira() {
  if constexpr (sizeof(T) == sizeof(float)) {
    return PYELASTIC_CHOOSE(fira_float);
  } else {
    return PYELASTIC_CHOOSE(fira_double);
  }
}

const pyelastic::FiraProducts* fira_products() { return PYELASTIC_CHOOSE_PRODUCTS(fira_products); }
const pyelastic::Gemm* gemm() { return PYELASTIC_CHOOSE_PRODUCTS(gemm); }

bool is_intel() {
#ifdef PYELASTIC_HAVE_X86_ISAS
  __builtin_cpu_init();
  return __builtin_cpu_is("intel") != 0;
#else
  return false;
#endif
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

void bind_fira_products(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> nogil;
  m.def("fira_room", [](const FiraProblem& p, int dtype) {
    return fira_products() == nullptr ? Int{-1} : fira_products()->room(problem(p), static_cast<Dtype>(dtype));
  });
  m.def("fira_project",
        [](const FiraProblem& p, Pointer g, int dtype, Int g_stride, Pointer basis, int p_dtype, const FiraMoments& s,
           Pointer r, int r_dtype, Pointer squares, Pointer room, int threads) {
          fira_products()->project(problem(p), as<const void>(g), static_cast<Dtype>(dtype), g_stride,
                                   as<const void>(basis), static_cast<Dtype>(p_dtype), moments(s), as<void>(r),
                                   static_cast<Dtype>(r_dtype), as<double>(squares), as<void>(room), threads);
        }, nogil);
  m.def("fira_apply",
        [](const FiraProblem& p, Pointer r, int r_dtype, const FiraMoments& s, Pointer basis, int p_dtype, Pointer f,
           Pointer g, Int g_stride, Pointer w, Int w_stride, int dtype, double size, double keep,
           const std::tuple<bool, std::uint64_t, std::uint32_t, Pointer>& rounding, Pointer room, int threads) {
          const auto& [stochastic, seed, step, remainder] = rounding;
          fira_products()->apply(problem(p), as<const void>(r), static_cast<Dtype>(r_dtype), moments(s),
                                 as<const void>(basis), static_cast<Dtype>(p_dtype), as<const float>(f),
                                 as<const void>(g), g_stride, as<void>(w), w_stride, static_cast<Dtype>(dtype), size,
                                 keep, {stochastic, seed, step, as<void>(remainder)}, as<void>(room), threads);
        }, nogil);
}

// (data, dtype, row, column)
using GemmOperand = std::tuple<Pointer, int, Int, Int>;
pyelastic::GemmOperand gemm_operand(const GemmOperand& x) {
  const auto& [data, dtype, row, column] = x;
  return {as<const void>(data), static_cast<Dtype>(dtype), row, column};
}

void bind_gemm(py::module_& m) {
  m.def("is_intel", is_intel);
  m.def("gemm_room", [](Int rows, Int columns) { return gemm() == nullptr ? Int{-1} : gemm()->room(rows, columns); });
  m.def("gemm",
        [](const GemmOperand& a, const GemmOperand& b, Pointer c, Int rows, Int columns, Int depth, bool add, Pointer room,
           int threads) {
          gemm()->run(gemm_operand(a), gemm_operand(b), as<float>(c), rows, columns, depth, add, as<void>(room), threads);
        }, py::call_guard<py::gil_scoped_release>());
}

template <class T>
const pyelastic::MarginSoftmaxKernels<T>& margin_softmax() {
  if constexpr (sizeof(T) == sizeof(float)) {
    return PYELASTIC_CHOOSE(margin_softmax_float);
  } else {
    return PYELASTIC_CHOOSE(margin_softmax_double);
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

// Sides as Python passes them: (pointer, dtype, stride, offsets, count, tokens, bits, codes, centroids, buckets).
using Side = std::tuple<Pointer, int, Int, Pointer, Int, Int, int, Pointer, Pointer, Pointer>;
pyelastic::Tokens tokens(const Side& side) {
  const auto& [data, dtype, stride, offsets, count, total, bits, codes, centroids, buckets] = side;
  return {as<const void>(data), static_cast<Dtype>(dtype), stride, as<const Int>(offsets), count, total,
          {bits, as<const std::int32_t>(codes), as<const float>(centroids), as<const float>(buckets)}};
}

// (queries, documents, dim, d_mask, floor, pair_q, pair_d, pairs, max_q, prefixes, planes, topk, temperature, q_inv, d_inv)
using MaxSim = std::tuple<Side, Side, Int, Pointer, Pointer, Pointer, Pointer, Int, Int, Pointer, int, int, double,
                          Pointer, Pointer>;
pyelastic::MaxSimProblem maxsim_problem(const MaxSim& m) {
  const auto& [q, d, dim, d_mask, floor, pair_q, pair_d, pairs, max_q, prefixes, planes, topk, temperature, q_inv,
               d_inv] = m;
  return {tokens(q), tokens(d), dim, as<const std::uint8_t>(d_mask), as<const std::uint8_t>(floor), as<const Int>(pair_q),
          as<const Int>(pair_d), pairs, max_q, as<const Int>(prefixes), planes, topk, temperature, as<const void>(q_inv),
          as<const void>(d_inv)};
}

template <class T>
const pyelastic::MaxSimKernels<T>& maxsim() {
  if constexpr (sizeof(T) == sizeof(float)) {
    return *PYELASTIC_CHOOSE_BFLOAT16(maxsim_float, &PYELASTIC_CHOOSE(maxsim_float));
  } else {
    return PYELASTIC_CHOOSE(maxsim_double);
  }
}

template <class T>
const pyelastic::MaxSimBackward<T>& maxsim_backward() {
  if constexpr (sizeof(T) == sizeof(float)) {
    return PYELASTIC_CHOOSE(maxsim_backward_float);
  } else {
    return PYELASTIC_CHOOSE(maxsim_backward_double);
  }
}

template <class T>
void bind_maxsim(py::module_& m, const char* suffix) {
  const auto name = [&](const char* stem) { return std::string("maxsim_") + stem + suffix; };
  const py::call_guard<py::gil_scoped_release> nogil;
  m.def(name("block").c_str(), [] { return maxsim<T>().block(); });
  m.def(name("pairs").c_str(), [] { return maxsim<T>().pairs(); });
  m.def(name("norms").c_str(), [](const Side& x, Pointer prefixes, int planes, Pointer inverse, int threads) {
    maxsim<T>().norms(tokens(x), as<const Int>(prefixes), planes, as<T>(inverse), threads);
  }, nogil);
  m.def(name("pack").c_str(),
        [](const Side& q, Int dim, Pointer groups, Pointer blocks, Int n, Pointer packed, bool pairs, int threads) {
          maxsim<T>().pack(tokens(q), dim, as<const Int>(groups), as<const Int>(blocks), n, as<void>(packed), pairs,
                           threads);
        }, nogil);
  m.def(name("forward").c_str(),
        [](const MaxSim& p, Pointer packed, bool pairs, Pointer groups, Pointer blocks, Int n, Pointer weights,
           Pointer scores, Pointer maxima, Pointer winners, bool narrow, int threads) {
          maxsim<T>().forward(maxsim_problem(p), as<const void>(packed), pairs, as<const Int>(groups),
                              as<const Int>(blocks), n, as<const T>(weights), as<T>(scores), as<T>(maxima),
                              {as<void>(winners), narrow}, threads);
        }, nogil);
  // `winners` are the maxima of a smooth forward.
  m.def(name("backward").c_str(),
        [](const MaxSim& p, bool of_queries, Pointer scores, Pointer weights, Pointer per_token, Pointer winners,
           bool narrow, Pointer order, Pointer first, Pointer out, int dtype, int threads) {
          const auto problem = maxsim_problem(p);
          const pyelastic::MaxSimGradient<T> gradient{as<const T>(scores), as<const T>(weights), as<const T>(per_token)};
          const pyelastic::PairOrder pairs{as<const Int>(order), as<const Int>(first)};
          const auto& kernels = maxsim_backward<T>();
          const pyelastic::Winners won{as<void>(winners), narrow};
          if (problem.temperature > 0 && of_queries) {
            kernels.smooth_queries(problem, gradient, as<const T>(winners), pairs, as<T>(out), threads);
          } else if (problem.temperature > 0) {
            kernels.smooth_documents(problem, gradient, as<const T>(winners), pairs, as<void>(out),
                                     static_cast<Dtype>(dtype), threads);
          } else if (of_queries) {
            kernels.queries(problem, gradient, won, pairs, as<T>(out), threads);
          } else {
            kernels.documents(problem, gradient, won, pairs, as<void>(out), static_cast<Dtype>(dtype), threads);
          }
        }, nogil);
}

template <class T>
const pyelastic::ProjectionKernels<T>& projection() {
  if constexpr (sizeof(T) == sizeof(float)) {
    return PYELASTIC_CHOOSE(projection_float);
  } else {
    return PYELASTIC_CHOOSE(projection_double);
  }
}

// A matrix of rows as Python passes it: (pointer, dtype, stride).
using Matrix = std::tuple<Pointer, int, Int>;
pyelastic::MatrixView matrix(const Matrix& m) {
  const auto& [data, dtype, stride] = m;
  return {as<const void>(data), static_cast<Dtype>(dtype), stride};
}

template <class T>
void bind_projection(py::module_& m, const char* suffix) {
  const auto name = [&](const char* stem) { return std::string("projection_") + stem + suffix; };
  const py::call_guard<py::gil_scoped_release> nogil;
  m.def(name("forward").c_str(),
        [](Pointer z, Pointer bias, const Matrix& residual, Int rows, Int dim, const Matrix& out, Pointer inverse,
           int threads) {
          const auto& [data, dtype, stride] = out;
          projection<T>().forward(as<const T>(z), as<const T>(bias), matrix(residual), rows, dim, as<void>(data),
                                  static_cast<Dtype>(dtype), stride, as<T>(inverse), threads);
        }, nogil);
  m.def(name("backward").c_str(),
        [](const Matrix& grad, const Matrix& y, Pointer inverse, Int rows, Int dim, bool parts, Pointer dz,
           int threads) {
          projection<T>().backward(matrix(grad), matrix(y), as<const T>(inverse), rows, dim, parts, as<void>(dz), threads);
        }, nogil);
}

template <class T>
const pyelastic::NlaKernels<T>& nla() {
  if constexpr (sizeof(T) == sizeof(float)) {
    return PYELASTIC_CHOOSE(nla_float);
  } else {
    return PYELASTIC_CHOOSE(nla_double);
  }
}

template <class T>
const pyelastic::NlaBackward<T>& nla_backward() {
  if constexpr (sizeof(T) == sizeof(float)) {
    return PYELASTIC_CHOOSE(nla_backward_float);
  } else {
    return PYELASTIC_CHOOSE(nla_backward_double);
  }
}

template <class T>
const pyelastic::NlaShort<T>& nla_short() {
  if constexpr (sizeof(T) == sizeof(float)) {
    return PYELASTIC_CHOOSE(nla_short_float);
  } else {
    return PYELASTIC_CHOOSE(nla_short_double);
  }
}

template <class T>
pyelastic::NlaPasses<T> nla_passes() {
  return {nla<T>(), nla_backward<T>(), nla_short<T>()};
}

template <class T>
void bind_norm_linear_attention(py::module_& m, const char* suffix) {
  const auto name = [&](const char* stem) { return std::string("norm_linear_attention_") + stem + suffix; };
  const py::call_guard<py::gil_scoped_release> nogil;
  using pyelastic::NlaArguments, pyelastic::NlaPartsArguments, pyelastic::NlaRoomArguments;
  m.def(name("forward").c_str(),
        [](const NlaArguments& x, const NlaPartsArguments& parts, const NlaRoomArguments& room, Pointer s, Pointer z,
           int threads) {
          nla_passes<T>().forward(pyelastic::norm_linear_attention_problem<T>(x), pyelastic::nla_parts(parts),
                                  pyelastic::nla_room(room), as<T>(s), as<T>(z), threads);
        }, nogil);
  m.def(name("backward").c_str(),
        [](const NlaArguments& x, const NlaPartsArguments& parts, const NlaRoomArguments& room, Pointer s, Pointer z,
           Pointer s_grad, Pointer z_grad, Pointer dparams, Pointer ds, Pointer dz, int threads) {
          nla_passes<T>().backward(pyelastic::norm_linear_attention_problem<T>(x), pyelastic::nla_parts(parts),
                                   pyelastic::nla_room(room), as<const T>(s), as<const T>(z), as<const T>(s_grad),
                                   as<const T>(z_grad), as<T>(dparams), as<T>(ds), as<T>(dz), threads);
        }, nogil);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of pyelastic. Private: call pyelastic.ops instead.";
  m.def("isa", [] { return pyelastic::isa_name(pyelastic::isa()); });
  m.def("use_openmp", [](Pointer gomp_parallel) { pyelastic::use_openmp(as<void>(gomp_parallel)); });
  bind_fira<float>(m, "_f32");
  bind_fira<double>(m, "_f64");
  bind_fira_products(m);
  bind_gemm(m);
  bind_margin_softmax<float>(m, "_f32");
  bind_margin_softmax<double>(m, "_f64");
  bind_maxsim<float>(m, "_f32");
  bind_maxsim<double>(m, "_f64");
  bind_norm_linear_attention<float>(m, "_f32");
  bind_norm_linear_attention<double>(m, "_f64");
  bind_projection<float>(m, "_f32");
  bind_projection<double>(m, "_f64");
#ifdef PYELASTIC_HAVE_CUDA
  pyelastic::bind_cuda(m);
#endif
}
