// Vectors in the compiler's own vector extension, so that one source serves every instruction set. A vector is one register of
// the set that a file is compiled for: GCC keeps wider ones in memory, which made a product 20 times slower on AVX2.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace pyelastic {
namespace {  // one copy per instruction set, see dtype.h

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

// For functions of vectors: a call would pass them in memory.
#define PYELASTIC_INLINE __attribute__((always_inline)) inline

// Rows of a product in registers: kMicroRows times two vectors are sums, 24 of 32 registers or 12 of 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMicroRows = 12;
#else
constexpr int kMicroRows = 6;
#endif

template <class T>
struct VecOf;

template <>
struct VecOf<float> {
  typedef float V __attribute__((vector_size(kVecBytes)));
  typedef std::int32_t I __attribute__((vector_size(kVecBytes)));
  static constexpr int lanes = kVecBytes / 4;
};

template <>
struct VecOf<double> {
  typedef double V __attribute__((vector_size(kVecBytes)));
  typedef std::int64_t I __attribute__((vector_size(kVecBytes)));
  static constexpr int lanes = kVecBytes / 8;
};

template <class T>
using Vec = typename VecOf<T>::V;

template <class T>
PYELASTIC_INLINE Vec<T> load_vec(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class T>
PYELASTIC_INLINE void store_vec(T* p, const Vec<T>& v) {
  std::memcpy(p, &v, sizeof(v));
}

// Sum of the lanes in a fixed order, in double.
template <class T>
PYELASTIC_INLINE double sum_lanes(const Vec<T>& v) {
  double sum = 0;
  for (int l = 0; l < VecOf<T>::lanes; ++l) sum += static_cast<double>(v[l]);
  return sum;
}

// A vector of doubles from elements of T.
template <class T>
PYELASTIC_INLINE Vec<double> load_doubles(const T* p) {
  typedef T Narrow __attribute__((vector_size(VecOf<double>::lanes * sizeof(T))));
  Narrow v;
  std::memcpy(&v, p, sizeof(v));
  return __builtin_convertvector(v, Vec<double>);
}

// sum a b in double, in a fixed order.
template <class T>
inline double dot_in_double(const T* a, const T* b, std::int64_t n) {
  constexpr int lanes = VecOf<double>::lanes;
  Vec<double> even{}, odd{};
  std::int64_t k = 0;
  for (; k + 2 * lanes <= n; k += 2 * lanes) {
    even += load_doubles(a + k) * load_doubles(b + k);
    odd += load_doubles(a + k + lanes) * load_doubles(b + k + lanes);
  }
  double sum = sum_lanes<double>(even + odd);
  for (; k < n; ++k) sum += static_cast<double>(a[k]) * static_cast<double>(b[k]);
  return sum;
}

// 2^x. Relative error below 2 ulp for x in the type's normal range of exponents; exactly 0 below it;
// NaN stays NaN. The caller keeps x below the largest exponent.
// Method: x = n + r with n the nearest integer (by adding 1.5 * 2^mantissa, which leaves n in the low
// bits), 2^r by its Taylor polynomial on [-1/2, 1/2], 2^n by building the exponent field.
PYELASTIC_INLINE Vec<float> exp2_vec(const Vec<float>& x) {
  using V = Vec<float>;
  using I = VecOf<float>::I;
  const V shifted = x + 12582912.0f;
  const V r = x - (shifted - 12582912.0f);
  V p = r * 1.5403530393381609e-4f + 1.3333558146428443e-3f;
  p = p * r + 9.6181291076284772e-3f;
  p = p * r + 5.5504108664821580e-2f;
  p = p * r + 2.4022650695910071e-1f;
  p = p * r + 6.9314718055994531e-1f;
  p = p * r + 1.0f;
  const I exponent = ((I)shifted << 23) + 0x3f800000;
  const V result = p * (V)exponent;
  return x < -126.0f ? V{} : result;
}

PYELASTIC_INLINE Vec<double> exp2_vec(const Vec<double>& x) {
  using V = Vec<double>;
  using I = VecOf<double>::I;
  const V shifted = x + 6755399441055744.0;
  // ln2^k / k!, k = 13 .. 1: the remainder at |r| = 1/2 is 1e-17.
  const V r = x - (shifted - 6755399441055744.0);
  V p = r * 1.3691488853904128e-12 + 2.5678435993488202e-11;
  p = p * r + 4.4455382718708114e-10;
  p = p * r + 7.0549116208011233e-9;
  p = p * r + 1.0178086009239699e-7;
  p = p * r + 1.3215486790144309e-6;
  p = p * r + 1.5252733804059840e-5;
  p = p * r + 1.5403530393381609e-4;
  p = p * r + 1.3333558146428443e-3;
  p = p * r + 9.6181291076284772e-3;
  p = p * r + 5.5504108664821580e-2;
  p = p * r + 2.4022650695910071e-1;
  p = p * r + 6.9314718055994531e-1;
  p = p * r + 1.0;
  const I exponent = ((I)shifted << 52) + 0x3ff0000000000000;
  const V result = p * (V)exponent;
  return x < -1022.0 ? V{} : result;
}

// log2 x for x >= 0 in the type's normal range, absolute error below 2 ulp of max(1, |log2 x|); NaN and Inf stay.
// Method: x = 2^e m with m in [sqrt(1/2), sqrt(2)), log2 m = 2 / ln2 atanh((m - 1) / (m + 1)) by its series.
PYELASTIC_INLINE Vec<float> log2_vec(const Vec<float>& x) {
  using V = Vec<float>;
  using I = VecOf<float>::I;
  const I shifted = (I)x - 0x3f3504f3;  // so that m begins at sqrt(1/2)
  const I exponent = shifted >> 23;
  const V m = (V)((shifted & 0x007fffff) + 0x3f3504f3);
  const V s = (m - 1.0f) / (m + 1.0f), z = s * s;
  V p = z * 0.26230819f + 0.32059890f;
  p = p * z + 0.41219858f;
  p = p * z + 0.57707802f;
  p = p * z + 0.96179669f;
  const V result = s * 2.88539008f + (s * z * p + __builtin_convertvector(exponent, V));
  return x - x == 0.0f ? result : x;
}

PYELASTIC_INLINE Vec<double> log2_vec(const Vec<double>& x) {
  using V = Vec<double>;
  using I = VecOf<double>::I;
  const I shifted = (I)x - 0x3fe6a09e667f3bcd;
  const I exponent = shifted >> 52;
  const V m = (V)((shifted & 0x000fffffffffffff) + 0x3fe6a09e667f3bcd);
  const V s = (m - 1.0) / (m + 1.0), z = s * s;
  V p = z * 0.12545174268599682 + 0.1373995277037108;  // 2 / ((2 k + 1) ln 2), k = 11 .. 1
  p = p * z + 0.15186263588304877;
  p = p * z + 0.16972882833987804;
  p = p * z + 0.19235933878519512;
  p = p * z + 0.2219530832136867;
  p = p * z + 0.2623081892525388;
  p = p * z + 0.3205988979753252;
  p = p * z + 0.41219858311113244;
  p = p * z + 0.5770780163555853;
  p = p * z + 0.9617966939259757;
  const V result = s * 2.8853900817779268 + (s * z * p + __builtin_convertvector(exponent, V));
  return x - x == 0.0 ? result : x;
}

}  // namespace
}  // namespace pyelastic
