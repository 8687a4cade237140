// bfloat16 products by AMX. A tile register holds 16 rows of 64 bytes; an instruction multiplies two and adds to a third:
// A [16, 32] bfloat16 by B [32, 16], which lies as pairs along the depth, into [16, 16] float.
#pragma once

#if defined(__AMX_BF16__)
#include <immintrin.h>

#include <cstdint>

namespace pyelastic {
namespace PYELASTIC_ISA {
namespace {

constexpr int kTileRows = 16;     // of a register
constexpr int kTileColumns = 32;  // and rows of a result in four registers
constexpr int kTileDepth = 32;    // of one instruction

// The registers' shapes. They are a thread's own: it sets them before its first product, and lets go of them so that the
// kernel need not save them.
class TileRegisters {
 public:
  TileRegisters() {
    struct alignas(64) Shapes {
      std::uint8_t palette, start, reserved[14];
      std::uint16_t bytes[16];
      std::uint8_t rows[16];
    };
    static constexpr Shapes kShapes = {
        1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_loadconfig(&kShapes);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// out [32 or 16, 32], rows ldo apart, = or += A B over `steps` steps of 32 of the depth. Rows of A lie a_pitch bytes apart, its
// steps a_step bytes; b [16 steps][32] pairs. kBoth: 32 rows. Registers 0 .. 3: the result, 4 and 5: A, 6 and 7: B.
template <bool kBoth>
inline void multiply_tiles(const void* a, std::int64_t a_pitch, std::int64_t a_step, const void* b, std::int64_t steps,
                           float* out, std::int64_t ldo, bool add) {
  constexpr std::int64_t kPitch = 4 * kTileColumns;
  const std::int64_t pitch = ldo * static_cast<std::int64_t>(sizeof(float));
  const char *left = static_cast<const char*>(a), *right = static_cast<const char*>(b);
  asm volatile("" ::: "memory");  // GCC does not know that tile loads read memory
  if (add) {
    _tile_loadd(0, out, pitch);
    _tile_loadd(1, out + kTileRows, pitch);
    if constexpr (kBoth) {
      _tile_loadd(2, out + kTileRows * ldo, pitch);
      _tile_loadd(3, out + kTileRows * ldo + kTileRows, pitch);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kBoth) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  for (std::int64_t k = 0; k < steps; ++k) {
    _tile_loadd(4, left, a_pitch);
    _tile_loadd(6, right, kPitch);
    _tile_loadd(7, right + kPitch / 2, kPitch);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kBoth) {
      _tile_loadd(5, left + kTileRows * a_pitch, a_pitch);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    left += a_step;
    right += kTileRows * kPitch;
  }
  _tile_stored(0, out, pitch);
  _tile_stored(1, out + kTileRows, pitch);
  if constexpr (kBoth) {
    _tile_stored(2, out + kTileRows * ldo, pitch);
    _tile_stored(3, out + kTileRows * ldo + kTileRows, pitch);
  }
}

}  // namespace
}  // namespace PYELASTIC_ISA
}  // namespace pyelastic
#endif
