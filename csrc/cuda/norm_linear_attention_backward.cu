// norm_linear_attention on CUDA, backward, the general path. Contract and formulas: ../norm_linear_attention.h; blocking as in the forward pass.
//
// `nla_queries`, a block for a tile of queries: denominators and their gradients, dq, dgate, and the tile's part of the
// parameters' gradients. `nla_grad_state` sums R phi_q y^T, y = g / D, over parts, which `nla_scan` adds up; `nla_keys`, a
// block for a tile of keys: dk and dv. Causal tiles add the tokens of their own part by weights; without states, all do all.
#include "norm_linear_attention_mma.h"
#include "norm_linear_attention_tile.cuh"

namespace pyelastic {
namespace cuda {
namespace {

// y [kTile][kColumns]: columns of the gradient before the gate, over the denominators d. No barrier.
template <class T>
__device__ void load_gradient(const Problem& x, const Place& at, std::int64_t first, std::int64_t head, std::int64_t column,
                              const float* d, float* y) {
  for (int i = threadIdx.x; i < kTile * kColumns; i += kThreads) {
    const std::int64_t token = first + i / kColumns, c = column + i % kColumns;
    float g = 0.0f;
    if (token < at.length && c < x.v_dim) {
      g = to_float(row_of<const T>(x.o, at, token, head)[c]);
      if (x.gate.data != nullptr) {
        const float s = to_float(row_of<const T>(x.gate, at, token, head)[c]);
        g *= s * sigmoid(s);
      }
      g /= d[i / kColumns];
    }
    y[i] = g;
  }
}

// What the features of a channel say to its magnitude, and to its angle (0 unless cosine).
__device__ __forceinline__ float magnitude(const Problem& q, const Tile& tile, int t, int c, const float* h, float w,
                                           float& turned) {
  const float v = tile.x[t * tile.ldx + c], upper = h[t * tile.ldf + c], lower = h[t * tile.ldf + tile.dim + c];
  turned = 0.0f;
  if (q.map != FeatureMap::cosine) return by_sign(v, upper, lower);
  float slope, co, si;
  cos_sin(kQuarter * tanh_of(q.alpha * v / tile.r[t], slope), co, si);
  turned = w * (lower * co - upper * si) * slope * (q.alpha * kQuarter);
  return upper * co + lower * si;
}

// MALA: a tile's rows of dq or dk, `stride` apart, from the gradient of its features.
template <class T>
__device__ void elu_gradient(const Tile& tile, const Place& at, std::int64_t first, const float* h, T* to,
                             std::int64_t stride) {
  for (int i = threadIdx.x; i < kTile * tile.dim; i += kThreads) {
    const int t = i / tile.dim, c = i % tile.dim;
    const float v = tile.x[t * tile.ldx + c];
    const float slope = v > 0.0f ? 1.0f : elu_plus_1(v);
    if (first + t < at.length) to[t * stride + c] = from_float<T>(h[t * tile.ldf + c] * slope);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 3)
    nla_queries_kernel(Problem x, NlaSlots tiles, std::int64_t part, std::int64_t each, const float* s, const float* z,
                   float* d_out, float* dd_out, float* dparams) {
  DYN_SHARED(float, shared);
  float* room = shared;
  const int dim = static_cast<int>(x.dim), rows = 2 * dim;
  Tile query(room, dim, x.sin != nullptr), key(room, dim, x.sin != nullptr);
  const int ld = query.ldf;
  float* const h = room;  // [kTile][ld]
  float* const v = h + kTile * ld;
  float* const y = v + kTile * kColumns;
  float* const o = y + kTile * kColumns;
  float* const weights = o + kTile * kColumns;
  float* const d = weights + kTile * kTile;
  float* const dd = d + kTile;
  float* const own = dd + kTile;  // [3][kTile]
  float* const dots = own;        // MALA, which has no parameters: phi_q . z
  const bool mala = x.map == FeatureMap::mala;
  const std::int64_t head = blockIdx.y, kv = head / (x.q_heads / x.kv_heads);
  const Place at = locate(x, tiles, x.queries);
  const std::int64_t first = at.part * kTile;
  if (first >= at.length) return;
  std::int64_t slot = at.sequence;
  if (x.causal) slot = first_part(x, at.sequence, part, each) + first / part;
  slot = slot * x.kv_heads + kv;
  const bool alone = s == nullptr;
  const float* const state = alone ? nullptr : s + slot * rows * x.v_dim;
  const Met met = keys_met(x, at, first, part, kTile, alone);
  const T* const values = static_cast<const T*>(x.v.data) + at.batch * x.v.batch + kv * x.v.head;
  const bool gated = x.gate.data != nullptr;
  make_tile<T>(x, x.q, at, first, head, true, query);
  const float* const plain = x.rope_both ? query.g : query.f;
  const float* const plain_k = x.rope_both ? key.g : key.f;
  product(plain, ld, 1, alone ? nullptr : z + slot * rows, 1, 0, kTile, alone ? 0 : rows, 1, d, 1, false);
  for (std::int64_t other = met.first; other < met.end; other += kTile) {
    make_tile<T>(x, x.k, met.at, other, kv, false, key);
    product(plain, ld, 1, plain_k, 1, ld, kTile, rows, kTile, weights, kTile, false);
    __syncthreads();
    if (threadIdx.x < kTile) {
      for (int j = 0; j < kTile && (!x.causal || other + j <= first + threadIdx.x); ++j) {
        d[threadIdx.x] += weights[threadIdx.x * kTile + j];
      }
    }
  }
  if (threadIdx.x < kTile) {
    const std::int64_t token = first + threadIdx.x;
    if (mala) {
      dots[threadIdx.x] = d[threadIdx.x];
      d[threadIdx.x] = 1.0f;
    } else {
      d[threadIdx.x] = token < at.length ? d[threadIdx.x] + effective_eps(x, at, token) : 1.0f;
    }
  }
  for (int i = threadIdx.x; i < kTile * ld; i += kThreads) h[i] = 0.0f;
  __syncthreads();
  for (std::int64_t column = 0; column < x.v_dim; column += kColumns) {
    const int width = x.v_dim - column < kColumns ? static_cast<int>(x.v_dim - column) : kColumns;
    __syncthreads();
    load_gradient<T>(x, at, first, head, column, d, y);
    __syncthreads();
    if (!alone) product(y, kColumns, 1, state + column, 1, static_cast<int>(x.v_dim), kTile, width, rows, h, ld, true);
    if (gated) {
      product(query.g, ld, 1, alone ? nullptr : state + column, x.v_dim, 1, kTile, alone ? 0 : rows, width, o, kColumns, false);
    }
    for (std::int64_t other = met.first; other < met.end; other += kTile) {
      make_tile<T>(x, x.k, met.at, other, kv, false, key);
      load_columns(values, x.v.token, met.at, other, column, x.v_dim, v);
      __syncthreads();
      product(y, kColumns, 1, v, 1, kColumns, kTile, kColumns, kTile, weights, kTile, false);
      for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
        if (x.causal && other + i % kTile > first + i / kTile) weights[i] = 0.0f;
      }
      __syncthreads();
      product(weights, kTile, 1, key.g, ld, 1, kTile, kTile, rows, h, ld, true);
      if (!gated) continue;
      __syncthreads();
      product(query.g, ld, 1, key.g, 1, ld, kTile, rows, kTile, weights, kTile, false);
      for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
        if (x.causal && other + i % kTile > first + i / kTile) weights[i] = 0.0f;
      }
      __syncthreads();
      product(weights, kTile, 1, v, kColumns, 1, kTile, kTile, width, o, kColumns, true);
    }
    for (int i = threadIdx.x; i < kTile * width && gated; i += kThreads) {
      const int t = i / width, c = i % width;
      const std::int64_t token = first + t;
      if (token >= at.length) continue;
      const float g = to_float(row_of<const T>(x.gate, at, token, head)[column + c]), sig = sigmoid(g);
      const float up = to_float(row_of<const T>(x.o, at, token, head)[column + c]);
      row_of<T>(x.dgate, at, token, head)[column + c] =
          from_float<T>(up * (o[t * kColumns + c] / d[t]) * sig * (1.0f + g * (1.0f - sig)));
    }
  }
  __syncthreads();
  for (int t = threadIdx.x / 32; t < kTile; t += kWarps) {
    float sum = 0;
    for (int r = threadIdx.x % 32; r < rows; r += 32) sum += query.g[t * ld + r] * h[t * ld + r];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) {
      dd[t] = -sum / d[t];
      if (mala) {  // of phi_q . z; d is to give y, the gradient times c, as its quotient
        const Readout r = readout_of(x, at, dots[t]);
        dd[t] = (sum * r.slope - h[t * ld + dim] * r.inverse) * r.scale;
        d[t] = 1.0f / r.c;
      }
      const std::int64_t token = first + t, row = query_row(x, at, token, head);
      if (token < at.length) {
        d_out[row] = d[t];
        dd_out[row] = dd[t];
        if (mala) dparams[row] = readout_of(x, at, dots[t]).last;
      }
    }
  }
  __syncthreads();
  if (mala) {
    for (int i = threadIdx.x; i < kTile * rows; i += kThreads) h[i / rows * ld + i % rows] /= d[i / rows];
    __syncthreads();
  }
  if (x.sin != nullptr && !x.rope_both) turn<-1>(x, at, first, dim, h, ld, h);
  for (int i = threadIdx.x; i < kTile * rows && !alone; i += kThreads) {
    h[i / rows * ld + i % rows] += dd[i / rows] * z[slot * rows + i % rows];
  }
  for (std::int64_t other = met.first; other < met.end; other += kTile) {
    make_tile<T>(x, x.k, met.at, other, kv, false, key);
    for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
      weights[i] = !x.causal || other + i % kTile <= first + i / kTile ? dd[i / kTile] : 0.0f;
    }
    __syncthreads();
    product(weights, kTile, 1, plain_k, ld, 1, kTile, kTile, rows, h, ld, true);
  }
  __syncthreads();
  if (x.rope_both) turn<-1>(x, at, first, dim, h, ld, h);
  if (mala) {
    elu_gradient(query, at, first, h, row_of<T>(x.dq, at, first, head), x.dq.token);
    return;
  }
  const bool pola = is_pola(x.map);
  if (x.map == FeatureMap::pola_opposite) {
    for (int i = threadIdx.x; i < kTile * dim; i += kThreads) {
      float* const upper = h + i / dim * ld + i % dim;
      const float swap = upper[0];
      upper[0] = upper[dim];
      upper[dim] = swap;
    }
    __syncthreads();
  }
  for (int t = threadIdx.x / 32; t < kTile; t += kWarps) {
    const std::int64_t token = first + t;
    T* const to = row_of<T>(x.dq, at, token, head);
    const float r = query.r[t], p = query.p[t];
    float sum_p = 0, sum_t = 0, sum_n = 0;
    for (int c = threadIdx.x % 32; c < dim && !pola; c += 32) {
      const float v_ = query.x[t * query.ldx + c], a = fabsf(v_) / r, w = power(a, p);
      float turned;
      const float gm = magnitude(x, query, t, c, h, w, turned) * w;
      sum_t += gm;
      sum_p += gm * log2_or_0(a);
      sum_n += turned * v_ / r;
    }
    sum_p = warp_sum(sum_p) * kLn2;
    sum_t = warp_sum(sum_t);
    sum_n = warp_sum(sum_n);
    const float lam = pola ? 0.0f : x.params[head], beta = pola ? 0.0f : x.params[2 * x.q_heads + head];
    const float pull = (sum_p * lam * beta * query.slope[t] - (p * sum_t + sum_n) / r) / r;
    for (int c = threadIdx.x % 32; c < dim; c += 32) {
      const float v_ = query.x[t * query.ldx + c];
      const float w = pola ? power(fabsf(v_), x.params[head * dim + c]) : power(fabsf(v_) / r, p);
      float turned;
      const float gm = magnitude(x, query, t, c, h, w, turned) * w;
      const float grad_c = pola ? x.params[head * dim + c] * gm / (v_ == 0.0f ? 1.0f : v_)
                                : p * gm / (v_ == 0.0f ? 1.0f : v_) + turned / r + pull * v_;
      if (token < at.length) to[c] = from_float<T>(grad_c);
      if (pola) query.f[t * ld + c] = token < at.length ? gm * log2_or_0(fabsf(v_)) * kLn2 : 0.0f;
    }
    if (threadIdx.x % 32 == 0 && !pola) {
      const bool there = token < at.length;
      own[t] = there ? sum_p * (x.params[x.q_heads + head] + query.t[t]) : 0.0f;
      own[kTile + t] = there ? sum_p * lam : 0.0f;
      own[2 * kTile + t] = there ? sum_p * lam * r * query.slope[t] : 0.0f;
    }
  }
  __syncthreads();
  const int width = pola ? dim : 3;
  for (int c = threadIdx.x; c < width; c += kThreads) {
    float sum = 0;
    for (int t = 0; t < kTile; ++t) sum += pola ? query.f[t * ld + c] : own[c * kTile + t];
    dparams[(static_cast<std::int64_t>(blockIdx.x) * x.q_heads + head) * width + c] = sum;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 3)
    nla_grad_state_kernel(Problem x, NlaSlots parts, std::int64_t part, const float* d_in, const float* dd_in, const float* last,
                      float* ds /* [parts, Hq, 2 d, dv] */, float* dz /* [parts, Hq, 2 d] */) {
  DYN_SHARED(float, shared);
  float* room = shared;
  const int dim = static_cast<int>(x.dim), rows = 2 * dim;
  Tile query(room, dim, x.sin != nullptr);
  float* const y = room;
  float* const sum = y + kTile * kColumns;  // [2 d][kColumns]
  float* const z_sum = sum + rows * kColumns;
  float* const d = z_sum + rows;
  float* const dd = d + kTile;
  const std::int64_t head = blockIdx.y, column = static_cast<std::int64_t>(blockIdx.z) * kColumns;
  const Place at = locate_part(x, parts, x.queries, part);
  const std::int64_t first = at.part * part;
  if (first >= at.length) return;
  for (int i = threadIdx.x; i < rows * kColumns; i += kThreads) sum[i] = 0.0f;
  for (int i = threadIdx.x; i < rows; i += kThreads) z_sum[i] = 0.0f;
  for (std::int64_t token = first; token < at.length; token += kTile) {
    make_tile<T>(x, x.q, at, token, head, true, query);
    if (threadIdx.x < kTile) {
      const std::int64_t row = query_row(x, at, token + threadIdx.x, head);
      const bool there = token + threadIdx.x < at.length;
      d[threadIdx.x] = there ? d_in[row] : 1.0f;
      dd[threadIdx.x] = there ? dd_in[row] : 0.0f;
      // y is to be the gradient times c, of which the sum of the values takes `last`.
      if (x.map == FeatureMap::mala) {
        query.g[threadIdx.x * query.ldf + dim] = there ? last[row] * d_in[row] : 0.0f;
      }
    }
    __syncthreads();
    load_gradient<T>(x, at, token, head, column, d, y);
    __syncthreads();
    product(query.g, 1, query.ldf, y, kColumns, 1, rows, kTile, kColumns, sum, kColumns, true);
    const float* const plain = x.rope_both ? query.g : query.f;
    for (int r = threadIdx.x; r < rows; r += kThreads) {
      for (int t = 0; t < kTile; ++t) z_sum[r] += dd[t] * plain[t * query.ldf + r];
    }
  }
  const std::int64_t slot = static_cast<std::int64_t>(blockIdx.x) * x.q_heads + head;
  for (int i = threadIdx.x; i < rows * kColumns; i += kThreads) {
    const std::int64_t c = column + i % kColumns;
    if (c < x.v_dim) ds[(slot * rows + i / kColumns) * x.v_dim + c] = sum[i];
  }
  if (blockIdx.z != 0) return;
  for (int r = threadIdx.x; r < rows; r += kThreads) dz[slot * rows + r] = z_sum[r];
}

template <class T>
__global__ void __launch_bounds__(kThreads, 3)
    nla_keys_kernel(Problem x, NlaSlots tiles, std::int64_t part, std::int64_t each, const float* d_in,
                const float* dd_in, const float* ds, const float* dz, float* dparams) {
  DYN_SHARED(float, shared);
  float* room = shared;
  const int dim = static_cast<int>(x.dim), rows = 2 * dim;
  Tile key(room, dim, x.sin != nullptr), query(room, dim, x.sin != nullptr);
  const int ld = key.ldf;
  float* const h = room;  // [kTile][ld]
  float* const v = h + kTile * ld;
  float* const y = v + kTile * kColumns;
  float* const out = y + kTile * kColumns;
  float* const weights = out + kTile * kColumns;
  float* const d = weights + kTile * kTile;
  const std::int64_t kv = blockIdx.y, group = x.q_heads / x.kv_heads;
  const Place at = locate(x, tiles, x.keys);
  const std::int64_t first = at.part * kTile;
  if (first >= at.length) return;
  std::int64_t slot = at.sequence;
  if (x.causal) slot = first_part(x, at.sequence, part, each) + first / part;
  slot = slot * x.kv_heads + kv;
  const bool alone = ds == nullptr;
  const float* const state = alone ? nullptr : ds + slot * rows * x.v_dim;
  const Met met = queries_met(x, at, first, part, alone);
  const T* const values = static_cast<const T*>(x.v.data) + at.batch * x.v.batch + kv * x.v.head;
  const float* const plain = x.rope_both ? query.g : query.f;
  make_tile<T>(x, x.k, at, first, kv, false, key);
  for (int i = threadIdx.x; i < kTile * ld; i += kThreads) h[i] = 0.0f;
  for (std::int64_t column = 0; column < x.v_dim; column += kColumns) {
    const int width = x.v_dim - column < kColumns ? static_cast<int>(x.v_dim - column) : kColumns;
    __syncthreads();
    load_columns(values, x.v.token, at, first, column, x.v_dim, v);
    __syncthreads();
    if (!alone) product(v, kColumns, 1, state + column, 1, static_cast<int>(x.v_dim), kTile, width, rows, h, ld, true);
    product(key.g, ld, 1, alone ? nullptr : state + column, x.v_dim, 1, kTile, alone ? 0 : rows, width, out, kColumns, false);
    for (std::int64_t member = 0; member < group; ++member) {
      const std::int64_t head = kv * group + member;
      for (std::int64_t other = met.first; other < met.end; other += kTile) {
        make_tile<T>(x, x.q, met.at, other, head, true, query);
        if (threadIdx.x < kTile) {
          const std::int64_t token = other + threadIdx.x;
          d[threadIdx.x] = token < met.at.length ? d_in[query_row(x, at, token, head)] : 1.0f;
        }
        __syncthreads();
        load_gradient<T>(x, met.at, other, head, column, d, y);
        product(key.g, ld, 1, query.g, 1, ld, kTile, rows, kTile, weights, kTile, false);  // [keys][queries]
        for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
          if (x.causal && first + i / kTile > other + i % kTile) weights[i] = 0.0f;
        }
        __syncthreads();
        product(weights, kTile, 1, y, kColumns, 1, kTile, kTile, width, out, kColumns, true);
        __syncthreads();
        product(v, kColumns, 1, y, 1, kColumns, kTile, kColumns, kTile, weights, kTile, false);
        for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
          if (x.causal && first + i / kTile > other + i % kTile) weights[i] = 0.0f;
        }
        __syncthreads();
        product(weights, kTile, 1, query.g, ld, 1, kTile, kTile, rows, h, ld, true);
      }
    }
    for (int i = threadIdx.x; i < kTile * width; i += kThreads) {
      const int t = i / width, c = i % width;
      const std::int64_t token = first + t;
      if (token >= at.length) continue;
      row_of<T>(x.dv, at, token, kv)[column + c] = from_float<T>(out[t * kColumns + c]);
    }
  }
  __syncthreads();
  if (x.sin != nullptr && !x.rope_both) turn<-1>(x, at, first, dim, h, ld, h);
  for (int i = threadIdx.x; i < kTile * rows && !alone; i += kThreads) {
    h[i / rows * ld + i % rows] += dz[slot * rows + i % rows];
  }
  for (std::int64_t member = 0; member < group; ++member) {
    const std::int64_t head = kv * group + member;
    for (std::int64_t other = met.first; other < met.end; other += kTile) {
      make_tile<T>(x, x.q, met.at, other, head, true, query);
      for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
        const std::int64_t token = other + i % kTile;
        const bool meets = (!x.causal || first + i / kTile <= token) && token < met.at.length;
        weights[i] = meets ? dd_in[query_row(x, at, token, head)] : 0.0f;
      }
      __syncthreads();
      product(weights, kTile, 1, plain, ld, 1, kTile, kTile, rows, h, ld, true);
    }
  }
  __syncthreads();
  if (x.rope_both) turn<-1>(x, at, first, dim, h, ld, h);
  if (x.map == FeatureMap::mala) {
    elu_gradient(key, at, first, h, row_of<T>(x.dk, at, first, kv), x.dk.token);
    return;
  }
  const bool pola = is_pola(x.map), cosine = x.map == FeatureMap::cosine;
  for (int t = threadIdx.x / 32; t < kTile; t += kWarps) {
    const std::int64_t token = first + t;
    T* const to = row_of<T>(x.dk, at, token, kv);
    const float r = key.r[t];
    float along = 0;
    for (int c = threadIdx.x % 32; c < dim && cosine; c += 32) {
      const float k = key.x[t * key.ldx + c], a = fabsf(k);
      float turned;
      magnitude(x, key, t, c, h, x.key_power == 3.0f ? a * a * a : power(a, x.key_power), turned);
      along += turned * k / r;
    }
    along = warp_sum(along) / r;
    for (int c = threadIdx.x % 32; c < dim; c += 32) {
      const float k = key.x[t * key.ldx + c], a = fabsf(k);
      const float p = pola ? x.params[kv * dim + c] : x.key_power;
      const float m = p == 3.0f ? a * a * a : power(a, p);
      float turned;
      const float e = magnitude(x, key, t, c, h, m, turned);
      // p |k|^(p - 1) with k's sign; 0 for k = 0, whatever p is.
      const float slope = p == 3.0f ? 3.0f * a * k : (k == 0.0f ? 0.0f : p * copysignf(exp2f((p - 1.0f) * log2f(a)), k));
      if (token < at.length) to[c] = from_float<T>(slope * e + (turned - k * along) / r);
      if (pola) key.f[t * ld + c] = token < at.length ? e * m * log2_or_0(a) * kLn2 : 0.0f;
    }
  }
  if (!pola) return;
  __syncthreads();
  for (int c = threadIdx.x; c < dim; c += kThreads) {
    float sum = 0;
    for (int t = 0; t < kTile; ++t) sum += key.f[t * ld + c];
    dparams[(static_cast<std::int64_t>(blockIdx.x) * x.kv_heads + kv) * dim + c] = sum;
  }
}

std::size_t shared_bytes(const Problem& x) {
  const std::size_t dim = static_cast<std::size_t>(x.dim);
  const std::size_t tile = kTile * ((dim | 1) + 2 * (2 * dim + 1) + 4);
  return sizeof(float) * (2 * tile + kTile * (2 * dim + 1) + 3 * kTile * kColumns + kTile * kTile + 5 * kTile);
}

}  // namespace

void nla_queries(const Problem& x, NlaSlots tiles, std::int64_t part, std::int64_t each, const float* s, const float* z,
                 float* d, float* dd, float* dparams, void* stream) {
  if (tiles.count == 0) return;
  if (nla_mma_fits(x)) return nla_mma_queries(x, tiles, part, each, s, z, d, dd, dparams, stream);
  const dim3 grid(static_cast<unsigned>(tiles.count), static_cast<unsigned>(x.q_heads));
  visit_dtype(x.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    LAUNCH((nla_queries_kernel<T>), grid, kThreads, shared_bytes(x), stream, x, tiles, part, each, s, z, d, dd,
           dparams);
  });
}

void nla_grad_state(const Problem& x, NlaSlots parts, std::int64_t part, const float* d, const float* dd, const float* last,
                    float* ds, float* dz, void* stream) {
  if (parts.count == 0) return;
  if (nla_mma_fits(x)) return nla_mma_grad_state(x, parts, part, d, dd, ds, dz, stream);
  const dim3 grid(static_cast<unsigned>(parts.count), static_cast<unsigned>(x.q_heads),
                  static_cast<unsigned>((x.v_dim + kColumns - 1) / kColumns));
  const std::size_t dim = static_cast<std::size_t>(x.dim), tile = kTile * ((dim | 1) + 2 * (2 * dim + 1) + 4);
  const std::size_t shared = sizeof(float) * (tile + kTile * kColumns + 2 * dim * (kColumns + 1) + 2 * kTile);
  visit_dtype(x.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    LAUNCH((nla_grad_state_kernel<T>), grid, kThreads, shared, stream, x, parts, part, d, dd, last, ds, dz);
  });
}

void nla_keys(const Problem& x, NlaSlots tiles, std::int64_t part, std::int64_t each, const float* d, const float* dd,
              const float* ds, const float* dz, float* dparams, void* stream) {
  if (tiles.count == 0) return;
  if (nla_mma_fits(x)) return nla_mma_keys(x, tiles, part, each, d, dd, ds, dz, dparams, stream);
  const dim3 grid(static_cast<unsigned>(tiles.count), static_cast<unsigned>(x.kv_heads));
  visit_dtype(x.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    LAUNCH((nla_keys_kernel<T>), grid, kThreads, shared_bytes(x), stream, x, tiles, part, each, d, dd, ds, dz,
           dparams);
  });
}

}  // namespace cuda
}  // namespace pyelastic
