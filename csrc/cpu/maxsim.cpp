// maxsim on the CPU, forward. Contract and formulas: ../maxsim.h; the micro-kernel: maxsim_tile.h.
//
// One unit of work is a document and a group of queries. A tile of the document's kept tokens (copied if they are of
// another type, or have gaps) stays in L2 while each block of query tokens (16 KB at d = 128) passes through L1; 12
// tokens meet a block in registers, and the running maximum of the block's tokens is updated from there. The
// similarities are never stored.

#include <cmath>
#include <limits>

#include "maxsim_tile.h"

namespace pyelastic {
namespace PYELASTIC_ISA {
namespace {

constexpr std::int64_t kTileBytes = 256 << 10;  // of a document: a share of L2
constexpr double kLog2e = 1.4426950408889634;
constexpr double kZeroNorm = 1e-12;  // F.normalize's eps

template <class T>
constexpr T kNone = -std::numeric_limits<T>::infinity();

template <class T>
std::int64_t block() {
  return kBlock<T>;
}

template <class T>
void norms(const Tokens& x, const std::int64_t* prefixes, int planes, T* inverse, int threads) {
  const std::int64_t dim = prefixes[planes - 1];
  parallel_for(x.total, 256, threads, [&](std::int64_t begin, std::int64_t end) {
    T* const room = Room(Room::bytes<T>(dim)).take<T>(dim);
    for (std::int64_t t = begin; t < end; ++t) {
      const T* row = token(x, t, dim, room);
      double sum = 0;
      std::int64_t k = 0;
      for (int p = 0; p < planes; ++p) {
        sum += dot_in_double(row + k, row + k, prefixes[p] - k);
        k = prefixes[p];
        const double norm = std::sqrt(sum);
        inverse[p * x.total + t] = static_cast<T>(1.0 / (norm < kZeroNorm ? kZeroNorm : norm));  // NaN stays NaN
      }
    }
  });
}

bool pairs() {
#if defined(__AVX512BF16__)
  return true;
#else
  return false;
#endif
}

#if defined(__AVX512BF16__)
// As the product of maxsim_tile.h with bfloat16 in pairs: depth counts pairs, b is [depth][lanes][2].
template <int R>
inline void multiply(const std::uint16_t* a, std::int64_t lda, const std::uint16_t* b, std::int64_t ldb,
                     std::int64_t depth, Sums<float>& sums, std::int64_t ahead) {
  __m512 acc[R][2];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    acc[r][0] = (__m512)sums.v[r][0];
    acc[r][1] = (__m512)sums.v[r][1];
  }
  for (std::int64_t k = 0; k < depth / 2; ++k) {
    if (ahead != 0 && k % 16 == 0) {
      for (int r = 0; r < R; ++r) __builtin_prefetch(a + ahead + r * lda);
    }
    const __m512bh low = (__m512bh)_mm512_loadu_si512(b), high = (__m512bh)_mm512_loadu_si512(b + 32);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      std::int32_t pair;
      std::memcpy(&pair, a + r * lda, sizeof(pair));
      const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
      acc[r][0] = _mm512_dpbf16_ps(acc[r][0], low, x);
      acc[r][1] = _mm512_dpbf16_ps(acc[r][1], high, x);
    }
    a += 2;
    b += 2 * ldb;
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    sums.v[r][0] = (Vec<float>)acc[r][0];
    sums.v[r][1] = (Vec<float>)acc[r][1];
  }
}
#endif

// E: what products take, T or bfloat16 in pairs.
template <class E>
constexpr int kGroup = sizeof(E) == 2 ? 2 : 1;  // of the dimension

template <class E>
inline bool in_place_as(const Tokens& x) {
  if constexpr (sizeof(E) == 2) {
    return x.codec.bits == 0;
  } else {
    return in_place<E>(x);
  }
}

template <class E>
inline void copy_token(const Tokens& x, std::int64_t t, std::int64_t dim, E* to) {
  if constexpr (sizeof(E) == 2) {
    const std::int64_t at = t * x.stride;
    if (x.codec.bits == 0) {
      std::memcpy(to, static_cast<const E*>(x.data) + at, dim * sizeof(E));
      return;
    }
    for (std::int64_t k = 0; k < dim; ++k) {
      to[k] = float_to_bfloat16(static_cast<float>(static_cast<const std::int8_t*>(x.data)[at + k]));
    }
  } else {
    const E* row = token(x, t, dim, to);
    if (row != to) std::memcpy(to, row, dim * sizeof(E));
  }
}

template <class E, std::int64_t kLanes>
void pack_as(const Tokens& q, std::int64_t dim, const std::int64_t* groups, const std::int64_t* blocks, std::int64_t n,
             E* packed, int threads) {
  constexpr std::int64_t kG = kGroup<E>;
  parallel_for(blocks[n], 1, threads, [&](std::int64_t begin, std::int64_t end) {
    E* const row = Room(Room::bytes<E>(dim)).take<E>(dim);
    std::int64_t g = 0;
    for (std::int64_t b = begin; b < end; ++b) {
      while (b >= blocks[g + 1]) ++g;
      E* const out = packed + b * dim * kLanes;
      const std::int64_t first = q.offsets[groups[g]] + (b - blocks[g]) * kLanes;
      const std::int64_t count = std::min(kLanes, q.offsets[groups[g + 1]] - first);
      for (std::int64_t s = 0; s < kLanes; ++s) {
        if (s < count) {
          copy_token(q, first + s, dim, row);
        } else {
          std::memset(row, 0, dim * sizeof(E));
        }
        for (std::int64_t k = 0; k < dim; ++k) out[(k / kG * kLanes + s) * kG + k % kG] = row[k];
      }
    }
  });
}

template <class T>
void pack(const Tokens& q, std::int64_t dim, const std::int64_t* groups, const std::int64_t* blocks, std::int64_t n,
          void* packed, bool pairs, int threads) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (pairs) return pack_as<std::uint16_t, kBlock<T>>(q, dim, groups, blocks, n, static_cast<std::uint16_t*>(packed), threads);
  }
  pack_as<T, kBlock<T>>(q, dim, groups, blocks, n, static_cast<T*>(packed), threads);
}

// The running aggregate of one block of query tokens over the tokens of a document.
//   maximum, top-k: value[level] falls with the level, index the winner; smooth: value[0] the maximum of s / tau in
//   powers of 2, value[1] the sum of 2^(s / tau - maximum).
template <class T>
struct Running {
  Vec<T>* value;    // [levels][2]
  Mask<T>* index;   // [levels][2]
};

// (v > m), or the first NaN.
template <class T>
PYELASTIC_INLINE Mask<T> above(const Vec<T>& v, const Vec<T>& m) {
  return (v > m) | ((v != v) & (m == m));
}

template <int R, class T>
PYELASTIC_INLINE void take_maximum(const Running<T>& run, int half, const Vec<T> (&v)[R], const std::int32_t* positions) {
  Vec<T> m = run.value[half];
  Mask<T> a = run.index[half];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    const Mask<T> better = above<T>(v[r], m);
    m = better ? v[r] : m;
    a = better ? Mask<T>{} + positions[r] : a;
  }
  run.value[half] = m;
  run.index[half] = a;
}

template <class T>
PYELASTIC_INLINE void take_levels(const Running<T>& run, int levels, int half, Vec<T> v, std::int32_t t) {
  Mask<T> at = Mask<T>{} + t;
  for (int level = 0; level < levels; ++level) {
    Vec<T>& m = run.value[level * 2 + half];
    Mask<T>& a = run.index[level * 2 + half];
    const Mask<T> better = above<T>(v, m);
    const Vec<T> lower = better ? m : v;  // sinks one level
    const Mask<T> lower_at = better ? a : at;
    m = better ? v : m;
    a = better ? at : a;
    v = lower;
    at = lower_at;
  }
}

template <int R, class T>
PYELASTIC_INLINE void take_smooth(const Running<T>& run, int half, const Vec<T> (&v)[R]) {
  Vec<T> top = run.value[half];
  for (int r = 0; r < R; ++r) top = above<T>(v[r], top) ? v[r] : top;
  const auto term = [&](const Vec<T>& x) { return exp2_vec(x == top ? Vec<T>{} : x - top); };  // inf - inf would be NaN
  Vec<T> sum = run.value[2 + half] * term(run.value[half]);
  for (int r = 0; r < R; ++r) sum += term(v[r]);
  run.value[half] = top;
  run.value[2 + half] = sum;
}

template <class T>
struct Unit {
  const MaxSimProblem& p;
  const void* packed;
  const T* weights;
  T *scores, *maxima;
  Winners winners;
  const std::int64_t *groups, *blocks;
  int levels;  // of Running
  // Of this thread:
  Vec<T>* value;
  Mask<T>* index;
  std::int32_t* positions;
  void* tile;  // [tokens][dim] of E, what cannot be read in place

  Running<T> running(std::int64_t b, int plane) const {
    const std::int64_t at = (b * (p.topk > 1 ? 1 : p.planes) + plane) * levels * 2;
    return {value + at, index + at};
  }
};

// Factors of the similarities of half a block's query tokens: log2(e) / tau and the queries' norms. A maximum needs
// neither until its end.
template <class T>
PYELASTIC_INLINE Vec<T> smooth_scale(const MaxSimProblem& p, std::int64_t first, int plane) {
  const auto* q_inv = static_cast<const T*>(p.q_inv);
  T lanes[VecOf<T>::lanes];
  for (int l = 0; l < VecOf<T>::lanes; ++l) {
    lanes[l] = q_inv == nullptr ? T(1) : first + l < p.q.total ? q_inv[plane * p.q.total + first + l] : T(0);
  }
  return load_vec(lanes) * static_cast<T>(kLog2e / p.temperature);
}

// The blocks of group g against kept tokens from .. to of document j.
template <class T, class E>
void sweep(const Unit<T>& u, std::int64_t g, std::int64_t j, std::int64_t from, std::int64_t to) {
  const MaxSimProblem& p = u.p;
  const std::int64_t begin = p.d.offsets[j];
  const std::int32_t* positions = u.positions + from;
  const bool run_of_tokens = positions[to - from - 1] - positions[0] == to - from - 1;
  const E* rows = static_cast<const E*>(p.d.data) + (begin + positions[0]) * p.d.stride;
  std::int64_t stride = p.d.stride;
  if (!in_place_as<E>(p.d) || !run_of_tokens) {
    E* const tile = static_cast<E*>(u.tile);
    for (std::int64_t n = from; n < to; ++n) {
      copy_token(p.d, begin + u.positions[n], p.dim, tile + (n - from) * p.dim);
    }
    rows = tile;
    stride = p.dim;
  }
  const int planes = p.topk > 1 ? 1 : p.planes;
  const auto* d_inv = static_cast<const T*>(p.d_inv);
  for (std::int64_t b = 0; b < u.blocks[g + 1] - u.blocks[g]; ++b) {
    const E* q = static_cast<const E*>(u.packed) + (u.blocks[g] + b) * p.dim * kBlock<T>;
    const std::int64_t first_q = p.q.offsets[u.groups[g]] + b * kBlock<T>;
    each_rows(to - from, [&](std::int64_t n, auto count) {
      constexpr int R = decltype(count)::value;
      Sums<T> sums{};
      const std::int64_t ahead = b == 0 && n + 2 * R <= to - from ? R * stride : 0;
      std::int64_t done = 0;
      for (int plane = 0; plane < planes; ++plane) {
        multiply<R>(rows + n * stride + done, stride, q + done * kBlock<T>, kBlock<T>, p.prefixes[plane] - done, sums,
                    ahead);
        done = p.prefixes[plane];
        const Running<T> run = u.running(b, plane);
        for (int half = 0; half < 2; ++half) {
          Vec<T> v[R];
#pragma GCC unroll 12
          for (int r = 0; r < R; ++r) v[r] = sums.v[r][half];
          if (d_inv != nullptr) {
            const T* inverse = d_inv + plane * p.d.total + begin;
            for (int r = 0; r < R; ++r) v[r] *= inverse[positions[n + r]];
          }
          if (p.temperature > 0) {
            const Vec<T> scale = smooth_scale<T>(p, first_q + half * VecOf<T>::lanes, plane);
            for (int r = 0; r < R; ++r) v[r] *= scale;
            take_smooth<R>(run, half, v);
          } else if (u.levels == 1) {
            take_maximum<R>(run, half, v, positions + n);
          } else {
            for (int r = 0; r < R; ++r) take_levels<T>(run, u.levels, half, v[r], positions[n + r]);
          }
        }
      }
    });
  }
}

// m and the winners of query token `lane` of a block from its running aggregate; k is how many tokens the mean takes.
template <class T>
T finish_token(const Unit<T>& u, std::int64_t j, const Running<T>& run, std::int64_t lane, std::int64_t n_kept,
               T q_inv, std::int32_t* winners) {
  const MaxSimProblem& p = u.p;
  const std::int64_t half = lane / VecOf<T>::lanes, l = lane % VecOf<T>::lanes;
  const int taken = p.topk > 1 ? static_cast<int>(std::min<std::int64_t>(p.topk, n_kept)) : 1;
  for (int level = 0; level < std::max(1, p.topk); ++level) winners[level] = -1;
  if (n_kept == 0) return T(0);
  if (p.temperature > 0) {
    const double top = static_cast<double>(run.value[half][l]), sum = static_cast<double>(run.value[2 + half][l]);
    return static_cast<T>((top + std::log2(sum)) * p.temperature / kLog2e);
  }
  double mean = 0;
  for (int level = 0; level < taken; ++level) {
    // Nothing is above -inf, so a token that has only such similarities has no winner yet: the first.
    winners[level] = static_cast<std::int32_t>(run.index[level * 2 + half][l]);
    if (winners[level] < 0) winners[level] = u.positions[level];
    mean += static_cast<double>(run.value[level * 2 + half][l]);
  }
  const T m = static_cast<T>(mean / taken) * q_inv;
  if (p.floor != nullptr && p.floor[j] != 0 && m < 0) {
    winners[0] = -1;
    return T(0);
  }
  return m;
}

// Scores, maxima and winners of the pair (i, j) once the group's blocks have seen the whole document.
template <class T>
void finish_query(const Unit<T>& u, std::int64_t g, std::int64_t i, std::int64_t j, std::int64_t pair,
                  std::int64_t n_kept) {
  const MaxSimProblem& p = u.p;
  const std::int64_t first = p.q.offsets[i], in_group = first - p.q.offsets[u.groups[g]];
  const int planes = p.topk > 1 ? 1 : p.planes;
  std::int32_t won[64];
  for (int plane = 0; plane < planes; ++plane) {
    const auto* q_inv = static_cast<const T*>(p.q_inv);
    double score = 0;
    for (std::int64_t s = 0; s < p.q.offsets[i + 1] - first; ++s) {
      const std::int64_t lane = in_group + s;
      const Running<T> run = u.running(lane / kBlock<T>, plane);
      const T inverse = q_inv != nullptr ? q_inv[plane * p.q.total + first + s] : T(1);
      const T m = finish_token(u, j, run, lane % kBlock<T>, n_kept, inverse, won);
      const std::int64_t at = token_array(p, plane, i, j, pair) + s;
      if (u.maxima != nullptr) u.maxima[at] = m;
      for (int level = 0; u.winners.data != nullptr && level < std::max(1, p.topk); ++level) {
        const std::int64_t to = token_array(p, p.topk > 1 ? level : plane, i, j, pair) + s;
        if (u.winners.narrow) {
          static_cast<std::uint16_t*>(u.winners.data)[to] = static_cast<std::uint16_t>(won[level]);
        } else {
          static_cast<std::int32_t*>(u.winners.data)[to] = won[level];
        }
      }
      if (u.weights == nullptr) {
        score += static_cast<double>(m);
      } else if (u.weights[first + s] != 0) {
        score += static_cast<double>(u.weights[first + s]) * static_cast<double>(m);
      }
    }
    if (u.scores != nullptr) u.scores[score_at(p, plane, i, j, pair)] = static_cast<T>(score);
  }
}

template <class T, class E>
void forward_as(const MaxSimProblem& p, const void* packed, const std::int64_t* groups, const std::int64_t* blocks,
                std::int64_t n, const T* weights, T* scores, T* maxima, Winners winners, int threads) {
  const bool listed = p.pair_q != nullptr;
  std::int64_t most_blocks = 0, longest = 0;
  for (std::int64_t g = 0; g < n; ++g) most_blocks = std::max(most_blocks, blocks[g + 1] - blocks[g]);
  for (std::int64_t j = 0; j < p.d.count; ++j) longest = std::max(longest, p.d.offsets[j + 1] - p.d.offsets[j]);
  const int levels = p.temperature > 0 ? 2 : std::max(1, p.topk);
  const int planes = p.topk > 1 ? 1 : p.planes;
  const std::int64_t states = most_blocks * planes * levels * 2;
  const std::int64_t row_bytes = p.dim * static_cast<std::int64_t>(sizeof(E));
  const std::int64_t tile_tokens = std::max<std::int64_t>(kRows, kTileBytes / row_bytes / kRows * kRows);
  const bool copies = !in_place_as<E>(p.d) || p.d_mask != nullptr;
  const std::int64_t tile = copies ? std::min(tile_tokens, longest) * p.dim : 0;
  const std::int64_t bytes = Room::bytes<Vec<T>>(states) + Room::bytes<Mask<T>>(states) +
                             Room::bytes<std::int32_t>(longest) + Room::bytes<E>(tile);
  parallel_for(listed ? p.pairs : p.d.count * n, 1, threads, [&](std::int64_t begin, std::int64_t end) {
    Room room(bytes);
    Unit<T> u{p, packed, weights, scores, maxima, winners, groups, blocks, levels, nullptr, nullptr, nullptr, nullptr};
    u.value = room.take<Vec<T>>(states);
    u.index = room.take<Mask<T>>(states);
    u.positions = room.take<std::int32_t>(longest);
    u.tile = room.take<E>(tile);
    for (std::int64_t w = begin; w < end; ++w) {
      const std::int64_t j = listed ? p.pair_d[w] : w / n, g = listed ? p.pair_q[w] : w % n;
      const std::int64_t used = (blocks[g + 1] - blocks[g]) * planes;
      for (std::int64_t b = 0; b < used * levels * 2; ++b) {
        u.value[b] = Vec<T>{} + (p.temperature > 0 && b % 4 >= 2 ? T(0) : kNone<T>);
        u.index[b] = Mask<T>{} - 1;
      }
      const std::int64_t n_kept = kept(p, j, u.positions);
      for (std::int64_t from = 0; from < n_kept; from += tile_tokens) {
        sweep<T, E>(u, g, j, from, std::min(n_kept, from + tile_tokens));
      }
      for (std::int64_t i = groups[g]; i < groups[g + 1]; ++i) finish_query(u, g, i, j, w, n_kept);
    }
  });
}

template <class T>
void forward(const MaxSimProblem& p, const void* packed, bool pairs, const std::int64_t* groups,
             const std::int64_t* blocks, std::int64_t n, const T* weights, T* scores, T* maxima, Winners winners,
             int threads) {
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) == sizeof(float)) {
    if (pairs) {
      return forward_as<T, std::uint16_t>(p, packed, groups, blocks, n, weights, scores, maxima, winners, threads);
    }
  }
#endif
  static_cast<void>(pairs);
  forward_as<T, T>(p, packed, groups, blocks, n, weights, scores, maxima, winners, threads);
}

}  // namespace

const MaxSimKernels<float> maxsim_float = {norms<float>, block<float>, pairs, pack<float>, forward<float>};
#if !defined(__AVX512BF16__)  // there of no other use than with AVX-512
const MaxSimKernels<double> maxsim_double = {norms<double>, block<double>, pairs, pack<double>,
                                               forward<double>};
#endif

}  // namespace PYELASTIC_ISA
}  // namespace pyelastic
