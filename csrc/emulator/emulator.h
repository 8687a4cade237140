// Stands in for CUDA's headers when a .cu file is compiled by the host compiler: the types, variables and functions
// our kernels use, on top of the scheduler (runtime.h). What is missing here is a compile error, not a guess.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

// --- types ---

struct alignas(16) float4 {
  float x, y, z, w;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct __half {
  std::uint16_t bits;
};
struct __nv_bfloat16 {
  std::uint16_t bits;
};

inline float __half2float(__half h) {
  _Float16 value;
  std::memcpy(&value, &h.bits, 2);
  return static_cast<float>(value);
}
inline __half __float2half_rn(float x) {
  const auto value = static_cast<_Float16>(x);
  __half h;
  std::memcpy(&h.bits, &value, 2);
  return h;
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline double __longlong_as_double(long long bits) {
  double x;
  std::memcpy(&x, &bits, 8);
  return x;
}
inline float __bfloat162float(__nv_bfloat16 h) { return __uint_as_float(static_cast<unsigned>(h.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const unsigned bits = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

// --- variables ---

#define threadIdx ::pyelastic::emulator::thread_index
#define blockIdx ::pyelastic::emulator::block_index
#define blockDim ::pyelastic::emulator::block_size
#define gridDim ::pyelastic::emulator::grid_size

// --- arithmetic ---

inline void sincospi(double x, double* sine, double* cosine) {
  *sine = std::sin(x * 3.14159265358979323846);
  *cosine = std::cos(x * 3.14159265358979323846);
}

inline int __ffs(int x) { return __builtin_ffs(x); }

// --- synchronisation ---

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  pyelastic::emulator::sync_threads(file, line);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  pyelastic::emulator::warp_exchange(mask, 0, "__syncwarp", line);
}
inline void __threadfence() { pyelastic::emulator::thread_fence(); }

namespace pyelastic {
namespace emulator {

template <class T>
T shuffle(unsigned mask, T value, const char* what, unsigned source, int line) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const std::uint64_t* all = warp_exchange(mask, bits, what, line);
  if ((mask >> source & 1u) == 0) fail(std::string(what) + ": the source lane is not in the mask");
  std::memcpy(&value, &all[source], sizeof(T));
  return value;
}

}  // namespace emulator
}  // namespace pyelastic

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
  const unsigned first = pyelastic::emulator::lane() / width * width;
  return pyelastic::emulator::shuffle(mask, value, "__shfl_sync", first + source % width, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, int line = __builtin_LINE()) {
  const unsigned own = pyelastic::emulator::lane(), to = own ^ lanes;
  return pyelastic::emulator::shuffle(mask, value, "__shfl_xor_sync", to / width == own / width ? to : own, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  const unsigned own = pyelastic::emulator::lane(), to = own + delta;
  return pyelastic::emulator::shuffle(mask, value, "__shfl_down_sync", to / width == own / width ? to : own, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  const unsigned own = pyelastic::emulator::lane();
  const bool inside = own % width >= delta;
  return pyelastic::emulator::shuffle(mask, value, "__shfl_up_sync", inside ? own - delta : own, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  const std::uint64_t* all = pyelastic::emulator::warp_exchange(mask, predicate != 0, "__ballot_sync", line);
  unsigned votes = 0;
  for (unsigned l = 0; l < 32; ++l) votes |= (mask >> l & 1u) && all[l] ? 1u << l : 0u;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, line) == mask;
}

// --- atomics: a fiber is not interrupted between begin and end ---

namespace pyelastic {
namespace emulator {

template <class T, class F>
T atomic(T* at, F change) {
  std::uint64_t bits = atomic_begin(at, sizeof(T));
  T before;
  std::memcpy(&before, &bits, sizeof(T));
  const T after = change(before);
  std::memcpy(&bits, &after, sizeof(T));
  atomic_end(at, bits, sizeof(T));
  return before;
}

}  // namespace emulator
}  // namespace pyelastic

template <class T>
T atomicAdd(T* at, std::common_type_t<T> value) {
  return pyelastic::emulator::atomic(at, [&](T before) { return before + value; });
}
inline unsigned atomicInc(unsigned* at, unsigned last) {
  return pyelastic::emulator::atomic(at, [&](unsigned before) { return before >= last ? 0u : before + 1; });
}
template <class T>
T atomicMax(T* at, std::common_type_t<T> value) {
  return pyelastic::emulator::atomic(at, [&](T before) { return before > value ? before : value; });
}
template <class T>
T atomicMin(T* at, std::common_type_t<T> value) {
  return pyelastic::emulator::atomic(at, [&](T before) { return before < value ? before : value; });
}
template <class T>
T atomicExch(T* at, std::common_type_t<T> value) {
  return pyelastic::emulator::atomic(at, [&](T) { return value; });
}
template <class T>
T atomicCAS(T* at, std::common_type_t<T> expected, std::common_type_t<T> value) {
  return pyelastic::emulator::atomic(at, [&](T before) { return before == expected ? value : before; });
}
