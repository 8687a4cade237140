// Products of norm_linear_attention's tensor-core kernels, and the tiles that a block of them works with. Contract and formulas:
// ../norm_linear_attention.h.
#pragma once

#include <type_traits>

#include "norm_linear_attention_mma_features.cuh"

namespace pyelastic {
namespace cuda {
namespace {

// Fragments: 16 rows of A [rows][k], and two groups of 8 columns of B, stored as rows of columns ([n][k]) or of k ([k][n]).
__device__ __forceinline__ void fragment_a(std::uint32_t (&a)[4], const Bits* from, int ld, int lane) {
  ldmatrix_x4(a, from + lane % 16 * ld + lane / 16 * 8);
}
__device__ __forceinline__ void fragment_a_trans(std::uint32_t (&a)[4], const Bits* from, int ld, int lane) {
  ldmatrix_x4_trans(a, from + (lane % 8 + lane / 16 * 8) * ld + lane / 8 % 2 * 8);
}
__device__ __forceinline__ void fragment_b(std::uint32_t (&b)[4], const Bits* from, int ld, int lane) {
  ldmatrix_x4(b, from + (lane % 8 + lane / 16 * 8) * ld + lane / 8 % 2 * 8);
}
__device__ __forceinline__ void fragment_b_trans(std::uint32_t (&b)[4], const Bits* from, int ld, int lane) {
  ldmatrix_x4_trans(b, from + lane % 16 * ld + lane / 16 * 8);
}
__device__ __forceinline__ void multiply(float (&sums)[2][4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[4]) {
  const std::uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
  mma_m16n8k16(sums[0], a, low, BF16{});
  mma_m16n8k16(sums[1], a, high, BF16{});
}

template <int kCount>
__device__ __forceinline__ void clear(float (&sums)[kCount][2][4]) {
#pragma unroll
  for (int i = 0; i < kCount * 8; ++i) sums[i / 8][i / 4 % 2][i % 4] = 0.0f;
}

// sums += left [64][depth] right [depth][columns], of the columns below `columns`.
template <int kCount>
__device__ __forceinline__ void multiply_rows(const Fragment& f, const Bits* left, int ld_left, const Bits* right, int ld_right,
                                              int depth, int columns, float (&sums)[kCount][2][4]) {
#pragma unroll 1
  for (int k = 0; k < depth; k += 16) {
    std::uint32_t a[4];
    fragment_a(a, left + f.row * ld_left + k, ld_left, f.lane);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int column = 16 * (f.half + 2 * i);
      if (column >= columns) continue;
      std::uint32_t b[4];
      fragment_b_trans(b, right + k * ld_right + column, ld_right, f.lane);
      multiply(sums[i], a, b);
    }
  }
}

// Weights of 64 tokens and 64 others, left [64][depth] right^T: this warp's 16 rows and columns 32 half .. + 31.
__device__ __forceinline__ void multiply_tokens(const Fragment& f, const Bits* left, const Bits* right, int ld, int depth,
                                                float (&w)[2][2][4]) {
  clear(w);
#pragma unroll 1
  for (int k = 0; k < depth; k += 16) {
    std::uint32_t a[4];
    fragment_a(a, left + f.row * ld + k, ld, f.lane);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      std::uint32_t b[4];
      fragment_b(b, right + (32 * f.half + 16 * i) * ld + k, ld, f.lane);
      multiply(w[i], a, b);
    }
  }
}

// Zero where the token of the row may not meet that of the column; `ahead`: row's token minus column's, of the first ones.
template <bool kRowsLater>
__device__ __forceinline__ void mask_tokens(const Fragment& f, int ahead, float (&w)[2][2][4]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int row = f.row + f.g + i / 2 % 2 * 8, column = 32 * f.half + i / 8 * 16 + i / 4 % 2 * 8 + 2 * f.t + i % 2;
    const int after = ahead + row - column;
    if (kRowsLater ? after < 0 : after > 0) w[i / 8][i / 4 % 2][i % 4] = 0.0f;
  }
}

// Rounded to `to` [64][kWeightsLd].
__device__ __forceinline__ void store_tokens(const Fragment& f, const float (&w)[2][2][4], Bits* to) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int row = f.row + f.g + i % 2 * 8, column = 32 * f.half + i / 4 * 16 + i / 2 % 2 * 8 + 2 * f.t;
    const float* const pair = &w[i / 4][i / 2 % 2][i % 2 * 2];
    *reinterpret_cast<std::uint32_t*>(to + row * kWeightsLd + column) = pack(pair[0], pair[1], BF16{});
  }
}

// Sums of this warp's columns to `to` [2][64].
__device__ __forceinline__ void sum_tokens(const Fragment& f, const float (&w)[2][2][4], float* to) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += w[i / 2][i % 2][2 * r] + w[i / 2][i % 2][2 * r + 1];
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    if (f.t == 0) to[f.half * kMmaTile + f.row + f.g + 8 * r] = sum;
  }
}

// A block's shared memory: its own tokens' features, values (or a piece of a state), and, causal or alone, other tokens' features
// and the weights between both; then the denominators and scratch.
struct Tiles {
  Bits *own, *values, *others, *weights;  // [64][ldf], [64][ldv], [64][ldf], [64][kWeightsLd]
  float *d, *sums;                        // [64], [2][64]

  static std::size_t bytes(const Problem& x, bool alone) {
    const std::size_t ldf = static_cast<std::size_t>(2 * x.dim + 8), ldv = static_cast<std::size_t>((x.v_dim + 15) / 16 * 16 + 8);
    return kMmaTile * (2 * (ldf + ldv + (x.causal || alone ? ldf + kWeightsLd : 0)) + 3 * sizeof(float));
  }
  __device__ Tiles(float* room, const Widths& width) {
    d = room;
    sums = d + kMmaTile;
    own = reinterpret_cast<Bits*>(sums + 2 * kMmaTile);
    values = own + kMmaTile * width.ldf;
    others = values + kMmaTile * width.ldv;
    weights = others + kMmaTile * width.ldf;
  }
};

// Weights of own queries and other keys, `ahead` tokens before; rounded to `weights` if `keep`, summed into d if `sum`.
// Begins and ends with a barrier.
__device__ __forceinline__ void weigh_keys(const Widths& width, const Fragment& f, const Tiles& tiles, int ahead, bool keep,
                                           bool sum) {
  __syncthreads();
  float w[2][2][4];
  multiply_tokens(f, tiles.own, tiles.others, width.ldf, width.features, w);
  mask_tokens<true>(f, ahead, w);
  if (keep) store_tokens(f, w, tiles.weights);
  if (sum) sum_tokens(f, w, tiles.sums);
  __syncthreads();
  if (sum && threadIdx.x < kMmaTile) {
    tiles.d[threadIdx.x] += tiles.sums[threadIdx.x] + tiles.sums[kMmaTile + threadIdx.x];
  }
}

// What mask_tokens and weigh_keys take for queries from `first` on and keys from `other` on: bidirectional, no key is cut.
__device__ __forceinline__ int ahead_of(const Problem& x, std::int64_t first, std::int64_t other) {
  return x.causal ? static_cast<int>(first - other) : kMmaTile;
}

// The features of a tile of queries, turned, in `own`, and d of the state's tokens (z null: none). Those met by weights
// follow where `whole` is set or the weights of the denominator are others than the numerator's; returns whether they
// did. Ends with a barrier.
__device__ __forceinline__ bool make_queries(const Problem& x, const Widths& width, const Fragment& f, const Tiles& tiles,
                                             const Place& at, std::int64_t first, const Met& met, std::int64_t head,
                                             std::int64_t kv, const float* z, bool whole) {
  const bool rope = x.sin != nullptr, meets = met.end > 0, apart = meets && rope && !x.rope_both, now = meets && (whole || apart);
  make_features<true>(x, x.q, at, first, head, rope && !apart, width, tiles.own,
                      DotWith{z, tiles.d, width.dim, sharers(width.dim)});
  for (std::int64_t other = met.first; now && other < met.end; other += kMmaTile) {
    make_features<false>(x, x.k, met.at, other, kv, rope && !apart, width, tiles.others, NoLook{});
    weigh_keys(width, f, tiles, ahead_of(x, first, other), false, true);
    __syncthreads();  // sums, and the other tokens
  }
  if (apart) make_features<true>(x, x.q, at, first, head, true, width, tiles.own, NoLook{});
  __syncthreads();
  return now;
}

// sums += the products of own features [64][features] and a state [features][v_dim]. Begins and ends with a barrier.
template <int kCount>
__device__ __forceinline__ void multiply_state(const Widths& width, const Fragment& f, const Tiles& tiles, const float* state,
                                               float (&sums)[kCount][2][4]) {
  for (int k = 0; k < width.features; k += kMmaTile) {
    const int depth = width.features - k < kMmaTile ? width.features - k : kMmaTile;
    __syncthreads();
    load_state(state, width, tiles.values, [&](int i) { return i < depth ? k + i : -1; });
    __syncthreads();
    multiply_rows(f, tiles.own + k, width.ldf, tiles.values, width.ldv, depth, width.v_dim, sums);
  }
  __syncthreads();
}

// look of keys: this thread's eight channels of both halves, summed over the rows it makes in its words of `room`.
struct SumInto {
  float* room;  // [16][kMmaThreads]
  __device__ __forceinline__ float& at(int i) const { return room[i * kMmaThreads + static_cast<int>(threadIdx.x)]; }
  __device__ __forceinline__ void operator()(int, int, const float (&upper)[8], const float (&lower)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      at(i) += upper[i];
      at(8 + i) += lower[i];
    }
  }
};

// A part's sums of features times 64 columns of values, features 16 (warp + 8 i) .. + 15 in a warp; and of features, in
// shared memory: with them wide heads would spill.
template <bool kWide>
struct StateSums {
  static constexpr int kBlocks = kWide ? 2 : 1;
  float s[4 * kBlocks][2][4];
  float* z;  // [16][kMmaThreads]
  __device__ explicit StateSums(float* room) : z(room) { reset(); }
  __device__ __forceinline__ void reset() {
    clear(s);
#pragma unroll
    for (int i = 0; i < 16; ++i) SumInto{z}.at(i) = 0.0f;
  }
  // s += features^T values, of 64 tokens; values [64][kStateLd].
  __device__ __forceinline__ void add(const Widths& width, const Fragment& f, const Bits* features, const Bits* values) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll 1
    for (int k = 0; k < kMmaTile; k += 16) {
      std::uint32_t a[kBlocks][4];
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        const int r = 16 * (warp + 8 * i);
        if (r < width.features) fragment_a_trans(a[i], features + k * width.ldf + r, width.ldf, f.lane);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        std::uint32_t b[4];
        fragment_b_trans(b, values + k * kStateLd + 16 * j, kStateLd, f.lane);
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) {
          if (16 * (warp + 8 * i) < width.features) multiply(s[4 * i + j], a[i], b);
        }
      }
    }
  }
  // with(row, column, s of the row's columns column and column + 1) for this thread's elements of [features][columns], the
  // first of which is column `first`.
  template <class With>
  __device__ __forceinline__ void each(const Widths& width, const Fragment& f, int first, int columns, With with) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
    for (int i = 0; i < 8 * kBlocks; ++i) {
      const int at = first + i / 2 % 4 * 16 + i % 2 * 8 + 2 * f.t, row = 16 * (warp + i / 8 * 8) + f.g;
      if (row >= width.features || at >= columns) continue;
      float* const x = s[i / 2][i % 2];
      with(row, at, x);
      with(row + 8, at, x + 2);
    }
  }
  // to_s [features][v_dim] from `column` on; to_z [features] or null.
  __device__ __forceinline__ void store(const Widths& width, const Fragment& f, int column, float* to_s, float* to_z) {
    each(width, f, column, width.v_dim, [&](int row, int at, const float* x) {
      float* const to = to_s + row * width.v_dim + at;
      to[0] = x[0];
      to[1] = x[1];
    });
    if (to_z == nullptr) return;
    __syncthreads();
    sum_z(width, nullptr, [&](int r, float sum) { to_z[r] = sum; });
  }
  // s += from [features][v_dim], all of whose columns these are.
  __device__ __forceinline__ void load(const Widths& width, const Fragment& f, const float* from) {
    each(width, f, 0, width.v_dim, [&](int row, int at, float* x) {
      x[0] += from[row * width.v_dim + at];
      x[1] += from[row * width.v_dim + at + 1];
    });
  }
  // s rounded to `to` [features][kStateLd], zeros behind v_dim.
  __device__ __forceinline__ void round(const Widths& width, const Fragment& f, Bits* to) {
    each(width, f, 0, kStateColumns, [&](int row, int at, const float* x) {
      *reinterpret_cast<std::uint32_t*>(to + row * kStateLd + at) = pack(x[0], x[1], BF16{});
    });
  }
  // with(feature, initial [features] or 0 + its sum), by a thread each; after a barrier.
  template <class With>
  __device__ __forceinline__ void sum_z(const Widths& width, const float* initial, With with) const {
    const int n = sharers(width.dim);
    for (int r = static_cast<int>(threadIdx.x); r < width.features; r += kMmaThreads) {
      const int half = r / width.dim, c = r % width.dim;
      const float* const from = z + (8 * half + c % 8) * kMmaThreads + c / 8;
      float sum = initial == nullptr ? 0.0f : initial[r];
      for (int thread = 0; thread < kMmaThreads; thread += n) sum += from[thread];
      with(r, sum);
    }
  }
};

constexpr int kStateFloats = 16 * kMmaThreads;
inline std::size_t state_bytes(const Problem& x) {
  return sizeof(float) * kStateFloats + 2 * kMmaTile * static_cast<std::size_t>(2 * x.dim + 8 + kStateLd);
}

// Place of the state that a tile reads: of 32 bits, as 2^31 states are a terabyte, and one register less to hold.
__device__ __forceinline__ int state_slot(const Problem& x, const Place& at, std::int64_t first, std::int64_t part,
                                          std::int64_t each, std::int64_t kv) {
  const std::int64_t slot = x.causal ? first_part(x, at.sequence, part, each) + first / part : at.sequence;
  return static_cast<int>(slot * x.kv_heads + kv);
}

// Element of a state of `size` elements at a slot.
__device__ __forceinline__ std::int64_t state_at(int slot, int size) { return static_cast<std::int64_t>(slot) * size; }

__device__ __forceinline__ float gate_value(const Problem& x, const Place& at, std::int64_t token, std::int64_t head, int c) {
  return widen(row_of<const Bits>(x.gate, at, token, head)[c]);
}

// What a tile reads of the tokens it does not meet, from global memory: s [features][v_dim] and z [features]; null: none.
struct StateFar {
  const float *s, *z;
  template <int kCount>
  __device__ __forceinline__ void multiply(const Widths& width, const Fragment& f, const Tiles& tiles,
                                           float (&sums)[kCount][2][4]) const {
    multiply_state(width, f, tiles, s, sums);
  }
};

// o of a tile of queries of a head: of the state, unless kAlone, and of the keys it meets. look: of the features of those keys,
// once each, which, the last tile's, stay in `others` turned, their values in `values`.
template <bool kWide, bool kAlone, class State, class Look>
__device__ __forceinline__ void forward_tile(const Problem& x, const Widths& width, const Fragment& f, const Tiles& tiles,
                                             const Place& at, std::int64_t first, const Met& met, std::int64_t head,
                                             std::int64_t kv, const State& state, Look look) {
  const bool known = make_queries(x, width, f, tiles, at, first, met, head, kv, kAlone ? nullptr : state.z, false);
  float out[kPairs<kWide>][2][4];
  clear(out);
  if (!kAlone) state.multiply(width, f, tiles, out);
  for (std::int64_t other = met.first; other < met.end; other += kMmaTile) {
    make_features<false>(x, x.k, met.at, other, kv, x.sin != nullptr, width, tiles.others, look);
    load_values(x.v, met.at, other, kv, 0, width.ldv - 8, width.v_dim, tiles.values, width.ldv);
    weigh_keys(width, f, tiles, ahead_of(x, first, other), true, !known);
    multiply_rows(f, tiles.weights, kWeightsLd, tiles.values, width.ldv, kMmaTile, width.v_dim, out);
    __syncthreads();
  }
  const bool aligned = aligned_16(x.o);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = f.row + f.g + 8 * r;
    const std::int64_t token = first + row;
    if (token >= at.length) continue;
    const float d = tiles.d[row] + effective_eps(x, at, token);
    Bits* const to = row_of<Bits>(x.o, at, token, head);
#pragma unroll
    for (int i = 0; i < 2 * kPairs<kWide>; ++i) {
      const int c = 16 * (f.half + i / 2 * 2) + i % 2 * 8 + 2 * f.t;
      if (c >= width.v_dim) continue;
      float low = out[i / 2][i % 2][2 * r] / d, high = out[i / 2][i % 2][2 * r + 1] / d;
      if (x.gate.data != nullptr) {
        const float a = gate_value(x, at, token, head, c), b = gate_value(x, at, token, head, c + 1);
        low *= a * sigmoid(a);
        high *= b * sigmoid(b);
      }
      store_pair(to + c, low, high, aligned);
    }
  }
}

// run(wide, alone) with both as types. Alone is a kernel of its own, as both orders in one would spill.
template <class Run>
void with_flags(bool wide, bool alone, Run run) {
  const auto with = [&](auto a) { wide ? run(std::true_type{}, a) : run(std::false_type{}, a); };
  alone ? with(std::true_type{}) : with(std::false_type{});
}

}  // namespace
}  // namespace cuda
}  // namespace pyelastic
