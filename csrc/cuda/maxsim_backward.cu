// maxsim's backward on CUDA. Contract: ../maxsim.h.
//
// A row of a gradient is owned by one warp, which adds the winners' rows of the other side in their order into sums in
// shared memory, and stores the row once, the normalisation's Jacobian applied: no atomics, no sort, the same bits each
// time.
//   documents: a block owns up to kSumBytes of one document's rows, row t belonging to warp t mod kWarps. A lane looks at
//     a query token's winner, the warp walks through those it owns.
//   queries: a warp owns a query token; a lane looks at a document's winner.
// Bytes per winner: its row of the other side (2 d at 16 bits) from L2, and 8 d of shared memory. The smooth maximum
// computes similarities again, 4 d operations each, without tensor cores: simple, and rarely used.
#include <type_traits>

#include "maxsim_tile.cuh"

namespace pyelastic {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocksPerSm = 2;  // else ptxas stops at 64 or 80 registers and spills
constexpr std::int64_t kSumBytes = 72 << 10;  // two blocks an SM on sm_80, three on sm_90
constexpr int kBatch = 4;                     // rows of the other side whose loads are in flight together
constexpr std::int64_t kWantedBlocks = 512;   // two or more an SM
constexpr std::int64_t kNoBytes = 16;         // sums are elsewhere; asking for shared memory's address needs some

// A pointer's elements as floats; Any reads whatever a side is stored as.
struct Any {};
template <class E>
struct Rows {
  const E* data;
  std::int64_t stride;
  __device__ explicit Rows(const Tokens& x) : data(static_cast<const E*>(x.data)), stride(x.stride) {}
  __device__ __forceinline__ float operator()(std::int64_t t, std::int64_t k) const {
    return to_float(data[t * stride + k]);
  }
};
template <>
struct Rows<Any> {
  const Tokens& x;
  __device__ explicit Rows(const Tokens& x_) : x(x_) {}
  __device__ __forceinline__ float operator()(std::int64_t t, std::int64_t k) const { return element(x, t, k); }
};

struct Upstream {
  const float *scores, *weights, *per_token;
  std::int64_t ld;
};

// The gradient of m of query token `token` = q.offsets[i] + s, which per-token arrays hold at `at`.
__device__ __forceinline__ float coefficient(const MaxSimProblem& p, const Upstream& g, std::int64_t i, std::int64_t j,
                                             std::int64_t pair, std::int64_t token, std::int64_t at) {
  if (g.per_token != nullptr) return g.per_token[at];
  const float w = g.weights == nullptr ? 1.0f : g.weights[token];
  if (w == 0) return 0;
  return g.scores[p.pair_q == nullptr ? i * g.ld + j : pair] * w;
}

__device__ __forceinline__ int winner(const Winners& w, std::int64_t at) {
  if (!w.narrow) return static_cast<const std::int32_t*>(w.data)[at];
  const int t = static_cast<const std::uint16_t*>(w.data)[at];
  return t == 0xffff ? -1 : t;
}

__device__ __forceinline__ float inverse_norm(const void* all, std::int64_t t) {
  return all == nullptr ? 1.0f : static_cast<const float*>(all)[t];
}

// The sequence that token t belongs to.
__device__ inline std::int64_t sequence_of(const Tokens& x, std::int64_t t) {
  std::int64_t low = 0, high = x.count;  // offsets[low] <= t < offsets[high]
  while (high - low > 1) {
    const std::int64_t middle = (low + high) / 2;
    if (x.offsets[middle] <= t) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// sum[to_b] += c_b x_b for the lanes of `mine` in their order; the lanes hold row, factor and destination.
template <class Other>
__device__ __forceinline__ void add_rows(const Other& other, unsigned mine, std::int64_t from, float c, float* to,
                                         std::int64_t dim) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  while (mine != 0) {
    std::int64_t row[kBatch];
    float factor[kBatch];
    float* sum[kBatch];
    int n = 0;
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int source = mine != 0 ? __ffs(static_cast<int>(mine)) - 1 : 0;
      n += mine != 0 ? 1 : 0;
      mine &= mine - 1;
      row[b] = __shfl_sync(kAllLanes, from, source);
      factor[b] = __shfl_sync(kAllLanes, c, source);
      sum[b] = reinterpret_cast<float*>(__shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(to), source));
    }
    for (std::int64_t k = lane; k < dim; k += 32) {
      float x[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) x[b] = b < n ? other(row[b], k) : 0.0f;
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (b < n) sum[b][k] += factor[b] * x[b];
      }
    }
  }
}

// Stores a row of sums as the gradient of token t, dx = (dx^ - <dx^, x^> x^) / |x|. One without a gradient stays zero
// whatever the token holds: it may be masked.
__device__ __forceinline__ void store_row(const Tokens& x, const void* inverse, std::int64_t t, std::int64_t dim,
                                          const float* sum, const MaxSimOutput& out) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float r = 1, along = 0;
  bool some = false;
  if (inverse != nullptr) {
    double dot = 0;
    for (std::int64_t k = lane; k < dim; k += 32) some |= sum[k] != 0;
    some = __any_sync(kAllLanes, some) != 0;
    r = static_cast<const float*>(inverse)[t];
    if (some) {
      for (std::int64_t k = lane; k < dim; k += 32) dot += static_cast<double>(sum[k]) * element(x, t, k);
      dot = warp_sum(dot);
      // 0.999: the largest inverse, rounded to float. There the norm is constant.
      along = r >= 0.999e12f ? 0.0f : static_cast<float>(dot * r * r);
    }
  }
  for (std::int64_t k = lane; k < dim; k += 32) {
    float v = sum[k];
    if (some) v = (v - along * element(x, t, k)) * r;
    const std::int64_t at = t * out.ld + k;
    if (out.dtype == Dtype::float32) {
      auto* to = static_cast<float*>(out.data) + at;
      *to = out.add ? *to + v : v;
    } else if (out.dtype == Dtype::float16) {
      static_cast<__half*>(out.data)[at] = from_float<__half>(v);
    } else {
      static_cast<__nv_bfloat16*>(out.data)[at] = from_float<__nv_bfloat16>(v);
    }
  }
}

__device__ __forceinline__ void clear_row(float* sum, std::int64_t dim) {
  for (std::int64_t k = threadIdx.x % 32; k < dim; k += 32) sum[k] = 0;
}

template <class E>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    documents(MaxSimProblem p, Upstream g, const std::int64_t* query_of /* [q.total] */, const float* share, Winners w,
              PairOrder order, std::int64_t tiles, int rows /* of a tile */, MaxSimOutput out) {
  DYN_SHARED(float, shared);
  const std::int64_t j = blockIdx.x / tiles, first = p.d.offsets[j];
  const std::int64_t row0 = blockIdx.x % tiles * rows, left = p.d.offsets[j + 1] - first - row0;
  const int here = static_cast<int>(left < rows ? left : rows);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  float* const sums = out.room == nullptr ? shared : out.room + (first + row0) * p.dim;
  for (int t = warp; t < here; t += kWarps) clear_row(sums + t * p.dim, p.dim);
  const Rows<E> queries(p.q);
  const bool listed = p.pair_q != nullptr;
  const int levels = p.topk > 1 ? p.topk : 1;
  const float part = share == nullptr ? 1.0f : share[j];
  // All pairs: the queries' tokens are one sequence, each with its own gradient.
  for (std::int64_t n = listed ? order.first[j] : 0; n < (listed ? order.first[j + 1] : 1); ++n) {
    const std::int64_t pair = listed ? order.order[n] : 0, i = listed ? p.pair_q[pair] : 0;
    const std::int64_t begin = listed ? p.q.offsets[i] : 0, tokens = listed ? p.q.offsets[i + 1] - begin : p.q.total;
    const std::int64_t at = listed ? pair * p.max_q : j * p.q.total;
    // Read one step ahead: the sums' addresses may be anything to the compiler, so it would not.
    float next_c = 0;
    int next_t = -1;
    const auto fetch = [&](std::int64_t s) {
      next_c = 0;
      next_t = -1;
      if (s >= tokens) return;
      const std::int64_t query = listed ? i : query_of[s];
      next_c = coefficient(p, g, query, j, pair, begin + s, at + s) * part;
      next_t = winner(w, at + s);
    };
    fetch(lane);
    for (std::int64_t s0 = 0; s0 < tokens; s0 += 32) {
      const std::int64_t s = s0 + lane;
      const float c = next_c;
      const int first_t = next_t;
      fetch(s + 32);
      for (int level = 0; level < levels; ++level) {
        int t = first_t;
        if (level > 0) t = s < tokens ? winner(w, level * plane_size(p) + at + s) : -1;
        t = t < 0 ? -1 : t - static_cast<int>(row0);
        const bool own = t >= 0 && t < here && t % kWarps == warp && c != 0;
        const unsigned mine = __ballot_sync(kAllLanes, own);
        if (mine == 0) continue;
        const std::int64_t from = own ? begin + s : 0;
        const float factor = own ? c * inverse_norm(p.q_inv, from) : 0.0f;
        add_rows(queries, mine, from, factor, sums + (own ? t : 0) * p.dim, p.dim);
      }
    }
  }
  for (int t = warp; t < here; t += kWarps) store_row(p.d, p.d_inv, first + row0 + t, p.dim, sums + t * p.dim, out);
}

template <class E>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    queries(MaxSimProblem p, Upstream g, const std::int64_t* query_of, const float* share, Winners w, PairOrder order,
            MaxSimOutput out) {
  DYN_SHARED(float, shared);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t token = static_cast<std::int64_t>(blockIdx.x) * (blockDim.x / 32) + warp;
  if (token >= p.q.total) return;
  float* const sum = out.room == nullptr ? shared + warp * p.dim : out.room + token * p.dim;
  clear_row(sum, p.dim);
  const Rows<E> docs(p.d);
  const bool listed = p.pair_q != nullptr;
  const int levels = p.topk > 1 ? p.topk : 1;
  const std::int64_t i = query_of == nullptr ? sequence_of(p.q, token) : query_of[token], s = token - p.q.offsets[i];
  const std::int64_t begin = listed ? order.first[i] : 0, end = listed ? order.first[i + 1] : p.d.count;
  for (std::int64_t n0 = begin; n0 < end; n0 += 32) {
    const bool inside = n0 + lane < end;
    const std::int64_t pair = inside && listed ? order.order[n0 + lane] : 0;
    const std::int64_t j = !inside ? 0 : listed ? p.pair_d[pair] : n0 + lane;
    const std::int64_t at = listed ? pair * p.max_q + s : j * p.q.total + token;
    const float c = inside ? coefficient(p, g, i, j, pair, token, at) * (share == nullptr ? 1.0f : share[j]) : 0.0f;
    for (int level = 0; level < levels; ++level) {
      const int t = inside ? winner(w, level * plane_size(p) + at) : -1;
      const bool own = t >= 0 && c != 0;
      const unsigned mine = __ballot_sync(kAllLanes, own);
      if (mine == 0) continue;
      const std::int64_t from = own ? p.d.offsets[j] + t : 0;
      add_rows(docs, mine, from, own ? c * inverse_norm(p.d_inv, from) : 0.0f, sum, p.dim);
    }
  }
  store_row(p.q, p.q_inv, token, p.dim, sum, out);
}

// A warp owns a token of either side: it adds c exp((s - m) / tau) times each of the other side's unit rows.
template <bool kOfQueries>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    smooth(MaxSimProblem p, Upstream g, const float* maxima, PairOrder order, float per_tau, MaxSimOutput out) {
  DYN_SHARED(float, shared);
  const Tokens& own = kOfQueries ? p.q : p.d;
  const Tokens& other = kOfQueries ? p.d : p.q;
  const void* own_inv = kOfQueries ? p.q_inv : p.d_inv;
  const void* other_inv = kOfQueries ? p.d_inv : p.q_inv;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t token = own.offsets[0] + static_cast<std::int64_t>(blockIdx.x) * (blockDim.x / 32) + warp;
  if (token >= own.offsets[own.count]) return;
  float* const sum = out.room == nullptr ? shared + warp * p.dim : out.room + token * p.dim;
  clear_row(sum, p.dim);
  const std::int64_t sequence = sequence_of(own, token);
  const bool listed = p.pair_q != nullptr, there = kOfQueries || counts(p, token);
  const std::int64_t begin = listed ? order.first[sequence] : 0;
  const std::int64_t end = !there ? begin : listed ? order.first[sequence + 1] : other.count;
  const float own_scale = inverse_norm(own_inv, token);
  for (std::int64_t n = begin; n < end; ++n) {
    const std::int64_t pair = listed ? order.order[n] : 0;
    const std::int64_t with = !listed ? n : kOfQueries ? p.pair_d[pair] : p.pair_q[pair];
    const std::int64_t i = kOfQueries ? sequence : with, j = kOfQueries ? with : sequence;
    const std::int64_t at = token_array(p, i, j, pair) - p.q.offsets[i];
    for (std::int64_t o = other.offsets[with]; o < other.offsets[with + 1]; ++o) {
      if (kOfQueries && !counts(p, o)) continue;
      const std::int64_t q = kOfQueries ? token : o;
      const float c = coefficient(p, g, i, j, pair, q, at + q);
      if (c == 0) continue;
      const float scale = inverse_norm(other_inv, o);
      float s = 0;
      for (std::int64_t k = lane; k < p.dim; k += 32) {
        s += (element(own, token, k) * own_scale) * (element(other, o, k) * scale);
      }
      const float weight = c * exp2_approx((warp_sum(s) - maxima[at + q]) * per_tau) * scale;
      for (std::int64_t k = lane; k < p.dim; k += 32) sum[k] += weight * element(other, o, k);
    }
  }
  store_row(own, own_inv, token, p.dim, sum, out);
}

// Warps of a block that has a row of sums each.
int warps_for(std::int64_t dim, bool room) {
  if (room || dim == 0) return kWarps;
  const std::int64_t fit = kSumBytes / (4 * dim);
  return static_cast<int>(fit < kWarps ? fit : kWarps);
}

template <class F>
void visit_rows(const Tokens& x, F f) {
  if (x.codec.bits != 0) return f(As<Any>{});
  visit_dtype(x.dtype, f);
}

unsigned blocks_of(std::int64_t rows, std::int64_t each) { return static_cast<unsigned>((rows + each - 1) / each); }

}  // namespace

bool maxsim_backward_fits(std::int64_t dim) { return 4 * dim <= kSumBytes; }

void maxsim_backward(const MaxSimProblem& p, bool of_queries, std::int64_t longest,
                     const MaxSimGradient<float>& gradient, std::int64_t ld, const std::int64_t* query_of,
                     const float* share, Winners winners, PairOrder order, MaxSimOutput out, void* stream) {
  const Upstream g{gradient.scores, gradient.weights, gradient.per_token, ld};
  const bool room = out.room != nullptr;
  if (of_queries) {
    if (p.q.total == 0) return;
    const int warps = warps_for(p.dim, room);
    const auto bytes = static_cast<std::size_t>(room ? kNoBytes : warps * p.dim * 4);
    visit_rows(p.d, [&](auto e) {
      LAUNCH((queries<typename decltype(e)::type>), blocks_of(p.q.total, warps), static_cast<unsigned>(warps * 32),
             bytes, stream, p, g, query_of, share, winners, order, out);
    });
    return;
  }
  if (longest == 0 || p.d.count == 0) return;
  // Tiles as even as they can be: enough that they fit, and for many blocks, of at least a row a warp.
  const auto parts = [](std::int64_t of, std::int64_t each) { return (of + each - 1) / each; };
  const std::int64_t fitting = room ? 1 : parts(longest, kSumBytes / (4 * p.dim));
  std::int64_t tiles = parts(kWantedBlocks, p.d.count);
  if (tiles > parts(longest, kWarps)) tiles = parts(longest, kWarps);
  if (tiles < fitting) tiles = fitting;
  const std::int64_t rows = (longest + tiles - 1) / tiles;
  const auto bytes = static_cast<std::size_t>(room ? kNoBytes : rows * p.dim * 4);
  visit_dtype(p.q.dtype, [&](auto e) {
    const auto blocks = static_cast<unsigned>(p.d.count * tiles);
    LAUNCH((documents<typename decltype(e)::type>), blocks, kThreads, bytes, stream, p, g, query_of, share, winners,
           order, tiles, static_cast<int>(rows), out);
  });
}

void maxsim_backward_smooth(const MaxSimProblem& p, bool of_queries, const MaxSimGradient<float>& gradient,
                            std::int64_t ld, const float* maxima, PairOrder order, MaxSimOutput out, void* stream) {
  const Upstream g{gradient.scores, gradient.weights, gradient.per_token, ld};
  const std::int64_t total = of_queries ? p.q.total : p.d.total;
  if (total == 0) return;
  const int warps = warps_for(p.dim, out.room != nullptr);
  const auto bytes = static_cast<std::size_t>(out.room != nullptr ? kNoBytes : warps * p.dim * 4);
  const auto per_tau = static_cast<float>(1.4426950408889634 / p.temperature);
  const unsigned blocks = blocks_of(total, warps), threads = static_cast<unsigned>(warps * 32);
  if (of_queries) {
    LAUNCH((smooth<true>), blocks, threads, bytes, stream, p, g, maxima, order, per_tau, out);
  } else {
    LAUNCH((smooth<false>), blocks, threads, bytes, stream, p, g, maxima, order, per_tau, out);
  }
}

}  // namespace cuda
}  // namespace pyelastic
