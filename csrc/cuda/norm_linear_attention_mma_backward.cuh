// Gradients in norm_linear_attention's tensor-core kernels: y, that of a tile's features, and those of q and k. Contract and
// formulas: ../norm_linear_attention.h.
#pragma once

#include "norm_linear_attention_mma.cuh"

namespace pyelastic {
namespace cuda {
namespace {

// Columns `column` .. + columns - 1 of the gradient before the gate over the denominators d_of(row), as `to`
// [64][ld], zeros outside; columns: a multiple of 8. No barrier.
template <class DOf>
__device__ __forceinline__ void make_gradient(const Problem& x, const Place& at, std::int64_t first, std::int64_t head, int column,
                                              int columns, int width, Bits* to, int ld, DOf d_of) {
  const bool aligned = aligned_16(x.o), gate_aligned = aligned_16(x.gate);
  const Bits* const grad = row_of<const Bits>(x.o, at, first, head) + column;
  const Bits* const gate = row_of<const Bits>(x.gate, at, first, head) + column;
  const int each = columns / 8, rows = at.length - first < kMmaTile ? static_cast<int>(at.length - first) : kMmaTile;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < kMmaTile * each; i += kMmaThreads) {
    const int row = i / each, c = i % each * 8;
    float g[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    if (row < rows && column + c < width) {
      widen(load_eight(grad + row * x.o.token + c, aligned), g);
      if (x.gate.data != nullptr) {
        float s[8];
        widen(load_eight(gate + row * x.gate.token + c, gate_aligned), s);
#pragma unroll
        for (int e = 0; e < 8; ++e) g[e] *= s[e] * sigmoid(s[e]);
      }
      const float inverse = 1.0f / d_of(row);
#pragma unroll
      for (int e = 0; e < 8; ++e) g[e] *= inverse;
    }
    *reinterpret_cast<Eight*>(to + row * ld + c) = round_eight(g);
  }
}

// The gradient of 64 tokens' features: of a warp's pairs of columns, in the upper half and in the lower.
template <bool kWide>
struct Back {
  static constexpr int kCount = kPairs<kWide>;
  float upper[kCount][2][4], lower[kCount][2][4];
  __device__ Back() {
    clear(upper);
    clear(lower);
  }

  // += left [64][v_dim] state^T; the state in pieces of 32 channels. Begins with a barrier.
  __device__ __forceinline__ void add_state(const Widths& width, const Fragment& f, const Bits* left, const float* state,
                                            Bits* room) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (32 * i >= width.dim) continue;
      __syncthreads();
      load_state(state, width, room, [&](int r) {
        const int c = 32 * i + r % 32;
        return c < width.dim ? r / 32 * width.dim + c : -1;
      });
      __syncthreads();
#pragma unroll 1
      for (int k = 0; k < width.ldv - 8; k += 16) {
        std::uint32_t a[4], b[4];
        fragment_a(a, left + f.row * width.ldv + k, width.ldv, f.lane);
        fragment_b(b, room + 16 * f.half * width.ldv + k, width.ldv, f.lane);
        multiply(upper[i], a, b);
        fragment_b(b, room + (32 + 16 * f.half) * width.ldv + k, width.ldv, f.lane);
        multiply(lower[i], a, b);
      }
    }
  }

  // The same of a state in shared memory, rounded, [features + 8][ldv].
  __device__ __forceinline__ void add_near(const Widths& width, const Fragment& f, const Bits* left, const Bits* state) {
    __syncthreads();
#pragma unroll 1
    for (int k = 0; k < width.ldv - 8; k += 16) {
      std::uint32_t a[4];
      fragment_a(a, left + f.row * width.ldv + k, width.ldv, f.lane);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int row = 16 * (f.half + 2 * i);
        if (row >= width.dim) continue;
        std::uint32_t b[4];
        fragment_b(b, state + row * width.ldv + k, width.ldv, f.lane);
        multiply(upper[i], a, b);
        fragment_b(b, state + (width.dim + row) * width.ldv + k, width.ldv, f.lane);
        multiply(lower[i], a, b);
      }
    }
  }

  // += weights [64][64] features of others [64][2 d].
  __device__ __forceinline__ void add_tokens(const Widths& width, const Fragment& f, const Bits* weights, const Bits* others) {
#pragma unroll 1
    for (int k = 0; k < kMmaTile; k += 16) {
      std::uint32_t a[4];
      fragment_a(a, weights + f.row * kWeightsLd + k, kWeightsLd, f.lane);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int column = 16 * (f.half + 2 * i);
        if (column >= width.dim) continue;
        std::uint32_t b[4];
        fragment_b_trans(b, others + k * width.ldf + column, width.ldf, f.lane);
        multiply(upper[i], a, b);
        fragment_b_trans(b, others + k * width.ldf + width.dim + column, width.ldf, f.lane);
        multiply(lower[i], a, b);
      }
    }
  }

  __device__ static __forceinline__ int column_of(const Fragment& f, int i, int tile) {
    return 16 * (f.half + 2 * i) + 8 * tile + 2 * f.t;
  }

  // Sums over a warp's columns of features times this, to `to` [2][64].
  __device__ __forceinline__ void dot_rows(const Widths& width, const Fragment& f, const Bits* features, float* to) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Bits* const row = features + (f.row + f.g + 8 * r) * width.ldf;
      float sum = 0;
#pragma unroll
      for (int n = 0; n < 2 * kCount; ++n) {
        const int i = n / 2, tile = n % 2, c = column_of(f, i, tile);
        if (c >= width.dim) continue;
        const std::uint32_t a = *reinterpret_cast<const std::uint32_t*>(row + c);
        const std::uint32_t b = *reinterpret_cast<const std::uint32_t*>(row + width.dim + c);
        sum += __uint_as_float(a << 16) * upper[i][tile][2 * r] + __uint_as_float(a & 0xffff0000u) * upper[i][tile][2 * r + 1];
        sum += __uint_as_float(b << 16) * lower[i][tile][2 * r] + __uint_as_float(b & 0xffff0000u) * lower[i][tile][2 * r + 1];
      }
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      if (f.t == 0) to[f.half * kMmaTile + f.row + f.g + 8 * r] = sum;
    }
  }

  // Of rotated features to of plain ones.
  __device__ __forceinline__ void turn_back(const Problem& x, const Widths& width, const Fragment& f, const Place& at,
                                            std::int64_t first) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const std::int64_t from = position(x, at, first + f.row + f.g + 8 * r) * (width.dim / 2);
#pragma unroll
      for (int n = 0; n < 2 * kCount; ++n) {
        const int i = n / 2, tile = n % 2, c = column_of(f, i, tile);
        if (c >= width.dim) continue;
        const float s = x.sin[from + c / 2], co = x.cos[from + c / 2];
        turn(upper[i][tile][2 * r], upper[i][tile][2 * r + 1], s, co);
        turn(lower[i][tile][2 * r], lower[i][tile][2 * r + 1], s, co);
      }
    }
  }
  __device__ static __forceinline__ void turn(float& even, float& odd, float s, float co) {
    const float e = even, o = odd;
    even = e * co + o * s;
    odd = o * co - e * s;
  }

  // += scale [64] (null: 1) z [features]^T.
  __device__ __forceinline__ void add_rows(const Widths& width, const Fragment& f, const float* scale, const float* z) {
#pragma unroll
    for (int n = 0; n < 8 * kCount; ++n) {
      const int i = n / 8, tile = n / 4 % 2, e = n % 4, c = column_of(f, i, tile) + e % 2;
      if (c >= width.dim) continue;
      const float by = scale == nullptr ? 1.0f : scale[f.row + f.g + e / 2 * 8];
      upper[i][tile][e] += by * z[c];
      lower[i][tile][e] += by * z[width.dim + c];
    }
  }

  // To `to` [64][features + 4].
  __device__ __forceinline__ void store(const Widths& width, const Fragment& f, float* to) const {
#pragma unroll
    for (int n = 0; n < 4 * kCount; ++n) {
      const int i = n / 4, tile = n / 2 % 2, r = n % 2, c = column_of(f, i, tile);
      if (c >= width.dim) continue;
      float* const row = to + (f.row + f.g + 8 * r) * (width.features + 4) + c;
      row[0] = upper[i][tile][2 * r];
      row[1] = upper[i][tile][2 * r + 1];
      row[width.dim] = lower[i][tile][2 * r];
      row[width.dim + 1] = lower[i][tile][2 * r + 1];
    }
  }
};

// Weights that depend on one side alone, of the pairs that meet; value(row, column). Rounded to `to`.
template <class Value>
__device__ __forceinline__ void store_meeting(int ahead, bool rows_later, Bits* to, Value value) {
  for (int i = static_cast<int>(threadIdx.x); i < kMmaTile * kMmaTile / 2; i += kMmaThreads) {
    const int row = i / (kMmaTile / 2), column = i % (kMmaTile / 2) * 2, after = ahead + row - column;
    const float low = (rows_later ? after >= 0 : after <= 0) ? value(row, column) : 0.0f;
    const float high = (rows_later ? after >= 1 : after <= 1) ? value(row, column + 1) : 0.0f;
    *reinterpret_cast<std::uint32_t*>(to + row * kWeightsLd + column) = pack(low, high, BF16{});
  }
}

// What eight channels' features say to their magnitudes, and to their angles (0 unless cosine); w: magnitudes.
__device__ __forceinline__ void magnitudes(const Problem& x, const float (&v)[8], float inverse, const float (&w)[8],
                                           const float (&upper)[8], const float (&lower)[8], float (&e)[8], float (&turned)[8]) {
  const bool cosine = x.map == FeatureMap::cosine;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    turned[i] = 0.0f;
    if (cosine) {
      float slope, co, si;
      cos_sin(kQuarter * tanh_of(x.alpha * (v[i] * inverse), slope), co, si);
      turned[i] = w[i] * (lower[i] * co - upper[i] * si) * slope * (x.alpha * kQuarter);
      e[i] = upper[i] * co + lower[i] * si;
    } else {
      e[i] = by_sign(v[i], upper[i], lower[i]);
    }
  }
}

// The sum over a thread's rows of the powers' gradients, over the block, to `to` [dim]; room: [kMmaThreads / n][dim].
// Begins with a barrier.
__device__ __forceinline__ void store_powers(const Widths& width, const float (&sums)[8], float* room, float* to) {
  const int n = sharers(width.dim), c = static_cast<int>(threadIdx.x) % n * 8, member = static_cast<int>(threadIdx.x) / n;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (c < width.dim) room[member * width.dim + c + i] = sums[i];
  }
  __syncthreads();
  for (int r = static_cast<int>(threadIdx.x); r < width.dim; r += kMmaThreads) {
    float sum = 0;
    for (int m = 0; m < kMmaThreads / n; ++m) sum += room[m * width.dim + r];
    to[r] = sum;
  }
}

// A Tiles with the block's own values (or y), and words for its sums; h lies over all that is larger.
struct BackTiles : Tiles {
  Bits* side;        // [64][ldv]
  float *dd, *own;   // [64], [3][64]
  float* h;          // [64][features + 4]

  static constexpr int kFloats = 4 * kMmaTile;
  static std::size_t bytes(const Problem& x, bool alone) {
    const std::size_t ldv = static_cast<std::size_t>((x.v_dim + 15) / 16 * 16 + 8), dim = static_cast<std::size_t>(x.dim);
    const std::size_t few = 3 * kMmaTile * sizeof(float), bits = Tiles::bytes(x, alone) - few + 2 * kMmaTile * ldv;
    const std::size_t floats = sizeof(float) * kMmaTile * (2 * dim + 4);
    return sizeof(float) * kFloats + few + (bits > floats ? bits : floats);
  }
  __device__ BackTiles(float* room, const Widths& width, bool met) : Tiles(room + kFloats, width) {
    dd = room;
    own = dd + kMmaTile;
    h = reinterpret_cast<float*>(Tiles::own);
    side = met ? weights + kMmaTile * kWeightsLd : others;
  }
};

// What a thread takes of a row of q or k to make its gradient: channels c .. c + 7, and the gradients of their features in h
// [64][features + 4]. Zeros where there are none.
struct Channels {
  const Bits* data;  // of token 0
  std::int64_t stride;
  bool aligned;
  __device__ Channels(const HeadsView& x, const Place& at, std::int64_t head, int c)
      : data(static_cast<const Bits*>(x.data) + at.batch * x.batch + head * x.head + c), stride(x.token), aligned(aligned_16(x)) {}

  __device__ __forceinline__ void load(const Place& at, std::int64_t first, int row, int c, const float* h, const Widths& width,
                                       float (&v)[8], float (&upper)[8], float (&lower)[8]) const {
    const std::int64_t token = first + row;
    const bool there = c < width.dim;
    Eight raw{};
    if (there && token < at.length) raw = load_eight(data + (at.begin + token) * stride, aligned);
    widen(raw, v);
    const float* const from = h + row * (width.features + 4) + c;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      upper[i] = there ? from[i] : 0.0f;
      lower[i] = there ? from[width.dim + i] : 0.0f;
    }
  }
};

// dq of a tile, and its part of the parameters' gradients, from the features' gradients in tiles.h.
__device__ __forceinline__ void query_gradients(const Problem& x, const Widths& width, const Place& at, std::int64_t first,
                                                std::int64_t head, const BackTiles& tiles, float* dparams) {
  const int n = sharers(width.dim), c = static_cast<int>(threadIdx.x) % n * 8;
  const bool pola = is_pola(x.map), aligned = aligned_16(x.dq);
  const Channels rows(x.q, at, head, c);
  float powers[8] = {0, 0, 0, 0, 0, 0, 0, 0};
#pragma unroll 1
  for (int row = static_cast<int>(threadIdx.x) / n; row < kMmaTile; row += kMmaThreads / n) {
    const std::int64_t token = first + row;
    const bool there = token < at.length;
    float v[8], upper[8], lower[8], w[8], e[8], turned[8];
    rows.load(at, first, row, c, tiles.h, width, v, upper, lower);
    if (pola) {
      if (c >= width.dim) continue;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float a = fabsf(v[i]), exponent = x.params[head * width.dim + c + i];
        const bool swap = x.map == FeatureMap::pola_opposite;
        const float gm = by_sign(v[i], swap ? lower[i] : upper[i], swap ? upper[i] : lower[i]) * power(a, exponent);
        if (there) powers[i] += gm * log2_or_0(a) * kLn2;
        e[i] = exponent * gm / (v[i] == 0.0f ? 1.0f : v[i]);
      }
    } else {
      const Norm of = norm_of<true>(x, head, v, n);
#pragma unroll
      for (int i = 0; i < 8; ++i) w[i] = power(fabsf(v[i]) * of.inverse, of.p);
      magnitudes(x, v, of.inverse, w, upper, lower, e, turned);
      float sum_p = 0, sum_t = 0, sum_n = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float gm = e[i] * w[i];
        sum_t += gm;
        sum_p += gm * log2_or_0(fabsf(v[i]) * of.inverse);
        sum_n += turned[i] * v[i];
      }
      sum_p = sharers_sum(sum_p, n) * kLn2;
      sum_t = sharers_sum(sum_t, n);
      sum_n = sharers_sum(sum_n, n) * of.inverse;
      const float lam = x.params[head], tau = x.params[x.q_heads + head], beta = x.params[2 * x.q_heads + head];
      const float pull = (sum_p * lam * beta * of.slope - (of.p * sum_t + sum_n) * of.inverse) * of.inverse;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        e[i] = of.p * (e[i] * w[i]) / (v[i] == 0.0f ? 1.0f : v[i]) + turned[i] * of.inverse + pull * v[i];
      }
      if (c == 0) {
        tiles.own[row] = there ? sum_p * (tau + of.t) : 0.0f;
        tiles.own[kMmaTile + row] = there ? sum_p * lam : 0.0f;
        tiles.own[2 * kMmaTile + row] = there ? sum_p * lam * of.r * of.slope : 0.0f;
      }
    }
    if (there && c < width.dim) store_eight(row_of<Bits>(x.dq, at, token, head) + c, e, aligned);
  }
  if (pola) return store_powers(width, powers, tiles.h, dparams);
  __syncthreads();
  if (threadIdx.x < 3) {
    float sum = 0;
    for (int row = 0; row < kMmaTile; ++row) sum += tiles.own[threadIdx.x * kMmaTile + row];
    dparams[threadIdx.x] = sum;
  }
}

// dk of a tile and, of powers, its part of their gradients.
__device__ __forceinline__ void key_gradients(const Problem& x, const Widths& width, const Place& at, std::int64_t first,
                                              std::int64_t kv, const BackTiles& tiles, float* dparams) {
  const int n = sharers(width.dim), c = static_cast<int>(threadIdx.x) % n * 8;
  const bool pola = is_pola(x.map), aligned = aligned_16(x.dk), cube = !pola && x.key_power == 3.0f;
  const Channels rows(x.k, at, kv, c);
  float powers[8] = {0, 0, 0, 0, 0, 0, 0, 0};
#pragma unroll 1
  for (int row = static_cast<int>(threadIdx.x) / n; row < kMmaTile; row += kMmaThreads / n) {
    const std::int64_t token = first + row;
    const bool there = token < at.length;
    float v[8], upper[8], lower[8], m[8], e[8], turned[8], along = 0;
    rows.load(at, first, row, c, tiles.h, width, v, upper, lower);
    const Norm of = x.map == FeatureMap::cosine ? norm_of<false>(x, kv, v, n) : Norm{};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float a = fabsf(v[i]), p = pola && c < width.dim ? x.params[kv * width.dim + c + i] : x.key_power;
      m[i] = cube ? a * a * a : power(a, p);
    }
    magnitudes(x, v, of.inverse, m, upper, lower, e, turned);
    if (x.map == FeatureMap::cosine) {
#pragma unroll
      for (int i = 0; i < 8; ++i) along += turned[i] * v[i];
      along = sharers_sum(along, n) * of.inverse * of.inverse;
    }
    if (!there || c >= width.dim) continue;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float a = fabsf(v[i]), p = pola ? x.params[kv * width.dim + c + i] : x.key_power;
      if (pola) powers[i] += e[i] * m[i] * log2_or_0(a) * kLn2;
      // p |k|^(p - 1) with k's sign; 0 for k = 0, whatever p is.
      const float slope = cube ? 3.0f * a * v[i] : (v[i] == 0.0f ? 0.0f : p * copysignf(exp2f((p - 1.0f) * log2f(a)), v[i]));
      e[i] = slope * e[i] + (turned[i] - v[i] * along) * of.inverse;
    }
    store_eight(row_of<Bits>(x.dk, at, token, kv) + c, e, aligned);
  }
  if (pola) store_powers(width, powers, tiles.h, dparams);
}

}  // namespace
}  // namespace cuda
}  // namespace pyelastic
