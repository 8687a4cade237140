// The tiles that maxsim's CUDA kernels share: elements of tokens, and the two engines that multiply a tile of query
// tokens with a tile of document tokens. Contract: ../maxsim.h.
//
// A tile is kept in shared memory as rows of 128 bytes (a chunk of the dimension) in 144: eight rows, which an ldmatrix
// or eight lanes read together, then fall on different banks.
#pragma once

#include "../common/device.cuh"
#include "../common/ptx.cuh"
#include "../maxsim.h"

namespace pyelastic {
namespace cuda {

constexpr int kTileN = 64;       // document tokens
constexpr int kChunkBytes = 128;
constexpr int kRowBytes = kChunkBytes + 16;
constexpr int kPieces = kChunkBytes / 16;
constexpr double kZeroNorm = 1e-12;  // F.normalize's eps

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

// Is v above m: greater, or the first NaN.
__device__ __forceinline__ bool above(float v, float m) { return v > m || (v != v && m == m); }

__device__ __forceinline__ bool counts(const MaxSimProblem& p, std::int64_t token) {
  return p.d_mask == nullptr || p.d_mask[token] != 0;
}

// Where the per-token arrays of query i and document j (pair `pair` of a list) begin.
__device__ __forceinline__ std::int64_t token_array(const MaxSimProblem& p, std::int64_t i, std::int64_t j,
                                                    std::int64_t pair) {
  return p.pair_q == nullptr ? j * p.q.total + p.q.offsets[i] : pair * p.max_q;
}

// Elements of a plane of them.
__device__ __forceinline__ std::int64_t plane_size(const MaxSimProblem& p) {
  return p.pair_q == nullptr ? p.d.count * p.q.total : p.pairs * p.max_q;
}

// Element k of token t, whatever it is stored as; without the scale of int8 values.
__device__ __forceinline__ float element(const Tokens& x, std::int64_t t, std::int64_t k) {
  const std::int64_t at = t * x.stride + k;
  switch (x.codec.bits) {
    case 0:
      if (x.dtype == Dtype::float32) return static_cast<const float*>(x.data)[at];
      if (x.dtype == Dtype::float16) return to_float(static_cast<const __half*>(x.data)[at]);
      return to_float(static_cast<const __nv_bfloat16*>(x.data)[at]);
    case 8:
      return static_cast<float>(static_cast<const std::int8_t*>(x.data)[at]);
  }
  const int bits = x.codec.bits, each = 8 / bits;
  const int byte = static_cast<const std::uint8_t*>(x.data)[t * x.stride + k / each];
  const int bucket = byte >> (static_cast<int>(k % each) * bits) & ((1 << bits) - 1);
  return x.codec.centroids[x.codec.codes[t] * x.codec.dim + k] + x.codec.buckets[bucket];
}

// Exact: float32 products and sums. A warp owns 16 query tokens; a thread has 4 of them and 8 document tokens.
struct Simt {
  using Element = float;
  static constexpr int kWarpRows = 16, kRows = 4, kColumns = 8;
  static constexpr int kShare = 8;  // neighbouring lanes that share rows
  static constexpr int kSmallWarps = 2, kLargeWarps = 4, kLargeBlocks = 3;  // blocks an SM
  static constexpr int kChunk = kChunkBytes / 4;
  using Sums = float[kRows][kColumns];

  static __device__ int row(int r) { return r * 4 + static_cast<int>(threadIdx.x) % 32 / 8; }
  static __device__ int column(int c) { return c * 8 + static_cast<int>(threadIdx.x) % 8; }
  static __device__ float& at(Sums& s, int r, int c) { return s[r][c]; }
  static __device__ void clear(Sums& s) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) s[r][c] = 0;
    }
  }
  // Of elements k .. k + 3, where begin < k + 4 and k < end: zeros outside of begin .. end - 1.
  static __device__ __forceinline__ void inside(float4& x, int k, int begin, int end) {
    x.x = k >= begin ? x.x : 0.0f;
    x.y = k + 1 >= begin && k + 1 < end ? x.y : 0.0f;
    x.z = k + 2 >= begin && k + 2 < end ? x.z : 0.0f;
    x.w = k + 3 < end ? x.w : 0.0f;
  }
  // q: this warp's first row of a chunk; d: the tile's; begin, end: the elements of the chunk. kEdges: they may be no
  // multiples of 4; else begin is one, and elements from `end` on are zero.
  template <bool kEdges = false>
  static __device__ void multiply(const unsigned char* q, const unsigned char* d, int begin, int end, Sums& s) {
#pragma unroll 1  // two steps at once need more registers than three blocks leave
    for (int k = kEdges ? begin / 4 * 4 : begin; k < end; k += 4) {
      float4 a[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        a[r] = *reinterpret_cast<const float4*>(q + row(r) * kRowBytes + k * 4);
        if constexpr (kEdges) inside(a[r], k, begin, end);
      }
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        float4 b = *reinterpret_cast<const float4*>(d + column(c) * kRowBytes + k * 4);
        if constexpr (kEdges) inside(b, k, begin, end);  // both sides, as 0 times infinity is NaN
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          s[r][c] += a[r].x * b.x;
          s[r][c] += a[r].y * b.y;
          s[r][c] += a[r].z * b.z;
          s[r][c] += a[r].w * b.w;
        }
      }
    }
  }
};

// Tensor cores: 16-bit operands, float32 sums. A warp owns 32 query tokens; a thread has 4 of them and 16 document tokens.
// 6 ldmatrix feed 16 mma.
template <class Type>
struct Mma {
  using Element = std::uint16_t;
  static constexpr int kWarpRows = 32, kRows = 4, kColumns = 16;
  static constexpr int kShare = 4;
  static constexpr int kSmallWarps = 1, kLargeWarps = 4, kLargeBlocks = 3;
  static constexpr int kChunk = kChunkBytes / 2;
  using Sums = float[2][8][4];

  static __device__ int row(int r) { return r / 2 * 16 + r % 2 * 8 + static_cast<int>(threadIdx.x) % 32 / 4; }
  static __device__ int column(int c) { return c / 2 * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + c % 2; }
  static __device__ float& at(Sums& s, int r, int c) { return s[r / 2][c / 2][r % 2 * 2 + c % 2]; }
  static __device__ void clear(Sums& s) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[i][j][e] = 0;
      }
    }
  }
  // As above; multiples of 16, where elements from `end` on are not zero.
  template <bool kEdges = false>
  static __device__ void multiply(const unsigned char* q, const unsigned char* d, int begin, int end, Sums& s) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const unsigned char* a_row = q + lane % 16 * kRowBytes + lane / 16 * 16;
    const unsigned char* b_row = d + (lane % 8 + lane / 16 * 8) * kRowBytes + lane / 8 % 2 * 16;
#pragma unroll 1  // as above
    for (int k = begin; k < end; k += 16) {
      std::uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) ldmatrix_x4(a[i], a_row + i * 16 * kRowBytes + k * 2);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        std::uint32_t b[4];
        ldmatrix_x4(b, b_row + j * 16 * kRowBytes + k * 2);
        const std::uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          mma_m16n8k16(s[i][2 * j], a[i], low, Type{});
          mma_m16n8k16(s[i][2 * j + 1], a[i], high, Type{});
        }
      }
    }
  }
};

// Brings elements k0 .. of `rows` tokens from `first` on to a tile of kTile rows; zeros where there are none. aligned:
// by cp.async, else converted on the way, which needs float tiles.
template <class Element, int kTile, int kThreads>
__device__ __forceinline__ void load_rows(const Tokens& x, std::int64_t first, int rows, int k0, int dim,
                                          bool aligned, unsigned char* to) {
  constexpr int kEach = 16 / static_cast<int>(sizeof(Element));
  if (aligned) {
    constexpr int kRowsAtOnce = kThreads / kPieces;
    static_assert(kThreads % kPieces == 0 && kTile % kRowsAtOnce == 0, "every thread keeps to its part of a row");
    const int part = static_cast<int>(threadIdx.x) % kPieces, row0 = static_cast<int>(threadIdx.x) / kPieces;
    const int k = k0 + part * kEach, most = k < dim ? rows : 0;
    const auto* const data = static_cast<const Element*>(x.data);
    const Element* from = data + (first + row0) * x.stride + k;
    unsigned char* at = to + row0 * kRowBytes + part * 16;
#pragma unroll 1  // few registers: addresses of all steps would not leave the loops around this one
    for (int row = row0; row < kTile; row += kRowsAtOnce) {
      cp_async_16(at, row < most ? from : data, row < most);
      from += kRowsAtOnce * x.stride;
      at += kRowsAtOnce * kRowBytes;
    }
    return;
  }
  if constexpr (sizeof(Element) == 4) {
    constexpr int kChunk = kChunkBytes / 4;
    for (int n = static_cast<int>(threadIdx.x); n < kTile * kChunk; n += kThreads) {
      const int row = n / kChunk, part = n % kChunk;
      const bool inside = row < rows && k0 + part < dim;
      *reinterpret_cast<float*>(to + row * kRowBytes + part * 4) =
          inside ? element(x, first + row, k0 + part) : 0.0f;
    }
  }
}

}  // namespace cuda
}  // namespace pyelastic
