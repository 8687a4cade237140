// The CUDA half of pyelastic._C, and the whole of the emulator's module. Device pointers come as integers.
#include "bindings_cuda.h"
#include "bindings_norm_linear_attention.h"

#include <array>
#include <stdexcept>
#include <vector>

#include "fira.h"
#include "margin_softmax.h"
#include "maxsim.h"
#include "mma_gemm.h"
#include "projection.h"

namespace py = pybind11;
using pyelastic::Dtype;
using pyelastic::RowsView;
using Pointer = std::uintptr_t;
using Int = std::int64_t;

namespace {

template <class T>
T* as(Pointer p) {
  return reinterpret_cast<T*>(p);
}

// A matrix as Python passes it: (pointer, dtype, row stride, column stride, index, rows, columns).
using Matrix = std::tuple<Pointer, int, Int, Int, Pointer, Int, Int>;
RowsView view(const Matrix& m) {
  const auto& [data, dtype, row_stride, col_stride, index, rows, dim] = m;
  return {as<const void>(data), static_cast<Dtype>(dtype), row_stride, col_stride, as<const Int>(index), rows, dim};
}

// (rows, classes, subcenters, first, labels, threshold, hard_map, scale, stats)
using Negatives = std::tuple<Int, Int, Int, Int, Pointer, Pointer, Pointer, float, int>;
pyelastic::cuda::Negatives negatives(const Negatives& n) {
  const auto& [rows, classes, subcenters, first, labels, threshold, hard_map, scale, stats] = n;
  return {rows,  classes, subcenters, first, as<const Int>(labels), as<const float>(threshold), as<const float>(hard_map),
          scale, stats};
}

// (max, sum, sum_sq, sum_z, sum_cos, rank, max_cos, cos_target)
using Stats = std::tuple<Pointer, Pointer, Pointer, Pointer, Pointer, Pointer, Pointer, Pointer>;
pyelastic::cuda::RunningStats running(const Stats& s) {
  const auto& [max, sum, sum_sq, sum_z, sum_cos, rank, max_cos, cos_target] = s;
  return {as<float>(max),      as<double>(sum), as<double>(sum_sq), as<double>(sum_z),
          as<double>(sum_cos), as<Int>(rank),   as<float>(max_cos), as<const float>(cos_target)};
}

// (theta, grad_theta, center, order, sorted)
using Targets = std::tuple<Pointer, Pointer, Pointer, Pointer, Pointer>;
pyelastic::cuda::Targets targets(const Targets& t) {
  const auto& [theta, grad_theta, center, order, sorted] = t;
  return {as<const float>(theta), as<const float>(grad_theta), as<const Int>(center), as<const Int>(order),
          as<const Int>(sorted)};
}

void bind_margin_softmax(py::module_& m) {
  namespace cuda = pyelastic::cuda;
  const py::call_guard<py::gil_scoped_release> nogil;
  m.def("cuda_margin_softmax_normalize",
        [](const Matrix& x, Pointer factor, int out_dtype, Pointer out, Int ld, Pointer inv_norm, Pointer stream) {
          cuda::margin_softmax_normalize(view(x), as<const float>(factor), static_cast<Dtype>(out_dtype), as<void>(out),
                                         ld, as<float>(inv_norm), as<void>(stream));
        }, nogil);
  m.def("cuda_margin_softmax_target",
        [](const Matrix& e, const Matrix& w, Pointer labels, Int subcenters, Pointer theta, Pointer best,
           Pointer center, Pointer w_inv, Pointer stream) {
          cuda::margin_softmax_target(view(e), view(w), as<const Int>(labels), subcenters, as<float>(theta),
                                      as<Int>(best), as<Int>(center), as<float>(w_inv), as<void>(stream));
        }, nogil);
  m.def("cuda_margin_softmax_accumulate",
        [](const Negatives& n, Pointer cosines, Int ld, const Stats& stats, Pointer stream) {
          cuda::margin_softmax_accumulate(negatives(n), as<const float>(cosines), ld, running(stats), as<void>(stream));
        }, nogil);
  m.def("cuda_margin_softmax_accumulate_mma",
        [](const Negatives& n, Pointer e_hat, Pointer w_hat, Int ld, Pointer partials, const Stats& stats,
           Pointer stream) {
          cuda::margin_softmax_accumulate_mma(negatives(n), as<const void>(e_hat), as<const void>(w_hat), ld,
                                              as<float>(partials), running(stats), as<void>(stream));
        }, nogil);
  m.def("cuda_margin_softmax_gradient",
        [](const Negatives& n, Pointer cosines, Int ld, Pointer lse_neg, Pointer grad_lse, Pointer grad_sum,
           Pointer row_scale, int dtype, Pointer p, Int ldp, Pointer stream) {
          cuda::margin_softmax_gradient(negatives(n), as<const float>(cosines), ld, as<const float>(lse_neg),
                                        as<const float>(grad_lse), as<const float>(grad_sum),
                                        as<const float>(row_scale), static_cast<Dtype>(dtype), as<void>(p), ldp,
                                        as<void>(stream));
        }, nogil);
  m.def("cuda_margin_softmax_gradient_mma",
        [](const Negatives& n, Pointer e_hat, Pointer w_hat, Int ld, Pointer lse_neg, Pointer grad_lse,
           Pointer grad_sum, Pointer row_scale, Pointer p, Int ldp, Pointer stream) {
          cuda::margin_softmax_gradient_mma(negatives(n), as<const void>(e_hat), as<const void>(w_hat), ld,
                                            as<const float>(lse_neg), as<const float>(grad_lse),
                                            as<const float>(grad_sum), as<const float>(row_scale), as<void>(p), ldp,
                                            as<void>(stream));
        }, nogil);
  m.def("cuda_margin_softmax_project_e",
        [](Pointer d, Int ldd, Pointer factor, const Matrix& e, Pointer e_inv, const Matrix& w, Pointer w_inv,
           const Targets& t, Pointer out, Int row_stride, Int col_stride, Pointer stream) {
          cuda::margin_softmax_project_e(as<const float>(d), ldd, as<const float>(factor), view(e),
                                         as<const float>(e_inv), view(w), as<const float>(w_inv), targets(t),
                                         as<void>(out), row_stride, col_stride, as<void>(stream));
        }, nogil);
  m.def("cuda_margin_softmax_project_w",
        [](Pointer d, Int ldd, Pointer factor, const Matrix& w, Pointer w_inv, Int first, const Matrix& e,
           Pointer e_inv, const Targets& t, Int batch, Pointer out, Int row_stride, Int col_stride, Pointer stream) {
          cuda::margin_softmax_project_w(as<const float>(d), ldd, as<const float>(factor), view(w),
                                         as<const float>(w_inv), first, view(e), as<const float>(e_inv), targets(t),
                                         batch, as<void>(out), row_stride, col_stride, as<void>(stream));
        }, nogil);
}

// (w, g, p, r, c, m, v, m_scale, v_scale, gram, remainder, stats, f, scalars, limiter_norm, step), (rows, columns, rank, g_stride,
// w_stride), seed, left
using FiraMatrix = std::tuple<std::array<Pointer, 16>, std::array<Int, 5>, std::uint64_t, bool>;
pyelastic::cuda::FiraMatrix matrix(const FiraMatrix& x) {
  const auto& [p, size, seed, left] = x;
  return {as<void>(p[0]),  as<const void>(p[1]), as<const void>(p[2]),  as<float>(p[3]), as<void>(p[4]),
          as<void>(p[5]),  as<void>(p[6]),       as<float>(p[7]),       as<float>(p[8]), as<const float>(p[9]),
          as<void>(p[10]), as<float>(p[11]),     as<float>(p[12]),      as<float>(p[13]), as<float>(p[14]),
          as<float>(p[15]), size[0],             size[1],               size[2],         size[3],
          size[4],         seed,                 left};
}

// (dtype, moment_dtype, lr, grad_factor, found_inf), (beta1, beta2, eps, weight_decay, gamma, a_r, a_n, a_s), flags, mma
using FiraShared = std::tuple<std::tuple<int, int, Pointer, Pointer, Pointer>, std::array<double, 8>, int, bool>;
pyelastic::cuda::FiraShared shared(const FiraShared& s) {
  const auto& [head, x, flags, mma] = s;
  const auto& [dtype, moment_dtype, lr, grad_factor, found_inf] = head;
  const auto single = [&](int i) { return static_cast<float>(x[i]); };
  return {static_cast<Dtype>(dtype), static_cast<Dtype>(moment_dtype), as<const double>(lr), as<const float>(grad_factor),
          as<const float>(found_inf), x[0], x[1], single(2), single(3), single(4), single(5), single(6), single(7), flags,
          mma};
}

// What all launches of a group take, read from Python once.
struct FiraGroup {
  std::vector<pyelastic::cuda::FiraMatrix> matrices;
  pyelastic::cuda::FiraShared shared;
};

void bind_fira(py::module_& m) {
  py::class_<FiraGroup>(m, "_CudaFiraGroup", py::module_local())  // the emulator's module has its own
      .def_property_readonly("mma", [](const FiraGroup& group) { return group.shared.mma; });
  m.def("cuda_fira_group", [](const std::vector<FiraMatrix>& matrices, const FiraShared& s) {
    if (matrices.size() > pyelastic::cuda::kFiraGroup) throw std::invalid_argument("fira: too many matrices in a group");
    FiraGroup group{{}, shared(s)};
    for (const auto& x : matrices) group.matrices.push_back(matrix(x));
    return group;
  });
  using Kernel = void (*)(const pyelastic::cuda::FiraMatrix*, int, const pyelastic::cuda::FiraShared&, void*);
  const auto def = [&](const char* name, Kernel kernel) {
    m.def(name, [kernel](const FiraGroup& group, Pointer stream) {
      kernel(group.matrices.data(), static_cast<int>(group.matrices.size()), group.shared, as<void>(stream));
    }, py::call_guard<py::gil_scoped_release>());
  };
  def("cuda_fira_project", pyelastic::cuda::fira_project);
  def("cuda_fira_moments", pyelastic::cuda::fira_moments);
  def("cuda_fira_residual", pyelastic::cuda::fira_residual);
  def("cuda_fira_coefficients", pyelastic::cuda::fira_coefficients);
  def("cuda_fira_apply", pyelastic::cuda::fira_apply);
}

// Tokens as Python passes them: (pointer, dtype, stride, offsets, count, total, bits, codes, centroids, buckets,
// dimension of the centroids).
using Side = std::tuple<Pointer, int, Int, Pointer, Int, Int, int, Pointer, Pointer, Pointer, Int>;
pyelastic::Tokens tokens(const Side& s) {
  const auto& [data, dtype, stride, offsets, count, total, bits, codes, centroids, buckets, dim] = s;
  return {as<const void>(data), static_cast<Dtype>(dtype), stride, as<const Int>(offsets), count, total,
          {bits, as<const std::int32_t>(codes), as<const float>(centroids), as<const float>(buckets), dim}};
}

// (q, d, dim, d_mask, floor, pair_q, pair_d, pairs, max_q, topk, temperature, q_inv, d_inv)
using Problem = std::tuple<Side, Side, Int, Pointer, Pointer, Pointer, Pointer, Int, Int, int, double, Pointer, Pointer>;
pyelastic::MaxSimProblem problem(const Problem& p) {
  const auto& [q, d, dim, d_mask, floor, pair_q, pair_d, pairs, max_q, topk, temperature, q_inv, d_inv] = p;
  return {tokens(q), tokens(d), dim, as<const std::uint8_t>(d_mask), as<const std::uint8_t>(floor),
          as<const Int>(pair_q), as<const Int>(pair_d), pairs, max_q, nullptr, topk > 1 ? topk : 1, topk, temperature,
          as<const void>(q_inv), as<const void>(d_inv)};
}

// (scores, weights, per_token)
using Gradient = std::tuple<Pointer, Pointer, Pointer>;
pyelastic::MaxSimGradient<float> gradient(const Gradient& g) {
  return {as<const float>(std::get<0>(g)), as<const float>(std::get<1>(g)), as<const float>(std::get<2>(g))};
}

// (data, dtype, ld, add, room)
using Output = std::tuple<Pointer, int, Int, bool, Pointer>;
pyelastic::cuda::MaxSimOutput output(const Output& o) {
  const auto& [data, dtype, ld, add, room] = o;
  return {as<void>(data), static_cast<Dtype>(dtype), ld, add, as<float>(room)};
}

void bind_maxsim(py::module_& m) {
  namespace cuda = pyelastic::cuda;
  const py::call_guard<py::gil_scoped_release> nogil;
  m.def("cuda_maxsim_fits", cuda::maxsim_backward_fits);
  m.def("cuda_maxsim_norms",
        [](const Side& x, Int dim, Pointer inverse, Pointer stream) {
          cuda::maxsim_norms(tokens(x), dim, as<float>(inverse), as<void>(stream));
        }, nogil);
  m.def("cuda_maxsim_forward",
        [](const Problem& p, bool mma, bool q_aligned, bool d_aligned, Pointer share, Pointer maxima, Pointer winners,
           bool narrow, Pointer stream) {
          cuda::maxsim_forward(problem(p), {mma, q_aligned, d_aligned}, as<const float>(share), as<float>(maxima),
                               {as<void>(winners), narrow}, as<void>(stream));
        }, nogil);
  m.def("cuda_maxsim_forward_prefixes",
        [](const Problem& p, bool mma, bool q_aligned, bool d_aligned, const std::vector<Int>& prefixes,
           const std::tuple<Int, Int, Int, Int>& strides, Pointer maxima, Pointer winners, bool narrow, Pointer stream) {
          auto of_all = problem(p);
          of_all.prefixes = prefixes.data();
          const auto& [q_inv, d_inv, of_maxima, of_winners] = strides;
          cuda::maxsim_forward_prefixes(of_all, {mma, q_aligned, d_aligned},
                                        {static_cast<int>(prefixes.size()), q_inv, d_inv, of_maxima, of_winners},
                                        as<float>(maxima), {as<void>(winners), narrow}, as<void>(stream));
        }, nogil);
  m.def("cuda_maxsim_scores",
        [](const Problem& p, Pointer maxima, Pointer weights, Pointer scores, Int ld, Pointer stream) {
          cuda::maxsim_scores(problem(p), as<const float>(maxima), as<const float>(weights), as<float>(scores), ld,
                              as<void>(stream));
        }, nogil);
  m.def("cuda_maxsim_backward",
        [](const Problem& p, bool of_queries, Int longest, const Gradient& g, Int ld, Pointer query_of, Pointer share,
           Pointer winners, bool narrow, Pointer order, Pointer first, const Output& out, Pointer stream) {
          cuda::maxsim_backward(problem(p), of_queries, longest, gradient(g), ld, as<const Int>(query_of),
                                as<const float>(share), {as<void>(winners), narrow},
                                {as<const Int>(order), as<const Int>(first)}, output(out), as<void>(stream));
        }, nogil);
  m.def("cuda_maxsim_backward_smooth",
        [](const Problem& p, bool of_queries, const Gradient& g, Int ld, Pointer maxima, Pointer order, Pointer first,
           const Output& out, Pointer stream) {
          cuda::maxsim_backward_smooth(problem(p), of_queries, gradient(g), ld, as<const float>(maxima),
                                       {as<const Int>(order), as<const Int>(first)}, output(out), as<void>(stream));
        }, nogil);
}

// (pointer, dtype, row stride)
using Rows = std::tuple<Pointer, int, Int>;
pyelastic::MatrixView rows_view(const Rows& m) {
  return {as<const void>(std::get<0>(m)), static_cast<Dtype>(std::get<1>(m)), std::get<2>(m)};
}

void bind_projection(py::module_& m) {
  namespace cuda = pyelastic::cuda;
  const py::call_guard<py::gil_scoped_release> nogil;
  m.def("cuda_projection_forward",
        [](Pointer z, Pointer bias, const Rows& residual, Int rows, Int dim, const Rows& out, Pointer inverse,
           Pointer stream) {
          const auto& [data, dtype, stride] = out;
          cuda::projection_forward(as<const float>(z), as<const float>(bias), rows_view(residual), rows, dim,
                                   as<void>(data), static_cast<Dtype>(dtype), stride, as<float>(inverse),
                                   as<void>(stream));
        }, nogil);
  m.def("cuda_projection_backward",
        [](const Rows& grad, const Rows& y, Pointer inverse, Int rows, Int dim, bool parts, Pointer dz, Int part,
           Pointer stream) {
          cuda::projection_backward(rows_view(grad), rows_view(y), as<const float>(inverse), rows, dim, parts,
                                    as<void>(dz), part, as<void>(stream));
        }, nogil);
  m.def("cuda_projection_fits", [](Int dim) { return dim <= cuda::kProjectionLinearDim; });
  m.def("cuda_projection_linear",
        [](const Rows& x, const Rows& weight, const Rows& residual, const Rows& residual_weight, Pointer bias,
           const std::tuple<Int, Int, Int, Int>& sizes, Pointer out, Int out_stride, Pointer inverse, Pointer stream) {
          const auto& [rows, dim, depth, residual_depth] = sizes;
          cuda::projection_linear({rows_view(x), rows_view(weight), rows_view(residual), rows_view(residual_weight),
                                   as<const float>(bias), rows, dim, depth, residual_depth, as<void>(out), out_stride,
                                   as<float>(inverse)},
                                  as<void>(stream));
        }, nogil);
}

void bind_norm_linear_attention(py::module_& m) {
  namespace cuda = pyelastic::cuda;
  const py::call_guard<py::gil_scoped_release> nogil;
  using Arguments = pyelastic::NlaArguments;
  using Slots = std::tuple<Int, Int, Pointer, Pointer>;  // (count, each, sequence, place)
  const auto problem = [](const Arguments& x) { return pyelastic::norm_linear_attention_problem<float>(x); };
  const auto slots = [](const Slots& s) {
    const auto& [count, each, sequence, place] = s;
    return cuda::NlaSlots{count, each, as<const Int>(sequence), as<const Int>(place)};
  };
  m.def("cuda_norm_linear_attention_tile", [=](const Arguments& x) { return cuda::nla_tile(problem(x)); });
  m.def("cuda_norm_linear_attention_state",
        [=](const Arguments& x, const Slots& parts, Int part, Pointer s, Pointer z, Pointer stream) {
          cuda::nla_state(problem(x), slots(parts), part, as<float>(s), as<float>(z), as<void>(stream));
        }, nogil);
  m.def("cuda_norm_linear_attention_scan",
        [=](const Arguments& x, Int tokens, Int part, Int each, Int width, Pointer initial, bool exclusive, bool reverse,
            Pointer parts, Pointer total, Pointer stream) {
          cuda::nla_scan(problem(x), tokens, part, each, width, as<const float>(initial), exclusive, reverse,
                         as<float>(parts), as<float>(total), as<void>(stream));
        }, nogil);
  m.def("cuda_norm_linear_attention_forward",
        [=](const Arguments& x, const Slots& tiles, Int part, Int each, Pointer s, Pointer z, Pointer stream) {
          cuda::nla_forward(problem(x), slots(tiles), part, each, as<const float>(s), as<const float>(z), as<void>(stream));
        }, nogil);
  m.def("cuda_norm_linear_attention_queries",
        [=](const Arguments& x, const Slots& tiles, Int part, Int each, Pointer s, Pointer z, Pointer d, Pointer dd,
            Pointer dparams, Pointer stream) {
          cuda::nla_queries(problem(x), slots(tiles), part, each, as<const float>(s), as<const float>(z), as<float>(d),
                            as<float>(dd), as<float>(dparams), as<void>(stream));
        }, nogil);
  m.def("cuda_norm_linear_attention_grad_state",
        [=](const Arguments& x, const Slots& parts, Int part, Pointer d, Pointer dd, Pointer last, Pointer ds, Pointer dz,
            Pointer stream) {
          cuda::nla_grad_state(problem(x), slots(parts), part, as<const float>(d), as<const float>(dd),
                               as<const float>(last), as<float>(ds), as<float>(dz), as<void>(stream));
        }, nogil);
  m.def("cuda_norm_linear_attention_keys",
        [=](const Arguments& x, const Slots& tiles, Int part, Int each, Pointer d, Pointer dd, Pointer ds, Pointer dz,
            Pointer dparams, Pointer stream) {
          cuda::nla_keys(problem(x), slots(tiles), part, each, as<const float>(d), as<const float>(dd),
                         as<const float>(ds), as<const float>(dz), as<float>(dparams), as<void>(stream));
        }, nogil);
  m.def("cuda_norm_linear_attention_whole", [=](const Arguments& x) { return cuda::nla_whole_fits(problem(x)); });
  m.def("cuda_norm_linear_attention_whole_forward",
        [=](const Arguments& x, Pointer s, Pointer z, Pointer stream) {
          cuda::nla_whole_forward(problem(x), as<float>(s), as<float>(z), as<void>(stream));
        }, nogil);
  m.def("cuda_norm_linear_attention_whole_backward",
        [=](const Arguments& x, Pointer s, Pointer z, Pointer s_grad, Pointer z_grad, Pointer d, Pointer dd, Pointer dparams,
            Pointer dpowers, Pointer ds, Pointer dz, Pointer stream) {
          cuda::nla_whole_backward(problem(x), as<const float>(s), as<const float>(z), as<const float>(s_grad),
                                   as<const float>(z_grad), as<float>(d), as<float>(dd), as<float>(dparams),
                                   as<float>(dpowers), as<float>(ds), as<float>(dz), as<void>(stream));
        }, nogil);
}

}  // namespace

void pyelastic::bind_cuda(py::module_& m) {
  m.def("cuda_mma_gemm",
        [](Pointer a, Int lda, bool a_k_major, Pointer b, Int ldb, bool b_k_major, Int rows, Int columns, Int k,
           Pointer c, Int ldc, int splits, bool add, Pointer stream) {
          pyelastic::cuda::mma_gemm({as<const void>(a), lda, a_k_major}, {as<const void>(b), ldb, b_k_major}, rows,
                                    columns, k, as<float>(c), ldc, splits, add, as<void>(stream));
        }, py::call_guard<py::gil_scoped_release>());
  bind_margin_softmax(m);
  bind_fira(m);
  bind_maxsim(m);
  bind_norm_linear_attention(m);
  bind_projection(m);
}
