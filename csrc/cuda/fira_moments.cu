// fira on CUDA: what lies between the two products. Contract and formulas: ../fira.h.
#include "fira_group.cuh"

namespace pyelastic {
namespace cuda {
namespace {

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

// f and the limiter's norm of one matrix, from stats and, in `exact`, from what `residual` put in their first row.
__device__ __forceinline__ void limit(const FiraMatrix& x, const FiraShared& s, double before, bool exact, double* shared) {
  const std::int64_t vectors = vectors_of(x);
  const float *x2 = x.stats, *r2 = x2 + vectors, *n2 = r2 + vectors, *g2 = n2 + vectors;
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
  double sum = 0, whole = 0;
  for (std::int64_t j = threadIdx.x; j < vectors; j += kFiraThreads) {
    const double phi = per_matrix ? one : phi_of(n2[j], r2[j]), square = c * c * x2[j];
    double q = exact ? square : square - 2.0 * a_r * r2[j] + a_r * a_r * g2[j];
    if (q < 0) q = 0;  // NaN is not below
    sum += phi * phi * q;
    whole += phi * phi * square;
  }
  sum = block_sum<kFiraThreads>(sum, shared);
  whole = block_sum<kFiraThreads>(whole, shared);
  const double norm = sqrt(sum);
  const bool first = before != before || (!collapse && before == 0);
  double lim = 1;
  if (s.gamma > 0 && !first) {
    const double growth = norm / (before + kFiraNormEps), gamma = static_cast<double>(s.gamma);
    lim = (growth < gamma ? gamma : growth) / gamma;
  }
  if (threadIdx.x == 0) {
    *x.limiter_norm = static_cast<float>(collapse || norm != 0 ? norm / lim : before);
    const double most = x.gram != nullptr || s.dtype == Dtype::float32 ? kFiraKappa : kFiraKappaRounded;
    if (!exact) x.scalars[2] = a_r != 0 && whole > most * sum ? 1.0f : 0.0f;
  }
  const double scale = s.a_s / lim;
  for (std::int64_t j = threadIdx.x; j < vectors; j += kFiraThreads) {
    x.f[j] = static_cast<float>(scale * (per_matrix ? one : phi_of(n2[j], r2[j])));
  }
}

__global__ void __launch_bounds__(kFiraThreads) limiter(FiraGroup group, FiraShared s) {
  SHARED(double, shared, kFiraThreads / 32);
  const FiraMatrix& x = group.matrix[blockIdx.x];
  const bool skip = skipped(s);
  const float taken = *x.step + 1.0f, before = *x.limiter_norm;
  __syncthreads();  // all have read both before one thread writes them
  const double correction = correction_of(s, taken), rate = *s.lr;
  if (threadIdx.x == 0) {
    x.scalars[0] = static_cast<float>((s.flags & kPaper) != 0 ? rate : rate * correction);
    x.scalars[1] = static_cast<float>(1.0 - rate * s.weight_decay);
    x.scalars[2] = 0;
    x.scalars[3] = taken;
    x.scalars[4] = before;
    if (!skip) *x.step = taken;
  }
  if (skip) return;
  if (s.a_s == 0) {
    for (std::int64_t j = threadIdx.x; j < vectors_of(x); j += kFiraThreads) x.f[j] = 0;
    return;
  }
  limit(x, s, before, false, shared);
}

// --- the exact norm: where q cancelled too far, as the limiter found ---

__device__ __forceinline__ bool cancelled(const FiraMatrix& x, const FiraShared& s) {
  return !skipped(s) && x.scalars[2] != 0;
}

// |x - a_r P r|^2 of 64 vectors over |x|^2. A block walks over all of d, so the sum has one order and needs no scratch, and
// the grid is small where there is nothing to do. R is float32 and its rounding would be the residual: no matrix units.
template <class T>
__global__ void __launch_bounds__(kFiraThreads) residual(FiraGroup group, FiraShared s) {
  SHARED(float, a_tile, kDepth * kPitch);
  SHARED(float, b_tile, kDepth * kPitch);
  const int i_matrix = matrix_of_block(group);
  const FiraMatrix& x = group.matrix[i_matrix];
  if (!cancelled(x, s)) return;
  const std::int64_t m0 = (blockIdx.x - group.first[i_matrix]) * kTile, vectors = vectors_of(x), dim = dim_of(x);
  const T* p = static_cast<const T*>(x.p);
  const Strided<T> g = vectors_operand<T>(x);
  const Strided<float> r = x.left ? Strided<float>{x.r, vectors, x.rank, 1, vectors} : Strided<float>{x.r, vectors, x.rank, x.rank, 1};
  const Strided<T> basis = x.left ? Strided<T>{p, dim, x.rank, x.rank, 1} : Strided<T>{p, dim, x.rank, 1, dim};
  const int t = threadIdx.x;
  float sums[4] = {};
  for (std::int64_t n0 = 0; n0 < dim; n0 += kTile) {
    float acc[4][4];
    multiply_simt(r, basis, m0, n0, a_tile, b_tile, acc, [](const float*) {});
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // beyond the edges both are 0
        const float q = g.at(m0 + t / 16 * 4 + i, n0 + t % 16 + 16 * j) - s.a_r * acc[i][j];
        sums[i] += q * q;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int offset = 8; offset > 0; offset /= 2) sums[i] += __shfl_xor_sync(kAllLanes, sums[i], offset);
    const std::int64_t row = m0 + t / 16 * 4 + i;
    if (t % 16 == 0 && row < vectors) x.stats[row] = sums[i];
  }
}

__global__ void __launch_bounds__(kFiraThreads) limiter_exact(FiraGroup group, FiraShared s) {
  SHARED(double, shared, kFiraThreads / 32);
  const FiraMatrix& x = group.matrix[blockIdx.x];
  if (cancelled(x, s)) limit(x, s, x.scalars[4], true, shared);
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
}  // namespace

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

void fira_residual(const FiraMatrix* matrices, int count, const FiraShared& s, Stream stream) {
  const FiraGroup group = make_group(matrices, count, [](const FiraMatrix& x) { return ceil_div(vectors_of(x), kTile); });
  if (grid(group) == 0) return;
  visit_dtype(s.dtype, [&](auto t) {
    LAUNCH((residual<typename decltype(t)::type>), grid(group), kFiraThreads, 0, stream, group, s);
  });
}

void fira_limiter_exact(const FiraMatrix* matrices, int count, const FiraShared& s, Stream stream) {
  const FiraGroup group = make_group(matrices, count, [](const FiraMatrix&) { return std::int64_t{1}; });
  if (grid(group) == 0) return;
  LAUNCH((limiter_exact), grid(group), kFiraThreads, 0, stream, group, s);
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

}  // namespace cuda
}  // namespace pyelastic
