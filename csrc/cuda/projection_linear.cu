// projection on CUDA in one kernel: y = normalize(x W^T + b + r, or + r R^T) on tensor cores, 16-bit operands and float32
// sums; z is never written. Contract and formulas: ../projection.h.
//
// Blocking: a block has 64 rows and all of their kWidth >= d_out columns; a warp has 16 rows and kWidth / kSplit columns
// in registers, so a row's norm is a sum over a thread's columns, four lanes and kSplit warps. x and W flow through
// kStages buffers of 64 columns, filled by cp.async; a row of a buffer has 144 bytes, so that the eight rows of an
// ldmatrix are on different banks. The projected skip is a second loop with r and R into the same sums.
// Bytes: x, r and y once; W once a block, from L2. 2 d_in d_out operations a row; 1 + kTiles / 2 ldmatrix for kTiles mma.
#include "../common/device.cuh"
#include "../common/ptx.cuh"
#include "../projection.h"

namespace pyelastic {
namespace cuda {
namespace {

constexpr int kTileM = 64, kRowWarps = kTileM / 16;
constexpr int kColumns = 64;                // of a buffer: 128 bytes
constexpr int kRowBytes = 2 * kColumns + 16;
constexpr int kPieces = kColumns / 8;       // of 16 bytes
constexpr double kZeroNorm = 1e-12;         // F.normalize's eps

template <class Type>
struct HalfOf;
template <>
struct HalfOf<F16> {
  using type = __half;
};
template <>
struct HalfOf<BF16> {
  using type = __nv_bfloat16;
};

// Columns k0 .. k0 + 63 of kTile rows from `first` on, zeros beyond `rows` and `depth`.
template <int kTile, int kThreads>
__device__ __forceinline__ void load_tile(const MatrixView& x, std::int64_t first, std::int64_t rows, std::int64_t k0,
                                          std::int64_t depth, unsigned char* to) {
  constexpr int kAtOnce = kThreads / kPieces;
  static_assert(kTile % kAtOnce == 0, "every thread keeps to its part of a row");
  const auto* const data = static_cast<const std::uint16_t*>(x.data);
  const int part = static_cast<int>(threadIdx.x) % kPieces;
  const std::int64_t k = k0 + part * 8;
#pragma unroll 1  // few registers: addresses of all steps would not leave the sums room
  for (int row = static_cast<int>(threadIdx.x) / kPieces; row < kTile; row += kAtOnce) {
    const bool inside = first + row < rows && k < depth;
    cp_async_16(to + row * kRowBytes + part * 16, inside ? data + (first + row) * x.stride + k : data, inside);
  }
}

template <class Type, int kWidth, int kSplit, int kStages>
__global__ void __launch_bounds__(kRowWarps * 32 * kSplit, 2 / kSplit)  // else ptxas stops at 128 registers and spills
    projection_linear_mma(ProjectionLinear p) {
  constexpr int kThreads = kRowWarps * 32 * kSplit, kTiles = kWidth / kSplit / 8;
  constexpr int kStageBytes = (kTileM + kWidth) * kRowBytes;
  DYN_SHARED(unsigned char, shared);
  SHARED(double, squares, kSplit * kTileM);
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kTileM;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warp_row = warp % kRowWarps * 16, warp_column = warp / kRowWarps * (kWidth / kSplit);
  float sums[kTiles][4];
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[j][e] = 0;
  }

  const int steps_x = static_cast<int>((p.depth + kColumns - 1) / kColumns);
  const int steps = steps_x + static_cast<int>((p.residual_depth + kColumns - 1) / kColumns);
  const auto load = [&](int step) {
    unsigned char* const to = shared + step % kStages * kStageBytes;
    const bool of_x = step < steps_x;
    const std::int64_t k0 = static_cast<std::int64_t>(of_x ? step : step - steps_x) * kColumns;
    const std::int64_t depth = of_x ? p.depth : p.residual_depth;
    load_tile<kTileM, kThreads>(of_x ? p.x : p.residual, first, p.rows, k0, depth, to);
    load_tile<kWidth, kThreads>(of_x ? p.weight : p.residual_weight, 0, p.dim, k0, depth, to + kTileM * kRowBytes);
  };
  for (int n = 0; n < kStages - 1; ++n) {
    if (n < steps) load(n);
    cp_async_commit();  // one group a step, empty ones included: the count below is constant
  }
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // the step is there for all, and nobody still reads the buffer to be filled next
    if (step + kStages - 1 < steps) load(step + kStages - 1);
    cp_async_commit();
    const unsigned char* const a_rows =
        shared + step % kStages * kStageBytes + (warp_row + lane % 16) * kRowBytes + lane / 16 * 16;
    const unsigned char* const b_rows = shared + step % kStages * kStageBytes +
                                        (kTileM + warp_column + lane % 8 + lane / 16 * 8) * kRowBytes + lane / 8 % 2 * 16;
#pragma unroll 1
    for (int k = 0; k < kColumns; k += 16) {
      std::uint32_t a[4];
      ldmatrix_x4(a, a_rows + k * 2);
#pragma unroll
      for (int j = 0; j < kTiles / 2; ++j) {
        std::uint32_t b[4];
        ldmatrix_x4(b, b_rows + j * 16 * kRowBytes + k * 2);
        const std::uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
        mma_m16n8k16(sums[2 * j], a, low, Type{});
        mma_m16n8k16(sums[2 * j + 1], a, high, Type{});
      }
    }
  }
  cp_async_wait<0>();

  using Element = typename HalfOf<Type>::type;
  const auto* const residual = static_cast<const Element*>(p.residual_weight.data == nullptr ? p.residual.data : nullptr);
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // rows g and g + 8 of a warp
    const int row = warp_row + half * 8 + lane / 4;
    const Element* const added =
        residual != nullptr && first + row < p.rows ? residual + (first + row) * p.residual.stride : nullptr;
    double square = 0;  // in double, as the squares of a row of norm 1e19 overflow float
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = warp_column + j * 8 + lane % 4 * 2 + e;
        float& z = sums[j][half * 2 + e];
        if (column >= p.dim) continue;
        if (p.bias != nullptr) z += p.bias[column];
        if (added != nullptr) z += to_float(added[column]);
        square += static_cast<double>(z) * z;
      }
    }
    square += __shfl_xor_sync(kAllLanes, square, 1);
    square += __shfl_xor_sync(kAllLanes, square, 2);
    if (lane % 4 == 0) squares[warp / kRowWarps * kTileM + row] = square;
  }
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp_row + half * 8 + lane / 4;
    if (first + row >= p.rows) continue;
    float times = 1.0f;
    if (p.inverse != nullptr) {
      double square = 0;
#pragma unroll
      for (int n = 0; n < kSplit; ++n) square += squares[n * kTileM + row];
      const double norm = sqrt(square);
      times = static_cast<float>(1.0 / (norm < kZeroNorm ? kZeroNorm : norm));  // NaN stays NaN
      if (warp_column == 0 && lane % 4 == 0) p.inverse[first + row] = times;
    }
    Element* const out = static_cast<Element*>(p.out) + (first + row) * p.out_stride;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = warp_column + j * 8 + lane % 4 * 2 + e;
        if (column < p.dim) out[column] = from_float<Element>(sums[j][half * 2 + e] * times);
      }
    }
  }
}

template <class Type, int kWidth, int kSplit, int kStages>
void launch(const ProjectionLinear& p, Stream stream) {
  const auto blocks = static_cast<unsigned>((p.rows + kTileM - 1) / kTileM);
  LAUNCH((projection_linear_mma<Type, kWidth, kSplit, kStages>), blocks, kRowWarps * 32 * kSplit,
         static_cast<std::size_t>(kStages) * (kTileM + kWidth) * kRowBytes, stream, p);
}

template <class Type>
void linear_on(const ProjectionLinear& p, Stream stream) {
  if (p.dim <= 64) return launch<Type, 64, 1, 3>(p, stream);
  if (p.dim <= 128) return launch<Type, 128, 1, 3>(p, stream);
  launch<Type, 256, 2, 2>(p, stream);
}

}  // namespace

void projection_linear(const ProjectionLinear& p, Stream stream) {
  if (p.rows == 0 || p.dim == 0) return;
  if (p.x.dtype == Dtype::bfloat16) return linear_on<BF16>(p, stream);
  linear_on<F16>(p, stream);
}

}  // namespace cuda
}  // namespace pyelastic
