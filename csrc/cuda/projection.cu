// projection on CUDA: what happens to a row before and after the GEMMs. Contract and formulas: ../projection.h.
//
// Blocking: a warp owns a row, or a block where rows are wide; its sums are made in a fixed order, in double, as the
// squares of a float32 row of norm 1e19 overflow float. Bytes per element: forward reads z (4) and the residual and
// writes y, backward reads grad and y and writes dz (4); the second pass over a row finds it in L1.
#include <type_traits>

#include "../common/device.cuh"
#include "../projection.h"

namespace pyelastic {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kWide = 1024;        // columns above which a row has a block, so that few wide rows fill a GPU
constexpr double kZeroNorm = 1e-12;         // F.normalize's eps
constexpr float kConstantNorm = 0.999e12f;  // inverse norms from here on are 1 / kZeroNorm, rounded

// The row that a thread works on, with which others: `lanes` is 32 or kThreads.
struct Owner {
  std::int64_t row;
  int lane, lanes;
  __device__ explicit Owner(int count)
      : row((static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x) / count),
        lane(static_cast<int>(threadIdx.x) % count),
        lanes(count) {}
  __device__ __forceinline__ double sum(double x, double* shared) const {
    return lanes == 32 ? warp_sum(x) : block_sum<kThreads>(x, shared);
  }
};

int lanes_of(std::int64_t dim) { return dim > kWide ? kThreads : 32; }
unsigned blocks_of(std::int64_t rows, int lanes) {
  const std::int64_t per_block = kThreads / lanes;
  return static_cast<unsigned>((rows + per_block - 1) / per_block);
}

template <class R, class Out>
__global__ void __launch_bounds__(kThreads)
    projection_rows(const float* z /* [rows, dim] */, const float* bias /* [dim] or null */,
                    const R* residual /* [rows, dim] or null */, std::int64_t residual_stride, std::int64_t rows,
                    std::int64_t dim, int lanes, Out* out /* [rows, dim] */, std::int64_t stride,
                    float* inverse /* [rows] or null */) {
  SHARED(double, reduced, kThreads / 32);
  const Owner own(lanes);
  if (own.row >= rows) return;  // a whole warp: where a block owns a row there is one for every block
  const float* from = z + own.row * dim;
  const R* added = residual != nullptr ? residual + own.row * residual_stride : nullptr;
  const auto value = [&](std::int64_t k) {
    float v = from[k];
    if (bias != nullptr) v += bias[k];
    if (added != nullptr) v += to_float(added[k]);
    return v;
  };
  float times = 1.0f;
  if (inverse != nullptr) {
    double square = 0;
    for (std::int64_t k = own.lane; k < dim; k += own.lanes) {
      const double v = value(k);
      square += v * v;
    }
    const double norm = sqrt(own.sum(square, reduced));
    times = static_cast<float>(1.0 / (norm < kZeroNorm ? kZeroNorm : norm));  // NaN stays NaN
    if (own.lane == 0) inverse[own.row] = times;
  }
  Out* const to = out + own.row * stride;
  for (std::int64_t k = own.lane; k < dim; k += own.lanes) to[k] = from_float<Out>(value(k) * times);
}

__device__ __forceinline__ void store_parts(float* to, std::int64_t, float x) { *to = x; }
__device__ __forceinline__ void store_parts(__nv_bfloat16* to, std::int64_t part, float x) {
  const __nv_bfloat16 high = from_float<__nv_bfloat16>(x);
  *to = high;
  const bool finite = fabsf(x) < __uint_as_float(0x7f800000u);  // an infinity leaves nothing: inf - inf is NaN
  to[part] = from_float<__nv_bfloat16>(finite ? x - to_float(high) : 0.0f);
}

template <class T, class Z>
__global__ void __launch_bounds__(kThreads, 4)  // four blocks: else ptxas stops at 32 registers and spills on sm_100
    projection_gradient(const T* grad /* [rows, dim] */, std::int64_t grad_stride, const T* y /* [rows, dim] */,
                        std::int64_t y_stride, const float* inverse /* [rows] or null: y is not read */,
                        std::int64_t rows, std::int64_t dim, int lanes, Z* dz /* [rows, dim] */, std::int64_t part) {
  SHARED(double, reduced, kThreads / 32);
  const Owner own(lanes);
  if (own.row >= rows) return;  // as above
  const T* g = grad + own.row * grad_stride;
  Z* const to = dz + own.row * dim;
  if (inverse == nullptr) {
    for (std::int64_t k = own.lane; k < dim; k += own.lanes) store_parts(to + k, part, to_float(g[k]));
    return;
  }
  const T* u = y + own.row * y_stride;
  const float times = inverse[own.row];
  double dot = 0;
  for (std::int64_t k = own.lane; k < dim; k += own.lanes) dot += static_cast<double>(to_float(g[k])) * to_float(u[k]);
  const double sum = own.sum(dot, reduced);
  const float along = times >= kConstantNorm ? 0.0f : static_cast<float>(sum);
  for (std::int64_t k = own.lane; k < dim; k += own.lanes) {
    store_parts(to + k, part, (to_float(g[k]) - along * to_float(u[k])) * times);
  }
}

}  // namespace

void projection_forward(const float* z, const float* bias, MatrixView residual, std::int64_t rows, std::int64_t dim,
                        void* out, Dtype dtype, std::int64_t stride, float* inverse, Stream stream) {
  if (rows == 0 || dim == 0) return;
  const int lanes = lanes_of(dim);
  visit_dtype(dtype, [&](auto o) {
    using Out = typename decltype(o)::type;
    const auto launch = [&](auto r) {
      using R = typename decltype(r)::type;
      LAUNCH((projection_rows<R, Out>), blocks_of(rows, lanes), kThreads, 0, stream, z, bias,
             static_cast<const R*>(residual.data), residual.stride, rows, dim, lanes, static_cast<Out*>(out), stride,
             inverse);
    };
    if (residual.dtype == dtype) return launch(As<Out>{});
    launch(As<float>{});
  });
}

void projection_backward(MatrixView grad, MatrixView y, const float* inverse, std::int64_t rows, std::int64_t dim,
                         bool parts, void* dz, std::int64_t part, Stream stream) {
  if (rows == 0 || dim == 0) return;
  const int lanes = lanes_of(dim);
  visit_dtype(grad.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const auto launch = [&](auto* to) {
      using Z = std::remove_pointer_t<decltype(to)>;
      LAUNCH((projection_gradient<T, Z>), blocks_of(rows, lanes), kThreads, 0, stream, static_cast<const T*>(grad.data),
             grad.stride, static_cast<const T*>(y.data), y.stride, inverse, rows, dim, lanes, to, part);
    };
    if (parts) return launch(static_cast<__nv_bfloat16*>(dz));
    launch(static_cast<float*>(dz));
  });
}

}  // namespace cuda
}  // namespace pyelastic
