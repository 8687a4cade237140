// margin_softmax: the contract of its kernels.
//
//   e^_i = e_i / |e_i|, w^_j = w_j / |w_j|, c_ij = <e^_i, w^_j>, theta_i = angle(e^_i, w^_{y_i})
//   h(c) = c, or for hard negatives (c > threshold_i) a0 + a1 c + a2 c^2; z_ij = scale * h(c_ij)
//   lse_neg_i = log sum_{j != y_i} exp z_ij
// and backward, with upstream g_theta_i, g_lse_i, g_sum_i:
//   G_ij = (g_lse_i scale exp(z_ij - lse_neg_i) + g_sum_i) h'(c_ij)  for j != y_i, 0 for j = y_i
//   dE^_i = sum_j G_ij w^_j - g_theta_i t_i,            t_i = (w^_y - c e^) / sin theta
//   dW^_j = sum_i G_ij e^_i - sum_{i: y_i = j} g_theta_i u_i,   u_i = (e^ - c w^_y) / sin theta
//   dx = (dx^ - <dx^, x^> x^) / |x|
// The margin itself touches only theta_i and lse_neg_i, so it stays outside: one pair of kernels serves
// every variant, and no gradient is divided by sin theta where theta -> 0 (t and u are unit vectors).
//
// Division of labour: the launcher (pyelastic/ops/_margin_softmax_cpu.py) walks over chunks of classes.
// Per chunk it calls `normalize`, a GEMM of the BLAS that torch carries, one of the kernels below on the
// [B, chunk] tile that the GEMM wrote, and in backward two more GEMMs and `project`. No array here is
// larger than one tile, and each row of dW is finished in its chunk.
//
// Conventions. T is the compute type, float or double. Matrices of T are row-major and contiguous
// unless a leading dimension `ld` is given, in elements. Strides are in elements and may be anything.
// Labels are int64 in [-1, C); -1 marks an ignored row. Inputs and outputs alias only where said.
// Deterministic: a row or a class is owned by one thread, and sums run in index order, so the thread
// count does not change a bit.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace pyelastic {

// A matrix [rows, dim] in a user's layout; `index`, when given, picks the rows (a negative index is a
// zero row).
struct RowsView {
  const void* data;
  Dtype dtype;
  std::int64_t row_stride, col_stride;
  const std::int64_t* index;  // [rows] or null
  std::int64_t rows, dim;
};

// One tile [rows, classes * subcenters] of the classes first .. first + classes - 1: the GEMM's output.
// A cosine is an element times its column's scale, so that contiguous class rows enter the GEMM as they
// are (scale 1 / |w|) and no normalised copy is written; null means that the rows were unit rows.
template <class T>
struct Tile {
  T* cosines;
  const T* column_scale;  // [classes * subcenters] or null
  std::int64_t ld, rows, classes, subcenters, first;
  const std::int64_t* labels;  // [rows]
  const T* threshold;          // [rows] or null: no hard negatives
  const T* hard_map;           // [3]: a0, a1, a2; null exactly when threshold is
  double scale;
};

// Statistics of the negatives of each row, carried from tile to tile (all [rows]).
//   max      running maximum of z; read and written only when `online`, else all exponents use shift 0
//   sum      sum exp(z - max)
//   sum_sq   sum exp(2 (z - max)), sum_z: sum exp(z - max) z   (null unless wanted; then online)
//   sum_cos  sum h(c)                                          (null unless wanted)
//   rank     number of negatives with c > cos_target, max_cos: largest negative c (null unless wanted)
template <class T>
struct NegativeStats {
  double *max, *sum, *sum_sq, *sum_z, *sum_cos;
  std::int64_t* rank;
  T* max_cos;
  const T* cos_target;
  bool online;
};

template <class T>
struct MarginSoftmaxKernels {
  // out [rows, dim] = x / |x|, inv_norm [rows] = 1 / |x|; both 0 where |x| <= 1e-12. The norm is summed
  // in double, so no float row overflows it. With out null only inv_norm is written; x then holds T, with
  // col_stride 1 and no index.
  void (*normalize)(const RowsView& x, T* out, T* inv_norm, int threads);
  // theta [rows] between e_hat [rows, dim] and the closest of its K candidate rows
  // w_hat_y [rows, K, dim]; best [rows] is that candidate. pi/2 where either vector is zero.
  void (*target_angle)(const T* e_hat, const T* w_hat_y, std::int64_t rows, std::int64_t subcenters,
                       std::int64_t dim, T* theta, std::int64_t* best, int threads);
  void (*accumulate)(const Tile<T>& tile, const NegativeStats<T>& stats, int threads);
  // Overwrites the tile with the gradient of its elements: G times the column's scale. grad_sum may be
  // null. Of the sub-centres of a class only the closest gets a gradient.
  void (*gradient)(const Tile<T>& tile, const T* lse_neg, const T* grad_lse, const T* grad_sum,
                   int threads);
  // out[to_i] -= grad_theta_i (b_i - cos(theta_i) a_i) / sin(theta_i) over the rows with
  // first <= to_i < first + count, in row order; a [rows, dim], b [rows, dim], out [count, dim].
  void (*add_target)(const T* a, const T* b, const T* theta, const T* grad_theta,
                     const std::int64_t* to, std::int64_t rows, std::int64_t dim, std::int64_t first,
                     std::int64_t count, T* out, int threads);
  // out = (d - <d, x^> x^) / |x|, rounded once to the dtype of out; out may be d. x [rows, dim] holds x^;
  // if not x_is_unit it holds x itself, and d has been divided by |x| already (by the column scale).
  void (*project)(const T* d, const T* x, std::int64_t x_stride, bool x_is_unit, const T* inv_norm,
                  std::int64_t rows, std::int64_t dim, void* out, Dtype dtype, std::int64_t row_stride,
                  std::int64_t col_stride, int threads);
};

namespace baseline {
extern const MarginSoftmaxKernels<float> margin_softmax_float;
extern const MarginSoftmaxKernels<double> margin_softmax_double;
}  // namespace baseline
namespace avx2 {
extern const MarginSoftmaxKernels<float> margin_softmax_float;
extern const MarginSoftmaxKernels<double> margin_softmax_double;
}  // namespace avx2
namespace avx512 {
extern const MarginSoftmaxKernels<float> margin_softmax_float;
extern const MarginSoftmaxKernels<double> margin_softmax_double;
}  // namespace avx512

// --- CUDA -----------------------------------------------------------------------------------------------
//
// The same division of labour, launched by pyelastic/ops/_margin_softmax_cuda.py; all pointers are device
// memory, statistics are float, running sums double, nothing synchronises, no atomics. "Operand" is the
// type that enters the GEMMs: float, or half with unit rows, whose elements are below 1.
//
// Gradients travel scaled so that they fit a half: P_ij = kGradientScale G_ij / row_scale_i with
// row_scale_i >= |G_ij|, a normal number chosen by the launcher. Then dE^_i = row_scale_i / kGradientScale
// sum_j P_ij w^_j, and dW^_j takes rows of e^ that were multiplied by row_scale_i / max row_scale.
namespace cuda {

using Stream = void*;
constexpr float kGradientScale = 16384;  // P is exact to 11 bits down to 3.7e-9 of row_scale

// The negatives of a tile: classes first .. first + classes - 1, as Tile above. `stats` is a bit set: 1
// sum_cos, 2 rank and max_cos, 4 moments.
struct Negatives {
  std::int64_t rows, classes, subcenters, first;
  const std::int64_t* labels;
  const float *threshold, *hard_map;  // null, or as in Tile
  float scale;
  int stats;
};

// As NegativeStats; the maximum is always carried. Arrays of unwanted statistics are not touched.
struct RunningStats {
  float* max;
  double *sum, *sum_sq, *sum_z, *sum_cos;
  std::int64_t* rank;
  float* max_cos;
  const float* cos_target;
};

// out [rows, ld] = factor_i x_i / |x_i| in `out_dtype` (float32 or float16), columns dim .. ld - 1 zero;
// factor [rows] may be null (1). inv_norm as above.
void margin_softmax_normalize(const RowsView& x, const float* factor, Dtype out_dtype, void* out, std::int64_t ld,
                              float* inv_norm, Stream stream);
// theta, best [rows]; center [rows] = row of w of the closest sub-centre (-1: ignored); w_inv [rows] its
// inverse norm. w.index [w.rows], when given, maps class rows to rows of w. A label beyond w.rows gives NaN.
void margin_softmax_target(const RowsView& e, const RowsView& w, const std::int64_t* labels,
                           std::int64_t subcenters, float* theta, std::int64_t* best, std::int64_t* center,
                           float* w_inv, Stream stream);
// Statistics of a tile of cosines [rows, classes * subcenters], leading dimension ld.
void margin_softmax_accumulate(const Negatives& n, const float* cosines, std::int64_t ld,
                               const RunningStats& stats, Stream stream);
// P [rows, ldp] in `dtype` from the tile; columns up to ldp that hold no class are zeroed.
void margin_softmax_gradient(const Negatives& n, const float* cosines, std::int64_t ld, const float* lse_neg,
                             const float* grad_lse, const float* grad_sum, const float* row_scale, Dtype dtype,
                             void* p, std::int64_t ldp, Stream stream);
// The two above with the GEMM inside, on tensor cores: e_hat [rows, ld], w_hat [classes, ld] float16;
// subcenters = 1, ld a multiple of 8, columns past D zero. partials: float [7, ceil(classes / 128), rows].
void margin_softmax_accumulate_mma(const Negatives& n, const void* e_hat, const void* w_hat, std::int64_t ld,
                                   float* partials, const RunningStats& stats, Stream stream);
void margin_softmax_gradient_mma(const Negatives& n, const void* e_hat, const void* w_hat, std::int64_t ld,
                                 const float* lse_neg, const float* grad_lse, const float* grad_sum,
                                 const float* row_scale, void* p, std::int64_t ldp, Stream stream);

// What the target's tangents add to a gradient. For dE, row i gets its own; for dW, `order` [rows] sorts
// the samples by `center`, `sorted` [rows] are the centers in that order, and a class row finds its run.
struct Targets {
  const float *theta, *grad_theta;
  const std::int64_t* center;          // [B] row of w
  const std::int64_t *order, *sorted;  // null for dE
};
// out_i = (d_i factor_i - <.., x^> x^ - tangents) / |x|, rounded once to x.dtype; d float [rows, ldd].
//   dE: x = e, y = w, factor [rows] per row;  dW: x = w, whose rows are first, first + 1, .. (or w.index), y = e, factor [1].
void margin_softmax_project_e(const float* d, std::int64_t ldd, const float* factor, const RowsView& e,
                              const float* e_inv, const RowsView& w, const float* w_inv, const Targets& targets,
                              void* out, std::int64_t row_stride, std::int64_t col_stride, Stream stream);
void margin_softmax_project_w(const float* d, std::int64_t ldd, const float* factor, const RowsView& w,
                              const float* w_inv, std::int64_t first, const RowsView& e, const float* e_inv,
                              const Targets& targets, std::int64_t batch, void* out, std::int64_t row_stride,
                              std::int64_t col_stride, Stream stream);

}  // namespace cuda
}  // namespace pyelastic
