// What fira's CPU kernels share: sums of squares, and the way W is written.
#pragma once

#include "../fira.h"
#include "rows.h"

namespace pyelastic {
namespace PYELASTIC_ISA {
namespace {

constexpr std::int64_t kRowsFlush = 64;  // rows of G summed in T on the left before they are added to a double
constexpr int kLanes = 16;

// An element of a line: of the compute type, or bfloat16 bits.
inline double widen(double x) { return x; }
inline float widen(float x) { return x; }
inline float widen(std::uint16_t x) { return bfloat16_to_float(x); }
inline void narrow(double x, double* to) { *to = x; }
inline void narrow(float x, float* to) { *to = x; }
inline void narrow(float x, std::uint16_t* to) { *to = float_to_bfloat16(x); }

// Sum of squares of n <= kSegment elements, in kLanes partial sums of the compute type.
template <class Source>
inline double sum_squares(const Source* x, std::int64_t n) {
  using T = decltype(widen(*x));
  T lanes[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lanes[l] += widen(x[i + l]) * widen(x[i + l]);
  }
  double sum = 0;
  for (int l = 0; l < kLanes; ++l) sum += static_cast<double>(lanes[l]);
  for (; i < n; ++i) sum += static_cast<double>(widen(x[i])) * static_cast<double>(widen(x[i]));
  return sum;
}

template <class Source, class T>
inline void add_squares(const Source* x, std::int64_t n, T* sums) {
  for (std::int64_t i = 0; i < n; ++i) sums[i] += widen(x[i]) * widen(x[i]);
}
template <class T>
inline void flush(T* sums, std::int64_t n, double* to) {
  for (std::int64_t i = 0; i < n; ++i) {
    to[i] += static_cast<double>(sums[i]);
    sums[i] = 0;
  }
}

inline std::uint32_t mix(std::uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

template <class T>
inline void store_stochastic(const FiraRounding& rounding, std::int64_t element, std::uint16_t* to, std::int64_t n, const T* x) {
  std::uint32_t key = mix(rounding.step);
  key = mix(static_cast<std::uint32_t>(rounding.seed >> 32) ^ key);
  key = mix(static_cast<std::uint32_t>(rounding.seed) ^ key);
  key = mix(static_cast<std::uint32_t>(element >> 32) ^ key);
  const auto low = static_cast<std::uint32_t>(element);
  for (std::int64_t i = 0; i < n; ++i) {
    const auto bits = bit_cast<std::uint32_t>(static_cast<float>(x[i]));
    const std::uint32_t noise = mix((low + static_cast<std::uint32_t>(i)) ^ key) & 0xffffu;
    const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
    to[i] = finite ? static_cast<std::uint16_t>((bits + noise) >> 16) : float_to_bfloat16(static_cast<float>(x[i]));
  }
}

// What a step of W needs beside C P^T. size: the step, keep: k.
template <class T>
struct FiraWeights {
  const FiraProblem& p;
  const T* f;
  const void* g;
  std::int64_t g_stride;
  void* w;
  std::int64_t w_stride;
  Dtype w_dtype;
  T size, keep;
  const FiraRounding& rounding;
};

// write_segment of float or bfloat16 elements rounded to nearest, with t, in one loop.
template <class E>
inline void write_nearest(const FiraWeights<float>& x, std::int64_t row, std::int64_t at, std::int64_t n, const float* t) {
  const float size = x.size, keep = x.keep, c = static_cast<float>(x.p.factor);
  const E* __restrict g = static_cast<const E*>(x.g) + row * x.g_stride + at;
  E* __restrict w = static_cast<E*>(x.w) + row * x.w_stride + at;
  if (x.p.left) {
    const float* f = x.f + at;
    for (std::int64_t l = 0; l < n; ++l) narrow(keep * (widen(w[l]) - size * (t[l] + f[l] * c * widen(g[l]))), w + l);
  } else {
    const float factor = x.f[row] * c;
    for (std::int64_t l = 0; l < n; ++l) narrow(keep * (widen(w[l]) - size * (t[l] + factor * widen(g[l]))), w + l);
  }
}

// Elements at .. at + n - 1 of a row of W, n <= kSegment; t holds C P^T there, or null for 0.
template <class T>
inline void write_segment(const FiraWeights<T>& x, std::int64_t row, std::int64_t at, std::int64_t n, const T* t) {
  const FiraProblem& p = x.p;
  const FiraRounding& rounding = x.rounding;
  if constexpr (sizeof(T) == sizeof(float)) {
    if (t != nullptr && !rounding.stochastic && rounding.remainder == nullptr) {
      if (x.w_dtype == Dtype::float32) return write_nearest<float>(x, row, at, n, t);
      if (x.w_dtype == Dtype::bfloat16) return write_nearest<std::uint16_t>(x, row, at, n, t);
    }
  }
  const T size = x.size, keep = x.keep, c = static_cast<T>(p.factor);
  const std::int64_t element = row * (p.left ? p.vectors : p.dim) + at;
  T g_room[kSegment], w_room[kSegment], rest[kSegment];
  const T* g = read_row(x.g, x.w_dtype, row * x.g_stride + at, n, g_room);
  load_row(x.w, x.w_dtype, row * x.w_stride + at, n, w_room);
  if (rounding.remainder != nullptr) {
    load_row(rounding.remainder, x.w_dtype, element, n, rest);
    for (std::int64_t l = 0; l < n; ++l) w_room[l] += rest[l];
  }
  const T factor = p.left ? T(0) : x.f[row] * c;
  const T* f = p.left ? x.f + at : nullptr;
  if (t == nullptr) {
    for (std::int64_t l = 0; l < n; ++l) w_room[l] = keep * (w_room[l] - size * ((f ? f[l] * c : factor) * g[l]));
  } else if (p.left) {
    for (std::int64_t l = 0; l < n; ++l) w_room[l] = keep * (w_room[l] - size * (t[l] + f[l] * c * g[l]));
  } else {
    for (std::int64_t l = 0; l < n; ++l) w_room[l] = keep * (w_room[l] - size * (t[l] + factor * g[l]));
  }
  if (rounding.stochastic) {
    // The hash's high word is one for a run of elements.
    const std::int64_t run = least(n, (std::int64_t{1} << 32) - (element & 0xffffffff));
    auto* const to = static_cast<std::uint16_t*>(x.w) + row * x.w_stride + at;
    store_stochastic(rounding, element, to, run, w_room);
    if (run < n) store_stochastic(rounding, element + run, to + run, n - run, w_room + run);
    return;
  }
  write_row(w_room, n, x.w, x.w_dtype, row * x.w_stride + at);
  if (rounding.remainder == nullptr) return;
  load_row(x.w, x.w_dtype, row * x.w_stride + at, n, rest);
  for (std::int64_t l = 0; l < n; ++l) rest[l] = w_room[l] - rest[l];
  write_row(rest, n, rounding.remainder, x.w_dtype, element);
}

}  // namespace
}  // namespace PYELASTIC_ISA
}  // namespace pyelastic
