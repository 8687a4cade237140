// fira: the contract of its kernels. One low-rank optimizer step of a matrix W [m, n] with gradient G.
//
// Vector view: L vectors x_j of length d. On the right they are the rows of G (L = m, d = n), on the left its
// columns (L = n, d = m). R = X P (L x r) and the moments are stored [m, r] on the right and [r, n] on the left.
//   m <- b1 m + (1 - b1) R, v <- b2 v + (1 - b2) R^2, N = m / (sqrt(v) + eps), from the moments as stored
//   phi_j = |N_j| / (|R_j| + 1e-8)
//   s^2 = sum_j phi_j^2 max(0, q_j),  q_j = |x_j|^2 - 2 a_r |R_j|^2 + a_r^2 R_j^T M R_j,  M = P^T P
//   lim = max(s / (s_prev + 1e-8), gamma) / gamma (1 without history), s_prev <- s / lim
//   f_j = a_s phi_j / lim,  C_j = a_n N_j - a_r f_j R_j,  W <- k W - k step (C P^T + f X),  k = 1 - lr wd
// so the residual S = phi (X - a_r R P^T) never exists; W and G are touched four times in all.
//
// Division of labour on the CPU: the launcher (pyelastic/ops/_fira_cpu.py) calls, with AVX2 or AVX-512, the `project` of
// FiraProducts (R and the moments), `scales`, and the `apply` of FiraProducts (C and W); elsewhere and in double a GEMM of
// torch for R, `moments`, `scales`, `coefficients`, and over blocks of rows of W a GEMM for T = C P^T and the `apply` of
// FiraKernels. A factor c of the gradient (unscaling, clipping, ascent) enters as c R and c x, without a pass of its own.
//
// Conventions. T is the compute type, float or double. G, W have column stride 1 and a row stride in elements; all else
// is contiguous. Sums run in T over at most 1024 terms, then in double; a vector is owned by one thread and the sum
// over vectors is serial, so the thread count does not change a bit. Nothing aliases but where said.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace pyelastic {

// 8-bit moments: blocks of 128 coordinates of one vector share a scale a, the largest absolute value of the block.
// m: int8, 127 sign(x) sqrt(|x| / a); v: uint8, 255 (x / a)^(1/4), at least 1 where x > 0.
constexpr std::int64_t kFiraBlock = 128;
constexpr double kFiraNormEps = 1e-8;
// GPUs: beyond this kappa (FiraLimiter) the residual is formed. The smaller one where P is 16-bit and no gram is given:
// P^T P is then off by up to 2^-9.
constexpr double kFiraKappa = 1e3, kFiraKappaRounded = 16;

struct FiraMoments {
  void *m, *v;                // of `dtype`, or int8 and uint8 when m_scale is given
  Dtype dtype;
  float *m_scale, *v_scale;   // [L, ceil(r / 128)] or null
};

// Sizes of a problem, and the scalars of its step.
struct FiraProblem {
  std::int64_t vectors, dim, rank;  // L, d, r
  bool left;
  double beta1, beta2, eps;
  double factor;      // c
  double correction;  // multiplies N
  double a_r, a_n, a_s;
};

// What became of the limiter: out of `scales`.
struct FiraLimiter {
  double norm;   // s
  double kept;   // s_prev from now on
  double lim;
  double kappa;  // sum_j phi_j^2 |x_j|^2 / s^2: how many digits of s cancellation took; 0 where s = 0
};

// How W is rounded to its dtype. bits: hash(seed, step, element) as pyelastic.eager.fira.noise.
struct FiraRounding {
  bool stochastic;
  std::uint64_t seed;
  std::uint32_t step;
  void* remainder;  // [m, n] of W's dtype and row stride n, or null
};

template <class T>
struct FiraKernels {
  // Updates the moments from R (of `r_dtype`) and writes the squares |x|^2, |R|^2, |N|^2 [3, L].
  void (*moments)(const FiraProblem& p, const void* r, Dtype r_dtype, const void* g, Dtype g_dtype, std::int64_t g_stride,
                  const FiraMoments& moments, double* squares, int threads);
  // f [L] and the limiter. gram [L]: R^T M R, or null for |R|^2; exact [L]: q itself, or null. gamma 0: no limiter;
  // `collapse`: a norm of 0 stays 0, as in the published package; per_matrix: one phi for all vectors.
  FiraLimiter (*scales)(const FiraProblem& p, const double* squares, const double* gram, const double* exact,
                        double before, double gamma, bool collapse, bool per_matrix, T* f);
  // C over R, in place.
  void (*coefficients)(const FiraProblem& p, const FiraMoments& moments, const T* f, void* r, Dtype r_dtype, int threads);
  // Rows first .. first + rows - 1 of W; t [rows, n] (of `t_dtype`) holds C P^T, or null for 0; f is [n] on the left,
  // [m] on the right. size: the step, keep: k.
  void (*apply)(const FiraProblem& p, const void* t, Dtype t_dtype, const T* f, const void* g, std::int64_t g_stride,
                void* w, std::int64_t w_stride, Dtype w_dtype, std::int64_t first, std::int64_t rows, double size,
                double keep, const FiraRounding& rounding, int threads);
};

// The two products, for float32 and 16-bit weights; AVX2 and AVX-512. `basis` is P as stored, of any dtype; `dtype` is that of
// G and W. With AVX-512-BF16 or AMX bfloat16 operands are multiplied as they are (C rounded), all else in float.
struct FiraProducts {
  std::int64_t (*room)(const FiraProblem& p, Dtype dtype);  // bytes of scratch, on a 64-byte boundary
  // R (as the moments lie), the moments' update with it as it was before it was rounded to `r_dtype`, and squares [3, L].
  void (*project)(const FiraProblem& p, const void* g, Dtype dtype, std::int64_t g_stride, const void* basis,
                  Dtype p_dtype, const FiraMoments& moments, void* r, Dtype r_dtype, double* squares, void* room,
                  int threads);
  // All of W. C = a_n N - a_r f R is made as it is packed, and is nowhere in memory.
  void (*apply)(const FiraProblem& p, const void* r, Dtype r_dtype, const FiraMoments& moments, const void* basis,
                Dtype p_dtype, const float* f, const void* g, std::int64_t g_stride, void* w, std::int64_t w_stride,
                Dtype dtype, double size, double keep, const FiraRounding& rounding, void* room, int threads);
};

namespace baseline {
extern const FiraKernels<float> fira_float;
extern const FiraKernels<double> fira_double;
}  // namespace baseline
namespace avx2 {
extern const FiraKernels<float> fira_float;
extern const FiraKernels<double> fira_double;
extern const FiraProducts fira_products;
}  // namespace avx2
namespace avx512 {
extern const FiraKernels<float> fira_float;
extern const FiraKernels<double> fira_double;
extern const FiraProducts fira_products;
}  // namespace avx512
namespace avx512bf16 {
extern const FiraProducts fira_products;
}  // namespace avx512bf16
namespace amx {
extern const FiraProducts fira_products;
}  // namespace amx

// --- CUDA -----------------------------------------------------------------------------------------------
//
// The same step for up to kFiraGroup matrices at once, launched by pyelastic/ops/_fira_cuda.py in this order: project,
// moments, coefficients, apply; near a_r = 1 residual follows moments, which has marked in `scalars` the matrices whose q
// cancelled, and does nothing for the others. The limiter is the work of the last block of moments, and of residual, to
// finish a matrix: the only atomic is the ticket that finds it, and it sums in a fixed order. Descriptors travel as kernel
// arguments, so a launch can be captured in a CUDA graph; nothing synchronises.
namespace cuda {

using Stream = void*;
constexpr int kFiraGroup = 16;

// One matrix. Scratch: r [L, r] float in the moments' layout, c the same in the operand type (the matrix units) or r
// itself, stats [4, L] (|x|^2, then |S_j|^2 / phi_j^2 if formed; |R|^2, |N|^2, R^T M R), f [L], scalars [6] (step size, keep,
// 1 = form the residual, steps taken, the limiter's norm before, and the bits of the ticket).
struct FiraMatrix {
  void* w;
  const void *g, *p;
  float* r;
  void *c, *m, *v;
  float *m_scale, *v_scale;  // of 8-bit moments (FiraMoments), as all of a call are; or null
  const float* gram;  // or null
  void* remainder;    // or null
  float *stats, *f, *scalars, *limiter_norm, *step;
  std::int64_t rows, columns, rank, g_stride, w_stride;
  std::uint64_t seed;
  bool left;
};

// What a call's matrices share. p, g, w have `dtype`; moments are float32, bfloat16 or 8-bit. grad_factor, found_inf: null or a
// number on the device.
struct FiraShared {
  Dtype dtype, moment_dtype;
  const double* lr;
  const float *grad_factor, *found_inf;
  double beta1, beta2;
  float eps, weight_decay, gamma, a_r, a_n, a_s;
  int flags;  // pyelastic.eager.fira.Flags
  bool mma;   // 16-bit operands, all sizes and strides multiples of 8, all addresses of 16 bytes
};

void fira_project(const FiraMatrix* matrices, int count, const FiraShared& shared, Stream stream);
void fira_moments(const FiraMatrix* matrices, int count, const FiraShared& shared, Stream stream);
void fira_residual(const FiraMatrix* matrices, int count, const FiraShared& shared, Stream stream);
void fira_coefficients(const FiraMatrix* matrices, int count, const FiraShared& shared, Stream stream);
void fira_apply(const FiraMatrix* matrices, int count, const FiraShared& shared, Stream stream);

}  // namespace cuda
}  // namespace pyelastic
