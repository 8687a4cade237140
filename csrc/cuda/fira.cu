// fira on CUDA: four launches for a group of matrices, here the two products. Contract and formulas: ../fira.h.
//
// project       R = X P, a block a tile, and |x|^2 from the tile of X that is in shared memory anyway
// moments       m, v and |R|^2, |N|^2 (and R^T M R), a block 32 vectors; the last block of a matrix then does the limiter:
//               s, lim, f from sums over all vectors in one order
// residual      |x - a_r P r|^2 formed, and the limiter again from it: only near a_r = 1, and it returns at once but for
//               matrices of which the limiter found that s had lost its digits
// coefficients  C = a_n N - a_r f R
// apply         W from C P^T in registers: the tile's epilogue reads W and G and writes W
// Why C is not made where apply loads it: docs/kernels.md.
// Both products run on matrix units (bfloat16, float16; tiles of 128 x 128, mma_gemm.cuh) where sizes and addresses allow
// 16-byte copies, else in float32 on tiles of 64 x 64. Bytes: G twice, W once each way; of the size L r: R written and
// read twice, m and v read twice and written once, C written once and read once a tile of columns, from L2.
#include "../common/mma_gemm.cuh"
#include "fira_group.cuh"

namespace pyelastic {
namespace cuda {
namespace {

// --- project ---

template <class T>
__global__ void __launch_bounds__(kFiraThreads) project_simt(FiraGroup group, FiraShared) {
  SHARED(float, a_tile, kDepth * kPitch);
  SHARED(float, b_tile, kDepth * kPitch);
  const int i_matrix = matrix_of_block(group);
  const FiraMatrix& x = group.matrix[i_matrix];
  const std::int64_t block = blockIdx.x - group.first[i_matrix], vectors = vectors_of(x);
  const std::int64_t tiles = (vectors + kTile - 1) / kTile;
  const std::int64_t m0 = block % tiles * kTile, n0 = block / tiles * kTile;
  const T* p = static_cast<const T*>(x.p);
  const Strided<T> a = vectors_operand<T>(x);
  const Strided<T> b = x.left ? Strided<T>{p, x.rank, x.rows, 1, x.rank} : Strided<T>{p, x.rank, x.columns, x.columns, 1};
  float acc[4][4], square = 0;
  const int t = threadIdx.x;
  multiply_simt(a, b, m0, n0, a_tile, b_tile, acc, [&](const float* tile) {
    if (n0 != 0 || t >= kTile) return;
    for (int k = 0; k < kDepth; ++k) square += tile[k * kPitch + t] * tile[k * kPitch + t];
  });
  if (n0 == 0 && t < kTile && m0 + t < vectors) x.stats[m0 + t] = square;
  if (block == 0 && t == 0) *ticket_of(x) = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const std::int64_t row = m0 + t / 16 * 4 + i, column = n0 + t % 16 + 16 * j;
      if (row < vectors && column < x.rank) x.r[x.left ? column * vectors + row : row * x.rank + column] = acc[i][j];
    }
  }
}

__device__ __forceinline__ float bits_to_float(__half h, F16) { return __half2float(h); }
__device__ __forceinline__ float bits_to_float(__half h, BF16) {
  __nv_bfloat16 value;
  memcpy(&value, &h, 2);
  return __bfloat162float(value);
}

// Squares of this thread's share of A's buffer: half a row of the tile, 16 of 32 k.
template <bool kKMajor, class Type>
struct SumSquares {
  float* sum;
  __device__ __forceinline__ void operator()(const __half* stage) const {
    const int row = threadIdx.x / 2, k0 = threadIdx.x % 2 * 16;
    float s = 0;
    for (int k = k0; k < k0 + 16; ++k) {
      const int at = kKMajor ? row * mma::kKMajorStride + k : k * mma::kKSlowStride + row;
      const float value = bits_to_float(stage[at], Type{});
      s += value * value;
    }
    *sum += s;
  }
};

template <bool kLeft, class Type>
__device__ __forceinline__ void project_tile(const FiraMatrix& x, std::int64_t m0, std::int64_t n0, __half* buffers) {
  const std::int64_t vectors = kLeft ? x.columns : x.rows, dim = kLeft ? x.rows : x.columns;
  const mma::Operand a{static_cast<const __half*>(x.g), x.g_stride, vectors, dim};
  const mma::Operand b{static_cast<const __half*>(x.p), kLeft ? x.rank : x.columns, x.rank, dim};
  mma::Accumulators acc;
  float square = 0;
  mma::multiply<!kLeft, !kLeft, Type>(a, b, m0, n0, 0, dim, buffers, acc, SumSquares<!kLeft, Type>{&square});
  square += __shfl_xor_sync(kAllLanes, square, 1);
  const std::int64_t vector = m0 + threadIdx.x / 2;
  if (n0 == 0 && threadIdx.x % 2 == 0 && vector < vectors) x.stats[vector] = square;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const std::int64_t row = m0 + mma::row_of(i, e), column = n0 + mma::column_of(j, e);
        if (row < vectors && column < x.rank) x.r[kLeft ? column * vectors + row : row * x.rank + column] = acc[i][j][e];
      }
    }
  }
}

template <class Type>
__global__ void __launch_bounds__(mma::kThreads, 2) project_mma(FiraGroup group, FiraShared) {
  DYN_SHARED(__half, buffers);
  const int i_matrix = matrix_of_block(group);
  const FiraMatrix& x = group.matrix[i_matrix];
  const std::int64_t block = blockIdx.x - group.first[i_matrix];
  const std::int64_t tiles = (vectors_of(x) + mma::kTileM - 1) / mma::kTileM;
  const std::int64_t m0 = block % tiles * mma::kTileM, n0 = block / tiles * mma::kTileN;
  if (block == 0 && threadIdx.x == 0) *ticket_of(x) = 0;
  if (x.left) {
    project_tile<true, Type>(x, m0, n0, buffers);
  } else {
    project_tile<false, Type>(x, m0, n0, buffers);
  }
}
// --- apply ---

// W's element (row, column) from the element t of C P^T.
template <class T>
__device__ __forceinline__ void write(const FiraMatrix& x, const FiraShared& s, std::int64_t row, std::int64_t column,
                                      float t, float size, float keep, float c, std::uint32_t key) {
  T* w = static_cast<T*>(x.w) + row * x.w_stride + column;
  const std::int64_t element = row * x.columns + column;
  float base = to_float(*w);
  T* remainder = static_cast<T*>(x.remainder);
  if (remainder != nullptr) base += to_float(remainder[element]);
  const float g = c * to_float(static_cast<const T*>(x.g)[row * x.g_stride + column]);
  const float value = keep * (base - size * (t + x.f[x.left ? column : row] * g));
  if ((s.flags & kStochastic) != 0) {
    const std::uint32_t high = mix(static_cast<std::uint32_t>(element >> 32) ^ key);
    const std::uint32_t bits = __float_as_uint(value), noise = mix(static_cast<std::uint32_t>(element) ^ high) & 0xffffu;
    const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
    *w = from_float<T>(finite ? __uint_as_float((bits + noise) & 0xffff0000u) : value);  // exact in bfloat16
    return;
  }
  const T rounded = from_float<T>(value);
  *w = rounded;
  if (remainder != nullptr) remainder[element] = from_float<T>(value - to_float(rounded));
}

template <class T>
__global__ void __launch_bounds__(kFiraThreads) apply_simt(FiraGroup group, FiraShared s) {
  SHARED(float, a_tile, kDepth * kPitch);
  SHARED(float, b_tile, kDepth * kPitch);
  const int i_matrix = matrix_of_block(group);
  const FiraMatrix& x = group.matrix[i_matrix];
  if (skipped(s)) return;
  const std::int64_t block = blockIdx.x - group.first[i_matrix], tiles = (x.rows + kTile - 1) / kTile;
  const std::int64_t m0 = block % tiles * kTile, n0 = block / tiles * kTile;
  const float* coefficient = static_cast<const float*>(x.c);
  const T* p = static_cast<const T*>(x.p);
  float acc[4][4];
  const auto look_away = [](const float*) {};
  if (x.left) {
    multiply_simt(Strided<T>{p, x.rows, x.rank, x.rank, 1}, Strided<float>{coefficient, x.columns, x.rank, 1, x.columns},
                  m0, n0, a_tile, b_tile, acc, look_away);
  } else {
    multiply_simt(Strided<float>{coefficient, x.rows, x.rank, x.rank, 1}, Strided<T>{p, x.columns, x.rank, 1, x.columns},
                  m0, n0, a_tile, b_tile, acc, look_away);
  }
  const float size = x.scalars[0], keep = x.scalars[1], c = factor_of(s);
  if (block == 0 && threadIdx.x == 0) *x.step = x.scalars[3];  // here: blocks of moments may read it after the limiter
  const std::uint32_t key = noise_key(x.seed, x.scalars[3]);
  const int t = threadIdx.x;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const std::int64_t row = m0 + t / 16 * 4 + i, column = n0 + t % 16 + 16 * j;
      if (row < x.rows && column < x.columns) write<T>(x, s, row, column, acc[i][j], size, keep, c, key);
    }
  }
}

template <class T, class Type>
__global__ void __launch_bounds__(mma::kThreads, 2) apply_mma(FiraGroup group, FiraShared s) {
  DYN_SHARED(__half, buffers);
  const int i_matrix = matrix_of_block(group);
  const FiraMatrix& x = group.matrix[i_matrix];
  if (skipped(s)) return;
  const std::int64_t block = blockIdx.x - group.first[i_matrix];
  const std::int64_t tiles = (x.rows + mma::kTileM - 1) / mma::kTileM;
  const std::int64_t m0 = block % tiles * mma::kTileM, n0 = block / tiles * mma::kTileN;
  // [rows, r] times [r, columns] on either side: C P^T or P C^T.
  const void *left = x.left ? x.p : x.c, *right = x.left ? x.c : x.p;
  const mma::Operand a{static_cast<const __half*>(left), x.rank, x.rows, x.rank};
  const mma::Operand b{static_cast<const __half*>(right), x.columns, x.columns, x.rank};
  mma::Accumulators acc;
  mma::multiply<true, false, Type>(a, b, m0, n0, 0, x.rank, buffers, acc);
  const float size = x.scalars[0], keep = x.scalars[1], c = factor_of(s);
  if (block == 0 && threadIdx.x == 0) *x.step = x.scalars[3];  // here: blocks of moments may read it after the limiter
  const std::uint32_t key = noise_key(x.seed, x.scalars[3]);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const std::int64_t row = m0 + mma::row_of(i, e), column = n0 + mma::column_of(j, e);
        if (row < x.rows && column < x.columns) write<T>(x, s, row, column, acc[i][j][e], size, keep, c, key);
      }
    }
  }
}

}  // namespace

void fira_project(const FiraMatrix* matrices, int count, const FiraShared& s, Stream stream) {
  const std::int64_t tile = s.mma ? mma::kTileM : kTile;
  const FiraGroup group = make_group(matrices, count, [&](const FiraMatrix& x) {
    return ceil_div(vectors_of(x), tile) * ceil_div(x.rank, tile);
  });
  if (grid(group) == 0) return;
  if (!s.mma) {
    visit_dtype(s.dtype, [&](auto t) {
      LAUNCH((project_simt<typename decltype(t)::type>), grid(group), kFiraThreads, 0, stream, group, s);
    });
  } else if (s.dtype == Dtype::bfloat16) {
    LAUNCH((project_mma<BF16>), grid(group), mma::kThreads, mma::kSharedBytes, stream, group, s);
  } else {
    LAUNCH((project_mma<F16>), grid(group), mma::kThreads, mma::kSharedBytes, stream, group, s);
  }
}

void fira_apply(const FiraMatrix* matrices, int count, const FiraShared& s, Stream stream) {
  const std::int64_t tile = s.mma ? mma::kTileM : kTile;
  const FiraGroup group = make_group(
      matrices, count, [&](const FiraMatrix& x) { return ceil_div(x.rows, tile) * ceil_div(x.columns, tile); });
  if (grid(group) == 0) return;
  if (!s.mma) {
    visit_dtype(s.dtype, [&](auto t) {
      LAUNCH((apply_simt<typename decltype(t)::type>), grid(group), kFiraThreads, 0, stream, group, s);
    });
  } else if (s.dtype == Dtype::bfloat16) {
    LAUNCH((apply_mma<__nv_bfloat16, BF16>), grid(group), mma::kThreads, mma::kSharedBytes, stream, group, s);
  } else {
    LAUNCH((apply_mma<__half, F16>), grid(group), mma::kThreads, mma::kSharedBytes, stream, group, s);
  }
}

}  // namespace cuda
}  // namespace pyelastic
