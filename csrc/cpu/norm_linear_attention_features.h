// Features of norm_linear_attention and their gradients, a row at a time. Formulas: ../norm_linear_attention.h.
//
// A row of x is [dim] and then zeros up to a whole number of vectors; a row of features is [2 dim] with room for as many
// beyond. Loops work on whole vectors: what they write beyond a half is overwritten by the next one, or is zeros.
#pragma once

#include "../common/vec.h"
#include "../norm_linear_attention.h"
#include "rows.h"

namespace pyelastic {
namespace PYELASTIC_ISA {
namespace {

template <class T>
constexpr std::int64_t kLanes = VecOf<T>::lanes;
constexpr double kQuarter = 0.78539816339744831, kLog2e = 1.4426950408889634, kLn2 = 0.69314718055994531;

template <class T>
inline std::int64_t padded(std::int64_t width) {
  return (width + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

template <class T>
PYELASTIC_INLINE Vec<T> spread(T x) {
  return Vec<T>{} + x;
}

template <class T>
PYELASTIC_INLINE Vec<T> absolute(const Vec<T>& x) {
  return x < T(0) ? -x : x;
}

// Sum of the lanes, by halves.
template <class T, int kBytes = kVecBytes>
PYELASTIC_INLINE T total(const void* v) {
  if constexpr (kBytes == sizeof(T)) {
    T x;
    std::memcpy(&x, v, sizeof(x));
    return x;
  } else {
    typedef T Half __attribute__((vector_size(kBytes / 2)));
    Half halves[2];
    std::memcpy(halves, v, kBytes);
    const Half sum = halves[0] + halves[1];
    return total<T, kBytes / 2>(&sum);
  }
}
template <class T>
PYELASTIC_INLINE T total(const Vec<T>& v) {
  return total<T, kVecBytes>(&v);
}

// log2 x, 0 for x = 0.
template <class T>
PYELASTIC_INLINE Vec<T> log2_or_0(const Vec<T>& x) {
  return log2_vec(x == T(0) ? spread<T>(1) : x);
}

// 2^x, also beyond the type's range.
template <class T>
PYELASTIC_INLINE Vec<T> exp2_any(const Vec<T>& x) {
  constexpr T most = sizeof(T) == sizeof(float) ? T(127.99999) : T(1023.999999999999);
  const Vec<T> inside = exp2_vec(x > most ? spread<T>(most) : x);
  return x > most ? spread<T>(T(__builtin_inf())) : inside;
}

// a^p, 0 for a = 0; NaN stays.
template <class T>
PYELASTIC_INLINE Vec<T> power(const Vec<T>& a, const Vec<T>& p) {
  return a == T(0) ? Vec<T>{} : exp2_any<T>(p * log2_or_0<T>(a));
}

// tanh x, and 1 - tanh^2 x without cancellation.
template <class T>
PYELASTIC_INLINE Vec<T> tanh_of(const Vec<T>& x, Vec<T>& slope) {
  const Vec<T> e = exp2_vec(absolute<T>(x) * T(-2 * kLog2e));
  const Vec<T> t = (T(1) - e) / (T(1) + e);
  slope = T(4) * e / ((T(1) + e) * (T(1) + e));
  return x < T(0) ? -t : t;
}

// For |x| <= pi/4.
template <class T>
PYELASTIC_INLINE void cos_sin(const Vec<T>& x, Vec<T>& c, Vec<T>& s) {
  const Vec<T> y = x * x;
  // 1 / (2 k)!, 1 / (2 k + 1)! with alternating signs; the double needs three terms more.
  c = spread<T>(T(-2.7557319223985893e-7));
  s = spread<T>(T(-2.5052108385441720e-8));
  if constexpr (sizeof(T) == sizeof(double)) {
    c = spread<T>(4.7794773323873853e-14);
    s = spread<T>(2.8114572543455206e-15);
    c = c * y - 1.1470745597729725e-11;
    s = s * y - 7.6471637318198164e-13;
    c = c * y + 2.0876756987868099e-9;
    s = s * y + 1.6059043836821613e-10;
    c = c * y - 2.7557319223985893e-7;
    s = s * y - 2.5052108385441720e-8;
  }
  c = c * y + T(2.4801587301587302e-5);
  s = s * y + T(2.7557319223985893e-6);
  c = c * y - T(1.3888888888888889e-3);
  s = s * y - T(1.9841269841269841e-4);
  c = c * y + T(4.1666666666666667e-2);
  s = s * y + T(8.3333333333333333e-3);
  c = c * y - T(0.5);
  s = s * y - T(0.16666666666666667);
  c = c * y + T(1);
  s = s * y * x + x;
}

template <class T>
inline T square_of(const T* x, std::int64_t dim) {
  Vec<T> sum{};
  for (std::int64_t c = 0; c < dim; c += kLanes<T>) {
    const Vec<T> v = load_vec(x + c);
    sum += v * v;
  }
  return total<T>(sum);
}

// sqrt(square + eps^2), 1 if that is 0.
template <class T>
inline T norm_of(T square, T eps) {
  square += eps * eps;
  return square == T(0) ? T(1) : static_cast<T>(__builtin_sqrt(static_cast<double>(square)));
}
template <class T>
inline T norm_of(const T* x, std::int64_t dim, T eps) {
  return norm_of(square_of(x, dim), eps);
}

// What a head's features depend on. power: pola, [dim] and then ones.
template <class T>
struct Head {
  FeatureMap map;
  std::int64_t dim;
  T lam, tau, beta, key_power, alpha, eps;
  const T* power;
};

// A query's exponent and its parts.
template <class T>
struct Exponent {
  T r, t, slope, p;
};

// Those of n queries, from their squared norms; both arrays have room up to a whole number of vectors.
template <class T>
inline void exponents(const Head<T>& h, const T* squares, std::int64_t n, Exponent<T>* to) {
  for (std::int64_t i = 0; i < n; i += kLanes<T>) {
    Vec<T> r, slope;
    for (std::int64_t l = 0; l < kLanes<T>; ++l) r[l] = i + l < n ? norm_of(squares[i + l], h.eps) : T(1);
    const Vec<T> t = tanh_of<T>(r * h.beta, slope), p = (t + h.tau) * h.lam;
    for (std::int64_t l = 0; l < kLanes<T>; ++l) to[i + l] = {r[l], t[l], slope[l], p[l]};
  }
}

// [w where x > 0; w where x < 0], a NaN in both; opposite: the halves swapped. The first half's last vector may reach into
// the second, which is written after it.
template <class T>
inline void split_row(std::int64_t dim, const T* x, const T* w, bool opposite, T* f) {
  for (int half = 0; half < 2; ++half) {
    const bool positive = (half == 0) != opposite;
    for (std::int64_t c = 0; c < dim; c += kLanes<T>) {
      const Vec<T> v = load_vec(x + c), m = load_vec(w + c);
      store_vec(f + half * dim + c, positive ? (v <= T(0) ? Vec<T>{} : m) : (v >= T(0) ? Vec<T>{} : m));
    }
  }
}

template <class T>
inline void angle_row(const Head<T>& h, const T* x, const T* w, T inverse, T* f) {
  for (int half = 0; half < 2; ++half) {
    for (std::int64_t c = 0; c < h.dim; c += kLanes<T>) {
      Vec<T> slope, cosine, sine;
      cos_sin<T>(tanh_of<T>(load_vec(x + c) * inverse * h.alpha, slope) * T(kQuarter), cosine, sine);
      store_vec(f + half * h.dim + c, load_vec(w + c) * (half == 0 ? cosine : sine));
    }
  }
}

// elu + 1 of a row, and its slope.
template <class T>
inline void elu_row(std::int64_t dim, const T* x, T* slope, T* f) {
  for (std::int64_t c = 0; c < dim; c += kLanes<T>) {
    const Vec<T> v = load_vec(x + c), e = v <= T(0) ? exp2_vec(v * T(kLog2e)) : v - v + T(1);  // a NaN stays
    store_vec(slope + c, e);
    store_vec(f + c, v > T(0) ? v + T(1) : e);
  }
}

// phi_q of a row; w, l [dim]: magnitudes and their base's log2, kept for the gradient.
template <class T>
inline void query_row(const Head<T>& h, const Exponent<T>& e, const T* q, T* w, T* l, T* f) {
  if (h.map == FeatureMap::mala) return elu_row(h.dim, q, w, f);
  T inverse = 1;
  Vec<T> p{};
  if (h.power == nullptr) {
    inverse = T(1) / e.r;
    p = spread<T>(e.p);
  }
  for (std::int64_t c = 0; c < h.dim; c += kLanes<T>) {
    if (h.power != nullptr) p = load_vec(h.power + c);
    const Vec<T> a = absolute<T>(load_vec(q + c) * inverse), log = log2_or_0<T>(a);
    store_vec(l + c, log);
    store_vec(w + c, a == T(0) ? Vec<T>{} : exp2_any<T>(p * log));
  }
  if (h.map == FeatureMap::cosine) {
    angle_row(h, q, w, inverse, f);
  } else {
    split_row(h.dim, q, w, h.map == FeatureMap::pola_opposite, f);
  }
}

// phi_k of a row; w as above.
template <class T>
inline void key_row(const Head<T>& h, const T* k, T* w, T* f) {
  if (h.map == FeatureMap::mala) return elu_row(h.dim, k, w, f);
  for (std::int64_t c = 0; c < h.dim; c += kLanes<T>) {
    const Vec<T> a = absolute<T>(load_vec(k + c));
    if (h.power != nullptr) {
      store_vec(w + c, power<T>(a, load_vec(h.power + c)));
    } else {
      store_vec(w + c, h.key_power == T(3) ? a * a * a : power<T>(a, spread<T>(h.key_power)));
    }
  }
  if (h.map == FeatureMap::cosine) {
    angle_row(h, k, w, T(1) / norm_of(k, h.dim, h.eps), f);
  } else {
    split_row(h.dim, k, w, false, f);
  }
}

// Pairs of channels turned by a vector of angles s, c: two vectors, in place.
template <class T>
PYELASTIC_INLINE void turn_pairs(Vec<T>& a, Vec<T>& b, const Vec<T>& s, const Vec<T>& c) {
  using I = typename VecOf<T>::I;
  constexpr int lanes = VecOf<T>::lanes;
  I low, high, other;
  Vec<T> sign;
  for (int l = 0; l < lanes; ++l) {
    low[l] = l / 2;
    high[l] = lanes / 2 + l / 2;
    other[l] = l ^ 1;
    sign[l] = l % 2 == 0 ? T(-1) : T(1);
  }
  a = a * __builtin_shuffle(c, low) + __builtin_shuffle(a, other) * (__builtin_shuffle(s, low) * sign);
  b = b * __builtin_shuffle(c, high) + __builtin_shuffle(b, other) * (__builtin_shuffle(s, high) * sign);
}

// The split map and its rotation in one go, for rows of whole pairs of vectors: f as query_row and key_row make it, and g, f
// turned by the angles sin, cos [dim / 2] (null: not). w and l may be null.
template <bool kQuery, class T>
inline void split_and_turn(const Head<T>& h, const Exponent<T>& e, const T* x, const T* sin, const T* cos, T* w, T* l, T* f,
                           T* g) {
  constexpr std::int64_t lanes = kLanes<T>;
  const T inverse = kQuery ? T(1) / e.r : T(1);
  const Vec<T> p = spread<T>(kQuery ? e.p : h.key_power);
  const bool cube = !kQuery && h.key_power == T(3);
  for (std::int64_t c = 0; c < h.dim; c += 2 * lanes) {
    Vec<T> upper[2], lower[2];
    for (std::int64_t i = 0; i < 2; ++i) {
      const std::int64_t at = c + i * lanes;
      const Vec<T> v = load_vec(x + at), a = absolute<T>(v * inverse);
      Vec<T> m;
      if (cube) {
        m = a * a * a;
      } else {
        const Vec<T> log = log2_or_0<T>(a);
        m = a == T(0) ? Vec<T>{} : exp2_any<T>(p * log);
        if (l != nullptr) store_vec(l + at, log);
      }
      if (w != nullptr) store_vec(w + at, m);
      upper[i] = v <= T(0) ? Vec<T>{} : m;
      lower[i] = v >= T(0) ? Vec<T>{} : m;
      store_vec(f + at, upper[i]);
      store_vec(f + h.dim + at, lower[i]);
    }
    if (sin == nullptr) continue;
    const Vec<T> s = load_vec(sin + c / 2), co = load_vec(cos + c / 2);
    turn_pairs<T>(upper[0], upper[1], s, co);
    turn_pairs<T>(lower[0], lower[1], s, co);
    for (std::int64_t i = 0; i < 2; ++i) {
      store_vec(g + c + i * lanes, upper[i]);
      store_vec(g + h.dim + c + i * lanes, lower[i]);
    }
  }
}

// What reaches a channel's magnitude, from the gradient of its two features.
template <class T>
PYELASTIC_INLINE Vec<T> by_sign(const Vec<T>& x, const Vec<T>& upper, const Vec<T>& lower) {
  return x > T(0) ? upper : (x < T(0) ? lower : (x == T(0) ? Vec<T>{} : x));
}

template <class T>
PYELASTIC_INLINE Vec<T> sign_of(const Vec<T>& x) {
  return x > T(0) ? spread<T>(1) : (x < T(0) ? spread<T>(-1) : x);
}

template <class T>
inline void elu_gradient(std::int64_t dim, const T* slope, const T* df, T* dx) {
  for (std::int64_t c = 0; c < dim; c += kLanes<T>) store_vec(dx + c, load_vec(df + c) * load_vec(slope + c));
}

// dq [dim and padding] from df [2 dim]; adds the gradients of lam, tau, beta (pola: of each power) to `sums`.
template <class T>
inline void query_gradient(const Head<T>& h, const Exponent<T>& e, const T* q, const T* w, const T* l, const T* df, T* dq, double* sums) {
  if (h.map == FeatureMap::mala) return elu_gradient(h.dim, w, df, dq);
  const T *upper = df, *lower = df + h.dim;
  if (h.map == FeatureMap::pola_opposite) {
    upper = df + h.dim;
    lower = df;
  }
  if (h.power != nullptr) {
    for (std::int64_t c = 0; c < h.dim; c += kLanes<T>) {
      const Vec<T> x = load_vec(q + c), m = by_sign<T>(x, load_vec(upper + c), load_vec(lower + c)) * load_vec(w + c);
      store_vec(dq + c, load_vec(h.power + c) * m / (x == T(0) ? spread<T>(1) : x));
      const Vec<T> grad = m * load_vec(l + c) * T(kLn2);
      for (std::int64_t i = c; i < h.dim && i < c + kLanes<T>; ++i) sums[i] += static_cast<double>(grad[i - c]);
    }
    return;
  }
  const T inverse = T(1) / e.r;
  const bool cosine = h.map == FeatureMap::cosine;
  Vec<T> sum_p{}, sum_t{}, sum_n{};
  for (std::int64_t c = 0; c < h.dim; c += kLanes<T>) {
    const Vec<T> x = load_vec(q + c), m = load_vec(w + c);
    Vec<T> grad, turned{};
    if (cosine) {
      Vec<T> slope, co, si;
      cos_sin<T>(tanh_of<T>(x * inverse * h.alpha, slope) * T(kQuarter), co, si);
      const Vec<T> u = load_vec(upper + c), v = load_vec(lower + c);
      grad = u * co + v * si;
      turned = m * (v * co - u * si) * slope * (h.alpha * T(kQuarter));
      sum_n += turned * x * inverse;
    } else {
      grad = by_sign<T>(x, load_vec(upper + c), load_vec(lower + c));
    }
    const Vec<T> gm = grad * m;
    sum_t += gm;
    sum_p += gm * load_vec(l + c);
    store_vec(dq + c, gm * e.p / (x == T(0) ? spread<T>(1) : x) + turned * inverse);
  }
  const T p = total<T>(sum_p) * T(kLn2), t = total<T>(sum_t);
  const T pull = (p * h.lam * h.beta * e.slope - (e.p * t + total<T>(sum_n)) * inverse) * inverse;
  for (std::int64_t c = 0; c < h.dim; c += kLanes<T>) store_vec(dq + c, load_vec(dq + c) + load_vec(q + c) * pull);
  sums[0] += static_cast<double>(p * (h.tau + e.t));
  sums[1] += static_cast<double>(p * h.lam);
  sums[2] += static_cast<double>(p * h.lam * e.r * e.slope);
}

// dk from df; w: magnitudes.
template <class T>
inline void key_gradient(const Head<T>& h, const T* k, const T* w, const T* df, T* dk, double* sums) {
  if (h.map == FeatureMap::mala) return elu_gradient(h.dim, w, df, dk);
  const T *upper = df, *lower = df + h.dim;
  const bool cosine = h.map == FeatureMap::cosine;
  const T inverse = cosine ? T(1) / norm_of(k, h.dim, h.eps) : T(1);
  Vec<T> sum_n{};
  for (std::int64_t c = 0; c < h.dim; c += kLanes<T>) {
    const Vec<T> x = load_vec(k + c), a = absolute<T>(x), m = load_vec(w + c);
    Vec<T> grad, turned{};
    if (cosine) {
      Vec<T> slope, co, si;
      cos_sin<T>(tanh_of<T>(x * inverse * h.alpha, slope) * T(kQuarter), co, si);
      const Vec<T> u = load_vec(upper + c), v = load_vec(lower + c);
      grad = u * co + v * si;
      turned = m * (v * co - u * si) * slope * (h.alpha * T(kQuarter));
      sum_n += turned * x * inverse;
    } else {
      grad = by_sign<T>(x, load_vec(upper + c), load_vec(lower + c));
    }
    if (h.power != nullptr) {
      const Vec<T> gm = grad * m;
      store_vec(dk + c, load_vec(h.power + c) * gm / (x == T(0) ? spread<T>(1) : x));
      const Vec<T> grad_p = gm * log2_or_0<T>(a) * T(kLn2);
      for (std::int64_t i = c; i < h.dim && i < c + kLanes<T>; ++i) sums[i] += static_cast<double>(grad_p[i - c]);
      continue;
    }
    Vec<T> slope = T(3) * a * x;
    if (h.key_power != T(3)) {
      slope = exp2_any<T>(log2_or_0<T>(a) * (h.key_power - T(1))) * h.key_power * sign_of<T>(x);
    }
    store_vec(dk + c, slope * grad + turned * inverse);
  }
  if (cosine) {
    const T along = total<T>(sum_n) * inverse * inverse;
    for (std::int64_t c = 0; c < h.dim; c += kLanes<T>) store_vec(dk + c, load_vec(dk + c) - load_vec(k + c) * along);
  }
}

}  // namespace
}  // namespace PYELASTIC_ISA
}  // namespace pyelastic
