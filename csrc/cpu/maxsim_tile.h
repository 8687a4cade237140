// The micro-kernel that maxsim's CPU kernels share: a small product with everything in registers.
//
// acc[r][lane] += sum_k rows[r][k] b[k][lane]: kRows rows are broadcast element by element, two vectors hold the lanes. In the
// forward the rows are document tokens and the lanes query tokens, so the maximum over a document needs no
// horizontal step. With 12 rows on AVX-512, 24 of 32 registers are sums: 14 loads for 24 multiply-adds.
#pragma once

#include <algorithm>

#include "../common/parallel.h"
#include "../common/vec.h"
#include "../maxsim.h"
#include "rows.h"

namespace pyelastic {
namespace PYELASTIC_ISA {
namespace {

constexpr int kRows = kMicroRows;

template <class T>
constexpr std::int64_t kBlock = 2 * VecOf<T>::lanes;  // query tokens of a block

template <class T>
using Mask = typename VecOf<T>::I;

// Sums of kRows rows, of which a kernel of R rows uses R.
template <class T>
struct Sums {
  Vec<T> v[kRows][2];
};

// Rows a + r lda, r < R. `ahead`: how far after a row lies one that comes next and is not in a cache yet; R streams are
// more than the hardware foresees. 0: none.
template <int R, class T>
inline void multiply(const T* a, std::int64_t lda, const T* b, std::int64_t ldb, std::int64_t depth, Sums<T>& sums,
                     std::int64_t ahead = 0) {
  Vec<T> acc[R][2];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    acc[r][0] = sums.v[r][0];
    acc[r][1] = sums.v[r][1];
  }
  for (std::int64_t k = 0; k < depth;) {
    if (ahead != 0) {
      for (int r = 0; r < R; ++r) __builtin_prefetch(a + ahead + r * lda);
    }
    const std::int64_t line = k + VecOf<T>::lanes < depth ? k + VecOf<T>::lanes : depth;
    for (; k < line; ++k) {
      const Vec<T> low = load_vec(b), high = load_vec(b + VecOf<T>::lanes);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const T x = a[r * lda];
        acc[r][0] += low * x;
        acc[r][1] += high * x;
      }
      ++a;
      b += ldb;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    sums.v[r][0] = acc[r][0];
    sums.v[r][1] = acc[r][1];
  }
}

// Calls f(n, R) over `count` rows, R a compile-time constant: whole kernels first, then what is left in smaller ones.
template <int R>
struct Rows {
  static constexpr int value = R;
};
template <class F>
inline void each_rows(std::int64_t count, const F& f) {
  std::int64_t n = 0;
  for (; n + kRows <= count; n += kRows) f(n, Rows<kRows>{});
  if constexpr (kRows > 8) {
    if (n + 8 <= count) f(n, Rows<8>{}), n += 8;
  }
  if (n + 4 <= count) f(n, Rows<4>{}), n += 4;
  if (n + 2 <= count) f(n, Rows<2>{}), n += 2;
  if (n < count) f(n, Rows<1>{});
}

// A quantised token without the scale of int8 values.
template <class T>
inline void decode(const Tokens& x, std::int64_t t, std::int64_t dim, T* room) {
  if (x.codec.bits == 8) {
    const auto* from = static_cast<const std::int8_t*>(x.data) + t * x.stride;
    for (std::int64_t k = 0; k < dim; ++k) room[k] = static_cast<T>(from[k]);
    return;
  }
  const auto* from = static_cast<const std::uint8_t*>(x.data) + t * x.stride;
  const float* centroid = x.codec.centroids + x.codec.codes[t] * dim;
  const int bits = x.codec.bits, each = 8 / bits, low = (1 << bits) - 1;
  for (std::int64_t k = 0; k < dim; ++k) {
    const int bucket = from[k / each] >> (k % each * bits) & low;
    room[k] = static_cast<T>(centroid[k] + x.codec.buckets[bucket]);
  }
}

// Token `t` as T: where it lies if it is of that type, else converted into `room`.
template <class T>
inline const T* token(const Tokens& x, std::int64_t t, std::int64_t dim, T* room) {
  if (x.codec.bits != 0) {
    decode(x, t, dim, room);
    return room;
  }
  return read_row(x.data, x.dtype, t * x.stride, dim, room);
}

// Whether rows of T can be read where the tokens lie.
template <class T>
inline bool in_place(const Tokens& x) {
  return x.codec.bits == 0 && x.dtype == (sizeof(T) == sizeof(float) ? Dtype::float32 : Dtype::float64);
}

// Tokens of document j that its mask keeps, as positions in it; returns how many.
inline std::int64_t kept(const MaxSimProblem& p, std::int64_t j, std::int32_t* positions) {
  const std::int64_t begin = p.d.offsets[j], length = p.d.offsets[j + 1] - begin;
  if (p.d_mask == nullptr) {
    for (std::int64_t t = 0; t < length; ++t) positions[t] = static_cast<std::int32_t>(t);
    return length;
  }
  std::int64_t n = 0;
  for (std::int64_t t = 0; t < length; ++t) {
    positions[n] = static_cast<std::int32_t>(t);
    n += p.d_mask[begin + t] != 0;
  }
  return n;
}

// Where the per-token arrays of plane `p`, query i and document j (pair `pair` of a list) begin.
inline std::int64_t token_array(const MaxSimProblem& p, int plane, std::int64_t i, std::int64_t j, std::int64_t pair) {
  if (p.pair_q == nullptr) return (plane * p.d.count + j) * p.q.total + p.q.offsets[i];
  return (plane * p.pairs + pair) * p.max_q;
}
inline std::int64_t score_at(const MaxSimProblem& p, int plane, std::int64_t i, std::int64_t j, std::int64_t pair) {
  return p.pair_q == nullptr ? (plane * p.q.count + i) * p.d.count + j : plane * p.pairs + pair;
}

}  // namespace
}  // namespace PYELASTIC_ISA
}  // namespace pyelastic
