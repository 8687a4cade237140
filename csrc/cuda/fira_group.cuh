// What fira's kernels share: the group of matrices as a kernel argument, and a tiled product without matrix units.
#pragma once

#include "../common/device.cuh"
#include "../fira.h"

namespace pyelastic {
namespace cuda {

constexpr int kFiraThreads = 256;
enum : int { kPaper = 1, kCorrectBias = 2, kMaximize = 4, kCollapse = 8, kPerMatrix = 16, kStochastic = 32 };

// Matrices and the first block of each; first[count] is the grid. 16 matrices are 3 KB of the 4 KB of arguments.
struct FiraGroup {
  FiraMatrix matrix[kFiraGroup];
  std::int64_t first[kFiraGroup + 1];
  int count;
};
static_assert(sizeof(FiraGroup) + sizeof(FiraShared) <= 4000, "kernel arguments of sm_80");

__host__ __device__ inline std::int64_t vectors_of(const FiraMatrix& x) { return x.left ? x.columns : x.rows; }
__host__ __device__ inline std::int64_t dim_of(const FiraMatrix& x) { return x.left ? x.rows : x.columns; }
inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// The group and its grid from the number of blocks that each matrix needs.
template <class Blocks>
FiraGroup make_group(const FiraMatrix* matrices, int count, Blocks blocks) {
  FiraGroup group{};
  group.count = count;
  for (int i = 0; i < count; ++i) {
    group.matrix[i] = matrices[i];
    group.first[i + 1] = group.first[i] + blocks(matrices[i]);
  }
  return group;
}

__device__ __forceinline__ unsigned* ticket_of(const FiraMatrix& x) { return reinterpret_cast<unsigned*>(x.scalars + 5); }

// Of one matrix.
__device__ __forceinline__ unsigned blocks_for(const FiraGroup& group, int i_matrix) {
  return static_cast<unsigned>(group.first[i_matrix + 1] - group.first[i_matrix]);
}

inline unsigned grid(const FiraGroup& group) { return static_cast<unsigned>(group.first[group.count]); }

__device__ __forceinline__ int matrix_of_block(const FiraGroup& group) {
  int i = 0;
  while (i + 1 < group.count && static_cast<std::int64_t>(blockIdx.x) >= group.first[i + 1]) ++i;
  return i;
}

__device__ __forceinline__ float factor_of(const FiraShared& s) {
  const float c = s.grad_factor != nullptr ? *s.grad_factor : 1.0f;
  return (s.flags & kMaximize) != 0 ? -c : c;
}
__device__ __forceinline__ bool skipped(const FiraShared& s) { return s.found_inf != nullptr && *s.found_inf > 0; }

// sqrt(1 - b2^t) / (1 - b1^t), in double: 1 - b2^t loses digits.
__device__ __forceinline__ double correction_of(const FiraShared& s, float taken) {
  if ((s.flags & kCorrectBias) == 0) return 1.0;
  return sqrt(1.0 - pow(s.beta2, static_cast<double>(taken))) / (1.0 - pow(s.beta1, static_cast<double>(taken)));
}

// An operand [rows, depth] of a product: element (row, k) at row * row_stride + k * k_stride.
template <class T>
struct Strided {
  const T* data;
  std::int64_t rows, depth, row_stride, k_stride;
  __device__ __forceinline__ float at(std::int64_t row, std::int64_t k) const {
    return row < rows && k < depth ? to_float(data[row * row_stride + k * k_stride]) : 0.0f;
  }
};

// X of a matrix.
template <class T>
__device__ __forceinline__ Strided<T> vectors_operand(const FiraMatrix& x) {
  const T* g = static_cast<const T*>(x.g);
  if (x.left) return {g, x.columns, x.rows, 1, x.g_stride};
  return {g, x.rows, x.columns, x.g_stride, 1};
}

// acc = the 64 x 64 tile at (m0, n0) of A B^T in float32 without matrix units: a thread owns rows 4 (t / 16) + i and columns
// t % 16 + 16 j. look(A's buffer [16][64]) is called once a step. Ends with a barrier.
constexpr int kTile = 64, kDepth = 16, kPitch = kTile + 4;  // the pad spreads a column of 16 over the banks
template <class A, class B, class Look>
__device__ __forceinline__ void multiply_simt(const Strided<A>& a, const Strided<B>& b, std::int64_t m0, std::int64_t n0,
                                              float* a_tile, float* b_tile, float (&acc)[4][4], Look look) {
  const int t = threadIdx.x;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) acc[i][j] = 0;
  }
  for (std::int64_t k0 = 0; k0 < a.depth; k0 += kDepth) {
#pragma unroll
    for (int e = 0; e < kTile * kDepth / kFiraThreads; ++e) {
      const int piece = e * kFiraThreads + t;  // neighbours along the dimension that is fast in memory
      const int ar = a.k_stride == 1 ? piece / kDepth : piece % kTile, ak = a.k_stride == 1 ? piece % kDepth : piece / kTile;
      a_tile[ak * kPitch + ar] = a.at(m0 + ar, k0 + ak);
      const int br = b.k_stride == 1 ? piece / kDepth : piece % kTile, bk = b.k_stride == 1 ? piece % kDepth : piece / kTile;
      b_tile[bk * kPitch + br] = b.at(n0 + br, k0 + bk);
    }
    __syncthreads();
    look(a_tile);
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      float left[4], right[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        left[i] = a_tile[k * kPitch + t / 16 * 4 + i];
        right[i] = b_tile[k * kPitch + t % 16 + 16 * i];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[i][j] += left[i] * right[j];
      }
    }
    __syncthreads();
  }
}

// A 32-bit integer hash (Wellons' lowbias32), as pyelastic.eager.fira.
__device__ __forceinline__ std::uint32_t mix(std::uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}
__device__ __forceinline__ std::uint32_t noise_key(std::uint64_t seed, float taken) {
  const std::uint32_t key = mix(static_cast<std::uint32_t>(static_cast<std::int64_t>(taken)));
  return mix(static_cast<std::uint32_t>(seed) ^ mix(static_cast<std::uint32_t>(seed >> 32) ^ key));
}

}  // namespace cuda
}  // namespace pyelastic
