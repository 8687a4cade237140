// Products on CPUs with AVX2 or AVX-512, A [rows, depth] B [depth, columns]: packed operands, and the micro-kernel on them.
//
// Packing: A in groups of 12 rows (AVX2: 6), B in panels of two vectors of columns, depth-major, so that the micro-kernel
// (24 sums in registers; 12) reads both as streams. With AVX-512-BF16 an element can be a pair of bfloat16 along the depth,
// and with AMX (tiles.h) groups have 32 rows, packed as its tiles; else everything is converted to float. A result's sum has
// one order, whatever the thread count.
#pragma once

#include <immintrin.h>

#include "../common/vec.h"
#include "rows.h"

namespace pyelastic {
namespace PYELASTIC_ISA {
namespace {

using Int = std::int64_t;

constexpr Int kHalf = VecOf<float>::lanes, kPanel = 2 * kHalf;
constexpr Int kDepth = 256;  // of one sum in registers
// Elements of packed B (way back) or of packed vectors (projection): 384 KB of 1 MB L2, where AVX-512 is missing 192 of 512.
constexpr Int kBlockElements = (kHalf == 16 ? 96 : 48) * 1024;

Int ceil_div(Int a, Int b) { return (a + b - 1) / b; }
Int round_up(Int a, Int b) { return ceil_div(a, b) * b; }

// What products are made of.
struct Floats {
  using Element = float;  // of a packed operand
  using Source = float;   // of a line before it is packed
  static constexpr Int depth = 1;            // of an element
  static constexpr Int group = kMicroRows;   // rows of A that meet a panel
  static constexpr bool tiled = false;       // A is packed as tiles
  static Int elements(Int of) { return of; }  // along a packed depth
  struct Ready {                             // what a thread holds while it multiplies
    Ready() {}
  };
};

PYELASTIC_INLINE void multiply_add(Vec<float>& sum, const Vec<float>& b, float a) { sum += b * a; }

#if defined(__AVX512BF16__)
struct Pairs {
  using Element = std::uint32_t;
  using Source = std::uint16_t;
  static constexpr Int depth = 2;
  static constexpr Int group = kMicroRows;
  static constexpr bool tiled = false;
  static Int elements(Int of) { return ceil_div(of, depth); }
  using Ready = Floats::Ready;
};
typedef std::uint32_t Words __attribute__((vector_size(64)));

PYELASTIC_INLINE void multiply_add(Vec<float>& sum, const Words& b, std::uint32_t a) {
  sum = (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)b, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)));
}
#endif

template <int kRows, class Element>
inline void multiply_rows(const Element* a, const Element* b, Int depth, float* out, Int ldo, bool add) {
  typedef Element Lanes __attribute__((vector_size(kVecBytes)));
  Vec<float> sum[kRows][2] = {};
  for (int r = 0; r < kRows; ++r) {  // may lie in L2 or beyond: asked for while sums are made
    __builtin_prefetch(out + r * ldo, 1);
    __builtin_prefetch(out + r * ldo + kPanel - 1, 1);
  }
#pragma GCC unroll 2
  for (Int k = 0; k < depth; ++k) {
    Lanes low, high;
    std::memcpy(&low, b, kVecBytes);
    std::memcpy(&high, b + kHalf, kVecBytes);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      multiply_add(sum[r][0], low, a[r]);
      multiply_add(sum[r][1], high, a[r]);
    }
    a += kMicroRows;
    b += kPanel;
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    if (add) {
      sum[r][0] += load_vec(out);
      sum[r][1] += load_vec(out + kHalf);
    }
    store_vec(out, sum[r][0]);
    store_vec(out + kHalf, sum[r][1]);
    out += ldo;
  }
}

// out [group, kPanel] (row stride ldo) = or += A B over `depth` packed elements; rows from `rows` on may be left out.
template <class Kind>
inline void multiply(Int rows, const typename Kind::Element* a, const typename Kind::Element* b, Int depth, float* out,
                     Int ldo, bool add) {
  if constexpr (Kind::tiled) {
    Kind::multiply(rows, a, b, depth, out, ldo, add);
  } else {
    constexpr int kThird = kMicroRows / 3;
    if (rows > 2 * kThird) return multiply_rows<kMicroRows>(a, b, depth, out, ldo, add);
    if (rows > kThird) return multiply_rows<2 * kThird>(a, b, depth, out, ldo, add);
    multiply_rows<kThird>(a, b, depth, out, ldo, add);
  }
}

inline float pack(const float* x) { return *x; }
inline std::uint32_t pack(const std::uint16_t* x) { return x[0] | static_cast<std::uint32_t>(x[1]) << 16; }
inline float pack(float x, float) { return x; }
inline std::uint32_t pack(std::uint16_t x, std::uint16_t y) { return x | static_cast<std::uint32_t>(y) << 16; }

// A matrix in memory, one of whose dimensions is contiguous. What is packed is read through a function like it: n elements of
// row `row` from element `at` on, n <= kSegment, as floats or bfloat16 words, in place or in `room`.
struct Matrix {
  const void* data;
  Dtype dtype;
  Int stride;

  const float* operator()(Int row, Int at, Int n, float* room) const {
    return read_row(data, dtype, row * stride + at, n, room);
  }
  const std::uint16_t* operator()(Int row, Int at, Int n, std::uint16_t* room) const {
    if (dtype == Dtype::bfloat16) return static_cast<const std::uint16_t*>(data) + row * stride + at;
    float wide[kSegment];
    write_row(read_row(data, dtype, row * stride + at, n, wide), n, room, Dtype::bfloat16, 0);
    return room;
  }
};

// Packs columns first .. first + count - 1 of rows k0 .. k0 + depth - 1, where the rows are the depth, into panels of
// kWidth columns, `pitch` elements apart. Each element is read once.
template <class Kind, Int kWidth, class Read>
void pack_across(const Read& read, Int first, Int count, Int k0, Int depth, typename Kind::Element* out, Int pitch) {
  using Source = typename Kind::Source;
  constexpr Int kLine = kSegment / kWidth * kWidth;
  Source room[2][kSegment];
  const Source zeros[kSegment] = {};
  for (Int k = 0; k < Kind::elements(depth) * Kind::depth; k += Kind::depth) {
    for (Int at = 0; at < count; at += kLine) {
      const Int n = least(kLine, count - at);
      const Source* lines[2] = {zeros, zeros};
      for (Int i = 0; i < Kind::depth && k + i < depth; ++i) lines[i] = read(k0 + k + i, first + at, n, room[i]);
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

// Four elements (of 32 bits) of each of four lines, turned: out[e][i] = lines[i][e], rows of out `pitch` elements apart.
template <class Source, class Element>
PYELASTIC_INLINE void turn(const Source* const* lines, Int at, Element* out, Int pitch) {
  const auto line = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(lines[i] + at)); };
  const auto store = [&](Int e, __m128i x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(out + e * pitch), x); };
  const __m128i low01 = _mm_unpacklo_epi32(line(0), line(1)), low23 = _mm_unpacklo_epi32(line(2), line(3));
  const __m128i high01 = _mm_unpackhi_epi32(line(0), line(1)), high23 = _mm_unpackhi_epi32(line(2), line(3));
  store(0, _mm_unpacklo_epi64(low01, low23));
  store(1, _mm_unpackhi_epi64(low01, low23));
  store(2, _mm_unpacklo_epi64(high01, high23));
  store(3, _mm_unpackhi_epi64(high01, high23));
}

// As pack_across, of rows first .. first + count - 1, where the columns k0 .. k0 + depth - 1 are the depth.
template <class Kind, Int kWidth, class Read>
void pack_along(const Read& read, Int first, Int count, Int k0, Int depth, typename Kind::Element* out, Int pitch) {
  using Source = typename Kind::Source;
  static_assert(kDepth <= kSegment, "a line is a segment");
  constexpr Int kTurned = kWidth / 4 * 4;
  Source room[kWidth][kDepth + 2];
  const Source zeros[kDepth + 2] = {};
  for (Int row = 0; row < count; row += kWidth, out += pitch) {
    for (Int k = 0; k < depth; k += kDepth) {
      const Int n = least(kDepth, depth - k), whole = n / Kind::depth;
      const Source* lines[kWidth];
      for (Int i = 0; i < kWidth; ++i) {
        lines[i] = row + i < count ? read(first + row + i, k0 + k, n, room[i]) : zeros;
      }
      typename Kind::Element* to = out + k / Kind::depth * kWidth;
      Int e = 0;
      for (; e + 4 <= whole; e += 4, to += 4 * kWidth) {
        for (Int i = 0; i < kTurned; i += 4) turn(lines + i, e * Kind::depth, to + i, kWidth);
        for (Int i = kTurned; i < kWidth; ++i) {
          for (Int j = 0; j < 4; ++j) to[j * kWidth + i] = pack(lines[i] + (e + j) * Kind::depth);
        }
      }
      for (; e < whole; ++e, to += kWidth) {
        for (Int i = 0; i < kWidth; ++i) to[i] = pack(lines[i] + e * Kind::depth);
      }
      if (whole * Kind::depth < n) {
        for (Int i = 0; i < kWidth; ++i) to[i] = pack(lines[i][n - 1], typename Kind::Source{});
        ++e, to += kWidth;
      }
      for (; e < Kind::elements(n); ++e, to += kWidth) {
        for (Int i = 0; i < kWidth; ++i) to[i] = 0;
      }
    }
  }
}

// The above of rows of A.
template <class Kind, class Read>
void pack_a(bool along, const Read& read, Int first, Int count, Int k0, Int depth, typename Kind::Element* out, Int pitch) {
  if constexpr (Kind::tiled) {
    const auto panels = [&](Int at, Int from, Int n, typename Kind::Element* to) {
      pack_across<Kind, kPanel>(read, first + at, least(kPanel, count - at), k0 + from, n, to, 0);
    };
    along ? Kind::pack_along(read, first, count, k0, depth, out, pitch) : Kind::pack_across(panels, count, depth, out, pitch);
  } else if (along) {
    pack_along<Kind, Kind::group>(read, first, count, k0, depth, out, pitch);
  } else {
    pack_across<Kind, Kind::group>(read, first, count, k0, depth, out, pitch);
  }
}

// `count` columns or rows cut into `parts` of whole units, as even as they can be and of at most `most` where that is a unit
// or more. Threads get as many parts each where there are enough, also in the four ranges a thread of parallel_for.
struct Cut {
  Int count, unit, units, parts;
  Cut(Int of, Int most, Int size, int threads) : count(of), unit(size), units(ceil_div(of, size)) {
    parts = ceil_div(units, most > unit ? most / unit : 1);
    parts = least(round_up(parts, parts > 4 * threads ? 4 * threads : threads), units);
  }
  Int first(Int part) const { return least(units * part / parts * unit, count); }
  Int widest() const { return parts == 0 ? 0 : ceil_div(units, parts) * unit; }
};

// Result tile [group, kPanel] of R at (row, column), of which the part inside of [rows, columns] counts.
template <class Kind>
void multiply_tile(const typename Kind::Element* a, const typename Kind::Element* b, Int depth, float* r, Int row, Int rows,
                   Int column, Int columns, bool add) {
  constexpr Int kGroup = Kind::group;
  float* to = r + row * columns + column;
  if (row + kGroup <= rows && column + kPanel <= columns) return multiply<Kind>(kGroup, a, b, depth, to, columns, add);
  alignas(64) float tile[kGroup * kPanel];
  multiply<Kind>(rows - row, a, b, depth, tile, kPanel, false);
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
