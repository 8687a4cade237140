// What a block of query tokens keeps while it meets the tokens of a document.
#pragma once

#include "maxsim_tile.h"

namespace pyelastic {
namespace PYELASTIC_ISA {
namespace {

// The running aggregate of one block of query tokens over the tokens of a document.
//   maximum, top-k: value[level] falls with the level, index the winner; smooth: value[0] the maximum of s / tau in
//   powers of 2, value[1] the sum of 2^(s / tau - maximum).
template <class T>
struct Running {
  Vec<T>* value;    // [levels][2]
  Mask<T>* index;   // [levels][2]
};

// (v > m), or the first NaN.
template <class T>
PYELASTIC_INLINE Mask<T> above(const Vec<T>& v, const Vec<T>& m) {
  return (v > m) | ((v != v) & (m == m));
}

template <int R, class T>
PYELASTIC_INLINE void take_maximum(const Running<T>& run, int half, const Vec<T> (&v)[R], const std::int32_t* positions) {
  Vec<T> m = run.value[half];
  Mask<T> a = run.index[half];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    const Mask<T> better = above<T>(v[r], m);
    m = better ? v[r] : m;
    a = better ? Mask<T>{} + positions[r] : a;
  }
  run.value[half] = m;
  run.index[half] = a;
}

template <class T>
PYELASTIC_INLINE void take_levels(const Running<T>& run, int levels, int half, Vec<T> v, std::int32_t t) {
  Mask<T> at = Mask<T>{} + t;
  for (int level = 0; level < levels; ++level) {
    Vec<T>& m = run.value[level * 2 + half];
    Mask<T>& a = run.index[level * 2 + half];
    const Mask<T> better = above<T>(v, m);
    const Vec<T> lower = better ? m : v;  // sinks one level
    const Mask<T> lower_at = better ? a : at;
    m = better ? v : m;
    a = better ? at : a;
    v = lower;
    at = lower_at;
  }
}

template <int R, class T>
PYELASTIC_INLINE void take_smooth(const Running<T>& run, int half, const Vec<T> (&v)[R]) {
  Vec<T> top = run.value[half];
  for (int r = 0; r < R; ++r) top = above<T>(v[r], top) ? v[r] : top;
  const auto term = [&](const Vec<T>& x) { return exp2_vec(x == top ? Vec<T>{} : x - top); };  // inf - inf would be NaN
  Vec<T> sum = run.value[2 + half] * term(run.value[half]);
  for (int r = 0; r < R; ++r) sum += term(v[r]);
  run.value[half] = top;
  run.value[2 + half] = sum;
}

}  // namespace
}  // namespace PYELASTIC_ISA
}  // namespace pyelastic
