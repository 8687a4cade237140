// maxsim: the contract of its kernels.
//
//   s_ijst = <q_is, d_jt>, with unit vectors if `normalize`; t runs over the tokens of document j that its mask keeps
//   m_ijs  = max_t s_ijst, winner a_ijs the first t that has it           (maximum)
//          = mean of the k largest, winners a_ijs1 .. a_ijsk              (top-k)
//          = tau log sum_t exp(s_ijst / tau)                              (smooth)
//   score_ij = sum_s w_is m_ijs
// and backward with c_ijs, the gradient of m_ijs (g_ij w_is, or given per token):
//   dq^_is = sum_j c_ijs d^_{j a_ijs},  dd^_jt = sum_i sum_{s: a_ijs = t} c_ijs q^_is
//   dx = (dx^ - <dx^, x^> x^) / |x| if `normalize`
// An empty document, and under mask_mode="zero" a maximum below 0 of a document with a masked token, gives m = 0
// and winner -1, which has no gradient. A NaN among the similarities of a token is its maximum, at the first NaN.
//
// Conventions. All layouts are packed tokens: rows of a matrix with contiguous columns, and offsets [N + 1]. Which query
// meets which document: all pairs ("cross"), or a list of pairs. Per-token arrays (m, winners, c) are [planes, Nd, Tq] for
// cross and [planes, P, max_q] for a list, with a query's own tokens first. A plane is one of the prefixes
// of the dimension (Matryoshka), or one of the k winners. Winners count from the document's first token; 16 bits (0xffff
// is -1) or 32. Weights of 0 drop a query token whatever it holds.
// Deterministic: each row of dq and dd is owned by one thread (CPU) or warp (CUDA), which adds in the order of the
// other side; a pair's sum over query tokens runs in their order.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace pyelastic {

// How quantised documents are stored. bits 0: plain, by dtype; 8: int8 values, whose scale per token is d_inv;
// 2 or 4: centroids[codes[t]] + buckets[b_k], with the b_k packed from the low bits of each byte up.
struct Codec {
  int bits;
  const std::int32_t* codes;  // [total]
  const float *centroids, *buckets;  // [.., dim], [2^bits]
  std::int64_t dim = 0;              // CUDA: of the centroids, whose prefix a call may take
};

struct Tokens {
  const void* data;
  Dtype dtype;
  std::int64_t stride;  // elements (bytes, if quantised) from token to token
  const std::int64_t* offsets;  // [count + 1]
  std::int64_t count, total;
  Codec codec;
};

struct MaxSimProblem {
  Tokens q, d;
  std::int64_t dim;
  const std::uint8_t* d_mask;  // [d.total] or null: tokens that count
  const std::uint8_t* floor;   // [d.count] or null: documents whose maxima are at least 0
  const std::int64_t *pair_q, *pair_d;  // [pairs], null for all pairs
  std::int64_t pairs, max_q;
  const std::int64_t* prefixes;  // [planes], rising, the last is dim; top-k: planes times dim
  int planes, topk;
  double temperature;  // 0: maximum
  // Factor of each token, compute type, [planes, total], or null: 1 / max(|x|, 1e-12) of each prefix if normalised, the
  // scale of int8 tokens if not. A backward pass takes it for a norm.
  const void *q_inv, *d_inv;
};

// Winners of a forward pass.
struct Winners {
  void* data;
  bool narrow;  // 16 bits
};

// CPU: T is float or double. `packed`: queries in blocks of lanes for the vector units, made by `pack`: in T, or, with
// `pairs`, bfloat16 in pairs of the dimension, [dim / 2][block][2]. Those take bfloat16 queries, bfloat16 or int8
// documents (whose values bfloat16 holds exactly) and even prefixes, sum in float, and exist where `pairs()` says so.
template <class T>
struct MaxSimKernels {
  // inverse[p, t] = 1 / max(|x_t[:prefixes[p]]|, 1e-12).
  void (*norms)(const Tokens& x, const std::int64_t* prefixes, int planes, T* inverse, int threads);
  // Query tokens a block holds.
  std::int64_t (*block)();
  bool (*pairs)();
  // groups [n + 1]: first query of each group; blocks [n + 1]: first block of each group. packed
  // [blocks[n]][dim][block()], zeros where a group's last block has no token.
  void (*pack)(const Tokens& q, std::int64_t dim, const std::int64_t* groups, const std::int64_t* blocks,
               std::int64_t n, void* packed, bool pairs, int threads);
  // One pass over each document per group. weights [q.total] or null; scores [planes or 1, Nq, Nd] or [.., P] or null;
  // maxima (per token, see above) or null; winners.data may be null. A list of pairs needs one group per query.
  void (*forward)(const MaxSimProblem& problem, const void* packed, bool pairs, const std::int64_t* groups,
                  const std::int64_t* blocks, std::int64_t n, const T* weights, T* scores, T* maxima, Winners winners,
                  int threads);
};

// The coefficients c of a backward pass: per_token, or scores [planes, Nq, Nd] or [planes, P] times weights.
template <class T>
struct MaxSimGradient {
  const T *scores, *weights, *per_token;
};

// Order in which a side's pairs are taken, for a list: pairs order[first[i]] .. order[first[i + 1] - 1] are those of
// sequence i. Null for all pairs.
struct PairOrder {
  const std::int64_t *order, *first;
};

template <class T>
struct MaxSimBackward {
  // dq [q.total, dim] and dd [d.total, dim]: all of it is written; dd in the documents' dtype or T.
  void (*queries)(const MaxSimProblem& problem, const MaxSimGradient<T>& gradient, Winners winners,
                  PairOrder order, T* dq, int threads);
  void (*documents)(const MaxSimProblem& problem, const MaxSimGradient<T>& gradient, Winners winners,
                    PairOrder order, void* dd, Dtype dtype, int threads);
  // The same for the smooth maximum; maxima [.., as forward wrote them], similarities are computed again.
  void (*smooth_queries)(const MaxSimProblem& problem, const MaxSimGradient<T>& gradient, const T* maxima,
                         PairOrder order, T* dq, int threads);
  void (*smooth_documents)(const MaxSimProblem& problem, const MaxSimGradient<T>& gradient, const T* maxima,
                           PairOrder order, void* dd, Dtype dtype, int threads);
};

#define PYELASTIC_DECLARE(ISA)                             \
  namespace ISA {                                          \
  extern const MaxSimKernels<float> maxsim_float;          \
  extern const MaxSimKernels<double> maxsim_double;        \
  extern const MaxSimBackward<float> maxsim_backward_float;   \
  extern const MaxSimBackward<double> maxsim_backward_double; \
  }
PYELASTIC_DECLARE(baseline)
PYELASTIC_DECLARE(avx2)
PYELASTIC_DECLARE(avx512)
#undef PYELASTIC_DECLARE
namespace avx512bf16 {
extern const MaxSimKernels<float> maxsim_float;
}
namespace amx {
extern const MaxSimKernels<float> maxsim_float;
}

namespace cuda {

// CUDA: float32 throughout, one plane a call (but maxsim_forward_prefixes): dim is the prefix, q_inv and d_inv that
// plane's [total], maxima, winners and scores point at it; planes is 1, or the number of winners with top-k; prefixes is
// not read. All pointers but the structs themselves are the device's.

// inverse[t] = 1 / max(|x_t[:dim]|, 1e-12).
void maxsim_norms(const Tokens& x, std::int64_t dim, float* inverse, void* stream);

// How the tiles are read. mma: both sides float16, or both bfloat16, on tensor cores; both must be aligned then, else only
// float32 can be. Aligned: the rows of that side start at multiples of 16 bytes, and dim is a multiple of 16 bytes.
struct MaxSimReads {
  bool mma, q_aligned, d_aligned;
};

// maxima (per token) and, unless winners.data is null, winners. share [d.count]: 1 / min(topk, kept tokens), for top-k.
void maxsim_forward(const MaxSimProblem& problem, MaxSimReads reads, const float* share, float* maxima, Winners winners,
                    void* stream);

constexpr int kMaxSimPlanes = 8;

// Elements from one plane of an array to the next. count: of the prefixes, at most kMaxSimPlanes.
struct MaxSimPlanes {
  int count;
  std::int64_t q_inv, d_inv, maxima, winners;
};

// Maxima and winners of several prefixes in one pass. problem.prefixes [planes.count] is the host's, rising to
// problem.dim; q_inv, d_inv, maxima and winners point at the first plane. With mma, prefixes but the last are multiples
// of 16.
void maxsim_forward_prefixes(const MaxSimProblem& problem, MaxSimReads reads, const MaxSimPlanes& planes, float* maxima,
                             Winners winners, void* stream);

// scores [Nq, ld] or [P]: the sum of w m over the tokens of each pair. ld >= d.count.
void maxsim_scores(const MaxSimProblem& problem, const float* maxima, const float* weights, float* scores,
                   std::int64_t ld, void* stream);

// Where a gradient goes: dx [total, dim] of ld elements a row, all of whose rows are written, or added to (`add`). room:
// float [total, dim] for sums, or null where maxsim_backward_fits.
struct MaxSimOutput {
  void* data;
  Dtype dtype;
  std::int64_t ld;
  bool add;
  float* room;
};

// Gradient of the queries, or of the documents. longest: document; ld: of gradient.scores; share: as in forward; query_of
// [q.total]: the query of each of their tokens.
void maxsim_backward(const MaxSimProblem& problem, bool of_queries, std::int64_t longest,
                     const MaxSimGradient<float>& gradient, std::int64_t ld, const std::int64_t* query_of,
                     const float* share, Winners winners, PairOrder order, MaxSimOutput out, void* stream);
// The same for the smooth maximum; similarities are computed again.
void maxsim_backward_smooth(const MaxSimProblem& problem, bool of_queries, const MaxSimGradient<float>& gradient,
                            std::int64_t ld, const float* maxima, PairOrder order, MaxSimOutput out, void* stream);
// Whether a row of `dim` sums fits shared memory.
bool maxsim_backward_fits(std::int64_t dim);

}  // namespace cuda

}  // namespace pyelastic
