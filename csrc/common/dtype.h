// Element types as they cross the binding, and their conversion to the type a kernel computes in.
#pragma once

#include <cstdint>
#include <cstring>

namespace pyelastic {

enum class Dtype : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

// Everything here is in an unnamed namespace: these functions are compiled once per instruction set,
// and a linker that merged the copies could hand AVX-512 code to a machine without it.
namespace {

template <class To, class From>
inline To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

inline float bfloat16_to_float(std::uint16_t bits) {
  return bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

inline std::uint16_t float_to_bfloat16(float value) {
  const auto bits = bit_cast<std::uint32_t>(value);
  if (value != value) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);  // stay a quiet NaN
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float float16_to_float(std::uint16_t bits) {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
  const std::uint32_t magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude >= 0x400u) return bit_cast<float>(sign | ((magnitude << 13) + 0x38000000u));
  // Subnormal: magnitude units of 2^-24, exact in float.
  const float value = static_cast<float>(magnitude) * 5.9604644775390625e-08f;
  return sign != 0 ? -value : value;
}

inline std::uint16_t float_to_float16(float value) {
  const auto bits = bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // rounds to inf
  if (magnitude < 0x38800000u) {  // subnormal result: let the adder round to a multiple of 2^-24
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    return static_cast<std::uint16_t>(sign | (bit_cast<std::uint32_t>(shifted) - 0x3f000000u));
  }
  const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

// Element `i` of an array of `dtype`, in the compute type T.
template <class T>
inline T load(const void* data, Dtype dtype, std::int64_t i) {
  switch (dtype) {
    case Dtype::float32:
      return static_cast<T>(static_cast<const float*>(data)[i]);
    case Dtype::float64:
      return static_cast<T>(static_cast<const double*>(data)[i]);
    case Dtype::bfloat16:
      return static_cast<T>(bfloat16_to_float(static_cast<const std::uint16_t*>(data)[i]));
    case Dtype::float16:
      break;
  }
  return static_cast<T>(float16_to_float(static_cast<const std::uint16_t*>(data)[i]));
}

template <class T>
inline void store(void* data, Dtype dtype, std::int64_t i, T value) {
  switch (dtype) {
    case Dtype::float32:
      static_cast<float*>(data)[i] = static_cast<float>(value);
      return;
    case Dtype::float64:
      static_cast<double*>(data)[i] = static_cast<double>(value);
      return;
    case Dtype::bfloat16:
      static_cast<std::uint16_t*>(data)[i] = float_to_bfloat16(static_cast<float>(value));
      return;
    case Dtype::float16:
      break;
  }
  static_cast<std::uint16_t*>(data)[i] = float_to_float16(static_cast<float>(value));
}

}  // namespace
}  // namespace pyelastic
