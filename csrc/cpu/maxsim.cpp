// maxsim on the CPU, forward. Contract and formulas: ../maxsim.h; the micro-kernel: maxsim_tile.h.
//
// One unit of work is a document and a group of queries. A tile of the document's kept tokens (copied if they are of
// another type, or have gaps) stays in L2 while each block of query tokens (16 KB at d = 128) passes through L1; 12
// tokens meet a block in registers, and the running maximum of the block's tokens is updated from there. The
// similarities are never stored.

#include <cmath>
#include <limits>

#include "amx.h"
#include "maxsim_running.h"

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

// What a thread holds while it multiplies elements of E.
template <class E>
struct Registers {
  Registers() {}
};
#if defined(__AMX_BF16__)
template <>
struct Registers<std::uint16_t> : TileRegisters {};
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

// 1 / |d| of document j's tokens, or null.
template <class T>
const T* inverses(const MaxSimProblem& p, int plane, std::int64_t j) {
  return p.d_inv == nullptr ? nullptr : static_cast<const T*>(p.d_inv) + plane * p.d.total + p.d.offsets[j];
}

// R similarities of half a block, with tokens positions[0 .. R - 1] of document j, into the running aggregate.
template <int R, class T>
PYELASTIC_INLINE void take(const Unit<T>& u, const Running<T>& run, int plane, int half, std::int64_t first_q, std::int64_t j,
                           const std::int32_t* positions, Vec<T> (&v)[R]) {
  const MaxSimProblem& p = u.p;
  if (const T* inverse = inverses<T>(p, plane, j)) {
    for (int r = 0; r < R; ++r) v[r] *= inverse[positions[r]];
  }
  if (p.temperature > 0) {
    const Vec<T> scale = smooth_scale<T>(p, first_q + half * VecOf<T>::lanes, plane);
    for (int r = 0; r < R; ++r) v[r] *= scale;
    take_smooth<R>(run, half, v);
  } else if (u.levels == 1) {
    take_maximum<R>(run, half, v, positions);
  } else {
    for (int r = 0; r < R; ++r) take_levels<T>(run, u.levels, half, v[r], positions[r]);
  }
}

// Kept tokens from .. to of document j, in rows.
template <class E>
struct Stretch {
  std::int64_t j, from, to;
  const E* rows;
  std::int64_t stride;
};

// The blocks of group g against a stretch of tokens.
template <class T, class E>
void sweep(const Unit<T>& u, std::int64_t g, const Stretch<E>& d) {
  const MaxSimProblem& p = u.p;
  const std::int64_t count = d.to - d.from, stride = d.stride;
  const std::int32_t* positions = u.positions + d.from;
  const int planes = p.topk > 1 ? 1 : p.planes;
  for (std::int64_t b = 0; b < u.blocks[g + 1] - u.blocks[g]; ++b) {
    const E* q = static_cast<const E*>(u.packed) + (u.blocks[g] + b) * p.dim * kBlock<T>;
    const std::int64_t first_q = p.q.offsets[u.groups[g]] + b * kBlock<T>;
    each_rows(count, [&](std::int64_t n, auto rows) {
      constexpr int R = decltype(rows)::value;
      Sums<T> sums{};
      const std::int64_t ahead = b == 0 && n + 2 * R <= count ? R * stride : 0;
      std::int64_t done = 0;
      for (int plane = 0; plane < planes; ++plane) {
        multiply<R>(d.rows + n * stride + done, stride, q + done * kBlock<T>, kBlock<T>, p.prefixes[plane] - done, sums,
                    ahead);
        done = p.prefixes[plane];
        for (int half = 0; half < 2; ++half) {
          Vec<T> v[R];
#pragma GCC unroll 12
          for (int r = 0; r < R; ++r) v[r] = sums.v[r][half];
          take<R>(u, u.running(b, plane), plane, half, first_q, d.j, positions + n, v);
        }
      }
    });
  }
}

#if defined(__AMX_BF16__)
// Whether a stretch of tokens can be multiplied by tiles: enough of them, and each plane ends where a step of the depth does.
bool by_tiles(const MaxSimProblem& p, std::int64_t tokens) {
  bool whole = tokens >= kTileRows;
  for (int plane = 0; plane < p.planes; ++plane) whole = whole && p.prefixes[plane] % kTileDepth == 0;
  return whole;
}

// take of `rows` rows of a tile s into a running maximum, if all are finite; returns whether they are. Rows are compared as
// numbers: a comparison that finds the first NaN takes three times as long.
template <bool kScaled>
bool take_finite(const Running<float>& run, const float* s, std::int64_t rows, const std::int32_t* positions,
                 const float* inverse) {
  Vec<float> m[2] = {run.value[0], run.value[1]}, bad[2] = {};
  Mask<float> a[2] = {run.index[0], run.index[1]};
  for (std::int64_t r = 0; r < rows; ++r) {
    const Mask<float> at = Mask<float>{} + positions[r];
    for (int half = 0; half < 2; ++half) {
      Vec<float> v = load_vec(s + r * kTileColumns + half * VecOf<float>::lanes);
      if constexpr (kScaled) v *= inverse[positions[r]];
      bad[half] += v * 0.0f;  // NaN of NaN and of infinities
      const Mask<float> better = v > m[half];
      m[half] = better ? v : m[half];
      a[half] = better ? at : a[half];
    }
  }
  const auto both = (__m512)(bad[0] + bad[1]);
  if (_mm512_cmp_ps_mask(both, both, _CMP_UNORD_Q) != 0) return false;
  for (int half = 0; half < 2; ++half) {
    run.value[half] = m[half];
    run.index[half] = a[half];
  }
  return true;
}

// sweep by tiles: 32 or 16 tokens at a time. The last tile may begin before the tokens that are left: what it shares with the
// one before is not taken again.
void sweep_tiles(const Unit<float>& u, std::int64_t g, const Stretch<std::uint16_t>& d) {
  const MaxSimProblem& p = u.p;
  const std::int64_t count = d.to - d.from, pitch = d.stride * 2;
  const std::int32_t* positions = u.positions + d.from;
  const int planes = p.topk > 1 ? 1 : p.planes;
  const bool maximum = p.temperature == 0 && u.levels == 1;
  alignas(64) float s[kTileColumns * kTileColumns];
  for (std::int64_t b = 0; b < u.blocks[g + 1] - u.blocks[g]; ++b) {
    const auto* q = static_cast<const std::uint16_t*>(u.packed) + (u.blocks[g] + b) * p.dim * kTileColumns;
    const std::int64_t first_q = p.q.offsets[u.groups[g]] + b * kTileColumns;
    for (std::int64_t n = 0; n < count;) {
      const bool both = count >= 2 * kTileRows && count - n > kTileRows;
      const std::int64_t size = both ? 2 * kTileRows : kTileRows, at = std::min(n, count - size);
      std::int64_t done = 0;
      for (int plane = 0; plane < planes; ++plane) {
        const auto* rows = d.rows + at * d.stride + done;
        const std::int64_t steps = (p.prefixes[plane] - done) / kTileDepth;
        const auto multiply = both ? multiply_tiles<true> : multiply_tiles<false>;
        multiply(rows, pitch, 2 * kTileDepth, q + done * kTileColumns, steps, s, kTileColumns, plane > 0);
        done = p.prefixes[plane];
        const Running<float> run = u.running(b, plane);
        const float* first = s + (n - at) * kTileColumns;
        const std::int64_t left = at + size - n;
        if (maximum) {
          const float* inverse = inverses<float>(p, plane, d.j);
          const auto take_all = inverse == nullptr ? take_finite<false> : take_finite<true>;
          if (take_all(run, first, left, positions + n, inverse)) continue;
        }
        each_rows(left, [&](std::int64_t row, auto taken) {
          constexpr int R = decltype(taken)::value;
          const float* from = first + row * kTileColumns;
          for (int half = 0; half < 2; ++half) {
            Vec<float> v[R];
            for (int r = 0; r < R; ++r) v[r] = load_vec(from + r * kTileColumns + half * VecOf<float>::lanes);
            take<R>(u, run, plane, half, first_q, d.j, positions + n + row, v);
          }
        });
      }
      n = at + size;
    }
  }
}
#endif

// The blocks of group g against kept tokens from .. to of document j.
template <class T, class E>
void meet(const Unit<T>& u, std::int64_t g, std::int64_t j, std::int64_t from, std::int64_t to) {
  const MaxSimProblem& p = u.p;
  const std::int64_t begin = p.d.offsets[j];
  const std::int32_t* positions = u.positions + from;
  const bool run_of_tokens = positions[to - from - 1] - positions[0] == to - from - 1;
  Stretch<E> d{j, from, to, static_cast<const E*>(p.d.data) + (begin + positions[0]) * p.d.stride, p.d.stride};
  if (!in_place_as<E>(p.d) || !run_of_tokens) {
    E* const tile = static_cast<E*>(u.tile);
    for (std::int64_t n = from; n < to; ++n) {
      copy_token(p.d, begin + u.positions[n], p.dim, tile + (n - from) * p.dim);
    }
    d.rows = tile;
    d.stride = p.dim;
  }
#if defined(__AMX_BF16__)
  if constexpr (sizeof(E) == 2) {
    if (by_tiles(p, to - from)) return sweep_tiles(u, g, d);
  }
#endif
  sweep<T, E>(u, g, d);
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
    const Registers<E> registers;
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
        meet<T, E>(u, g, j, from, std::min(n_kept, from + tile_tokens));
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
