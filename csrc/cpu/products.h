// Products on CPUs with AVX2 or AVX-512, A [rows, depth] B [depth, columns]: packed operands, and the micro-kernel on them.
//
// Packing: A in groups of 12 rows (AVX2: 6), B in panels of two vectors of columns, depth-major, so that the micro-kernel
// (24 sums in registers; 12) reads both as streams. With AVX-512-BF16 an element can be a pair of bfloat16 along the depth;
// else everything is converted to float. A result's sum has one order, whatever the thread count.
#pragma once

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "../common/parallel.h"
#include "../common/vec.h"
#include "segments.h"

namespace pyelastic {
namespace PYELASTIC_ISA {
namespace {

using Int = std::int64_t;

constexpr Int kHalf = VecOf<float>::lanes, kGroup = kMicroRows, kPanel = 2 * kHalf;
constexpr Int kDepth = 256;  // of one sum in registers
// Elements of packed B (way back) or of packed vectors (projection): 384 KB of 1 MB L2, where AVX-512 is missing 192 of 512.
constexpr Int kBlockElements = (kHalf == 16 ? 96 : 48) * 1024;

Int ceil_div(Int a, Int b) { return (a + b - 1) / b; }
Int round_up(Int a, Int b) { return ceil_div(a, b) * b; }

struct Floats {
  using Element = float;  // of a packed operand
  using Source = float;   // of a line before it is packed
  static constexpr Int depth = 1;
};

PYELASTIC_INLINE void multiply_add(Vec<float>& sum, const Vec<float>& b, float a) { sum += b * a; }

#if defined(__AVX512BF16__)
struct Pairs {
  using Element = std::uint32_t;
  using Source = std::uint16_t;
  static constexpr Int depth = 2;
};
typedef std::uint32_t Words __attribute__((vector_size(64)));

PYELASTIC_INLINE void multiply_add(Vec<float>& sum, const Words& b, std::uint32_t a) {
  sum = (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)b, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)));
}
#endif

// out [kGroup, kPanel] (row stride ldo) = or += A B over `depth` packed elements.
template <class Element>
inline void multiply(const Element* a, const Element* b, Int depth, float* out, Int ldo, bool add) {
  typedef Element Lanes __attribute__((vector_size(kVecBytes)));
  Vec<float> sum[kGroup][2] = {};
#pragma GCC unroll 2
  for (Int k = 0; k < depth; ++k) {
    Lanes low, high;
    std::memcpy(&low, b, kVecBytes);
    std::memcpy(&high, b + kHalf, kVecBytes);
#pragma GCC unroll 12
    for (int r = 0; r < kGroup; ++r) {
      multiply_add(sum[r][0], low, a[r]);
      multiply_add(sum[r][1], high, a[r]);
    }
    a += kGroup;
    b += kPanel;
  }
#pragma GCC unroll 12
  for (int r = 0; r < kGroup; ++r) {
    if (add) {
      sum[r][0] += load_vec(out);
      sum[r][1] += load_vec(out + kHalf);
    }
    store_vec(out, sum[r][0]);
    store_vec(out + kHalf, sum[r][1]);
    out += ldo;
  }
}

// n elements as floats or as bfloat16 words: in place where they are that, else in `room`.
inline const float* line(const void* data, Dtype dtype, Int at, Int n, float* room) {
  return segment(data, dtype, at, n, room);
}
inline const std::uint16_t* line(const void* data, Dtype dtype, Int at, Int n, std::uint16_t* room) {
  if (dtype == Dtype::bfloat16) return static_cast<const std::uint16_t*>(data) + at;
  float wide[kSegment];
  store_segment(room, Dtype::bfloat16, 0, n, segment(data, dtype, at, n, wide));
  return room;
}
inline float pack(const float* x) { return *x; }
inline std::uint32_t pack(const std::uint16_t* x) { return x[0] | static_cast<std::uint32_t>(x[1]) << 16; }
inline float pack(float x, float) { return x; }
inline std::uint32_t pack(std::uint16_t x, std::uint16_t y) { return x | static_cast<std::uint32_t>(y) << 16; }

// A matrix in memory, one of whose dimensions is contiguous.
struct Matrix {
  const void* data;
  Dtype dtype;
  Int stride;
};

// Packs columns first .. first + count - 1 of rows k0 .. k0 + depth - 1, where the rows are the depth, into panels of
// kWidth columns, `pitch` elements apart. look(column, n, line) sees every element of rows once.
template <class Kind, Int kWidth, class Look>
void pack_across(const Matrix& x, Int first, Int count, Int k0, Int depth, typename Kind::Element* out, Int pitch,
                 const Look& look) {
  using Source = typename Kind::Source;
  constexpr Int kLine = kSegment / kWidth * kWidth;
  Source room[2][kSegment];
  const Source zeros[kSegment] = {};
  for (Int k = 0; k < depth; k += Kind::depth) {
    for (Int at = 0; at < count; at += kLine) {
      const Int n = least(kLine, count - at);
      const Source* lines[2] = {zeros, zeros};
      for (Int i = 0; i < Kind::depth && k + i < depth; ++i) {
        lines[i] = line(x.data, x.dtype, (k0 + k + i) * x.stride + first + at, n, room[i]);
        look(at, n, lines[i]);
      }
      typename Kind::Element* to = out + at / kWidth * pitch + k / Kind::depth * kWidth;
      Int j = 0;
      for (; j + kWidth <= n; j += kWidth, to += pitch) {
        for (Int l = 0; l < kWidth; ++l) to[l] = pack(lines[0][j + l], lines[1][j + l]);
      }
      if (j == n) continue;
      for (Int l = 0; l < kWidth; ++l) to[l] = j + l < n ? pack(lines[0][j + l], lines[1][j + l]) : 0;
    }
  }
}

// The same of rows first .. first + count - 1, where the columns k0 .. k0 + depth - 1 are the depth. look(row, n, line).
template <class Kind, Int kWidth, class Look>
void pack_along(const Matrix& x, Int first, Int count, Int k0, Int depth, typename Kind::Element* out, Int pitch,
                const Look& look) {
  using Source = typename Kind::Source;
  static_assert(kDepth <= kSegment, "a line is a segment");
  Source room[kWidth][kDepth + 2];
  const Source zeros[kDepth + 2] = {};
  for (Int row = 0; row < count; row += kWidth, out += pitch) {
    for (Int k = 0; k < depth; k += kDepth) {
      const Int n = least(kDepth, depth - k), whole = n / Kind::depth;
      const Source* lines[kWidth];
      for (Int i = 0; i < kWidth; ++i) {
        lines[i] = zeros;
        if (row + i >= count) continue;
        lines[i] = line(x.data, x.dtype, (first + row + i) * x.stride + k0 + k, n, room[i]);
        look(row + i, n, lines[i]);
      }
      typename Kind::Element* to = out + k / Kind::depth * kWidth;
      for (Int e = 0; e < whole; ++e, to += kWidth) {
        for (Int i = 0; i < kWidth; ++i) to[i] = pack(lines[i] + e * Kind::depth);
      }
      if (whole * Kind::depth == n) continue;
      for (Int i = 0; i < kWidth; ++i) to[i] = pack(lines[i][n - 1], typename Kind::Source{});
    }
  }
}

const auto kLookAway = [](Int, Int, const auto*) {};

// `count` columns or rows in blocks of at most `most`, whose number is a multiple of the threads where they are many.
Int block_width(Int count, Int most, Int unit, int threads) {
  const Int blocks = round_up(ceil_div(count, most > unit ? most / unit * unit : unit), threads);
  return round_up(ceil_div(count, blocks), unit);
}

// Result tile [kGroup, kPanel] of R at (row, column), of which the part inside of [rows, columns] counts.
template <class Element>
void multiply_tile(const Element* a, const Element* b, Int depth, float* r, Int row, Int rows, Int column, Int columns,
                   bool add) {
  float* to = r + row * columns + column;
  if (row + kGroup <= rows && column + kPanel <= columns) return multiply(a, b, depth, to, columns, add);
  float tile[kGroup * kPanel];
  multiply(a, b, depth, tile, kPanel, false);
  for (Int i = 0; i < least(kGroup, rows - row); ++i) {
    for (Int j = 0; j < least(kPanel, columns - column); ++j) {
      const float value = tile[i * kPanel + j];
      to[i * columns + j] = add ? to[i * columns + j] + value : value;
    }
  }
}

}  // namespace
}  // namespace PYELASTIC_ISA
}  // namespace pyelastic
