// float16 x float16 -> float32 GEMM. Contract: ../mma_gemm.h; the tile: ../common/mma_gemm.cuh.
//
// One tile and one part of k a block. It stands in where torch.mm has no float32 output for half operands.
#include "../mma_gemm.h"

#include "../common/mma_gemm.cuh"

namespace pyelastic {
namespace cuda {
namespace {

template <bool kAKMajor, bool kBKMajor>
__global__ void __launch_bounds__(mma::kThreads, 2)
    gemm(mma::Operand a, mma::Operand b, std::int64_t tiles_m, std::int64_t part, float* c /* [splits, m, ldc] */,
         std::int64_t ldc, bool add) {
  DYN_SHARED(__half, buffers);
  const std::int64_t m0 = blockIdx.x % tiles_m * mma::kTileM, n0 = blockIdx.x / tiles_m * mma::kTileN;
  const std::int64_t begin = blockIdx.y * part, end = begin + part < a.depth ? begin + part : a.depth;
  mma::Accumulators acc;
  mma::multiply<kAKMajor, kBKMajor>(a, b, m0, n0, begin, end, buffers, acc);
  float* out = c + blockIdx.y * a.rows * ldc;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const std::int64_t row = m0 + mma::row_of(i, e), column = n0 + mma::column_of(j, e);
        if (row >= a.rows || column >= b.rows) continue;
        float* to = out + row * ldc + column;
        *to = add ? *to + acc[i][j][e] : acc[i][j][e];
      }
    }
  }
}

}  // namespace

void mma_gemm(const GemmOperand& a, const GemmOperand& b, std::int64_t m, std::int64_t n, std::int64_t k, float* c,
              std::int64_t ldc, int splits, bool add, void* stream) {
  if (m == 0 || n == 0) return;
  const std::int64_t steps = (k + mma::kTileK - 1) / mma::kTileK;
  const std::int64_t part = (steps + splits - 1) / splits * mma::kTileK;
  const std::int64_t tiles_m = (m + mma::kTileM - 1) / mma::kTileM, tiles_n = (n + mma::kTileN - 1) / mma::kTileN;
  const dim3 grid(static_cast<unsigned>(tiles_m * tiles_n), static_cast<unsigned>(splits));
  const mma::Operand left{static_cast<const __half*>(a.data), a.ld, m, k};
  const mma::Operand right{static_cast<const __half*>(b.data), b.ld, n, k};
  const auto launch = [&](auto a_k_major, auto b_k_major) {
    LAUNCH((gemm<decltype(a_k_major)::value, decltype(b_k_major)::value>), grid, mma::kThreads, mma::kSharedBytes,
           stream, left, right, tiles_m, part, c, ldc, add);
  };
  if (a.k_major && b.k_major) return launch(std::true_type{}, std::true_type{});
  if (a.k_major) return launch(std::true_type{}, std::false_type{});
  if (b.k_major) return launch(std::false_type{}, std::true_type{});
  launch(std::false_type{}, std::false_type{});
}

}  // namespace cuda
}  // namespace pyelastic
