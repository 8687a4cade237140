// margin_softmax on the CPU: the work between the GEMMs. Contract and formulas: ../margin_softmax.h.
//
// Blocking: a row of a tile is taken in blocks of 64 cosines that stay in L1; per element the forward
// costs one read and one exp2 (about 15 instructions per vector), the backward one read, one
// exp2 and one write. At D = 512 that is a few per cent of the GEMM that made the tile.
// Precision: a lane adds at most kFlush / lanes terms in T before it is added to a double, so the
// rounding of a sum over 1e7 classes does not grow with the number of classes.

#include "../margin_softmax.h"

#include <cmath>

#include "../common/parallel.h"
#include "../common/vec.h"

namespace pyelastic {
namespace PYELASTIC_ISA {
namespace {

constexpr std::int64_t kBlock = 64;           // cosines per block, whole vectors
constexpr std::int64_t kFlush = 8 * kBlock;   // cosines between two additions to a double
constexpr double kLog2e = 1.4426950408889634;
constexpr double kZeroNorm = 1e-12;           // F.normalize's eps: below it a row has no direction
constexpr std::int64_t kGrainElements = 1 << 14;  // least elements worth a range of their own
// Stands in for the target among the negatives: finite, so 0 * kMasked is 0 in the moments, and far
// below any cosine, so its exp2 is exactly 0.
constexpr double kMasked = -1e30;
constexpr double kPi = 3.14159265358979323846;

std::int64_t row_grain(std::int64_t elements_per_row) {
  return elements_per_row >= kGrainElements ? 1 : kGrainElements / (elements_per_row + 1) + 1;
}

template <class T, class From, T (*convert)(From)>
void copy_row(const void* data, std::int64_t offset, std::int64_t stride, std::int64_t dim, T* out) {
  const From* row = static_cast<const From*>(data) + offset;
  if (stride == 1) {
    for (std::int64_t d = 0; d < dim; ++d) out[d] = convert(row[d]);
  } else {
    for (std::int64_t d = 0; d < dim; ++d) out[d] = convert(row[d * stride]);
  }
}

template <class T, class From>
T cast(From x) {
  return static_cast<T>(x);
}
template <class T>
T from_bfloat16(std::uint16_t x) {
  return static_cast<T>(bfloat16_to_float(x));
}
template <class T>
T from_float16(std::uint16_t x) {
  return static_cast<T>(float16_to_float(x));
}

template <class T>
void load_row(const RowsView& x, std::int64_t row, T* out) {
  const std::int64_t at = row * x.row_stride;
  switch (x.dtype) {
    case Dtype::float32:
      return copy_row<T, float, cast<T, float>>(x.data, at, x.col_stride, x.dim, out);
    case Dtype::float64:
      return copy_row<T, double, cast<T, double>>(x.data, at, x.col_stride, x.dim, out);
    case Dtype::bfloat16:
      return copy_row<T, std::uint16_t, from_bfloat16<T>>(x.data, at, x.col_stride, x.dim, out);
    case Dtype::float16:
      return copy_row<T, std::uint16_t, from_float16<T>>(x.data, at, x.col_stride, x.dim, out);
  }
}

template <class T>
void normalize(const RowsView& x, T* out, T* inv_norm, int threads) {
  parallel_for(x.rows, row_grain(x.dim), threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      if (out == nullptr) {
        const T* row = static_cast<const T*>(x.data) + r * x.row_stride;
        const double norm = std::sqrt(dot_in_double(row, row, x.dim));
        inv_norm[r] = norm <= kZeroNorm ? T(0) : static_cast<T>(1.0 / norm);
        continue;
      }
      const std::int64_t row = x.index != nullptr ? x.index[r] : r;
      T* o = out + r * x.dim;
      double norm = 0;
      if (row >= 0) {
        load_row(x, row, o);
        norm = std::sqrt(dot_in_double(o, o, x.dim));
      }
      if (norm <= kZeroNorm) {
        for (std::int64_t d = 0; d < x.dim; ++d) o[d] = 0;
        inv_norm[r] = 0;
        continue;
      }
      const double inverse = 1.0 / norm;  // NaN and Inf rows become NaN rows: they must not vanish
      for (std::int64_t d = 0; d < x.dim; ++d) o[d] = static_cast<T>(o[d] * inverse);
      inv_norm[r] = static_cast<T>(inverse);
    }
  });
}

template <class T>
void target_angle(const T* e_hat, const T* w_hat_y, std::int64_t rows, std::int64_t subcenters,
                  std::int64_t dim, T* theta, std::int64_t* best, int threads) {
  parallel_for(rows, row_grain(dim * subcenters), threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const T* e = e_hat + i * dim;
      const T* candidates = w_hat_y + i * subcenters * dim;
      std::int64_t k = 0;
      double cosine = dot_in_double(e, candidates, dim);
      for (std::int64_t other = 1; other < subcenters; ++other) {
        const double c = dot_in_double(e, candidates + other * dim, dim);
        if (c > cosine) {
          cosine = c;
          k = other;
        }
      }
      const T* w = candidates + k * dim;
      double square = 0;  // |w^ - c e^|^2: atan2 keeps the digits that acos loses near 0 and pi
      for (std::int64_t d = 0; d < dim; ++d) {
        const double t = static_cast<double>(w[d]) - cosine * static_cast<double>(e[d]);
        square += t * t;
      }
      const bool no_direction = square == 0 && cosine == 0;
      theta[i] = static_cast<T>(no_direction ? kPi / 2 : std::atan2(std::sqrt(square), cosine));
      best[i] = k;
    }
  });
}

// A row of a tile with its hard-negative rule.
template <class T>
struct Row {
  const Tile<T>& tile;
  T* data;
  std::int64_t target;  // column of the target class in this tile, or outside [0, classes)
  T threshold, a0, a1, a2;

  Row(const Tile<T>& t, std::int64_t i)
      : tile(t), data(t.cosines + i * t.ld), target(t.labels[i] - t.first) {
    const bool hard = t.threshold != nullptr;
    threshold = hard ? t.threshold[i] : T(0);
    a0 = hard ? t.hard_map[0] : T(0);
    a1 = hard ? t.hard_map[1] : T(0);
    a2 = hard ? t.hard_map[2] : T(0);
  }

  // The cosines of classes [j, j + kBlock) of this tile, kMasked at the target and past the end.
  void load(std::int64_t j, T* c) const {
    constexpr int lanes = VecOf<T>::lanes;
    const std::int64_t left = tile.classes - j;
    const std::int64_t count = left < kBlock ? left : kBlock;
    const T* scale = tile.column_scale;
    if (tile.subcenters > 1) {
      for (std::int64_t l = 0; l < count; ++l) c[l] = cosine((j + l) * tile.subcenters + closest(j + l));
    } else if (count < kBlock) {
      for (std::int64_t l = 0; l < count; ++l) c[l] = cosine(j + l);
    } else {
      for (int l = 0; l < kBlock; l += lanes) {
        const Vec<T> v = load_vec(data + j + l);
        store_vec(c + l, scale == nullptr ? v : v * load_vec(scale + j + l));
      }
    }
    for (std::int64_t l = count; l < kBlock; ++l) c[l] = static_cast<T>(kMasked);
    if (target >= j && target < j + count) c[target - j] = static_cast<T>(kMasked);
  }

  // Stores gradients with respect to the cosines as gradients with respect to the GEMM's output.
  void store(std::int64_t j, const T* g) const {
    constexpr int lanes = VecOf<T>::lanes;
    const T* scale = tile.column_scale;
    for (int l = 0; l < kBlock; l += lanes) {
      const Vec<T> v = load_vec(g + l);
      store_vec(data + j + l, scale == nullptr ? v : v * load_vec(scale + j + l));
    }
  }

  T cosine(std::int64_t column) const {
    return tile.column_scale == nullptr ? data[column] : data[column] * tile.column_scale[column];
  }

  std::int64_t closest(std::int64_t j) const {
    const std::int64_t first = j * tile.subcenters;
    std::int64_t k = 0;
    for (std::int64_t other = 1; other < tile.subcenters; ++other) {
      const T c = cosine(first + other);
      if (c > cosine(first + k) || c != c) k = other;  // a NaN sub-centre must show
    }
    return k;
  }

  // The masked target stays hugely negative: it is below every threshold.
  Vec<T> map(const Vec<T>& c) const {
    return tile.threshold == nullptr ? c : (c > threshold ? a0 + c * (a1 + c * a2) : c);
  }
  Vec<T> map_slope(const Vec<T>& c) const { return c > threshold ? a1 + c * (2 * a2) : Vec<T>{} + 1; }
};

template <class T>
void accumulate_row(const Row<T>& row, const NegativeStats<T>& stats, std::int64_t i) {
  constexpr int lanes = VecOf<T>::lanes;
  using V = Vec<T>;
  const T to_log2 = static_cast<T>(row.tile.scale * kLog2e);
  alignas(64) T c[kBlock];
  double maximum = 0;
  if (stats.online) {
    T top = static_cast<T>(kMasked);
    for (std::int64_t j = 0; j < row.tile.classes; j += kBlock) {
      row.load(j, c);
      V most = V{} + top;
      for (int l = 0; l < kBlock; l += lanes) {
        const V h = row.map(load_vec(c + l));
        most = h > most ? h : most;
      }
      for (int l = 0; l < lanes; ++l) top = most[l] > top ? most[l] : top;
    }
    const double z_top = static_cast<double>(top) * row.tile.scale;
    maximum = z_top > stats.max[i] ? z_top : stats.max[i];
    // Empty so far: nothing to rescale, and -inf - -inf would be NaN.
    const double rescale = stats.sum[i] == 0 ? 0 : std::exp(stats.max[i] - maximum);
    stats.max[i] = maximum;
    stats.sum[i] *= rescale;
    if (stats.sum_sq != nullptr) {
      stats.sum_sq[i] *= rescale * rescale;
      stats.sum_z[i] *= rescale;
    }
  }
  const T shift = static_cast<T>(maximum * kLog2e);
  const bool moments = stats.sum_sq != nullptr;
  const T cos_target = stats.rank != nullptr ? stats.cos_target[i] : T(0);
  V top = V{} + (stats.rank != nullptr ? stats.max_cos[i] : T(0));
  typename VecOf<T>::I above = {};
  double sum = 0, sum_sq = 0, sum_z = 0, sum_cos = 0;
  for (std::int64_t flush = 0; flush < row.tile.classes; flush += kFlush) {
    const std::int64_t end = flush + kFlush < row.tile.classes ? flush + kFlush : row.tile.classes;
    V s = {}, ss = {}, sz = {}, sc = {};
    for (std::int64_t j = flush; j < end; j += kBlock) {
      row.load(j, c);
      for (int l = 0; l < kBlock; l += lanes) {
        const V cosine = load_vec(c + l);
        const V h = row.map(cosine);
        const V x = exp2_vec(h * to_log2 - shift);
        s += x;
        if (moments) {
          ss += x * x;
          sz += x * h;
        }
        if (stats.sum_cos != nullptr) sc += h < static_cast<T>(kMasked / 2) ? V{} : h;
        if (stats.rank != nullptr) {
          above -= cosine > cos_target;  // a true lane is -1
          top = (cosine > top) | (cosine != cosine) ? cosine : top;
        }
      }
    }
    sum += sum_lanes<T>(s);
    sum_sq += sum_lanes<T>(ss);
    sum_z += sum_lanes<T>(sz);
    sum_cos += sum_lanes<T>(sc);
  }
  stats.sum[i] += sum;
  if (moments) {
    stats.sum_sq[i] += sum_sq;
    stats.sum_z[i] += sum_z * row.tile.scale;
  }
  if (stats.sum_cos != nullptr) stats.sum_cos[i] += sum_cos;
  if (stats.rank != nullptr) {
    for (int l = 0; l < lanes; ++l) {
      stats.rank[i] += above[l];
      const bool higher = top[l] > stats.max_cos[i] || top[l] != top[l];
      stats.max_cos[i] = higher ? top[l] : stats.max_cos[i];
    }
  }
}

template <class T>
void accumulate(const Tile<T>& tile, const NegativeStats<T>& stats, int threads) {
  parallel_for(tile.rows, row_grain(tile.classes * tile.subcenters), threads,
               [&](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t i = begin; i < end; ++i) {
                   if (tile.labels[i] >= 0) accumulate_row(Row<T>(tile, i), stats, i);
                 }
               });
}

template <class T>
void gradient_row(const Row<T>& row, T lse_neg, T grad_lse, T grad_sum) {
  constexpr int lanes = VecOf<T>::lanes;
  using V = Vec<T>;
  const Tile<T>& tile = row.tile;
  const T to_log2 = static_cast<T>(tile.scale * kLog2e);
  const T shift = static_cast<T>(static_cast<double>(lse_neg) * kLog2e);
  const T factor = static_cast<T>(static_cast<double>(grad_lse) * tile.scale);
  alignas(64) T c[kBlock];
  alignas(64) T g[kBlock];
  for (std::int64_t j = 0; j < tile.classes; j += kBlock) {
    row.load(j, c);
    for (int l = 0; l < kBlock; l += lanes) {
      const V cosine = load_vec(c + l);
      V value = exp2_vec(row.map(cosine) * to_log2 - shift) * factor + grad_sum;
      if (tile.threshold != nullptr) value *= row.map_slope(cosine);
      store_vec(g + l, value);
    }
    const std::int64_t left = tile.classes - j;
    const std::int64_t count = left < kBlock ? left : kBlock;
    if (row.target >= j && row.target < j + count) g[row.target - j] = 0;
    if (tile.subcenters == 1 && count == kBlock) {
      row.store(j, g);
      continue;
    }
    for (std::int64_t l = 0; l < count; ++l) {
      const std::int64_t winner = row.closest(j + l);
      for (std::int64_t k = 0; k < tile.subcenters; ++k) {
        const std::int64_t column = (j + l) * tile.subcenters + k;
        const T scale = tile.column_scale == nullptr ? T(1) : tile.column_scale[column];
        row.data[column] = k == winner ? g[l] * scale : T(0);
      }
    }
  }
}

template <class T>
void gradient(const Tile<T>& tile, const T* lse_neg, const T* grad_lse, const T* grad_sum, int threads) {
  const std::int64_t width = tile.classes * tile.subcenters;
  parallel_for(tile.rows, row_grain(width), threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const Row<T> row(tile, i);
      const T sum = grad_sum != nullptr ? grad_sum[i] : T(0);
      // An ignored row, and one whose loss has no upstream gradient, gives exactly zero.
      if (tile.labels[i] < 0 || (grad_lse[i] == 0 && sum == 0)) {
        for (std::int64_t j = 0; j < width; ++j) row.data[j] = 0;
      } else {
        gradient_row(row, lse_neg[i], grad_lse[i], sum);
      }
    }
  });
}

template <class T>
void add_target(const T* a, const T* b, const T* theta, const T* grad_theta, const std::int64_t* to,
                std::int64_t rows, std::int64_t dim, std::int64_t first, std::int64_t count, T* out,
                int threads) {
  // Threads share the columns, not the rows: two rows may have the same target.
  parallel_for(dim, row_grain(rows), threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = 0; i < rows; ++i) {
      const std::int64_t r = to[i] - first;
      if (r < 0 || r >= count || grad_theta[i] == 0) continue;
      const double cosine = std::cos(static_cast<double>(theta[i]));
      const double sine = std::sin(static_cast<double>(theta[i]));
      // At theta = 0 or pi every tangent is as good as any other: none is taken.
      const double g = std::fabs(sine) < 1e-15 ? 0 : static_cast<double>(grad_theta[i]) / sine;
      for (std::int64_t d = begin; d < end; ++d) {
        const double tangent = static_cast<double>(b[i * dim + d]) - cosine * a[i * dim + d];
        out[r * dim + d] = static_cast<T>(out[r * dim + d] - g * tangent);
      }
    }
  });
}

template <class T>
void project(const T* d, const T* x, std::int64_t x_stride, bool x_is_unit, const T* inv_norm,
             std::int64_t rows, std::int64_t dim, void* out, Dtype dtype, std::int64_t row_stride,
             std::int64_t col_stride, int threads) {
  parallel_for(rows, row_grain(dim), threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      const T* dr = d + r * dim;
      const T* xr = x + r * x_stride;
      const double square = x_is_unit ? 1.0 : static_cast<double>(inv_norm[r]) * inv_norm[r];
      const T inverse = x_is_unit ? inv_norm[r] : T(1);
      const T radial = static_cast<T>(dot_in_double(dr, xr, dim) * square);
      if (dtype == Dtype::float32 && sizeof(T) == sizeof(float) && col_stride == 1) {
        T* o = static_cast<T*>(out) + r * row_stride;
        for (std::int64_t k = 0; k < dim; ++k) o[k] = (dr[k] - radial * xr[k]) * inverse;
        continue;
      }
      for (std::int64_t k = 0; k < dim; ++k) {
        store(out, dtype, r * row_stride + k * col_stride, (dr[k] - radial * xr[k]) * inverse);
      }
    }
  });
}

}  // namespace

const MarginSoftmaxKernels<float> margin_softmax_float = {
    normalize<float>, target_angle<float>, accumulate<float>,
    gradient<float>,  add_target<float>,   project<float>};
const MarginSoftmaxKernels<double> margin_softmax_double = {
    normalize<double>, target_angle<double>, accumulate<double>,
    gradient<double>,  add_target<double>,   project<double>};

}  // namespace PYELASTIC_ISA
}  // namespace pyelastic
