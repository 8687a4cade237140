// Passes of norm_linear_attention's tensor-core kernels over one tile of the backward pass. Contract and formulas:
// ../norm_linear_attention.h.
#pragma once

#include "norm_linear_attention_mma_backward.cuh"

namespace pyelastic {
namespace cuda {
namespace {

// A StateFar (or, of keys, its gradient) that features' gradients read, too.
struct StateBehind : StateFar {
  template <bool kWide>
  __device__ __forceinline__ void add_to(const Widths& width, const Fragment& f, const BackTiles& tiles, Back<kWide>& back) const {
    back.add_state(width, f, tiles.side, s, tiles.values);
  }
};

// Elements of the parameters' gradients of a tile and head.
__device__ __forceinline__ int params_of(const Problem& x) { return is_pola(x.map) ? static_cast<int>(x.dim) : 3; }

// dq, dgate and dparams of a tile of queries of a head; d and dd of [batch * queries, q_heads]. look() is called, after a
// barrier, while y is still in `side` and dd known; what it does to `own` nobody reads.
template <bool kWide, bool kAlone, class State, class Look>
__device__ __forceinline__ void queries_tile(const Problem& x, const Widths& width, const Fragment& f, const BackTiles& tiles,
                                             const Place& at, std::int64_t first, const Met& met, std::int64_t head,
                                             std::int64_t kv, const State& state, float* d_out, float* dd_out, Look look,
                                             float* dparams) {
  const bool rope = x.sin != nullptr;
  make_queries(x, width, f, tiles, at, first, met, head, kv, kAlone ? nullptr : state.z, true);
  if (threadIdx.x < kMmaTile) {
    const std::int64_t token = first + threadIdx.x;
    const bool there = token < at.length;
    const float d = there ? tiles.d[threadIdx.x] + effective_eps(x, at, token) : 1.0f;
    tiles.d[threadIdx.x] = d;
    if (there) d_out[query_row(x, at, token, head)] = d;
  }
  __syncthreads();
  make_gradient(x, at, first, head, 0, width.ldv - 8, width.v_dim, tiles.side, width.ldv,
                [&](int row) { return tiles.d[row]; });
  if (x.dgate.data != nullptr) {
    float out[kPairs<kWide>][2][4];
    clear(out);
    if (!kAlone) state.multiply(width, f, tiles, out);
    for (std::int64_t other = met.first; other < met.end; other += kMmaTile) {
      make_features<false>(x, x.k, met.at, other, kv, rope, width, tiles.others, NoLook{});
      load_values(x.v, met.at, other, kv, 0, width.ldv - 8, width.v_dim, tiles.values, width.ldv);
      weigh_keys(width, f, tiles, ahead_of(x, first, other), true, false);
      multiply_rows(f, tiles.weights, kWeightsLd, tiles.values, width.ldv, kMmaTile, width.v_dim, out);
      __syncthreads();
    }
#pragma unroll
    for (int n = 0; n < 8 * kPairs<kWide>; ++n) {
      const int i = n / 8, tile = n / 4 % 2, row = f.row + f.g + n / 2 % 2 * 8;
      const int c = 16 * (f.half + 2 * i) + 8 * tile + 2 * f.t + n % 2;
      const std::int64_t token = first + row;
      if (token >= at.length || c >= width.v_dim) continue;
      const float g = gate_value(x, at, token, head, c), sig = sigmoid(g);
      const float up = widen(row_of<const Bits>(x.o, at, token, head)[c]);
      const float made = up * (out[i][tile][n % 4] / tiles.d[row]) * sig * (1.0f + g * (1.0f - sig));
      row_of<Bits>(x.dgate, at, token, head)[c] = static_cast<Bits>(pack(made, 0.0f, BF16{}));
    }
  }
  Back<kWide> back;
  if (!kAlone) state.add_to(width, f, tiles, back);
  for (std::int64_t other = met.first; other < met.end; other += kMmaTile) {
    __syncthreads();
    make_features<false>(x, x.k, met.at, other, kv, rope, width, tiles.others, NoLook{});
    load_values(x.v, met.at, other, kv, 0, width.ldv - 8, width.v_dim, tiles.values, width.ldv);
    __syncthreads();
    float w[2][2][4];
    multiply_tokens(f, tiles.side, tiles.values, width.ldv, width.ldv - 8, w);
    mask_tokens<true>(f, ahead_of(x, first, other), w);
    store_tokens(f, w, tiles.weights);
    __syncthreads();
    back.add_tokens(width, f, tiles.weights, tiles.others);
  }
  back.dot_rows(width, f, tiles.Tiles::own, tiles.sums);
  __syncthreads();
  if (threadIdx.x < kMmaTile) {
    const float dd = -(tiles.sums[threadIdx.x] + tiles.sums[kMmaTile + threadIdx.x]) / tiles.d[threadIdx.x];
    tiles.dd[threadIdx.x] = dd;
    if (first + threadIdx.x < at.length) dd_out[query_row(x, at, first + threadIdx.x, head)] = dd;
  }
  if (rope && !x.rope_both) back.turn_back(x, width, f, at, first);
  __syncthreads();  // dd
  if (!kAlone) back.add_rows(width, f, tiles.dd, state.z);
  for (std::int64_t other = met.first; other < met.end; other += kMmaTile) {
    __syncthreads();
    make_features<false>(x, x.k, met.at, other, kv, x.rope_both && rope, width, tiles.others, NoLook{});
    store_meeting(ahead_of(x, first, other), true, tiles.weights, [&](int row, int) { return tiles.dd[row]; });
    __syncthreads();
    back.add_tokens(width, f, tiles.weights, tiles.others);
  }
  if (rope && x.rope_both) back.turn_back(x, width, f, at, first);
  __syncthreads();
  look();
  back.store(width, f, tiles.h);
  __syncthreads();
  query_gradients(x, width, at, first, head, tiles, dparams);
}

// SumInto of a row's features times scale[row * stride], below row `rows`.
struct ScaledSumInto {
  SumInto into;
  const float* scale;
  int stride, rows;
  __device__ __forceinline__ void operator()(int row, int, const float (&upper)[8], const float (&lower)[8]) const {
    const float by = row < rows ? scale[row * stride] : 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      into.at(i) += by * upper[i];
      into.at(8 + i) += by * lower[i];
    }
  }
};

// What a tile of queries adds to the gradient of the state: its features, turned, as `queries` [64][ldf], 64 columns of y as `y`
// [64][kStateLd], and dd times the features summed into `room` as by SumInto. No barrier.
__device__ __forceinline__ void make_grad_tile(const Problem& x, const Widths& width, const Place& at, std::int64_t token,
                                               std::int64_t head, const float* d_in, const float* dd_in, int column,
                                               Bits* queries, Bits* y, float* room) {
  const float* const dd = dd_in + query_row(x, at, token, head);
  const int rows = at.length - token < kMmaTile ? static_cast<int>(at.length - token) : kMmaTile;
  make_features<true>(x, x.q, at, token, head, x.sin != nullptr, width, queries,
                      ScaledSumInto{{room}, dd, static_cast<int>(x.q_heads), rows});
  const float* const d = d_in + query_row(x, at, token, head);
  make_gradient(x, at, token, head, column, kStateColumns, width.v_dim, y, kStateLd, [&](int row) { return d[row * x.q_heads]; });
}

// dk, dv of a tile of keys and, of powers, dparams. state: gradients of the state after the queries it meets.
template <bool kWide, bool kAlone, class State>
__device__ __forceinline__ void keys_tile(const Problem& x, const Widths& width, const Fragment& f, const BackTiles& tiles,
                                          const Place& at, std::int64_t first, const Met& met, int kv, const State& state,
                                          const float* d_in, const float* dd_in, float* dparams) {
  const int group = static_cast<int>(x.q_heads) / static_cast<int>(x.kv_heads);
  const int span = static_cast<int>(met.end - met.first);
  const bool rope = x.sin != nullptr;
  const auto meet = [&](auto what) {  // begins with a barrier, if there is any
    // One loop, and kAlone wherever it decides: narrow heads have no register left.
#pragma unroll 1
    for (int head = kv * group, after = 0; head < kv * group + group && (kAlone || after < span);) {
      __syncthreads();
      what(head, (kAlone ? met.first : first) + after, kAlone && !x.causal ? -kMmaTile : -after);
      __syncthreads();
      after += kMmaTile;
      if (after >= span) after = 0, ++head;
    }
  };
  const auto make_y = [&](int head, std::int64_t other) {  // ends with a barrier
    const float* const d = d_in + query_row(x, met.at, other, head);
    make_gradient(x, met.at, other, head, 0, width.ldv - 8, width.v_dim, tiles.values, width.ldv,
                  [&](int row) { return d[row * x.q_heads]; });
    __syncthreads();
  };
  make_features<false>(x, x.k, at, first, kv, rope, width, tiles.Tiles::own, NoLook{});
  load_values(x.v, at, first, kv, 0, width.ldv - 8, width.v_dim, tiles.side, width.ldv);
  {
    float out[kPairs<kWide>][2][4];
    clear(out);
    if (!kAlone) state.multiply(width, f, tiles, out);
    meet([&](int head, std::int64_t other, int ahead) {
      make_features<true>(x, x.q, met.at, other, head, rope, width, tiles.others, NoLook{});
      make_y(head, other);
      float w[2][2][4];
      multiply_tokens(f, tiles.Tiles::own, tiles.others, width.ldf, width.features, w);
      mask_tokens<false>(f, ahead, w);
      store_tokens(f, w, tiles.weights);
      __syncthreads();
      multiply_rows(f, tiles.weights, kWeightsLd, tiles.values, width.ldv, kMmaTile, width.v_dim, out);
    });
    const bool aligned = aligned_16(x.dv);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const std::int64_t token = first + f.row + f.g + 8 * r;
      if (token >= at.length) continue;
      Bits* const to = row_of<Bits>(x.dv, at, token, kv);
#pragma unroll
      for (int n = 0; n < 2 * kPairs<kWide>; ++n) {
        const int i = n / 2, tile = n % 2, c = 16 * (f.half + 2 * i) + 8 * tile + 2 * f.t;
        if (c < width.v_dim) store_pair(to + c, out[i][tile][2 * r], out[i][tile][2 * r + 1], aligned);
      }
    }
  }
  Back<kWide> back;
  if (!kAlone) state.add_to(width, f, tiles, back);
  const auto add_queries = [&](bool numerator) {
    meet([&](int head, std::int64_t other, int ahead) {
      make_features<true>(x, x.q, met.at, other, head, rope && (numerator || x.rope_both), width, tiles.others, NoLook{});
      if (numerator) {
        make_y(head, other);
        float w[2][2][4];
        multiply_tokens(f, tiles.side, tiles.values, width.ldv, width.ldv - 8, w);
        mask_tokens<false>(f, ahead, w);
        store_tokens(f, w, tiles.weights);
      } else {
        const float* const dd = dd_in + query_row(x, met.at, other, head);
        store_meeting(ahead, false, tiles.weights,
                      [&](int, int column) { return other + column < met.at.length ? dd[column * x.q_heads] : 0.0f; });
      }
      __syncthreads();
      back.add_tokens(width, f, tiles.weights, tiles.others);
    });
    if (!numerator) return;
    if (rope && !x.rope_both) back.turn_back(x, width, f, at, first);
    if (!kAlone) back.add_rows(width, f, nullptr, state.z);
  };
  if constexpr (kAlone) {  // one loop, as two would spill; the other way round with states
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) add_queries(pass == 0);
  } else {
    add_queries(true);
    add_queries(false);
  }
  if (rope && x.rope_both) back.turn_back(x, width, f, at, first);
  __syncthreads();
  back.store(width, f, tiles.h);
  __syncthreads();
  key_gradients(x, width, at, first, kv, tiles, dparams);
}

}  // namespace
}  // namespace cuda
}  // namespace pyelastic
