// What products.h needs to multiply bfloat16 with AMX (amx.h).
//
// A panel of B is what the instruction takes as it is. A is packed in groups of 32 rows: for every 32 of the depth two tiles of
// 16 rows each, contiguous. Depths are filled up with zeros.
#pragma once

#include "amx.h"
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
  static constexpr Int kSide = kTileRows;        // rows of a register, and its elements in a row
  static constexpr Int kTile = kSide * kSide;
  static Int elements(Int of) { return round_up(ceil_div(of, depth), kSide); }

  using Ready = TileRegisters;

  // As products.h's.
  static void multiply(Int rows, const Element* a, const Element* b, Int depth, float* out, Int ldo, bool add) {
    constexpr Int kPitch = sizeof(Element) * kSide, kStep = sizeof(Element) * 2 * kTile;
    if (rows > kSide) return multiply_tiles<true>(a, kPitch, kStep, b, depth / kSide, out, ldo, add);
    multiply_tiles<false>(a, kPitch, kStep, b, depth / kSide, out, ldo, add);
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
