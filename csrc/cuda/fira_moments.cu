// fira on CUDA: what lies between the two products. Contract and formulas: ../fira.h.
#include "fira_group.cuh"

namespace pyelastic {
namespace cuda {
namespace {

// --- moments ---

constexpr int kVectors = 32, kWarps = kFiraThreads / 32;

__device__ __forceinline__ float normalize(float m, float v, float eps, float correction) {
  return correction * (m / (sqrtf(v) + eps));
}

// 8-bit moments: coding as in csrc/cpu/fira.cpp; what is not finite has a scale that says so.
struct Codes {};
__device__ __forceinline__ float decode(std::int8_t code, float scale) {
  const float y = static_cast<float>(code) / 127.0f;
  return y * fabsf(y) * scale;
}
__device__ __forceinline__ float decode(std::uint8_t code, float scale) {
  const float y = static_cast<float>(code) / 255.0f;
  return y * y * (y * y) * scale;
}
__device__ __forceinline__ std::int8_t encode_m(float x, float scale) {
  const float y = 127.0f * sqrtf(fabsf(x) / (scale > 0 ? scale : 1.0f));
  return y == y ? static_cast<std::int8_t>(rintf(copysignf(fminf(y, 127.0f), x))) : std::int8_t{0};
}
__device__ __forceinline__ std::uint8_t encode_v(float x, float scale) {
  const float y = rintf(255.0f * sqrtf(sqrtf(x / (scale > 0 ? scale : 1.0f))));
  return y == y ? static_cast<std::uint8_t>(x > 0 && y < 1 ? 1.0f : fminf(y, 255.0f)) : std::uint8_t{0};
}
__host__ __device__ inline std::int64_t blocks_of(const FiraMatrix& x) { return (x.rank + kFiraBlock - 1) / kFiraBlock; }

// N of coordinate `at`, of this vector, from moments as stored.
template <class M>
struct Normalized {
  static __device__ __forceinline__ float of(const FiraMatrix& x, std::int64_t at, std::int64_t, float eps, float correction) {
    return normalize(to_float(static_cast<const M*>(x.m)[at]), to_float(static_cast<const M*>(x.v)[at]), eps, correction);
  }
};
template <>
struct Normalized<Codes> {
  static __device__ __forceinline__ float of(const FiraMatrix& x, std::int64_t at, std::int64_t vector, float eps,
                                             float correction) {
    const std::int64_t k = x.left ? at / x.columns : at - vector * x.rank;
    const std::int64_t scale = vector * blocks_of(x) + k / kFiraBlock;
    return normalize(decode(static_cast<const std::int8_t*>(x.m)[at], x.m_scale[scale]),
                     decode(static_cast<const std::uint8_t*>(x.v)[at], x.v_scale[scale]), eps, correction);
  }
};

// How a moment moves, in place.
__device__ __forceinline__ void move(const FiraShared& s, float r, float& m, float& v) {
  m = static_cast<float>(s.beta1) * m + static_cast<float>(1.0 - s.beta1) * r;
  v = static_cast<float>(s.beta2) * v + static_cast<float>(1.0 - s.beta2) * (r * r);
}

template <class M>
__device__ __forceinline__ float update(const FiraMatrix& x, std::int64_t at, float r, const FiraShared& s,
                                        float correction) {
  M *m = static_cast<M*>(x.m) + at, *v = static_cast<M*>(x.v) + at;
  float new_m = to_float(*m), new_v = to_float(*v);
  move(s, r, new_m, new_v);
  *m = from_float<M>(new_m);
  *v = from_float<M>(new_v);
  return normalize(to_float(*m), to_float(*v), s.eps, correction);
}

// |R|^2, |N|^2 and R^T M R of a vector, or a lane's share of them.
struct Squares {
  float r2 = 0, n2 = 0, g2 = 0;
  __device__ __forceinline__ void add(const FiraMatrix& x, const FiraShared& s, std::int64_t base, std::int64_t along,
                                      std::int64_t k, float c, float r, float n) {
    r2 += r * r;
    n2 += n * n;
    if (x.gram == nullptr || s.a_r == 0) return;
    float row = 0;
    for (std::int64_t l = 0; l < x.rank; ++l) row += x.gram[l * x.rank + k] * (c * x.r[base + l * along]);
    g2 += r * row;
  }
};

// On the right, from the lanes of a warp.
__device__ __forceinline__ void store_right(const FiraMatrix& x, std::int64_t vector, Squares q) {
  const std::int64_t vectors = vectors_of(x);
  q = {warp_sum(q.r2), warp_sum(q.n2), warp_sum(q.g2)};
  if (threadIdx.x % 32 != 0 || vector >= vectors) return;
  x.stats[vectors + vector] = q.r2;
  x.stats[2 * vectors + vector] = q.n2;
  x.stats[3 * vectors + vector] = x.gram != nullptr ? q.g2 : q.r2;
}

// On the left, from the warps of a block, whose lanes are the vectors.
__device__ __forceinline__ void store_left(const FiraMatrix& x, std::int64_t first, const Squares& q, float* sums) {
  const std::int64_t vectors = vectors_of(x);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  sums[warp * kVectors + lane] = q.r2;
  sums[(kWarps + warp) * kVectors + lane] = q.n2;
  sums[(2 * kWarps + warp) * kVectors + lane] = q.g2;
  __syncthreads();
  if (threadIdx.x >= 3 * kVectors || first + lane >= vectors) return;
  float total = 0;
  for (int w = 0; w < kWarps; ++w) total += sums[(warp * kWarps + w) * kVectors + lane];
  if (warp < 2 || x.gram != nullptr) x.stats[(1 + warp) * vectors + first + lane] = total;
  if (warp == 0 && x.gram == nullptr) x.stats[3 * vectors + first + lane] = total;
}

__device__ __forceinline__ float correction_of_n(const FiraMatrix& x, const FiraShared& s) {
  return (s.flags & kPaper) != 0 ? static_cast<float>(correction_of(s, *x.step + 1.0f)) : 1.0f;
}

// --- limiter ---

__device__ __forceinline__ double phi_of(double n2, double r2) { return sqrt(n2) / (sqrt(r2) + kFiraNormEps); }

// f and the limiter's norm of one matrix, from stats and, in `exact`, from what `residual` put in their first row.
// Loops are not unrolled: they are a small share of the work, and would take moments from 48 registers to 80.
__device__ __forceinline__ void limit(const FiraMatrix& x, const FiraShared& s, double before, bool exact, double* shared) {
  const std::int64_t vectors = vectors_of(x);
  const float *x2 = x.stats, *r2 = x2 + vectors, *n2 = r2 + vectors, *g2 = n2 + vectors;
  const bool per_matrix = (s.flags & kPerMatrix) != 0, collapse = (s.flags & kCollapse) != 0;
  double one = 0;
  if (per_matrix) {
    double all_r = 0, all_n = 0;
#pragma unroll 1
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
#pragma unroll 1
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
#pragma unroll 1
  for (std::int64_t j = threadIdx.x; j < vectors; j += kFiraThreads) {
    x.f[j] = static_cast<float>(scale * (per_matrix ? one : phi_of(n2[j], r2[j])));
  }
}

// The scalars of a matrix's step, and the limiter; by one block, when all of the matrix's sums are there.
__device__ __forceinline__ void finish(const FiraMatrix& x, const FiraShared& s, double* shared) {
  const float taken = *x.step + 1.0f, before = *x.limiter_norm;
  __syncthreads();  // all have read before one thread writes
  const double correction = correction_of(s, taken), rate = *s.lr;
  if (threadIdx.x == 0) {
    x.scalars[0] = static_cast<float>((s.flags & kPaper) != 0 ? rate : rate * correction);
    x.scalars[1] = static_cast<float>(1.0 - rate * s.weight_decay);
    x.scalars[2] = 0;
    x.scalars[3] = taken;
    x.scalars[4] = before;
  }
  if (s.a_s == 0) {
#pragma unroll 1
    for (std::int64_t j = threadIdx.x; j < vectors_of(x); j += kFiraThreads) x.f[j] = 0;
    return;
  }
  limit(x, s, before, false, shared);
}

// --- moments, and the limiter after them ---

// 32 vectors a block. On the right a warp takes four of them in turn, its lanes the coordinates; on the left the lanes are
// the vectors, which lie beside each other, and the warps take every eighth coordinate.
template <class M>
__global__ void __launch_bounds__(kFiraThreads) moments(FiraGroup group, FiraShared s) {
  SHARED(float, sums, 3 * kWarps * kVectors);
  SHARED(double, shared, kWarps);
  if (skipped(s)) return;
  const int i_matrix = matrix_of_block(group);
  const FiraMatrix& x = group.matrix[i_matrix];
  const std::int64_t first = (blockIdx.x - group.first[i_matrix]) * kVectors, vectors = vectors_of(x);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float c = factor_of(s), correction = correction_of_n(x, s);
  const std::int64_t along = x.left ? vectors : 1;  // from one coordinate of a vector to the next
  for (int q = 0; q < (x.left ? 1 : kVectors / kWarps); ++q) {
    const std::int64_t vector = first + (x.left ? lane : warp * (kVectors / kWarps) + q);
    Squares squares;
    if (vector < vectors) {
      const std::int64_t base = x.left ? vector : vector * x.rank;
      for (std::int64_t k = x.left ? warp : lane; k < x.rank; k += x.left ? kWarps : 32) {
        const std::int64_t at = base + k * along;
        const float r = c * x.r[at];
        squares.add(x, s, base, along, k, c, r, update<M>(x, at, r, s, correction));
      }
    }
    if (x.left) {
      store_left(x, first, squares, sums);
    } else {
      store_right(x, vector, squares);
    }
  }
  if (is_last_block(ticket_of(x), blocks_for(group, i_matrix))) finish(x, s, shared);
}

// The largest of a block of 128 coordinates: on the right over a warp, on the left over the warps.
template <bool kLeft>
__device__ __forceinline__ float largest(float top, float* tops) {
  if (!kLeft) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) top = max_or_nan(top, __shfl_xor_sync(kAllLanes, top, offset));
    return top;
  }
  tops[threadIdx.x] = top;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) top = max_or_nan(top, tops[w * kVectors + threadIdx.x % 32]);
  __syncthreads();  // tops may be used again at once
  return top;
}

// The same with 8-bit moments of one vector a thread or a warp. A block of 128 coordinates is held in registers between
// its largest value and its codes: 4 of its numbers a lane on the right, 16 a thread on the left.
template <bool kLeft>
__device__ __forceinline__ Squares update_codes(const FiraMatrix& x, const FiraShared& s, std::int64_t vector, float c,
                                                float correction, float* tops) {
  constexpr int kStep = kLeft ? kWarps : 32, kCount = kFiraBlock / kStep;
  const int start = kLeft ? threadIdx.x / 32 : threadIdx.x % 32;
  const std::int64_t vectors = vectors_of(x), blocks = blocks_of(x), along = kLeft ? vectors : 1;
  const std::int64_t base = kLeft ? vector : vector * x.rank;
  const bool inside = vector < vectors;
  std::int8_t* m_codes = static_cast<std::int8_t*>(x.m);
  std::uint8_t* v_codes = static_cast<std::uint8_t*>(x.v);
  Squares squares;
  for (std::int64_t block = 0; block < blocks; ++block) {
    const std::int64_t k0 = block * kFiraBlock + start, scale = vector * blocks + block;
    const float m_old = inside ? x.m_scale[scale] : 0.0f, v_old = inside ? x.v_scale[scale] : 0.0f;
    float m[kCount], v[kCount], m_top = 0, v_top = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const std::int64_t k = k0 + i * kStep, at = base + k * along;
      m[i] = v[i] = 0;
      if (!inside || k >= x.rank) continue;
      m[i] = decode(m_codes[at], m_old);
      v[i] = decode(v_codes[at], v_old);
      move(s, c * x.r[at], m[i], v[i]);
      m_top = max_or_nan(m_top, fabsf(m[i]));
      v_top = max_or_nan(v_top, v[i]);
    }
    m_top = largest<kLeft>(m_top, tops);
    v_top = largest<kLeft>(v_top, tops);
    if (inside && start == 0) {  // all have read the old ones: on the right within the warp's shuffles
      x.m_scale[scale] = m_top;
      x.v_scale[scale] = v_top;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const std::int64_t k = k0 + i * kStep, at = base + k * along;
      if (!inside || k >= x.rank) continue;
      m_codes[at] = encode_m(m[i], m_top);
      v_codes[at] = encode_v(v[i], v_top);
      const float n = normalize(decode(m_codes[at], m_top), decode(v_codes[at], v_top), s.eps, correction);
      squares.add(x, s, base, along, k, c, c * x.r[at], n);
    }
  }
  return squares;
}

__global__ void __launch_bounds__(kFiraThreads) moments_8bit(FiraGroup group, FiraShared s) {
  SHARED(float, sums, 3 * kWarps * kVectors);
  SHARED(float, tops, kWarps * kVectors);
  SHARED(double, shared, kWarps);
  if (skipped(s)) return;
  const int i_matrix = matrix_of_block(group);
  const FiraMatrix& x = group.matrix[i_matrix];
  const std::int64_t first = (blockIdx.x - group.first[i_matrix]) * kVectors;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float c = factor_of(s), correction = correction_of_n(x, s);
  if (x.left) {
    store_left(x, first, update_codes<true>(x, s, first + lane, c, correction, tops), sums);
  } else {
    for (int q = 0; q < kVectors / kWarps; ++q) {
      const std::int64_t vector = first + warp * (kVectors / kWarps) + q;
      store_right(x, vector, update_codes<false>(x, s, vector, c, correction, tops));
    }
  }
  if (is_last_block(ticket_of(x), blocks_for(group, i_matrix))) finish(x, s, shared);
}

// --- the exact norm: where q cancelled too far, as the limiter found ---

__device__ __forceinline__ bool cancelled(const FiraMatrix& x, const FiraShared& s) {
  return !skipped(s) && x.scalars[2] != 0;
}

// |x - a_r P r|^2 of 64 vectors over |x|^2; then, by the last block of a matrix, the limiter from them. A block walks over
// all of d, so the sum has one order and needs no scratch, and the grid is small where there is nothing to do. R is float32
// and its rounding would be the residual: no matrix units.
template <class T>
__global__ void __launch_bounds__(kFiraThreads) residual(FiraGroup group, FiraShared s) {
  SHARED(float, a_tile, kDepth * kPitch);
  SHARED(float, b_tile, kDepth * kPitch);
  SHARED(double, shared, kWarps);
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
  if (is_last_block(ticket_of(x), blocks_for(group, i_matrix))) limit(x, s, x.scalars[4], true, shared);
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
    const std::int64_t vector = x.left ? at % vectors : at / x.rank;
    const float f = x.f[vector], n = Normalized<M>::of(x, at, vector, s.eps, correction);
    static_cast<C*>(x.c)[at] = from_float<C>(s.a_n * n - s.a_r * f * (c * x.r[at]));
  }
}
}  // namespace

void fira_moments(const FiraMatrix* matrices, int count, const FiraShared& s, Stream stream) {
  const FiraGroup group = make_group(matrices, count, [](const FiraMatrix& x) { return ceil_div(vectors_of(x), kVectors); });
  if (grid(group) == 0) return;
  if (matrices[0].m_scale != nullptr) {
    LAUNCH((moments_8bit), grid(group), kFiraThreads, 0, stream, group, s);
  } else if (s.moment_dtype == Dtype::bfloat16) {
    LAUNCH((moments<__nv_bfloat16>), grid(group), kFiraThreads, 0, stream, group, s);
  } else {
    LAUNCH((moments<float>), grid(group), kFiraThreads, 0, stream, group, s);
  }
}

void fira_residual(const FiraMatrix* matrices, int count, const FiraShared& s, Stream stream) {
  const FiraGroup group = make_group(matrices, count, [](const FiraMatrix& x) { return ceil_div(vectors_of(x), kTile); });
  if (grid(group) == 0) return;
  visit_dtype(s.dtype, [&](auto t) {
    LAUNCH((residual<typename decltype(t)::type>), grid(group), kFiraThreads, 0, stream, group, s);
  });
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
  if (matrices[0].m_scale != nullptr) return launch(As<Codes>{});
  if (s.moment_dtype == Dtype::bfloat16) return launch(As<__nv_bfloat16>{});
  launch(As<float>{});
}

}  // namespace cuda
}  // namespace pyelastic
