// fira on CUDA: five launches for a group of matrices. Contract and formulas: ../fira.h.
//
// project       R = X P, a block a tile, and |x|^2 from the tile of X that is in shared memory anyway
// moments       m, v and |R|^2, |N|^2 (and R^T M R); a block 32 vectors
// limiter       s, lim, f; a block a matrix: the sum over vectors has one order
// coefficients  C = a_n N - a_r f R
// apply         W from C P^T in registers: the tile's epilogue reads W and G and writes W
// Both products run on matrix units (bfloat16, float16; tiles of 128 x 128, mma_gemm.cuh) where sizes and addresses allow
// 16-byte copies, else in float32 on tiles of 64 x 64. Bytes: G twice, W once each way; of the size L r: R written and
// read twice, m and v read twice and written once, C written once and read once a tile of columns, from L2.
#include "../common/mma_gemm.cuh"
#include "fira_group.cuh"

namespace pyelastic {
namespace cuda {
namespace {

template <class T>
__device__ __forceinline__ Strided<T> vectors_operand(const FiraMatrix& x) {
  const T* g = static_cast<const T*>(x.g);
  if (x.left) return {g, x.columns, x.rows, 1, x.g_stride};
  return {g, x.rows, x.columns, x.g_stride, 1};
}

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
  if (x.left) {
    project_tile<true, Type>(x, m0, n0, buffers);
  } else {
    project_tile<false, Type>(x, m0, n0, buffers);
  }
}

// --- moments ---

constexpr int kVectors = 32, kWarps = kFiraThreads / 32;

// N from moments as stored.
template <class M>
__device__ __forceinline__ float normalized(const FiraMatrix& x, std::int64_t at, float eps, float correction) {
  const float m = to_float(static_cast<const M*>(x.m)[at]), v = to_float(static_cast<const M*>(x.v)[at]);
  return correction * (m / (sqrtf(v) + eps));
}

template <class M>
__device__ __forceinline__ float update(const FiraMatrix& x, std::int64_t at, float r, const FiraShared& s,
                                        float correction) {
  M *m = static_cast<M*>(x.m) + at, *v = static_cast<M*>(x.v) + at;
  const float b1 = static_cast<float>(s.beta1), b2 = static_cast<float>(s.beta2);
  const float c1 = static_cast<float>(1.0 - s.beta1), c2 = static_cast<float>(1.0 - s.beta2);
  *m = from_float<M>(b1 * to_float(*m) + c1 * r);
  *v = from_float<M>(b2 * to_float(*v) + c2 * (r * r));
  return normalized<M>(x, at, s.eps, correction);
}

// 32 vectors a block. On the right a warp takes four of them in turn, its lanes the coordinates; on the left the lanes are
// the vectors, which lie beside each other, and the warps take every eighth coordinate.
template <class M>
__global__ void __launch_bounds__(kFiraThreads) moments(FiraGroup group, FiraShared s) {
  SHARED(float, sums, 3 * kWarps * kVectors);
  if (skipped(s)) return;
  const int i_matrix = matrix_of_block(group);
  const FiraMatrix& x = group.matrix[i_matrix];
  const std::int64_t first = (blockIdx.x - group.first[i_matrix]) * kVectors, vectors = vectors_of(x);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float c = factor_of(s);
  const float correction = (s.flags & kPaper) != 0 ? static_cast<float>(correction_of(s, *x.step + 1.0f)) : 1.0f;
  const std::int64_t along = x.left ? vectors : 1;  // from one coordinate of a vector to the next
  for (int q = 0; q < (x.left ? 1 : kVectors / kWarps); ++q) {
    const std::int64_t vector = first + (x.left ? lane : warp * (kVectors / kWarps) + q);
    float r2 = 0, n2 = 0, g2 = 0;
    if (vector < vectors) {
      const std::int64_t base = x.left ? vector : vector * x.rank;
      for (std::int64_t k = x.left ? warp : lane; k < x.rank; k += x.left ? kWarps : 32) {
        const std::int64_t at = base + k * along;
        const float r = c * x.r[at], n = update<M>(x, at, r, s, correction);
        r2 += r * r;
        n2 += n * n;
        if (x.gram != nullptr && s.a_r != 0) {
          float row = 0;
          for (std::int64_t l = 0; l < x.rank; ++l) row += x.gram[l * x.rank + k] * (c * x.r[base + l * along]);
          g2 += r * row;
        }
      }
    }
    if (x.left) {
      sums[warp * kVectors + lane] = r2;
      sums[(kWarps + warp) * kVectors + lane] = n2;
      sums[(2 * kWarps + warp) * kVectors + lane] = g2;
      continue;
    }
    r2 = warp_sum(r2);
    n2 = warp_sum(n2);
    g2 = warp_sum(g2);
    if (lane == 0 && vector < vectors) {
      x.stats[vectors + vector] = r2;
      x.stats[2 * vectors + vector] = n2;
      x.stats[3 * vectors + vector] = x.gram != nullptr ? g2 : r2;
    }
  }
  if (!x.left) return;
  __syncthreads();
  if (threadIdx.x >= 3 * kVectors || first + lane >= vectors) return;
  float total = 0;
  for (int w = 0; w < kWarps; ++w) total += sums[(warp * kWarps + w) * kVectors + lane];
  if (warp < 2 || x.gram != nullptr) x.stats[(1 + warp) * vectors + first + lane] = total;
  if (warp == 0 && x.gram == nullptr) x.stats[3 * vectors + first + lane] = total;
}

// --- limiter ---

__device__ __forceinline__ double phi_of(double n2, double r2) { return sqrt(n2) / (sqrt(r2) + kFiraNormEps); }

__global__ void __launch_bounds__(kFiraThreads) limiter(FiraGroup group, FiraShared s) {
  SHARED(double, shared, kFiraThreads / 32);
  const FiraMatrix& x = group.matrix[blockIdx.x];
  const bool skip = skipped(s);
  const float taken = *x.step + 1.0f;
  __syncthreads();  // all have read the step before one thread writes it
  const double correction = correction_of(s, taken), rate = *s.lr;
  if (threadIdx.x == 0) {
    x.scalars[0] = static_cast<float>((s.flags & kPaper) != 0 ? rate : rate * correction);
    x.scalars[1] = static_cast<float>(1.0 - rate * s.weight_decay);
    x.scalars[2] = skip ? 1.0f : 0.0f;
    x.scalars[3] = taken;
    if (!skip) *x.step = taken;
  }
  if (skip) return;
  const std::int64_t vectors = vectors_of(x);
  const float *x2 = x.stats, *r2 = x2 + vectors, *n2 = r2 + vectors, *g2 = n2 + vectors;
  if (s.a_s == 0) {
    for (std::int64_t j = threadIdx.x; j < vectors; j += kFiraThreads) x.f[j] = 0;
    return;
  }
  const bool per_matrix = (s.flags & kPerMatrix) != 0, collapse = (s.flags & kCollapse) != 0;
  double one = 0;
  if (per_matrix) {
    double all_r = 0, all_n = 0;
    for (std::int64_t j = threadIdx.x; j < vectors; j += kFiraThreads) {
      all_r += r2[j];
      all_n += n2[j];
    }
    all_r = block_sum<kFiraThreads>(all_r, shared);
    all_n = block_sum<kFiraThreads>(all_n, shared);
    one = phi_of(all_n, all_r);
  }
  const double c = factor_of(s), a_r = s.a_r;
  double sum = 0;
  for (std::int64_t j = threadIdx.x; j < vectors; j += kFiraThreads) {
    const double phi = per_matrix ? one : phi_of(n2[j], r2[j]);
    double q = c * c * x2[j] - 2.0 * a_r * r2[j] + a_r * a_r * g2[j];
    if (q < 0) q = 0;  // NaN is not below
    sum += phi * phi * q;
  }
  const double norm = sqrt(block_sum<kFiraThreads>(sum, shared));
  const double before = *x.limiter_norm;
  const bool first = before != before || (!collapse && before == 0);
  double lim = 1;
  if (s.gamma > 0 && !first) {
    const double growth = norm / (before + kFiraNormEps), gamma = static_cast<double>(s.gamma);
    lim = (growth < gamma ? gamma : growth) / gamma;
  }
  __syncthreads();
  if (threadIdx.x == 0 && (collapse || norm != 0)) *x.limiter_norm = static_cast<float>(norm / lim);
  const double scale = s.a_s / lim;
  for (std::int64_t j = threadIdx.x; j < vectors; j += kFiraThreads) {
    x.f[j] = static_cast<float>(scale * (per_matrix ? one : phi_of(n2[j], r2[j])));
  }
}

// --- coefficients ---

constexpr std::int64_t kElements = 4 * kFiraThreads;  // of a block

template <class M, class C>
__global__ void __launch_bounds__(kFiraThreads) coefficients(FiraGroup group, FiraShared s) {
  const int i_matrix = matrix_of_block(group);
  const FiraMatrix& x = group.matrix[i_matrix];
  if (skipped(s)) return;
  const std::int64_t vectors = vectors_of(x), count = vectors * x.rank;
  const float c = factor_of(s), taken = x.scalars[3];
  const float correction = (s.flags & kPaper) != 0 ? static_cast<float>(correction_of(s, taken)) : 1.0f;
  const std::int64_t begin = (blockIdx.x - group.first[i_matrix]) * kElements + threadIdx.x;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const std::int64_t at = begin + e * kFiraThreads;
    if (at >= count) return;
    const float f = x.f[x.left ? at % vectors : at / x.rank];
    const float n = normalized<M>(x, at, s.eps, correction);
    static_cast<C*>(x.c)[at] = from_float<C>(s.a_n * n - s.a_r * f * (c * x.r[at]));
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

unsigned grid(const FiraGroup& group) { return static_cast<unsigned>(group.first[group.count]); }

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

void fira_moments(const FiraMatrix* matrices, int count, const FiraShared& s, Stream stream) {
  const FiraGroup group = make_group(matrices, count, [](const FiraMatrix& x) { return ceil_div(vectors_of(x), kVectors); });
  if (grid(group) == 0) return;
  if (s.moment_dtype == Dtype::bfloat16) {
    LAUNCH((moments<__nv_bfloat16>), grid(group), kFiraThreads, 0, stream, group, s);
  } else {
    LAUNCH((moments<float>), grid(group), kFiraThreads, 0, stream, group, s);
  }
}

void fira_limiter(const FiraMatrix* matrices, int count, const FiraShared& s, Stream stream) {
  const FiraGroup group = make_group(matrices, count, [](const FiraMatrix&) { return std::int64_t{1}; });
  if (grid(group) == 0) return;
  LAUNCH((limiter), grid(group), kFiraThreads, 0, stream, group, s);
}

void fira_coefficients(const FiraMatrix* matrices, int count, const FiraShared& s, Stream stream) {
  const FiraGroup group =
      make_group(matrices, count, [](const FiraMatrix& x) { return ceil_div(vectors_of(x) * x.rank, kElements); });
  if (grid(group) == 0) return;
  const auto launch = [&](auto m) {
    using M = typename decltype(m)::type;
    if (!s.mma) {
      LAUNCH((coefficients<M, float>), grid(group), kFiraThreads, 0, stream, group, s);
    } else if (s.dtype == Dtype::bfloat16) {
      LAUNCH((coefficients<M, __nv_bfloat16>), grid(group), kFiraThreads, 0, stream, group, s);
    } else {
      LAUNCH((coefficients<M, __half>), grid(group), kFiraThreads, 0, stream, group, s);
    }
  };
  if (s.moment_dtype == Dtype::bfloat16) return launch(As<__nv_bfloat16>{});
  launch(As<float>{});
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
