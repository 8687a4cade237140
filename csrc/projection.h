// projection: the contract of its kernels.
//
//   z_i = W x_i + b (+ r_i, or + R r_i),  y_i = z_i / max(|z_i|, 1e-12) if normalize, else z_i
// and backward, from the gradient g_i of y_i:
//   dz_i = (g_i - <g_i, y_i> y_i) / |z_i|  (g_i / 1e-12 where the norm was clamped), or g_i
//   dW = sum_i dz_i x_i^T, db = sum_i dz_i, dx_i = W^T dz_i, dr_i = dz_i or R^T dz_i, dR = sum_i dz_i r_i^T
//
// Division of labour: the launcher (pyelastic/ops/_projection.py) walks over chunks of rows. Per chunk the BLAS that torch
// carries makes the products, `forward` turns W x (+ R r) into y in its only store, and `backward` makes dz, from which
// the BLAS makes the gradients. z of all rows never exists. On CUDA `projection_linear` makes y of 16-bit operands whole,
// and z of no row exists.
//
// Conventions. T is the compute type, float or double. Matrices are row-major with contiguous columns; strides are those
// of rows, in elements. Deterministic: a row is owned by one thread (CPU), or by one warp or block (CUDA).
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace pyelastic {

// A matrix of rows; data may be null where a function says so.
struct MatrixView {
  const void* data;
  Dtype dtype;
  std::int64_t stride;
};

template <class T>
struct ProjectionKernels {
  // z [rows, dim] contiguous: W x. bias [dim] or null, residual (data may be null) [rows, dim]. out [rows, dim] of
  // `dtype`; inverse [rows] = 1 / max(|z|, 1e-12), or null: not normalised.
  void (*forward)(const T* z, const T* bias, MatrixView residual, std::int64_t rows, std::int64_t dim, void* out,
                  Dtype dtype, std::int64_t stride, T* inverse, int threads);
  // dz [rows, dim] contiguous from grad and y; inverse null: not normalised, y is not read. parts: dz is bfloat16,
  // [rows, 2, dim]: dz rounded, and what that leaves; else T.
  void (*backward)(MatrixView grad, MatrixView y, const T* inverse, std::int64_t rows, std::int64_t dim, bool parts,
                   void* dz, int threads);
};

#define PYELASTIC_DECLARE(ISA)                              \
  namespace ISA {                                           \
  extern const ProjectionKernels<float> projection_float;   \
  extern const ProjectionKernels<double> projection_double; \
  }
PYELASTIC_DECLARE(baseline)
PYELASTIC_DECLARE(avx2)
PYELASTIC_DECLARE(avx512)
#undef PYELASTIC_DECLARE

// The same on CUDA, in float. The residual is of out's dtype or float32, grad and y are of one dtype, of which none is
// float64. Asynchronous on `stream`.
namespace cuda {

using Stream = void*;

void projection_forward(const float* z, const float* bias, MatrixView residual, std::int64_t rows, std::int64_t dim,
                        void* out, Dtype dtype, std::int64_t stride, float* inverse, Stream stream);
// parts: dz is bfloat16, [2, rows, dim] with the second part `part` elements after the first: dz rounded, and what that
// leaves; else float.
void projection_backward(MatrixView grad, MatrixView y, const float* inverse, std::int64_t rows, std::int64_t dim,
                         bool parts, void* dz, std::int64_t part, Stream stream);

constexpr std::int64_t kProjectionLinearDim = 256;

// The layer in one kernel. x [rows, depth], weight [dim, depth], residual [rows, residual_depth] with residual_weight
// [dim, residual_depth], or [rows, dim] without (its data null, residual_depth 0), out [rows, dim]: all float16, or all
// bfloat16. The rows of what is multiplied start at multiples of 16 bytes, both depths are multiples of 8, and dim is at
// most kProjectionLinearDim. bias [dim] and inverse [rows] may be null.
struct ProjectionLinear {
  MatrixView x, weight, residual, residual_weight;
  const float* bias;
  std::int64_t rows, dim, depth, residual_depth;
  void* out;
  std::int64_t out_stride;
  float* inverse;
};
void projection_linear(const ProjectionLinear& problem, Stream stream);

}  // namespace cuda

}  // namespace pyelastic
