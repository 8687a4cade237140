// projection on the CPU: what happens to a row before and after the BLAS. Contract and formulas: ../projection.h.

#include <cmath>

#include "../common/vec.h"
#include "../projection.h"
#include "rows.h"

namespace pyelastic {
namespace PYELASTIC_ISA {
namespace {

constexpr double kZeroNorm = 1e-12;  // F.normalize's eps
constexpr std::int64_t kGrain = 32;  // rows worth a range of their own

template <class T>
void forward(const T* z, const T* bias, MatrixView residual, std::int64_t rows, std::int64_t dim, void* out, Dtype dtype,
             std::int64_t stride, T* inverse, int threads) {
  parallel_for(rows, kGrain, threads, [&](std::int64_t begin, std::int64_t end) {
    Room room(2 * Room::bytes<T>(dim));
    T* const row = room.take<T>(dim);
    T* const spare = room.take<T>(dim);
    for (std::int64_t i = begin; i < end; ++i) {
      const T* zi = z + i * dim;
      for (std::int64_t k = 0; k < dim; ++k) row[k] = bias != nullptr ? zi[k] + bias[k] : zi[k];
      if (residual.data != nullptr) {
        const T* r = read_row(residual.data, residual.dtype, i * residual.stride, dim, spare);
        for (std::int64_t k = 0; k < dim; ++k) row[k] += r[k];
      }
      if (inverse != nullptr) {
        const double norm = std::sqrt(dot_in_double(row, row, dim));
        inverse[i] = static_cast<T>(1.0 / (norm < kZeroNorm ? kZeroNorm : norm));  // NaN stays NaN
        for (std::int64_t k = 0; k < dim; ++k) row[k] *= inverse[i];
      }
      write_row(row, dim, out, dtype, i * stride);
    }
  });
}

// A row of dz rounded to bfloat16, and behind it what that leaves.
template <class T>
void store_parts(const T* row, std::int64_t dim, std::uint16_t* to) {
  for (std::int64_t k = 0; k < dim; ++k) {
    const float value = static_cast<float>(row[k]);
    to[k] = float_to_bfloat16(value);
    to[dim + k] = float_to_bfloat16(value - bfloat16_to_float(to[k]));
  }
}

template <class T>
void backward(MatrixView grad, MatrixView y, const T* inverse, std::int64_t rows, std::int64_t dim, bool parts, void* dz,
              int threads) {
  parallel_for(rows, kGrain, threads, [&](std::int64_t begin, std::int64_t end) {
    Room room(3 * Room::bytes<T>(dim));
    T* const g_room = room.take<T>(dim);
    T* const y_room = room.take<T>(dim);
    T* const whole = room.take<T>(dim);
    for (std::int64_t i = begin; i < end; ++i) {
      const T* g = read_row(grad.data, grad.dtype, i * grad.stride, dim, g_room);
      T* const d = parts ? whole : static_cast<T*>(dz) + i * dim;
      if (inverse == nullptr) {
        for (std::int64_t k = 0; k < dim; ++k) d[k] = g[k];
      } else {
        const T* u = read_row(y.data, y.dtype, i * y.stride, dim, y_room);
        // 0.999: the largest inverse, rounded to float; there the norm is constant.
        const bool clamped = static_cast<double>(inverse[i]) >= 0.999 / kZeroNorm;
        const T along = clamped ? T(0) : static_cast<T>(dot_in_double(g, u, dim));
        for (std::int64_t k = 0; k < dim; ++k) d[k] = (g[k] - along * u[k]) * inverse[i];
      }
      if (parts) store_parts(d, dim, static_cast<std::uint16_t*>(dz) + i * 2 * dim);
    }
  });
}

}  // namespace

const ProjectionKernels<float> projection_float = {forward<float>, backward<float>};
const ProjectionKernels<double> projection_double = {forward<double>, backward<double>};

}  // namespace PYELASTIC_ISA
}  // namespace pyelastic
