// Rows of any dtype as the compute type, and a thread's scratch: what the CPU kernels of several ops share.
#pragma once

#if defined(__F16C__) || defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "../common/dtype.h"
#include "../common/parallel.h"

namespace pyelastic {
namespace PYELASTIC_ISA {
namespace {

constexpr std::int64_t kSegment = 256;  // elements of a memory row that are converted at once, in L1

inline std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// `dim` contiguous elements from element `at` on, converted into `out`.
template <class T>
inline void load_row(const void* data, Dtype dtype, std::int64_t at, std::int64_t dim, T* out) {
  switch (dtype) {
    case Dtype::float32:
      for (std::int64_t k = 0; k < dim; ++k) out[k] = static_cast<T>(static_cast<const float*>(data)[at + k]);
      return;
    case Dtype::float64:
      for (std::int64_t k = 0; k < dim; ++k) out[k] = static_cast<T>(static_cast<const double*>(data)[at + k]);
      return;
    case Dtype::bfloat16: {
      const auto* from = static_cast<const std::uint16_t*>(data) + at;
      for (std::int64_t k = 0; k < dim; ++k) out[k] = static_cast<T>(bfloat16_to_float(from[k]));
      return;
    }
    case Dtype::float16: {
      const auto* from = static_cast<const std::uint16_t*>(data) + at;
      std::int64_t k = 0;
#if defined(__F16C__)
      for (; k + 8 <= dim; k += 8) {
        float wide[8];
        _mm256_storeu_ps(wide, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + k))));
        for (int l = 0; l < 8; ++l) out[k + l] = static_cast<T>(wide[l]);
      }
#endif
      for (; k < dim; ++k) out[k] = static_cast<T>(float16_to_float(from[k]));
      return;
    }
  }
}

// The same elements where they lie if they are of type T, else converted into `room`.
template <class T>
inline const T* read_row(const void* data, Dtype dtype, std::int64_t at, std::int64_t dim, T* room) {
  if (dtype == (sizeof(T) == sizeof(float) ? Dtype::float32 : Dtype::float64)) return static_cast<const T*>(data) + at;
  load_row(data, dtype, at, dim, room);
  return room;
}

// `dim` elements from `row` to element `at` on.
template <class T>
inline void write_row(const T* row, std::int64_t dim, void* data, Dtype dtype, std::int64_t at) {
  if (dtype == (sizeof(T) == sizeof(float) ? Dtype::float32 : Dtype::float64)) {
    T* const to = static_cast<T*>(data) + at;
    for (std::int64_t k = 0; k < dim; ++k) to[k] = row[k];
  } else if (dtype == Dtype::bfloat16) {
    auto* const to = static_cast<std::uint16_t*>(data) + at;
    for (std::int64_t k = 0; k < dim; ++k) to[k] = float_to_bfloat16(static_cast<float>(row[k]));
  } else {
    for (std::int64_t k = 0; k < dim; ++k) store(data, dtype, at + k, row[k]);
  }
}

// Room for a thread's own arrays, taken apart piece by piece; pieces are multiples of 64 bytes.
class Room {
 public:
  explicit Room(std::int64_t bytes) : next_(static_cast<unsigned char*>(thread_scratch(static_cast<std::size_t>(bytes)))) {}
  template <class U>
  U* take(std::int64_t count) {
    U* const piece = reinterpret_cast<U*>(next_);
    next_ += bytes<U>(count);
    return piece;
  }
  template <class U>
  static std::int64_t bytes(std::int64_t count) {
    return (count * static_cast<std::int64_t>(sizeof(U)) + 63) / 64 * 64;
  }

 private:
  unsigned char* next_;
};

}  // namespace
}  // namespace PYELASTIC_ISA
}  // namespace pyelastic
