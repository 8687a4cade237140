// A 128 x 128 tile of A B on tensor cores: float16 operands, float32 sums, mma.sync (sm_80 and newer).
//
// Blocking: 8 warps in 2 x 4, each 64 x 32 of the tile in 64 registers a thread; steps of 32 along k, in
// kStages buffers filled by cp.async. An operand is stored k-fastest ("k-major") or k-slowest, chosen
// at compile time, so that the three products of a linear layer (x W^T, dy W, dy^T x) read what is there.
// A buffer row is padded by 16 bytes: eight rows of an ldmatrix then fall on different banks.
// Bytes per tile and step from L2: 16 KB for 2^20 operations, 64 operations per byte.
#pragma once

#include "cuda.cuh"
#include "ptx.cuh"

namespace pyelastic {
namespace mma {

constexpr int kTileM = 128, kTileN = 128, kTileK = 32;
constexpr int kThreads = 256;
constexpr int kStages = 4;
constexpr int kPad = 8;  // halves
constexpr int kKMajorStride = kTileK + kPad;
constexpr int kKSlowStride = kTileM + kPad;
constexpr int kOperandHalves = kTileM * kKMajorStride;  // the larger of the two layouts
static_assert(kTileK * kKSlowStride <= kOperandHalves, "a stage holds an operand in either layout");
static_assert(kTileM == kTileN, "the operands share one buffer layout");
constexpr int kSharedHalves = kStages * 2 * kOperandHalves;
constexpr int kSharedBytes = kSharedHalves * 2;  // 80 KB: two blocks fit an SM of sm_80 and newer

// An operand: extent `rows` along m (or n) and `depth` along k. ld and data are multiples of 16 bytes;
// what lies between the extent of the fast dimension and the next multiple of 8 is zero for k-major
// operands and anything but out of bounds for the others.
struct Operand {
  const __half* data;
  std::int64_t ld, rows, depth;
};

// Fragments of a warp: acc[i][j] is the m16n8 fragment i, j.
using Accumulators = float[4][4][4];

// Where element e of fragment i, j of this thread lies in the tile.
__device__ __forceinline__ int row_of(int i, int e) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  return (warp / 4) * 64 + i * 16 + (e / 2) * 8 + lane / 4;
}
__device__ __forceinline__ int column_of(int j, int e) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  return (warp % 4) * 32 + j * 8 + (lane % 4) * 2 + e % 2;
}

template <bool kKMajor>
__device__ __forceinline__ void load_stage(const Operand& x, std::int64_t first, std::int64_t k0, __half* to) {
  constexpr int kFast = kKMajor ? kTileK : kTileM;   // elements of a buffer row
  constexpr int kSlow = kKMajor ? kTileM : kTileK;
  constexpr int kStride = kKMajor ? kKMajorStride : kKSlowStride;
  constexpr int kPieces = kFast / 8;  // of 16 bytes
#pragma unroll
  for (int p = 0; p < kSlow * kPieces / kThreads; ++p) {
    const int piece = p * kThreads + static_cast<int>(threadIdx.x);
    const int slow = piece / kPieces, fast = piece % kPieces * 8;
    const std::int64_t row = kKMajor ? first + slow : first + fast;
    const std::int64_t k = kKMajor ? k0 + fast : k0 + slow;
    const bool inside = row < x.rows && k < x.depth;
    const std::int64_t at = kKMajor ? row * x.ld + k : k * x.ld + row;
    cp_async_16(to + slow * kStride + fast, x.data + (inside ? at : 0), inside);
  }
}

// The m16 x k16 fragment i of A, step k of the buffer.
template <bool kKMajor>
__device__ __forceinline__ void load_a(std::uint32_t (&a)[4], const __half* buffer, int i, int k) {
  const int lane = threadIdx.x % 32, m = (threadIdx.x / 32 / 4) * 64 + i * 16;
  if constexpr (kKMajor) {
    ldmatrix_x4(a, buffer + (m + lane % 16) * kKMajorStride + k + lane / 16 * 8);
  } else {
    ldmatrix_x4_trans(a, buffer + (k + lane % 8 + lane / 16 * 8) * kKSlowStride + m + lane / 8 % 2 * 8);
  }
}

// Two n8 x k16 fragments of B, 2 j and 2 j + 1.
template <bool kKMajor>
__device__ __forceinline__ void load_b(std::uint32_t (&b)[4], const __half* buffer, int j, int k) {
  const int lane = threadIdx.x % 32, n = (threadIdx.x / 32 % 4) * 32 + j * 16;
  if constexpr (kKMajor) {
    ldmatrix_x4(b, buffer + (n + lane % 8 + lane / 16 * 8) * kKMajorStride + k + lane / 8 % 2 * 8);
  } else {
    ldmatrix_x4_trans(b, buffer + (k + lane % 16) * kKSlowStride + n + lane / 16 * 8);
  }
}

// acc = the tile at (m0, n0) of A B over k in [k_begin, k_end), both multiples of kTileK or the end of the
// operands; ends with a barrier, the buffers free. Type: F16, or BF16 for operands whose bits are that. look(A's buffer)
// is called by all threads once a step, while the step's operands are there.
struct LookAway {
  __device__ __forceinline__ void operator()(const __half*) const {}
};
template <bool kAKMajor, bool kBKMajor, class Type = F16, class Look = LookAway>
__device__ __forceinline__ void multiply(Operand a, Operand b, std::int64_t m0, std::int64_t n0,
                                         std::int64_t k_begin, std::int64_t k_end, __half* shared,
                                         Accumulators& acc, Look look = Look{}) {
  a.depth = b.depth = k_end;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[i][j][e] = 0;
    }
  }
  const auto load = [&](std::int64_t step) {
    __half* stage = shared + step % kStages * 2 * kOperandHalves;
    load_stage<kAKMajor>(a, m0, k_begin + step * kTileK, stage);
    load_stage<kBKMajor>(b, n0, k_begin + step * kTileK, stage + kOperandHalves);
  };
  const std::int64_t steps = (k_end - k_begin + kTileK - 1) / kTileK;
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) load(step);
    cp_async_commit();  // groups stay one to a step, empty ones included: the count below is constant
  }
  for (std::int64_t step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // the step is there for all, and nobody still reads the buffer to be filled next
    if (step + kStages - 1 < steps) load(step + kStages - 1);
    cp_async_commit();
    const __half* stage = shared + step % kStages * 2 * kOperandHalves;
    look(stage);
#pragma unroll
    for (int k = 0; k < kTileK; k += 16) {
      std::uint32_t fa[4][4], fb[2][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) load_a<kAKMajor>(fa[i], stage, i, k);
#pragma unroll
      for (int j = 0; j < 2; ++j) load_b<kBKMajor>(fb[j], stage + kOperandHalves, j, k);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const std::uint32_t b_pair[2] = {fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]};
          mma_m16n8k16(acc[i][j], fa[i], b_pair, Type{});
        }
      }
    }
  }
  cp_async_wait<0>();
  __syncthreads();
}

}  // namespace mma
}  // namespace pyelastic
