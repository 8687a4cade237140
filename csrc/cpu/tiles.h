// bfloat16 products on CPUs with AMX: a tile register holds 16 rows of 64 bytes, an instruction multiplies two and adds to
// a third: [16, 32] bfloat16 by [32, 16] into [16, 16] float.
//
// A panel of B, pairs of bfloat16 along the depth by columns, is what the instruction takes as it is. A is packed in groups of
// 32 rows: for every 32 of the depth two tiles of 16 rows each, contiguous. A result's tile has 32 rows and columns, four
// registers. Depths are filled up with zeros.
#pragma once

#include <immintrin.h>

#include "products.h"

namespace pyelastic {
namespace PYELASTIC_ISA {
namespace {

#if defined(__AMX_BF16__)
struct Tiles {
  using Element = std::uint32_t;
  using Source = std::uint16_t;
  static constexpr Int depth = 2;
  static constexpr Int group = 32;
  static constexpr bool tiled = true;
  static constexpr Int kSide = 16;               // rows of a register, and its elements of 32 bits in a row
  static constexpr Int kTile = kSide * kSide;
  static Int elements(Int of) { return round_up(ceil_div(of, depth), kSide); }

  // The registers' shapes. Thread-local in hardware: a thread sets them before its first product, and lets go of them so that
  // the kernel need not save them.
  class Ready {
   public:
    Ready() {
      struct alignas(64) Shapes {
        std::uint8_t palette, start, reserved[14];
        std::uint16_t bytes[16];
        std::uint8_t rows[16];
      };
      static constexpr std::uint16_t kBytes = 4 * kSide;
      static constexpr Shapes kShapes = {
          1, 0, {}, {kBytes, kBytes, kBytes, kBytes, kBytes, kBytes, kBytes, kBytes}, {16, 16, 16, 16, 16, 16, 16, 16}};
      _tile_loadconfig(&kShapes);
    }
    ~Ready() { _tile_release(); }
    Ready(const Ready&) = delete;
    Ready& operator=(const Ready&) = delete;
  };

  // Registers 0 .. 3: the result, 4 and 5: A, 6 and 7: B.
  template <bool kBoth>
  static void multiply_tiles(const Element* a, Int lda, Int a_step, const Element* b, Int depth, float* out, Int ldo, bool add) {
    const Int pitch = ldo * static_cast<Int>(sizeof(float)), b_pitch = kPanel * static_cast<Int>(sizeof(Element));
    const Int a_pitch = lda * static_cast<Int>(sizeof(Element));
    asm volatile("" ::: "memory");  // GCC does not know that tile loads read memory
    if (add) {
      _tile_loadd(0, out, pitch);
      _tile_loadd(1, out + kSide, pitch);
      if constexpr (kBoth) {
        _tile_loadd(2, out + kSide * ldo, pitch);
        _tile_loadd(3, out + kSide * ldo + kSide, pitch);
      }
    } else {
      _tile_zero(0);
      _tile_zero(1);
      if constexpr (kBoth) {
        _tile_zero(2);
        _tile_zero(3);
      }
    }
    for (Int k = 0; k < depth; k += kSide) {
      _tile_loadd(4, a, a_pitch);
      _tile_loadd(6, b, b_pitch);
      _tile_loadd(7, b + kSide, b_pitch);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (kBoth) {
        _tile_loadd(5, a + kSide * lda, a_pitch);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      a += a_step;
      b += kSide * kPanel;
    }
    _tile_stored(0, out, pitch);
    _tile_stored(1, out + kSide, pitch);
    if constexpr (kBoth) {
      _tile_stored(2, out + kSide * ldo, pitch);
      _tile_stored(3, out + kSide * ldo + kSide, pitch);
    }
  }

  // As products.h's.
  static void multiply(Int rows, const Element* a, const Element* b, Int depth, float* out, Int ldo, bool add) {
    if (rows > kSide) return multiply_tiles<true>(a, kSide, 2 * kTile, b, depth, out, ldo, add);
    multiply_tiles<false>(a, kSide, 2 * kTile, b, depth, out, ldo, add);
  }

  static Element* tile_row(Element* group, Int row, Int element) {
    return group + element / kSide * 2 * kTile + row / kSide * kTile + row % kSide * kSide;
  }

  // Rows of A whose depth is contiguous.
  template <class Read>
  static void pack_along(const Read& read, Int first, Int count, Int k0, Int depth, Element* out, Int pitch) {
    constexpr Int kLine = 2 * kSide;  // of a tile
    Source room[kDepth];
    for (Int row = 0; row < count; row += group, out += pitch) {
      for (Int i = 0; i < group; ++i) {
        for (Int k = 0; k < depth; k += kDepth) {
          const Int n = row + i < count ? least(kDepth, depth - k) : 0;
          const Source* line = n > 0 ? read(first + row + i, k0 + k, n, room) : room;
          Int at = 0;
          for (; at + kLine <= n; at += kLine) std::memcpy(tile_row(out, i, (k + at) / 2), line + at, sizeof(Source) * kLine);
          for (; at < 2 * elements(least(kDepth, depth - k)); at += kLine) {
            Source last[kLine] = {};
            for (Int l = 0; l < n - at; ++l) last[l] = line[at + l];
            std::memcpy(tile_row(out, i, (k + at) / 2), last, sizeof(last));
          }
        }
      }
    }
  }

  // Rows of A from panels(row, k, n, to): rows row .. row + 31 of depths k .. k + n - 1, as panels of B are packed.
  template <class Panels>
  static void pack_across(const Panels& panels, Int count, Int depth, Element* out, Int pitch) {
    alignas(64) Element room[kDepth / 2 * kPanel];
    for (Int row = 0; row < count; row += group, out += pitch) {
      for (Int k = 0; k < depth; k += kDepth) {
        const Int n = least(kDepth, depth - k);
        panels(row, k, n, room);
        for (Int e = 0; e < elements(n); e += 4) {
          const Element* lines[4];
          for (Int l = 0; l < 4; ++l) lines[l] = room + (e + l) * kPanel;
          for (Int i = 0; i < group; i += 4) turn(lines, i, tile_row(out, i, k / 2 + e) + e % kSide, kSide);
        }
      }
    }
  }
};

using Bfloat16s = Tiles;
#elif defined(__AVX512BF16__)
using Bfloat16s = Pairs;
#endif

}  // namespace
}  // namespace PYELASTIC_ISA
}  // namespace pyelastic
