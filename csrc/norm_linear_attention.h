// norm_linear_attention: the contract of its kernels.
//
// Per query head h (kv head h / (q_heads / kv_heads)), with R_n the rotation of both halves by position n, or none:
//   phi_q(q) = [w 1(q > 0); w 1(q < 0)], w = (|q| / r)^p, r = sqrt(|q|^2 + norm_eps^2), p = lam (tau + tanh(beta r))
//   phi_k(k) = [m 1(k > 0); m 1(k < 0)], m = |k|^key_power                                             (split)
//   phi_q = [w cos th; w sin th], th = pi/4 tanh(alpha q / r), and phi_k = [m cos th'; m sin th'] of k / |k|  (cosine)
//   both = [x+^P; x-^P] with a power P per channel; the opposite map swaps phi_q's halves               (pola)
//   both = elu(x) + 1, of d features                                                                   (mala)
//   S = s0 + sum_j R phi_k(k_j) v_j^T,  z = z0 + sum_j phi_k(k_j)   (rope_both: of R phi_k, and phi_q below too)
//   D_i = phi_q(q_i) . z + eps e,  o_i = S^T R phi_q(q_i) / D_i,  e = tokens in z if `mean`, else 1
//   mala: x = phi_q . z / (sqrt(d) e), o_i = (1 + 1 / (x + eps)) S^T R phi_q / (sqrt(d) e) - x V / e, V = sum of values,
//   which is the last row of S; bidirectional and without a gate
//   o_i *= silu(gate_i)
// where sums run over the sequence, or, causal, over j <= i. A feature of 0^p is 0, and so is its gradient; a zero query
// has o = 0. A NaN in a row of q reaches that row of o, one in k or v all rows that attend to it. Backward: section 2 of the method's gradients, written out in docs/ops/norm_linear_attention.md.
//
// Conventions. T is the compute type, float or double; features, sums and gradients are made in it. Data of q, k, v,
// gate, o and their gradients has `dtype`, a contiguous last dimension, and any strides of the others. States are contiguous,
// S [sequences, kv_heads, rows, v_dim] with rows in the order of the features (2 dim, or dim + 1 for mala),
// z [sequences, kv_heads, features]. Sequence s is batch s, or, packed, tokens offsets[s] .. offsets[s + 1] - 1 of batch
// 0. Its token i is at position start[s] + i of the tables. Deterministic; nothing aliases but where said.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace pyelastic {

enum class FeatureMap : int { split = 0, cosine = 1, pola = 2, pola_opposite = 3, mala = 4 };

// [batch, tokens, heads, width]; strides in elements.
struct HeadsView {
  void* data;  // null: none
  std::int64_t batch, token, head;
};

template <class T>
struct NormLinearAttention {
  Dtype dtype;
  std::int64_t sequences, queries, keys;  // tokens per batch; packed: of all
  std::int64_t q_heads, kv_heads, dim, v_dim;
  HeadsView q, k, v, gate;
  HeadsView o;  // where the output goes; backward: its gradient
  HeadsView dq, dk, dv, dgate;
  const T* params;  // [3, q_heads]: lam, tau, beta; pola: P [q_heads, dim]; mala: null
  const T *sin, *cos;  // [positions, dim / 2] or null; pairs are (2j, 2j + 1)
  const std::int64_t *start, *offsets;  // [sequences] or null (0); [sequences + 1] or null
  const T *s0, *z0;  // or null
  const std::int64_t* count;  // [sequences] or null (0): tokens in s0, z0
  FeatureMap map;
  bool rope_both, causal, mean;
  T key_power, alpha, eps, norm_eps;
};

// Sequences are cut into parts of `part` tokens, a multiple of kNlaTile; part j of sequence s is slot first[s] + j.
constexpr std::int64_t kNlaTile = 64;

// CPU. Arrays per slot are [slots, kv_heads, ..] in the compute type.
struct NlaParts {
  std::int64_t part;
  bool walk;  // causal, one part a sequence: the state is carried
  const std::int64_t *first_q, *first_k;  // [sequences + 1], of queries and of keys
};

template <class T>
struct NlaKernels {
  // Sums of each part's keys: s [slots, kv_heads, rows, v_dim], z [slots, kv_heads, features].
  void (*states)(const NormLinearAttention<T>& x, const NlaParts& parts, T* s, T* z, int threads);
  // x [slots, heads, width] -> total [sequences, heads, width] = initial (or 0) + the parts in their order, or in the
  // reverse one; `exclusive`: each part becomes the sum before it.
  void (*scan)(const std::int64_t* first, std::int64_t sequences, std::int64_t heads, std::int64_t width, const T* initial,
               bool exclusive, bool reverse, T* parts, T* total, int threads);
  // o. s, z: bidirectional, the whole's; causal, those before each slot. Causal with one part a sequence: s_end, z_end
  // [sequences, ..] receive the state, and may be x.s0 and x.z0.
  void (*forward)(const NormLinearAttention<T>& x, const NlaParts& parts, const T* s, const T* z, T* s_end, T* z_end,
                  int threads);
};

template <class T>
struct NlaBackward {
  // dq and, with a gate, dgate; d and dd [batch, queries, q_heads], the denominator and its gradient (mala: of
  // phi_q . z); ds, dz: sums of each part (or null); dparams [slots, q_heads, 3], pola: [slots, q_heads, dim].
  void (*queries)(const NormLinearAttention<T>& x, const NlaParts& parts, const T* s, const T* z, T* d, T* dd, T* ds, T* dz,
                  double* dparams, int threads);
  // dk, dv. ds, dz: bidirectional, the whole's; causal, gradients of the state after each slot, which become those before
  // it. dparams, pola: [slots of keys, kv_heads, dim].
  void (*keys)(const NormLinearAttention<T>& x, const NlaParts& parts, const T* d, const T* dd, T* ds, T* dz, double* dparams,
               int threads);
};

// Quadratic order: queries and keys of at most kNlaTile tokens, no states, not packed, not mala. dparams [sequences, q_heads,
// 3], pola: [sequences, q_heads, dim] and dpowers [sequences, kv_heads, dim].
template <class T>
struct NlaShort {
  void (*forward)(const NormLinearAttention<T>& x, int threads);
  void (*backward)(const NormLinearAttention<T>& x, double* dparams, double* dpowers, int threads);
};

#define PYELASTIC_DECLARE(ISA)                            \
  namespace ISA {                                         \
  extern const NlaKernels<float> nla_float;               \
  extern const NlaKernels<double> nla_double;             \
  extern const NlaBackward<float> nla_backward_float;     \
  extern const NlaBackward<double> nla_backward_double;   \
  extern const NlaShort<float> nla_short_float;           \
  extern const NlaShort<double> nla_short_double;         \
  }
PYELASTIC_DECLARE(baseline)
PYELASTIC_DECLARE(avx2)
PYELASTIC_DECLARE(avx512)
#undef PYELASTIC_DECLARE

// Whole passes: the kernels above in their order, so that a short sequence pays for one call. Not compiled per instruction set.
// What a pass keeps between its kernels lies in `room`; too little of it is a std::length_error.
struct NlaRoom {
  void* data;  // aligned to 64 bytes
  std::int64_t bytes;
};

template <class T>
struct NlaPasses {
  const NlaKernels<T>& forward_kernels;
  const NlaBackward<T>& backward_kernels;
  const NlaShort<T>& quadratic;

  // o, and the state after all tokens, s and z, which may be x.s0 and x.z0. Null s: quadratic order.
  void forward(const NormLinearAttention<T>& x, const NlaParts& parts, NlaRoom room, T* s, T* z, int threads) const;
  // dq, dk, dv, dgate; dparams, shaped as params; ds and dz, of s0 and z0. s, z: what forward left, read in the bidirectional
  // form; s_grad, z_grad: their gradients or null. Null ds: quadratic order.
  void backward(const NormLinearAttention<T>& x, const NlaParts& parts, NlaRoom room, const T* s, const T* z, const T* s_grad,
                const T* z_grad, T* dparams, T* ds, T* dz, int threads) const;
};

// CUDA: sums in float32, widths up to kNlaWidest. Tensor cores multiply where nla_mma_fits (cuda/norm_linear_attention_mma.h),
// which rounds features, weights and states to bfloat16; all else is float32 throughout. All pointers are the device's; asynchronous on `stream`.
namespace cuda {

constexpr std::int64_t kNlaTokens = 16, kNlaMmaTokens = 64;  // of a tile: nla_tile says which
constexpr std::int64_t kNlaWidest = 128;  // dim and v_dim

// How blocks divide the sequences into pieces (tiles or parts): `count` of them in all and `each` per sequence; packed:
// the sequence of each and its place in it.
struct NlaSlots {
  std::int64_t count, each;
  const std::int64_t *sequence, *place;
};

// Tokens of a tile of x.
std::int64_t nla_tile(const NormLinearAttention<float>& x);
// Sums over each part of `part` tokens, a multiple of kNlaMmaTokens: s [parts, kv_heads, rows, v_dim], z [parts, kv_heads, features].
void nla_state(const NormLinearAttention<float>& x, NlaSlots parts, std::int64_t part, float* s, float* z, void* stream);
// As NlaKernels::scan, of `tokens` per sequence in parts of `part`, `each` of them.
void nla_scan(const NormLinearAttention<float>& x, std::int64_t tokens, std::int64_t part, std::int64_t each,
              std::int64_t width, const float* initial, bool exclusive, bool reverse, float* parts, float* total,
              void* stream);
// o. s, z: of the whole, or causal, before each part; each: parts of a sequence. Null in nla_forward and nla_queries, as ds and
// dz in nla_keys: quadratic order, without states ("alone"). Then x is not packed, not mala and has no s0 and z0, queries and
// keys are 1 .. `part` tokens, and a query meets all keys of its sequence, causal those up to it, by weights.
void nla_forward(const NormLinearAttention<float>& x, NlaSlots tiles, std::int64_t part, std::int64_t each, const float* s,
                 const float* z, void* stream);
// dq and, with a gate, dgate; d, dd [batch * queries, q_heads]; dparams [tiles, q_heads, 3], pola [tiles, q_heads, dim].
// States of mala have 2 dim rows here too, of which row dim sums the values; d is then the reciprocal of c (the factor of
// R phi_q), dd the gradient of phi_q . z, and dparams [batch * queries, q_heads] what the readout takes of row dim, which
// nla_grad_state gets as `last`.
void nla_queries(const NormLinearAttention<float>& x, NlaSlots tiles, std::int64_t part, std::int64_t each, const float* s,
                 const float* z, float* d, float* dd, float* dparams, void* stream);
// Sums over the queries of each part: ds [parts, q_heads, rows, v_dim], dz [parts, q_heads, features].
void nla_grad_state(const NormLinearAttention<float>& x, NlaSlots parts, std::int64_t part, const float* d, const float* dd,
                    const float* last, float* ds, float* dz, void* stream);
// dk, dv. ds, dz: of the whole, or causal, after each part; dparams, pola: [tiles, kv_heads, dim].
void nla_keys(const NormLinearAttention<float>& x, NlaSlots tiles, std::int64_t part, std::int64_t each, const float* d,
              const float* dd, const float* ds, const float* dz, float* dparams, void* stream);

// Whole passes, a block per sequence and kv head with the state kept in it: one launch each, no parts.
// Whether there is room for that: where tensor cores multiply, dim and v_dim up to 64.
bool nla_whole_fits(const NormLinearAttention<float>& x);
// o, and the state after all tokens, s and z, which may be x.s0 and x.z0.
void nla_whole_forward(const NormLinearAttention<float>& x, float* s, float* z, void* stream);
// dq, dk, dv and, with a gate, dgate; ds, dz, of s0 and z0. s, z: what forward left, read in the bidirectional form; s_grad,
// z_grad: their gradients or null; d, dd: room for [batch * queries, q_heads]. dparams [tiles of queries, q_heads, 3], pola
// [tiles of queries, q_heads, dim] and dpowers [tiles of keys, kv_heads, dim]: of tiles of kNlaMmaTokens, those of sequence s from
// s ceil(tokens / kNlaMmaTokens) on, packed from offsets[s] / kNlaMmaTokens + s on; those of no tokens are not written.
void nla_whole_backward(const NormLinearAttention<float>& x, const float* s, const float* z, const float* s_grad,
                        const float* z_grad, float* d, float* dd, float* dparams, float* dpowers, float* ds, float* dz,
                        void* stream);

}  // namespace cuda

}  // namespace pyelastic
