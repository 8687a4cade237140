// margin_softmax on CUDA with the GEMM inside: cosines live in tensor-core accumulators and only their
// statistics, or the gradient tile in half precision, reach memory. Contract: ../margin_softmax.h.
//
// Blocking: one 128 x 128 tile a block (common/mma_gemm.cuh), row tiles fastest so that a tile of class
// rows is read from L2 by its neighbours at once. Bytes per cosine: forward 6 * 4 / 128 of partials, backward 2;
// the tile in memory of margin_softmax.cu costs 4 written and 8 read, and 2 more in backward.
#include <type_traits>

#include "../common/mma_gemm.cuh"
#include "margin_softmax_tile.cuh"

namespace pyelastic {
namespace cuda {
namespace {

using mma::kTileM;
using mma::kTileN;
constexpr int kThreads = mma::kThreads;
constexpr int kColumnWarps = 4;
constexpr int kCombineThreads = 128;

struct Tiles {
  std::int64_t m, n;
  explicit Tiles(const Negatives& n) : m((n.rows + kTileM - 1) / kTileM), n((n.classes + kTileN - 1) / kTileN) {}
  unsigned count() const { return static_cast<unsigned>(m * n); }
};

// The sum over the four lanes that share a row of a fragment.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = max_or_nan(x, __shfl_xor_sync(kAllLanes, x, 1));
  return max_or_nan(x, __shfl_xor_sync(kAllLanes, x, 2));
}

// Statistics of a row's 32 columns in one warp, to shared memory: [kPartials][kColumnWarps][kTileM].
template <bool kHard, bool kExtra>
__device__ __forceinline__ void row_statistics(const Negatives& n, const mma::Accumulators& acc, int i, int half,
                                               std::int64_t m0, std::int64_t n0, const float* cos_target,
                                               float* shared) {
  const int row = mma::row_of(i, 2 * half);
  const bool used = m0 + row < n.rows && n.labels[m0 + row] >= 0;
  const std::int64_t at = used ? m0 + row : 0;  // read something; it is not stored
  const std::int64_t target = n.labels[at] - n.first - n0;
  const Rule<kHard> rule(n, at);
  const std::int64_t left = n.classes - n0;
  RowStats s;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int column = mma::column_of(j, e);
      if (column < left && column != target) s.max = max_or_nan(s.max, rule.map(acc[i][j][2 * half + e]) * n.scale);
    }
  }
  s.max = quad_max(s.max);
  const float own = kExtra && (n.stats & kRank) ? cos_target[at] : 0.0f;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int column = mma::column_of(j, e);
      if (column < left && column != target) {
        add_negative<kHard, kExtra>(s, rule, acc[i][j][2 * half + e], n.scale, own);
      }
    }
  }
  s.sum = quad_sum(s.sum);
  if constexpr (kExtra) {
    s.sum_sq = quad_sum(s.sum_sq);
    s.sum_z = quad_sum(s.sum_z);
    s.sum_cos = quad_sum(s.sum_cos);
    s.rank = static_cast<int>(quad_sum(static_cast<float>(s.rank)));
    s.top = quad_max(s.top);
  }
  if (threadIdx.x % 4 != 0) return;
  float* to = shared + threadIdx.x / 32 % kColumnWarps * kTileM + row;
  constexpr int kStep = kColumnWarps * kTileM;
  to[0] = s.max;
  to[kStep] = s.sum;
  if constexpr (kExtra) {
    to[2 * kStep] = s.sum_sq;
    to[3 * kStep] = s.sum_z;
    to[4 * kStep] = s.sum_cos;
    to[5 * kStep] = static_cast<float>(s.rank);
    to[6 * kStep] = s.top;
  }
}

template <bool kExtra>
__device__ __forceinline__ RowStats load_stats(const float* from, std::int64_t step) {
  RowStats s;
  s.max = from[0];
  s.sum = from[step];
  if constexpr (kExtra) {
    s.sum_sq = from[2 * step];
    s.sum_z = from[3 * step];
    s.sum_cos = from[4 * step];
    s.rank = static_cast<int>(from[5 * step]);
    s.top = from[6 * step];
  }
  return s;
}

template <bool kHard, bool kExtra>
__global__ void __launch_bounds__(kThreads, 2)
    accumulate_tile(Negatives n, mma::Operand e_hat /* [rows, dim] */, mma::Operand w_hat /* [classes, dim] */,
                    std::int64_t tiles_m, const float* cos_target, float* partials /* [7, tiles_n, rows] */) {
  DYN_SHARED(__half, buffers);
  const std::int64_t m0 = blockIdx.x % tiles_m * kTileM, tile_n = blockIdx.x / tiles_m, n0 = tile_n * kTileN;
  mma::Accumulators acc;
  mma::multiply<true, true>(e_hat, w_hat, m0, n0, 0, e_hat.depth, buffers, acc);

  float* shared = reinterpret_cast<float*>(buffers);  // multiply left it free
  static_assert(kPartials * kColumnWarps * kTileM * 4 <= mma::kSharedBytes, "the statistics fit the buffers");
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    row_statistics<kHard, kExtra>(n, acc, i, 0, m0, n0, cos_target, shared);
    row_statistics<kHard, kExtra>(n, acc, i, 1, m0, n0, cos_target, shared);
  }
  __syncthreads();
  const std::int64_t row = m0 + threadIdx.x;
  if (threadIdx.x >= kTileM || row >= n.rows) return;
  RowStats s = load_stats<kExtra>(shared + threadIdx.x, kColumnWarps * kTileM);
#pragma unroll
  for (int w = 1; w < kColumnWarps; ++w) {
    merge<kExtra>(s, load_stats<kExtra>(shared + w * kTileM + threadIdx.x, kColumnWarps * kTileM));
  }
  const std::int64_t step = (n.classes + kTileN - 1) / kTileN * n.rows;
  float* to = partials + tile_n * n.rows + row;
  to[0] = s.max;
  to[step] = s.sum;
  if constexpr (kExtra) {
    to[2 * step] = s.sum_sq;
    to[3 * step] = s.sum_z;
    to[4 * step] = s.sum_cos;
    to[5 * step] = static_cast<float>(s.rank);
    to[6 * step] = s.top;
  }
}

// Folds the partials of a chunk into the running statistics: one thread a row, tiles in order.
template <bool kExtra>
__global__ void __launch_bounds__(kCombineThreads)
    combine(Negatives n, const float* partials /* [7, tiles_n, rows] */, std::int64_t tiles_n, RunningStats stats) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kCombineThreads + threadIdx.x;
  if (row >= n.rows || n.labels[row] < 0) return;
  RowStats s;
  for (std::int64_t t = 0; t < tiles_n; ++t) {
    merge<kExtra>(s, load_stats<kExtra>(partials + t * n.rows + row, tiles_n * n.rows));
  }
  carry(stats, n.stats, row, s);
}

template <bool kHard>
__global__ void __launch_bounds__(kThreads, 2)
    gradient_tile(Negatives n, mma::Operand e_hat /* [rows, dim] */, mma::Operand w_hat /* [classes, dim] */,
                  std::int64_t tiles_m, const float* lse_neg /* [rows] */, const float* grad_lse,
                  const float* grad_sum, const float* row_scale, __half* p /* [rows, ldp] */, std::int64_t ldp) {
  DYN_SHARED(__half, buffers);
  const std::int64_t m0 = blockIdx.x % tiles_m * kTileM, n0 = blockIdx.x / tiles_m * kTileN;
  mma::Accumulators acc;
  mma::multiply<true, true>(e_hat, w_hat, m0, n0, 0, e_hat.depth, buffers, acc);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::int64_t row = m0 + mma::row_of(i, 2 * half);
      if (row >= n.rows) continue;
      const Gradient<kHard> g(n, row, lse_neg, grad_lse, grad_sum, row_scale);
      const std::int64_t target = n.labels[row] - n.first;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const std::int64_t column = n0 + mma::column_of(j, 0);
        if (column >= ldp) continue;  // ldp is even, and so is column: both or none are inside
        const bool first = column < n.classes && column != target;
        const bool second = column + 1 < n.classes && column + 1 != target;
        const float a = first ? g(acc[i][j][2 * half]) : 0.0f, b = second ? g(acc[i][j][2 * half + 1]) : 0.0f;
        *reinterpret_cast<std::uint32_t*>(p + row * ldp + column) = pack(a, b, F16{});
      }
    }
  }
}

mma::Operand operand(const void* x, std::int64_t ld, std::int64_t rows) {
  return {static_cast<const __half*>(x), ld, rows, ld};  // columns up to ld are zero
}

}  // namespace

void margin_softmax_accumulate_mma(const Negatives& n, const void* e_hat, const void* w_hat, std::int64_t ld,
                                   float* partials, const RunningStats& stats, Stream stream) {
  if (n.rows == 0 || n.classes == 0) return;
  const Tiles tiles(n);
  visit_switches(n, [&](auto hard, auto extra) {
    constexpr bool kHard = decltype(hard)::value, kExtra = decltype(extra)::value;
    LAUNCH((accumulate_tile<kHard, kExtra>), tiles.count(), kThreads, mma::kSharedBytes, stream, n,
           operand(e_hat, ld, n.rows), operand(w_hat, ld, n.classes), tiles.m, stats.cos_target, partials);
    const auto blocks = static_cast<unsigned>((n.rows + kCombineThreads - 1) / kCombineThreads);
    LAUNCH((combine<kExtra>), blocks, kCombineThreads, 0, stream, n, partials, tiles.n, stats);
  });
}

void margin_softmax_gradient_mma(const Negatives& n, const void* e_hat, const void* w_hat, std::int64_t ld,
                                 const float* lse_neg, const float* grad_lse, const float* grad_sum,
                                 const float* row_scale, void* p, std::int64_t ldp, Stream stream) {
  if (n.rows == 0 || n.classes == 0) return;
  const Tiles tiles(n);
  visit_switches(n, [&](auto hard, auto) {
    LAUNCH((gradient_tile<decltype(hard)::value>), tiles.count(), kThreads, mma::kSharedBytes, stream, n,
           operand(e_hat, ld, n.rows), operand(w_hat, ld, n.classes), tiles.m, lse_neg, grad_lse, grad_sum, row_scale,
           static_cast<__half*>(p), ldp);
  });
}

}  // namespace cuda
}  // namespace pyelastic
