// What norm_linear_attention's CUDA kernels share: where a block works, a tile's features, products in shared memory.
#pragma once

#include "../common/device.cuh"
#include "../norm_linear_attention.h"

namespace pyelastic {
namespace cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
// Kernels are bounded to three blocks of a multiprocessor (168 registers): left alone, ptxas stops at 64 to 128 and spills.
constexpr int kTile = 16;     // tokens
constexpr int kColumns = 32;  // of the values, at a time
constexpr float kQuarter = 0.78539816f, kLn2 = 0.69314718f;

using Problem = NormLinearAttention<float>;

// Where a block works: sequence, its part (or tile), batch, the sequence's first token and its tokens.
struct Place {
  std::int64_t sequence, part, batch, begin, length;
};

// `alone`: not packed, known at compile time for the registers.
__device__ __forceinline__ Place locate(const Problem& x, const NlaSlots& s, std::int64_t tokens, bool alone = false) {
  const std::int64_t program = blockIdx.x;
  if (alone || x.offsets == nullptr) return {program / s.each, program % s.each, program / s.each, 0, tokens};
  const std::int64_t sequence = s.sequence[program], begin = x.offsets[sequence];
  return {sequence, s.place[program], 0, begin, x.offsets[sequence + 1] - begin};
}

// Of a block's part of `part` tokens, from token at.part * part of the sequence on, with the part's end as the length: a part
// that begins there or after it has no tokens.
__device__ __forceinline__ Place locate_part(const Problem& x, const NlaSlots& s, std::int64_t tokens, std::int64_t part) {
  Place at = locate(x, s, tokens);
  const std::int64_t end = (at.part + 1) * part;
  at.length = end < at.length ? end : at.length;
  return at;
}

// A token's row of a head.
template <class T>
__device__ __forceinline__ T* row_of(const HeadsView& x, const Place& at, std::int64_t token, std::int64_t head) {
  return static_cast<T*>(x.data) + at.batch * x.batch + (at.begin + token) * x.token + head * x.head;
}

// A query's row of [batch * queries, q_heads].
__device__ __forceinline__ std::int64_t query_row(const Problem& x, const Place& at, std::int64_t token, std::int64_t head) {
  return (at.batch * x.queries + at.begin + token) * x.q_heads + head;
}

// Place of a sequence's first part among all, for parts of `part` tokens.
__device__ __forceinline__ std::int64_t first_part(const Problem& x, std::int64_t sequence, std::int64_t part,
                                                   std::int64_t each) {
  return x.offsets == nullptr ? sequence * each : x.offsets[sequence] / part + sequence;
}

// Tokens `first` .. `end` - 1 that a tile meets by weights, and the Place of their kind: `at` with their length.
struct Met {
  Place at;
  std::int64_t first, end;
};

// Keys that meet a tile of `tile` queries from `first` on: causal, those of its part up to its own; alone, all; else none.
__device__ __forceinline__ Met keys_met(const Problem& x, const Place& at, std::int64_t first, std::int64_t part, int tile,
                                        bool alone) {
  Met met{at, 0, 0};
  if (alone) met.at.length = met.end = x.keys;
  if (x.causal) met.first = first / part * part, met.end = first + tile;
  return met;
}

// Queries that meet a tile of keys: causal, those of its part from its own on; alone, all; else none.
__device__ __forceinline__ Met queries_met(const Problem& x, const Place& at, std::int64_t first, std::int64_t part,
                                           bool alone) {
  Met met{at, 0, 0};
  if (alone) met.at.length = met.end = x.queries;
  if (x.causal) {
    met.first = first;
    met.end = (first / part + 1) * part;
    met.end = met.end < at.length ? met.end : at.length;
  }
  return met;
}

__device__ __forceinline__ float log2_or_0(float a) { return log2f(a == 0.0f ? 1.0f : a); }
__device__ __forceinline__ float power(float a, float p) { return a == 0.0f ? 0.0f : exp2f(p * log2_or_0(a)); }

// tanh x, and 1 - tanh^2 x without cancellation.
__device__ __forceinline__ float tanh_of(float x, float& slope) {
  const float e = exp2f(-2.8853901f * fabsf(x)), t = (1.0f - e) / (1.0f + e);
  slope = 4.0f * e / ((1.0f + e) * (1.0f + e));
  return x < 0.0f ? -t : t;
}

// For |x| <= pi/4: cosf would bring the stack of its reduction of large arguments.
__device__ __forceinline__ void cos_sin(float x, float& c, float& s) {
  const float y = x * x;
  c = 1.0f + y * (-0.5f + y * (4.16666667e-2f + y * (-1.38888889e-3f + y * (2.48015873e-5f - 2.75573192e-7f * y))));
  s = x * (1.0f + y * (-1.66666667e-1f + y * (8.33333333e-3f + y * (-1.98412698e-4f + 2.75573192e-6f * y))));
}

__device__ __forceinline__ bool is_pola(FeatureMap map) { return map == FeatureMap::pola || map == FeatureMap::pola_opposite; }

// A tile of kTile rows in shared memory. Rows are an odd number of words apart, so that a column has no bank conflicts.
struct Tile {
  int dim, ldx, ldf;
  float *x, *f, *g;        // [kTile][ldx], [kTile][ldf] twice; g is f without RoPE
  float *r, *p, *t, *slope;  // [kTile]

  __device__ static int floats(int dim) { return kTile * ((dim | 1) + 2 * (2 * dim + 1) + 4); }
  __device__ Tile(float*& room, int dim_, bool rope) : dim(dim_), ldx(dim_ | 1), ldf(2 * dim_ + 1) {
    x = room;
    f = x + kTile * ldx;
    g = f + kTile * ldf;
    r = g + kTile * ldf;
    p = r + kTile;
    t = p + kTile;
    slope = t + kTile;
    room = slope + kTile;
    if (!rope) g = f;
  }
};

// Pairs of both halves of `from` [kTile][ld] turned by their positions, forwards or back; `to` may be `from`. All threads;
// ends with a barrier.
template <int Direction>
__device__ void turn(const Problem& q, const Place& at, std::int64_t first, int dim, const float* from, int ld, float* to) {
  for (int i = threadIdx.x; i < kTile * dim; i += kThreads) {
    const int t = i / dim, pair = i % dim, c = 2 * pair, j = pair % (dim / 2);
    const std::int64_t token = first + t < at.length ? first + t : 0;
    const std::int64_t angle = (token + (q.start == nullptr ? 0 : q.start[at.sequence])) * (dim / 2) + j;
    const float s = Direction * q.sin[angle], co = q.cos[angle], even = from[t * ld + c], odd = from[t * ld + c + 1];
    to[t * ld + c] = even * co - odd * s;
    to[t * ld + c + 1] = odd * co + even * s;
  }
  __syncthreads();
}

__device__ __forceinline__ float elu_plus_1(float x) { return x > 0.0f ? x + 1.0f : exp2f(1.4426950f * x); }

// MALA's readout of a row with z = phi_q . z: o = S^T [c R phi_q; last], and the slope of c by the scaled z.
struct Readout {
  float inverse, scale, c, last, slope;
};
__device__ __forceinline__ Readout readout_of(const Problem& x, const Place& at, float z) {
  const std::int64_t keys = x.offsets == nullptr ? x.keys : at.length;
  const float inverse = 1.0f / static_cast<float>((x.count == nullptr ? 0 : x.count[at.sequence]) + keys);
  const float scale = inverse / sqrtf(static_cast<float>(x.dim)), weight = z * scale, above = 1.0f / (weight + x.eps);
  return {inverse, scale, (1.0f + above) * scale, -weight * inverse, -above * above * scale};
}

// Rows `first` .. of a head, zeros from `length` on, and their features. All threads; ends with a barrier.
template <class T>
__device__ void make_tile(const Problem& q, const HeadsView& view, const Place& at, std::int64_t first, std::int64_t head,
                          bool query, Tile& tile) {
  const int dim = tile.dim;
  const T* const data = static_cast<const T*>(view.data) + at.batch * view.batch + head * view.head;
  __syncthreads();  // what was here has been read
  for (int i = threadIdx.x; i < kTile * dim; i += kThreads) {
    const int t = i / dim, c = i % dim;
    const std::int64_t token = first + t;
    tile.x[t * tile.ldx + c] = token < at.length ? to_float(data[(at.begin + token) * view.token + c]) : 0.0f;
  }
  __syncthreads();
  const bool pola = is_pola(q.map), mala = q.map == FeatureMap::mala;
  for (int t = threadIdx.x / 32; t < kTile; t += kWarps) {
    float sum = 0;
    for (int c = threadIdx.x % 32; c < dim; c += 32) sum += tile.x[t * tile.ldx + c] * tile.x[t * tile.ldx + c];
    sum = warp_sum(sum) + q.norm_eps * q.norm_eps;
    if (threadIdx.x % 32 == 0) {
      const float r = sum == 0.0f ? 1.0f : sqrtf(sum);
      tile.r[t] = r;
      if (query && !pola && !mala) {
        tile.t[t] = tanh_of(q.params[2 * q.q_heads + head] * r, tile.slope[t]);
        tile.p[t] = q.params[head] * (q.params[q.q_heads + head] + tile.t[t]);
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kTile * dim; i += kThreads) {
    const int t = i / dim, c = i % dim;
    const float v = tile.x[t * tile.ldx + c], a = fabsf(v);
    float w;
    if (mala) {
      w = first + t < at.length ? elu_plus_1(v) : 0.0f;
    } else if (pola) {
      w = power(a, q.params[head * dim + c]);
    } else if (query) {
      w = power(a / tile.r[t], tile.p[t]);
    } else {
      w = q.key_power == 3.0f ? a * a * a : power(a, q.key_power);
    }
    float upper = v <= 0.0f ? 0.0f : w, lower = v >= 0.0f ? 0.0f : w;  // a NaN in both
    if (mala) {
      upper = w;
      lower = 0.0f;
    } else if (q.map == FeatureMap::cosine) {
      float slope, co, si;
      cos_sin(kQuarter * tanh_of(q.alpha * v / tile.r[t], slope), co, si);
      upper = w * co;
      lower = w * si;
    } else if (query && q.map == FeatureMap::pola_opposite) {
      const float swap = upper;
      upper = lower;
      lower = swap;
    }
    tile.f[t * tile.ldf + c] = upper;
    tile.f[t * tile.ldf + dim + c] = lower;
  }
  __syncthreads();
  if (tile.g != tile.f) turn<1>(q, at, first, dim, tile.f, tile.ldf, tile.g);
  if (!mala || query) return;
  // The sum of the values is row `dim` of a state: a feature that is 1 for every key.
  if (threadIdx.x < kTile) tile.g[threadIdx.x * tile.ldf + dim] = first + threadIdx.x < at.length ? 1.0f : 0.0f;
  __syncthreads();
}

// c[r][j] = (c[r][j] +) sum_k a[r ra + k ka] b[k kb + j jb], each element by one thread. No barrier: of what it writes a
// thread reads its own elements only, if they are read by the same division of work.
__device__ __forceinline__ void product(const float* a, int ra, int ka, const float* b, std::int64_t kb, int jb, int rows,
                                        int depth, int width, float* c, int ldc, bool add) {
  for (int i = threadIdx.x; i < rows * width; i += kThreads) {
    const int r = i / width, j = i % width;
    float sum = add ? c[r * ldc + j] : 0.0f;
    const float* const from = a + r * ra;
    for (int k = 0; k < depth; ++k) sum = fmaf(from[k * ka], b[k * kb + j * jb], sum);
    c[r * ldc + j] = sum;
  }
}

// What reaches a channel's magnitude, by its sign.
__device__ __forceinline__ float by_sign(float x, float upper, float lower) {
  return x > 0.0f ? upper : (x < 0.0f ? lower : (x == 0.0f ? 0.0f : x));
}

// Columns `column` .. of a head's rows as float [kTile][kColumns], zeros outside. No barrier.
template <class T>
__device__ void load_columns(const T* data, std::int64_t token_stride, const Place& at, std::int64_t first, std::int64_t column,
                             std::int64_t width, float* to) {
  for (int i = threadIdx.x; i < kTile * kColumns; i += kThreads) {
    const std::int64_t token = first + i / kColumns, c = column + i % kColumns;
    to[i] = token < at.length && c < width ? to_float(data[(at.begin + token) * token_stride + c]) : 0.0f;
  }
}

__device__ __forceinline__ float effective_eps(const Problem& x, const Place& at, std::int64_t token) {
  if (!x.mean) return x.eps;
  const std::int64_t keys = x.offsets == nullptr ? x.keys : at.length;
  return x.eps * static_cast<float>((x.count == nullptr ? 0 : x.count[at.sequence]) + (x.causal ? token + 1 : keys));
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + exp2f(-1.4426950f * x)); }

}  // namespace
}  // namespace cuda
}  // namespace pyelastic
