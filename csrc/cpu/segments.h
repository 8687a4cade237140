// Segments of a memory row as the compute type.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace pyelastic {
namespace PYELASTIC_ISA {
namespace {

constexpr std::int64_t kSegment = 256;  // elements of a memory row that are converted at once, in L1

inline std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

template <class T>
inline void load_segment(const void* data, Dtype dtype, std::int64_t at, std::int64_t n, T* out) {
  switch (dtype) {
    case Dtype::float32:
      for (std::int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(static_cast<const float*>(data)[at + i]);
      return;
    case Dtype::float64:
      for (std::int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(static_cast<const double*>(data)[at + i]);
      return;
    case Dtype::bfloat16: {
      const std::uint16_t* from = static_cast<const std::uint16_t*>(data) + at;
      for (std::int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(bfloat16_to_float(from[i]));
      return;
    }
    case Dtype::float16: {
      const std::uint16_t* from = static_cast<const std::uint16_t*>(data) + at;
      for (std::int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(float16_to_float(from[i]));
      return;
    }
  }
}

template <class T>
inline void store_segment(void* data, Dtype dtype, std::int64_t at, std::int64_t n, const T* x) {
  switch (dtype) {
    case Dtype::float32:
      for (std::int64_t i = 0; i < n; ++i) static_cast<float*>(data)[at + i] = static_cast<float>(x[i]);
      return;
    case Dtype::float64:
      for (std::int64_t i = 0; i < n; ++i) static_cast<double*>(data)[at + i] = static_cast<double>(x[i]);
      return;
    case Dtype::bfloat16: {
      std::uint16_t* to = static_cast<std::uint16_t*>(data) + at;
      for (std::int64_t i = 0; i < n; ++i) to[i] = float_to_bfloat16(static_cast<float>(x[i]));
      return;
    }
    case Dtype::float16: {
      std::uint16_t* to = static_cast<std::uint16_t*>(data) + at;
      for (std::int64_t i = 0; i < n; ++i) to[i] = float_to_float16(static_cast<float>(x[i]));
      return;
    }
  }
}

// The segment as T: in place if it is T, else converted into `room`.
template <class T>
inline const T* segment(const void* data, Dtype dtype, std::int64_t at, std::int64_t n, T* room) {
  if (dtype == (sizeof(T) == sizeof(float) ? Dtype::float32 : Dtype::float64)) return static_cast<const T*>(data) + at;
  load_segment(data, dtype, at, n, room);
  return room;
}

}  // namespace
}  // namespace PYELASTIC_ISA
}  // namespace pyelastic
