// What norm_linear_attention's tensor-core kernels share, for bfloat16 inputs of widths that are multiples of 8: features of
// 64 tokens, made in registers and rounded once on their way to shared memory, and products of such tiles by mma.sync.
//
// A block is 8 warps. Tiles are rows of bfloat16 bits, 16 bytes longer than a multiple of 32: eight rows of an ldmatrix fall on
// different banks. In products of 64 rows warp w has rows 16 (w % 4) .. + 15 and, of groups of 16 columns ("pairs" of
// mma's 8), every other one from w / 4 on. Widths above 64 have kernels of their own (kWide), as they need twice the sums.
#pragma once

#include "../common/ptx.cuh"
#include "norm_linear_attention_tile.cuh"

namespace pyelastic {
namespace cuda {
namespace {

constexpr int kMmaThreads = 256, kMmaTile = static_cast<int>(kNlaMmaTokens);
constexpr int kWeightsLd = kMmaTile + 8, kStateColumns = 64, kStateLd = kStateColumns + 8;

template <bool kWide>
constexpr int kPairs = kWide ? 4 : 2;  // of columns, of a warp

using Bits = std::uint16_t;
struct alignas(16) Eight {
  std::uint32_t pair[4];
};

struct Widths {
  int dim, v_dim, features, ldf, ldv;  // elements; rows of features and of values are ldf and ldv apart
  __device__ explicit Widths(const Problem& x)
      : dim(static_cast<int>(x.dim)), v_dim(static_cast<int>(x.v_dim)), features(2 * dim), ldf(features + 8),
        ldv((v_dim + 15) / 16 * 16 + 8) {}
};

// Where this thread's fragments of a product of 64 rows lie.
struct Fragment {
  int lane, row, half, g, t;
  __device__ Fragment() {
    lane = static_cast<int>(threadIdx.x) % 32;
    row = static_cast<int>(threadIdx.x) / 32 % 4 * 16;
    half = static_cast<int>(threadIdx.x) / 128;
    g = lane / 4;
    t = lane % 4;
  }
};

__device__ __forceinline__ bool aligned_16(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }
__device__ __forceinline__ bool aligned_16(const HeadsView& x) {
  return aligned_16(x.data) && (x.batch | x.token | x.head) % 8 == 0;
}

// Eight neighbouring elements; one by one where they are not on 16 bytes.
__device__ __forceinline__ Eight load_eight(const Bits* from, bool aligned) {
  if (aligned) return *reinterpret_cast<const Eight*>(from);
  Eight x;
#pragma unroll
  for (int i = 0; i < 4; ++i) x.pair[i] = from[2 * i] | static_cast<std::uint32_t>(from[2 * i + 1]) << 16;
  return x;
}

__device__ __forceinline__ float widen(Bits x) { return __uint_as_float(static_cast<std::uint32_t>(x) << 16); }
__device__ __forceinline__ void widen(const Eight& x, float (&to)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = __uint_as_float(x.pair[i] << 16);
    to[2 * i + 1] = __uint_as_float(x.pair[i] & 0xffff0000u);
  }
}

__device__ __forceinline__ Eight round_eight(const float (&x)[8]) {
  Eight y;
#pragma unroll
  for (int i = 0; i < 4; ++i) y.pair[i] = pack(x[2 * i], x[2 * i + 1], BF16{});
  return y;
}

// Eight neighbouring elements, or two, rounded; one by one where they are not `aligned`.
__device__ __forceinline__ void store_eight(Bits* to, const float (&x)[8], bool aligned) {
  const Eight y = round_eight(x);
  if (aligned) {
    *reinterpret_cast<Eight*>(to) = y;
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) to[i] = static_cast<Bits>(y.pair[i / 2] >> i % 2 * 16);
}
__device__ __forceinline__ void store_pair(Bits* to, float low, float high, bool aligned) {
  const std::uint32_t pair = pack(low, high, BF16{});
  if (aligned) {
    *reinterpret_cast<std::uint32_t*>(to) = pair;
    return;
  }
  to[0] = static_cast<Bits>(pair);
  to[1] = static_cast<Bits>(pair >> 16);
}

// Threads that share a row of `width` elements, eight each: a power of two up to 16.
__device__ __forceinline__ int sharers(int width) {
  int n = 1;
  while (8 * n < width) n *= 2;
  return n;
}

__device__ __forceinline__ float sharers_sum(float x, int n) {
  for (int offset = n / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

__device__ __forceinline__ std::int64_t position(const Problem& q, const Place& at, std::int64_t token) {
  return (token < at.length ? token : 0) + (q.start == nullptr ? 0 : q.start[at.sequence]);
}

// sin and cos of the four pairs of channels c .. c + 7.
__device__ __forceinline__ void load_angles(const Problem& q, std::int64_t position, int c, float (&s)[4], float (&co)[4]) {
  const std::int64_t from = position * (q.dim / 2) + c / 2;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    s[i] = q.sin[from + i];
    co[i] = q.cos[from + i];
  }
}

// Eight channels from c on of a row of norm 1 / inverse and, of queries, power p. Formulas: make_tile.
template <bool kQuery>
__device__ __forceinline__ void features_of(const Problem& q, std::int64_t head, int c, const float (&v)[8], float inverse,
                                            float p, float (&upper)[8], float (&lower)[8]) {
  float w[8];
  if (is_pola(q.map)) {
#pragma unroll
    for (int i = 0; i < 8; ++i) w[i] = power(fabsf(v[i]), c < q.dim ? q.params[head * q.dim + c + i] : 1.0f);
  } else if constexpr (kQuery) {
#pragma unroll
    for (int i = 0; i < 8; ++i) w[i] = power(fabsf(v[i]) * inverse, p);
  } else if (q.key_power == 3.0f) {
#pragma unroll
    for (int i = 0; i < 8; ++i) w[i] = fabsf(v[i]) * v[i] * v[i];
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) w[i] = power(fabsf(v[i]), q.key_power);
  }
  if (q.map == FeatureMap::cosine) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float slope, co, si;
      cos_sin(kQuarter * tanh_of(q.alpha * (v[i] * inverse), slope), co, si);
      upper[i] = w[i] * co;
      lower[i] = w[i] * si;
    }
    return;
  }
  const bool swap = kQuery && q.map == FeatureMap::pola_opposite;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float above = v[i] <= 0.0f ? 0.0f : w[i], below = v[i] >= 0.0f ? 0.0f : w[i];  // a NaN in both
    upper[i] = swap ? below : above;
    lower[i] = swap ? above : below;
  }
}

__device__ __forceinline__ void turn_eight(float (&x)[8], const float (&s)[4], const float (&co)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float even = x[2 * i], odd = x[2 * i + 1];
    x[2 * i] = even * co[i] - odd * s[i];
    x[2 * i + 1] = odd * co[i] + even * s[i];
  }
}

// Norm of a row that n threads share, and of queries tanh(beta r) and its slope, and the power.
struct Norm {
  float r = 1, inverse = 1, p = 0, t = 0, slope = 0;
};
template <bool kQuery>
__device__ __forceinline__ Norm norm_of(const Problem& q, std::int64_t head, const float (&v)[8], int n) {
  Norm of;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) sum += v[i] * v[i];
  sum = sharers_sum(sum, n) + q.norm_eps * q.norm_eps;
  of.r = sum == 0.0f ? 1.0f : sqrtf(sum);
  of.inverse = 1.0f / of.r;
  if constexpr (kQuery) {
    of.t = tanh_of(q.params[2 * q.q_heads + head] * of.r, of.slope);
    of.p = q.params[head] * (q.params[q.q_heads + head] + of.t);
  }
  return of;
}

// Features of rows `first` .. of a head as `to` [64][ldf], turned or not; zeros from `length` on. look(row, c, upper, lower):
// the denominator's features, unrounded, by whole warps. No barrier.
template <bool kQuery, class Look>
__device__ __forceinline__ void make_features(const Problem& q, const HeadsView& view, const Place& at, std::int64_t first,
                                              std::int64_t head, bool turned, const Widths& width, Bits* to, Look look) {
  const int n = sharers(width.dim), c = static_cast<int>(threadIdx.x) % n * 8;
  const bool aligned = aligned_16(view), norm = kQuery ? !is_pola(q.map) : q.map == FeatureMap::cosine;
  const Bits* const data = static_cast<const Bits*>(view.data) + at.batch * view.batch + head * view.head + c;
#pragma unroll 1
  for (int row = static_cast<int>(threadIdx.x) / n; row < kMmaTile; row += kMmaThreads / n) {  // alike in a warp
    const std::int64_t token = first + row;
    Eight raw{};
    if (token < at.length && c < width.dim) raw = load_eight(data + (at.begin + token) * view.token, aligned);
    float v[8], upper[8], lower[8];
    widen(raw, v);
    const Norm of = norm ? norm_of<kQuery>(q, head, v, n) : Norm{};
    features_of<kQuery>(q, head, c, v, of.inverse, of.p, upper, lower);
    if (!q.rope_both) look(row, c, upper, lower);
    if (turned && c < width.dim) {
      float s[4], co[4];
      load_angles(q, position(q, at, token), c, s, co);
      turn_eight(upper, s, co);
      turn_eight(lower, s, co);
    }
    if (q.rope_both) look(row, c, upper, lower);
    if (c >= width.dim) continue;
    *reinterpret_cast<Eight*>(to + row * width.ldf + c) = round_eight(upper);
    *reinterpret_cast<Eight*>(to + row * width.ldf + width.dim + c) = round_eight(lower);
  }
}

struct NoLook {
  __device__ __forceinline__ void operator()(int, int, const float (&)[8], const float (&)[8]) const {}
};

// look of queries: d[row] = phi_q . z, of the state's z, or 0 without one.
struct DotWith {
  const float* z;
  float* d;
  int dim, n;
  __device__ __forceinline__ void operator()(int row, int c, const float (&upper)[8], const float (&lower)[8]) const {
    float sum = 0;
    if (z != nullptr && c < dim) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += upper[i] * z[c + i] + lower[i] * z[dim + c + i];
    }
    sum = sharers_sum(sum, n);
    if (c == 0) d[row] = sum;
  }
};

// Columns `column` .. + columns - 1 of a head's rows as `to` [64][ld], zeros outside; columns: a multiple of 8. No barrier.
__device__ __forceinline__ void load_values(const HeadsView& view, const Place& at, std::int64_t first, std::int64_t head,
                                            int column, int columns, int width, Bits* to, int ld) {
  const bool aligned = aligned_16(view);
  const Bits* const data = static_cast<const Bits*>(view.data) + at.batch * view.batch + head * view.head;
  const int each = columns / 8;
  for (int i = static_cast<int>(threadIdx.x); i < kMmaTile * each; i += kMmaThreads) {
    const int row = i / each, c = column + i % each * 8;
    const std::int64_t token = first + row;
    Eight x{};
    if (token < at.length && c < width) x = load_eight(data + (at.begin + token) * view.token + c, aligned);
    *reinterpret_cast<Eight*>(to + row * ld + i % each * 8) = x;
  }
}

// 64 rows of a state [features][v_dim], rounded, as `to` [64][ldv]; row_of(i): the i-th, or none if negative. No barrier.
template <class RowOf>
__device__ __forceinline__ void load_state(const float* state, const Widths& width, Bits* to, RowOf row_of) {
  const int each = (width.ldv - 8) / 8;
  const bool aligned = aligned_16(state);
  for (int i = static_cast<int>(threadIdx.x); i < kMmaTile * each; i += kMmaThreads) {
    const int r = row_of(i / each), c = i % each * 8;
    float x[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    if (r >= 0 && c < width.v_dim) {
      const float* const from = state + r * width.v_dim + c;
      if (aligned) {
        const float4 a = *reinterpret_cast<const float4*>(from), b = *reinterpret_cast<const float4*>(from + 4);
        x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) x[e] = from[e];
      }
    }
    *reinterpret_cast<Eight*>(to + i / each * width.ldv + c) = round_eight(x);
  }
}

}  // namespace
}  // namespace cuda
}  // namespace pyelastic
