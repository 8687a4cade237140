// margin_softmax on CUDA: the work on rows, between GEMMs of torch. Contract: ../margin_softmax.h; the
// kernels with the GEMM inside: margin_softmax_mma.cu.
//
// Blocking: a warp owns a row of D elements (normalize, target, project); a block owns a row of a tile of
// cosines. Each value is written by its one owner, so nothing depends on the order of blocks.
// Bytes: a tile is chosen to stay in L2, where it is written by the GEMM (4 a cosine) and read twice.
#include <type_traits>

#include "margin_softmax_tile.cuh"

namespace pyelastic {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsPerBlock = kThreads / 32;
constexpr double kZeroNorm = 1e-12;  // F.normalize's eps: below it a row has no direction

unsigned row_blocks(std::int64_t rows) {
  return static_cast<unsigned>((rows + kRowsPerBlock - 1) / kRowsPerBlock);
}
__device__ __forceinline__ std::int64_t my_row() {
  return static_cast<std::int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / 32;
}

// A row of a user's matrix.
template <class T>
struct Row {
  const T* data;
  std::int64_t stride;
  __device__ Row(const RowsView& x, std::int64_t row)
      : data(static_cast<const T*>(x.data) + row * x.row_stride), stride(x.col_stride) {}
  __device__ float operator[](std::int64_t d) const { return to_float(data[d * stride]); }
};

template <class T>
__device__ double warp_square(const Row<T>& x, std::int64_t dim) {
  double square = 0;  // in double, as a float32 row of norm 1e19 overflows float
  for (std::int64_t d = threadIdx.x % 32; d < dim; d += 32) {
    const double v = x[d];
    square += v * v;
  }
  return warp_sum(square);
}

template <class In, class Out>
__global__ void __launch_bounds__(kThreads)
    normalize(RowsView x, const float* factor /* [rows] or null */, Out* out /* [rows, ld] */, std::int64_t ld,
              float* inv_norm /* [rows] */) {
  const std::int64_t r = my_row();
  if (r >= x.rows) return;
  const int lane = threadIdx.x % 32;
  const std::int64_t from = x.index != nullptr ? x.index[r] : r;
  const Row<In> row(x, from < 0 ? 0 : from);
  const double norm = from < 0 ? 0 : sqrt(warp_square(row, x.dim));
  const bool nowhere = norm <= kZeroNorm;  // false for NaN: a NaN row must not vanish
  const double inverse = nowhere ? 0 : 1.0 / norm + (norm - norm);  // NaN for an infinite row, not 0
  const float times = factor != nullptr ? factor[r] : 1.0f;
  for (std::int64_t d = lane; d < ld; d += 32) {
    const float unit = nowhere || d >= x.dim ? 0.0f : static_cast<float>(row[d] * inverse);
    out[r * ld + d] = from_float<Out>(unit * times);
  }
  if (lane == 0) inv_norm[r] = static_cast<float>(inverse);
}

template <class E, class W>
__global__ void __launch_bounds__(kThreads, 1)  // one block: else ptxas stops at 64 registers and spills on sm_90a
    target(RowsView e, RowsView w, const std::int64_t* labels /* [rows] */, std::int64_t subcenters,
           float* theta /* [rows] */, std::int64_t* best, std::int64_t* center, float* w_inv) {
  const std::int64_t i = my_row();
  if (i >= e.rows) return;
  const int lane = threadIdx.x % 32;
  const std::int64_t label = labels[i];
  double cosine = 0, angle = 1.5707963267948966, inverse = 0;
  std::int64_t nearest = 0, at = -1;
  if (label >= w.rows / subcenters) {
    angle = __longlong_as_double(0x7ff8000000000000);  // out of range: a NaN loss, since raising would synchronise
  } else if (label >= 0) {
    const Row<E> x(e, i);
    const double norm = sqrt(warp_square(x, e.dim));
    const double e_inverse = norm <= kZeroNorm ? 0 : 1.0 / norm;
    for (std::int64_t k = 0; k < subcenters; ++k) {
      const std::int64_t row = w.index != nullptr ? w.index[label * subcenters + k] : label * subcenters + k;
      const Row<W> y(w, row);
      double dot = 0;
      for (std::int64_t d = lane; d < e.dim; d += 32) dot += static_cast<double>(x[d]) * y[d];
      const double y_norm = sqrt(warp_square(y, e.dim));
      const double y_inverse = y_norm <= kZeroNorm ? 0 : 1.0 / y_norm;
      const double c = warp_sum(dot) * e_inverse * y_inverse;
      if (k == 0 || c > cosine) {
        cosine = c;
        nearest = k;
        at = row;
        inverse = y_inverse;
      }
    }
    const Row<W> y(w, at);
    double square = 0;  // |w^ - c e^|^2: atan2 keeps the digits that acos loses near 0 and pi
    for (std::int64_t d = lane; d < e.dim; d += 32) {
      const double t = y[d] * inverse - cosine * (x[d] * e_inverse);
      square += t * t;
    }
    square = warp_sum(square);
    if (!(square == 0 && cosine == 0)) angle = atan2(sqrt(square), cosine);
  }
  if (lane != 0) return;
  theta[i] = static_cast<float>(angle);
  best[i] = nearest;
  center[i] = at;
  w_inv[i] = static_cast<float>(inverse);
}

// The cosine of class j of a row of a tile: that of its closest sub-centre, whose number goes to `winner`.
__device__ __forceinline__ float class_cosine(const float* row, std::int64_t j, std::int64_t subcenters,
                                              std::int64_t* winner) {
  float c = row[j * subcenters];
  *winner = 0;
  for (std::int64_t k = 1; k < subcenters; ++k) {
    const float other = row[j * subcenters + k];
    if (other > c || other != other) {  // a NaN sub-centre must show
      c = other;
      *winner = k;
    }
  }
  return c;
}

template <bool kHard, bool kExtra>
__global__ void __launch_bounds__(kThreads)
    accumulate(Negatives n, const float* cosines /* [rows, ld] */, std::int64_t ld, RunningStats stats) {
  SHARED(float, reduced, kThreads / 32);
  const std::int64_t i = blockIdx.x;
  if (n.labels[i] < 0) return;  // the whole block: no barrier is left behind
  const std::int64_t target = n.labels[i] - n.first;
  const float* row = cosines + i * ld;
  const Rule<kHard> rule(n, i);
  const float cos_target = kExtra && (n.stats & kRank) ? stats.cos_target[i] : 0.0f;
  std::int64_t winner;
  RowStats s;
  for (std::int64_t j = threadIdx.x; j < n.classes; j += kThreads) {
    if (j == target) continue;
    s.max = max_or_nan(s.max, rule.map(class_cosine(row, j, n.subcenters, &winner)) * n.scale);
  }
  s.max = block_max<kThreads>(s.max, reduced);
  for (std::int64_t j = threadIdx.x; j < n.classes; j += kThreads) {
    if (j == target) continue;
    add_negative<kHard, kExtra>(s, rule, class_cosine(row, j, n.subcenters, &winner), n.scale, cos_target);
  }
  s.sum = block_sum<kThreads>(s.sum, reduced);
  if constexpr (kExtra) {
    s.sum_sq = block_sum<kThreads>(s.sum_sq, reduced);
    s.sum_z = block_sum<kThreads>(s.sum_z, reduced);
    s.sum_cos = block_sum<kThreads>(s.sum_cos, reduced);
    s.top = block_max<kThreads>(s.top, reduced);
    s.rank = static_cast<int>(block_sum<kThreads>(static_cast<float>(s.rank), reduced));  // below 2^24
  }
  if (threadIdx.x == 0) carry(stats, n.stats, i, s);
}

template <bool kHard, class Out>
__global__ void __launch_bounds__(kThreads)
    gradient(Negatives n, const float* cosines /* [rows, ld] */, std::int64_t ld, const float* lse_neg /* [rows] */,
             const float* grad_lse, const float* grad_sum, const float* row_scale, Out* p /* [rows, ldp] */,
             std::int64_t ldp) {
  const std::int64_t i = blockIdx.x, k = n.subcenters;
  const std::int64_t target = n.labels[i] - n.first;
  const float* row = cosines + i * ld;
  const Gradient<kHard> g(n, i, lse_neg, grad_lse, grad_sum, row_scale);
  for (std::int64_t j = threadIdx.x; j < n.classes; j += kThreads) {
    std::int64_t winner;
    const float c = class_cosine(row, j, k, &winner);
    const float value = j == target ? 0.0f : g(c);
    for (std::int64_t m = 0; m < k; ++m) p[i * ldp + j * k + m] = from_float<Out>(m == winner ? value : 0.0f);
  }
  for (std::int64_t j = n.classes * k + threadIdx.x; j < ldp; j += kThreads) p[i * ldp + j] = from_float<Out>(0.0f);
}

// 1 / sin(theta) times -grad, and -cos times that: the coefficients of the two unit rows in a tangent.
__device__ __forceinline__ void tangent(const Targets& t, std::int64_t i, float* along, float* back) {
  double sine, cosine;
  sincospi(t.theta[i] * 0.31830988618379067, &sine, &cosine);  // sin and cos would bring code for huge angles
  // At theta = 0 or pi every tangent is as good as any other: none is taken.
  const double g = fabs(sine) < 1e-15 ? 0 : -static_cast<double>(t.grad_theta[i]) / sine;
  *along = static_cast<float>(g);
  *back = static_cast<float>(-g * cosine);
}

template <class T>
__device__ __forceinline__ void store_row(void* out, std::int64_t at, float value) {
  static_cast<T*>(out)[at] = from_float<T>(value);
}

template <class E, class W>
__global__ void __launch_bounds__(kThreads)
    project_e(const float* d /* [rows, ldd] */, std::int64_t ldd, const float* factor /* [rows] */, RowsView e,
              const float* e_inv, RowsView w, const float* w_inv, Targets targets, void* out,
              std::int64_t row_stride, std::int64_t col_stride) {
  const std::int64_t i = my_row();
  if (i >= e.rows) return;
  const int lane = threadIdx.x % 32;
  const float inverse = e_inv[i];
  const Row<E> x(e, i);
  const std::int64_t center = targets.center[i];
  const bool pulled = center >= 0 && targets.grad_theta[i] != 0;
  const Row<W> y(w, center < 0 ? 0 : center);
  float along = 0, back = 0;
  if (pulled) tangent(targets, i, &along, &back);
  along *= pulled ? w_inv[i] : 0.0f;
  float radial = 0;
  for (std::int64_t k = lane; k < e.dim; k += 32) radial += inverse == 0 ? 0.0f : d[i * ldd + k] * (x[k] * inverse);
  radial = warp_sum(radial);
  for (std::int64_t k = lane; k < e.dim; k += 32) {
    float value = 0;  // a row without direction, or ignored, whatever it holds
    if (inverse != 0) {
      const float unit = x[k] * inverse;
      value = (d[i * ldd + k] - radial * unit) * factor[i];
      if (pulled) value += along * y[k] + back * unit;
      value *= inverse;
    }
    store_row<E>(out, i * row_stride + k * col_stride, value);
  }
}

template <class W, class E>
__global__ void __launch_bounds__(kThreads)
    project_w(const float* d /* [rows, ldd] */, std::int64_t ldd, const float* factor /* [1] */, RowsView w,
              const float* w_inv /* [rows] */, std::int64_t first, RowsView e, const float* e_inv, Targets targets,
              std::int64_t batch, void* out, std::int64_t row_stride, std::int64_t col_stride) {
  const std::int64_t r = my_row();
  if (r >= w.rows) return;
  const int lane = threadIdx.x % 32;
  const std::int64_t row = w.index != nullptr ? w.index[r] : first + r;  // as `center` counts
  const float inverse = w_inv[r];
  const Row<W> x(w, w.index != nullptr ? row : r);
  // The samples of this class row are a run of the sorted centers: its first one by bisection.
  std::int64_t low = 0, high = batch;
  while (low < high) {
    const std::int64_t middle = (low + high) / 2;
    if (targets.sorted[middle] < row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  float radial = 0;
  for (std::int64_t k = lane; k < w.dim; k += 32) radial += inverse == 0 ? 0.0f : d[r * ldd + k] * (x[k] * inverse);
  radial = warp_sum(radial);
  const float times = factor[0];
  for (std::int64_t k = lane; k < w.dim; k += 32) {
    float value = 0;
    if (inverse != 0) {
      const float unit = x[k] * inverse;
      value = (d[r * ldd + k] - radial * unit) * times;
      for (std::int64_t run = low; run < batch && targets.sorted[run] == row; ++run) {
        const std::int64_t i = targets.order[run];
        if (targets.grad_theta[i] == 0) continue;
        float along, back;
        tangent(targets, i, &along, &back);
        value += along * (to_float(Row<E>(e, i)[k]) * e_inv[i]) + back * unit;
      }
      value *= inverse;
    }
    store_row<W>(out, r * row_stride + k * col_stride, value);
  }
}

}  // namespace

void margin_softmax_normalize(const RowsView& x, const float* factor, Dtype out_dtype, void* out, std::int64_t ld,
                              float* inv_norm, Stream stream) {
  if (x.rows == 0) return;
  visit_dtype(x.dtype, [&](auto in) {
    using In = typename decltype(in)::type;
    if (out_dtype == Dtype::float16) {
      LAUNCH((normalize<In, __half>), row_blocks(x.rows), kThreads, 0, stream, x, factor, static_cast<__half*>(out),
             ld, inv_norm);
    } else {
      LAUNCH((normalize<In, float>), row_blocks(x.rows), kThreads, 0, stream, x, factor, static_cast<float*>(out), ld,
             inv_norm);
    }
  });
}

void margin_softmax_target(const RowsView& e, const RowsView& w, const std::int64_t* labels,
                           std::int64_t subcenters, float* theta, std::int64_t* best, std::int64_t* center,
                           float* w_inv, Stream stream) {
  if (e.rows == 0) return;
  visit_dtype(e.dtype, [&](auto a) {
    visit_dtype(w.dtype, [&](auto b) {
      using E = typename decltype(a)::type;
      using W = typename decltype(b)::type;
      LAUNCH((target<E, W>), row_blocks(e.rows), kThreads, 0, stream, e, w, labels, subcenters, theta, best, center,
             w_inv);
    });
  });
}

void margin_softmax_accumulate(const Negatives& n, const float* cosines, std::int64_t ld,
                               const RunningStats& stats, Stream stream) {
  if (n.rows == 0 || n.classes == 0) return;
  visit_switches(n, [&](auto hard, auto extra) {
    LAUNCH((accumulate<decltype(hard)::value, decltype(extra)::value>), static_cast<unsigned>(n.rows), kThreads, 0,
           stream, n, cosines, ld, stats);
  });
}

void margin_softmax_gradient(const Negatives& n, const float* cosines, std::int64_t ld, const float* lse_neg,
                             const float* grad_lse, const float* grad_sum, const float* row_scale, Dtype dtype,
                             void* p, std::int64_t ldp, Stream stream) {
  if (n.rows == 0 || n.classes == 0) return;
  visit_switches(n, [&](auto hard, auto) {
    constexpr bool kHard = decltype(hard)::value;
    if (dtype == Dtype::float16) {
      LAUNCH((gradient<kHard, __half>), static_cast<unsigned>(n.rows), kThreads, 0, stream, n, cosines, ld, lse_neg,
             grad_lse, grad_sum, row_scale, static_cast<__half*>(p), ldp);
    } else {
      LAUNCH((gradient<kHard, float>), static_cast<unsigned>(n.rows), kThreads, 0, stream, n, cosines, ld, lse_neg,
             grad_lse, grad_sum, row_scale, static_cast<float*>(p), ldp);
    }
  });
}

void margin_softmax_project_e(const float* d, std::int64_t ldd, const float* factor, const RowsView& e,
                              const float* e_inv, const RowsView& w, const float* w_inv, const Targets& targets,
                              void* out, std::int64_t row_stride, std::int64_t col_stride, Stream stream) {
  if (e.rows == 0) return;
  visit_dtype(e.dtype, [&](auto a) {
    visit_dtype(w.dtype, [&](auto b) {
      using E = typename decltype(a)::type;
      using W = typename decltype(b)::type;
      LAUNCH((project_e<E, W>), row_blocks(e.rows), kThreads, 0, stream, d, ldd, factor, e, e_inv, w, w_inv, targets,
             out, row_stride, col_stride);
    });
  });
}

void margin_softmax_project_w(const float* d, std::int64_t ldd, const float* factor, const RowsView& w,
                              const float* w_inv, std::int64_t first, const RowsView& e, const float* e_inv,
                              const Targets& targets, std::int64_t batch, void* out, std::int64_t row_stride,
                              std::int64_t col_stride, Stream stream) {
  if (w.rows == 0) return;
  visit_dtype(w.dtype, [&](auto a) {
    visit_dtype(e.dtype, [&](auto b) {
      using W = typename decltype(a)::type;
      using E = typename decltype(b)::type;
      LAUNCH((project_w<W, E>), row_blocks(w.rows), kThreads, 0, stream, d, ldd, factor, w, w_inv, first, e, e_inv,
             targets, batch, out, row_stride, col_stride);
    });
  });
}

}  // namespace cuda
}  // namespace pyelastic
