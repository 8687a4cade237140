// fira on the CPU: the moments of a piece of R, and C, for kernels that make R and use C piece by piece.
//
// A piece is n elements of a memory row, in L1. Moments that are codes (8 bits) are taken on the left in tiles of 128
// coordinates by 64 vectors, since the scale of a block spans coordinates, which there lie in different memory rows.
#pragma once

#include <cmath>

#include "fira_rows.h"

namespace pyelastic {
namespace PYELASTIC_ISA {
namespace {

using Int = std::int64_t;

constexpr Int kColumns = 64;  // vectors of a tile on the left

inline Int blocks_of(const FiraProblem& p) { return (p.rank + kFiraBlock - 1) / kFiraBlock; }

template <class T>
T decode(std::int8_t code, T scale) {
  const T y = static_cast<T>(code) / T(127);
  return y * (y < 0 ? -y : y) * scale;
}
template <class T>
T decode(std::uint8_t code, T scale) {
  const T y = static_cast<T>(code) / T(255);
  return y * y * (y * y) * scale;
}
template <class T>
void encode(T x, T scale, std::int8_t* code) {
  const T a = scale > 0 ? scale : T(1);
  const T y = T(127) * std::sqrt((x < 0 ? -x : x) / a);
  *code = y == y ? static_cast<std::int8_t>(std::rint(x < 0 ? -y : y)) : std::int8_t(0);
}
template <class T>
void encode(T x, T scale, std::uint8_t* code) {
  const T a = scale > 0 ? scale : T(1);
  const T y = std::rint(T(255) * std::sqrt(std::sqrt(x / a)));
  *code = y == y ? static_cast<std::uint8_t>(x > 0 && y < 1 ? T(1) : y) : std::uint8_t(0);
}

// Elements [row, first .. first + n) of a moment that is codes. On the right a piece stays inside a block.
template <class T, class Code>
void decode_moment(const FiraProblem& p, const void* data, const float* scales, Int row, Int first, Int n, T* out) {
  const Code* codes = static_cast<const Code*>(data) + row * (p.left ? p.vectors : p.rank) + first;
  const Int blocks = blocks_of(p);
  for (Int i = 0; i < n; ++i) {
    const Int s = p.left ? (first + i) * blocks + row / kFiraBlock : row * blocks + first / kFiraBlock;
    out[i] = decode(codes[i], static_cast<T>(scales[s]));
  }
}

// Stores a tile [rows, n] of a moment (row stride `ld` in x) as codes and leaves in x what was stored. The tile spans whole
// blocks: on the right one row and at most 128 coordinates, on the left at most 128 coordinates (rows) of n vectors.
template <class T, class Code>
void encode_moment(const FiraProblem& p, void* data, float* scales, Int row, Int rows, Int first, Int n, T* x, Int ld) {
  const Int width = p.left ? p.vectors : p.rank, blocks = blocks_of(p);
  T most[kSegment];
  const Int scale_count = p.left ? n : 1;
  for (Int i = 0; i < scale_count; ++i) most[i] = 0;
  for (Int k = 0; k < rows; ++k) {
    for (Int i = 0; i < n; ++i) {
      const T value = x[k * ld + i], size = value < 0 ? -value : value;
      T& top = most[p.left ? i : 0];
      if (!(size <= top)) top = size;  // a NaN stays: nothing is larger
    }
  }
  for (Int i = 0; i < scale_count; ++i) {
    scales[p.left ? (first + i) * blocks + row / kFiraBlock : row * blocks + first / kFiraBlock] =
        static_cast<float>(most[i]);
  }
  for (Int k = 0; k < rows; ++k) {
    Code* codes = static_cast<Code*>(data) + (row + k) * width + first;
    for (Int i = 0; i < n; ++i) {
      const T top = most[p.left ? i : 0];
      encode(x[k * ld + i], top, &codes[i]);
      x[k * ld + i] = decode(codes[i], top);
    }
  }
}

// Moments of type E with R.
template <class T, class E>
void update(const FiraProblem& p, const T* __restrict r, Int n, E* __restrict m, E* __restrict v) {
  const T b1 = static_cast<T>(p.beta1), b2 = static_cast<T>(p.beta2);
  const T c1 = static_cast<T>(1.0 - p.beta1), c2 = static_cast<T>(1.0 - p.beta2);
  for (Int i = 0; i < n; ++i) {
    narrow(b1 * widen(m[i]) + c1 * r[i], m + i);
    narrow(b2 * widen(v[i]) + c2 * (r[i] * r[i]), v + i);
  }
}

// N of moments as they are stored; may be written over m.
template <class T, class E>
void normalize(const FiraProblem& p, const E* m, const E* v, Int n, T* normal) {
  const T eps = static_cast<T>(p.eps), correction = static_cast<T>(p.correction);
  for (Int i = 0; i < n; ++i) {
    const T first = widen(m[i]), second = widen(v[i]);
    normal[i] = correction * (first / (std::sqrt(second) + eps));
  }
}

// Updates the stored moments of a piece with r = c R and leaves N in `normal`; not for codes. n <= kSegment.
template <class T>
void update_moments(const FiraProblem& p, const FiraMoments& s, Int row, Int first, Int n, const T* r, T* normal) {
  const Int at = row * (p.left ? p.vectors : p.rank) + first;
  const auto in_place = [&](auto* m, auto* v) {
    update(p, r, n, m + at, v + at);
    normalize(p, m + at, v + at, n, normal);
  };
  if (s.dtype == (sizeof(T) == sizeof(float) ? Dtype::float32 : Dtype::float64)) {
    return in_place(static_cast<T*>(s.m), static_cast<T*>(s.v));
  }
  if constexpr (sizeof(T) == sizeof(float)) {
    if (s.dtype == Dtype::bfloat16) return in_place(static_cast<std::uint16_t*>(s.m), static_cast<std::uint16_t*>(s.v));
  }
  T m[kSegment], v[kSegment];
  load_row(s.m, s.dtype, at, n, m);
  load_row(s.v, s.dtype, at, n, v);
  update(p, r, n, m, v);
  write_row(m, n, s.m, s.dtype, at);
  write_row(v, n, s.v, s.dtype, at);
  load_row(s.m, s.dtype, at, n, m);
  load_row(s.v, s.dtype, at, n, v);
  normalize(p, m, v, n, normal);
}

// Moments of vectors first .. first + count - 1 on the right, and their squares |R|^2, |N|^2.
// read(row, first, n, out): c R of a piece; once for each element, n <= kFiraBlock.
template <class T, class Read>
void moments_right(const FiraProblem& p, const FiraMoments& s, const Read& read, Int first, Int count, double* squares) {
  T r[kFiraBlock], normal[kFiraBlock], v[kFiraBlock];
  for (Int j = first; j < first + count; ++j) {
    double r2 = 0, n2 = 0;
    for (Int k = 0; k < p.rank; k += kFiraBlock) {
      const Int n = least(kFiraBlock, p.rank - k);
      read(j, k, n, r);
      if (s.m_scale == nullptr) {
        update_moments(p, s, j, k, n, r, normal);
      } else {
        decode_moment<T, std::int8_t>(p, s.m, s.m_scale, j, k, n, normal);
        decode_moment<T, std::uint8_t>(p, s.v, s.v_scale, j, k, n, v);
        update(p, r, n, normal, v);
        encode_moment<T, std::int8_t>(p, s.m, s.m_scale, j, 1, k, n, normal, 0);
        encode_moment<T, std::uint8_t>(p, s.v, s.v_scale, j, 1, k, n, v, 0);
        normalize(p, normal, v, n, normal);
      }
      r2 += sum_squares(r, n);
      n2 += sum_squares(normal, n);
    }
    squares[p.vectors + j] = r2;
    squares[2 * p.vectors + j] = n2;
  }
}

// Sums of squares of columns over rows, in T for kRowsFlush rows and then in double.
template <class T, Int kWidth>
class ColumnSquares {
 public:
  void add(const T* row, Int n) {
    add_squares(row, n, part_);
    if (++rows_ % kRowsFlush == 0) flush(part_, n, sums_);
  }
  const double* sums(Int n) {
    flush(part_, n, sums_);
    return sums_;
  }

 private:
  T part_[kWidth] = {};
  double sums_[kWidth] = {};
  Int rows_ = 0;
};

template <Int kWidth, class T>
void store_squares(const FiraProblem& p, Int first, Int n, ColumnSquares<T, kWidth>& r2, ColumnSquares<T, kWidth>& n2,
                   double* squares) {
  const double *of_r = r2.sums(n), *of_n = n2.sums(n);
  for (Int i = 0; i < n; ++i) {
    squares[p.vectors + first + i] = of_r[i];
    squares[2 * p.vectors + first + i] = of_n[i];
  }
}

// A tile of moments that are codes, all coordinates of n <= kColumns vectors.
template <class T, class Read>
void encoded_left(const FiraProblem& p, const FiraMoments& s, const Read& read, Int first, Int n, double* squares) {
  T m[kFiraBlock * kColumns], v[kFiraBlock * kColumns];  // 64 KB of float in all: L2, and a small part of a thread's stack
  T r[kColumns];
  ColumnSquares<T, kColumns> r2, n2;
  for (Int k0 = 0; k0 < p.rank; k0 += kFiraBlock) {
    const Int rows = least(kFiraBlock, p.rank - k0);
    for (Int k = 0; k < rows; ++k) {
      T *mk = m + k * kColumns, *vk = v + k * kColumns;
      read(k0 + k, first, n, r);
      decode_moment<T, std::int8_t>(p, s.m, s.m_scale, k0 + k, first, n, mk);
      decode_moment<T, std::uint8_t>(p, s.v, s.v_scale, k0 + k, first, n, vk);
      update(p, r, n, mk, vk);
      r2.add(r, n);
    }
    encode_moment<T, std::int8_t>(p, s.m, s.m_scale, k0, rows, first, n, m, kColumns);
    encode_moment<T, std::uint8_t>(p, s.v, s.v_scale, k0, rows, first, n, v, kColumns);
    for (Int k = 0; k < rows; ++k) {
      T *mk = m + k * kColumns, *vk = v + k * kColumns;
      normalize(p, mk, vk, n, mk);
      n2.add(mk, n);
    }
  }
  store_squares(p, first, n, r2, n2, squares);
}

// As moments_right, on the left; n <= kSegment.
template <class T, class Read>
void moments_left(const FiraProblem& p, const FiraMoments& s, const Read& read, Int first, Int count, double* squares) {
  const Int width = s.m_scale == nullptr ? kSegment : kColumns;
  for (Int at = first; at < first + count; at += width) {
    const Int n = least(width, first + count - at);
    if (s.m_scale != nullptr) {
      encoded_left<T>(p, s, read, at, n, squares);
      continue;
    }
    T r[kSegment], normal[kSegment];
    ColumnSquares<T, kSegment> r2, n2;
    for (Int k = 0; k < p.rank; ++k) {
      read(k, at, n, r);
      update_moments(p, s, k, at, n, r, normal);
      r2.add(r, n);
      n2.add(normal, n);
    }
    store_squares(p, at, n, r2, n2, squares);
  }
}

template <class T, class Read>
void moments_of(const FiraProblem& p, const FiraMoments& s, const Read& read, Int first, Int count, double* squares) {
  (p.left ? moments_left<T, Read> : moments_right<T, Read>)(p, s, read, first, count, squares);
}

// N of a piece from the stored moments; on the right it stays inside a block of codes. n <= kSegment.
template <class T>
void load_normalized(const FiraProblem& p, const FiraMoments& s, Int row, Int first, Int n, T* out) {
  const Int at = row * (p.left ? p.vectors : p.rank) + first;
  T m_room[kSegment], v_room[kSegment];
  const T *m = m_room, *v = v_room;
  if (s.m_scale == nullptr) {
    m = read_row(s.m, s.dtype, at, n, m_room);
    v = read_row(s.v, s.dtype, at, n, v_room);
  } else {
    decode_moment<T, std::int8_t>(p, s.m, s.m_scale, row, first, n, m_room);
    decode_moment<T, std::uint8_t>(p, s.v, s.v_scale, row, first, n, v_room);
  }
  normalize(p, m, v, n, out);
}

// C of a piece, over c = c R of it.
template <class T>
void combine(const FiraProblem& p, const FiraMoments& s, const T* f, Int row, Int first, Int n, T* c) {
  const T a_n = static_cast<T>(p.a_n), a_r = static_cast<T>(p.a_r);
  T normal[kSegment];
  load_normalized(p, s, row, first, n, normal);
  if (p.left) {
    for (Int i = 0; i < n; ++i) c[i] = a_n * normal[i] - a_r * f[first + i] * c[i];
  } else {
    const T ff = a_r * f[row];
    for (Int i = 0; i < n; ++i) c[i] = a_n * normal[i] - ff * c[i];
  }
}

template <class T>
inline void load_scaled(const void* r, Dtype dtype, Int at, Int n, double factor, T* out) {
  load_row(r, dtype, at, n, out);
  const T c = static_cast<T>(factor);
  for (Int i = 0; i < n; ++i) out[i] *= c;
}

}  // namespace
}  // namespace PYELASTIC_ISA
}  // namespace pyelastic
