// AMX's instructions in C++, and csrc/cpu/gemm.cpp on them: how operands are packed into tiles is tested on CPUs without
// AMX too. Compiled by test_soft_tiles.py with -D__AMX_BF16__, without -mamx-*.
#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace soft {

// Registers of 16 rows of 64 bytes, shaped by the one configuration that amx.h asks for.
struct Tiles {
  bool ready = false;
  unsigned char rows[8][16][64];
};
thread_local Tiles tiles;

// A product without configuration, or one that forgets to let go of the registers, ends the process.
inline void expect(bool holds) {
  if (!holds) std::abort();
}
inline void configure(const void*) {
  expect(!tiles.ready);
  tiles.ready = true;
}
inline void release() {
  expect(tiles.ready);
  tiles.ready = false;
}
inline void zero(int t) {
  expect(tiles.ready);
  std::memset(tiles.rows[t], 0, sizeof(tiles.rows[t]));
}
inline void load(int t, const void* from, std::int64_t pitch) {
  expect(tiles.ready);
  for (int r = 0; r < 16; ++r) std::memcpy(tiles.rows[t][r], static_cast<const char*>(from) + r * pitch, 64);
}
inline void store(int t, void* to, std::int64_t pitch) {
  expect(tiles.ready);
  for (int r = 0; r < 16; ++r) std::memcpy(static_cast<char*>(to) + r * pitch, tiles.rows[t][r], 64);
}
inline float bfloat16(const unsigned char* row, int i) {
  std::uint16_t high;
  std::memcpy(&high, row + 2 * i, sizeof(high));
  const std::uint32_t bits = static_cast<std::uint32_t>(high) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline void multiply(int c, int a, int b) {
  expect(tiles.ready);
  for (int m = 0; m < 16; ++m) {
    float sums[16];
    std::memcpy(sums, tiles.rows[c][m], sizeof(sums));
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 16; ++n) {
        for (int i = 0; i < 2; ++i) sums[n] += bfloat16(tiles.rows[a][m], 2 * k + i) * bfloat16(tiles.rows[b][k], 2 * n + i);
      }
    }
    std::memcpy(tiles.rows[c][m], sums, sizeof(sums));
  }
}

}  // namespace soft

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig soft::configure
#define _tile_release soft::release
#define _tile_loadd soft::load
#define _tile_stored soft::store
#define _tile_zero soft::zero
#define _tile_dpbf16ps soft::multiply

#include "../csrc/cpu/gemm.cpp"

// Of csrc/gemm.h, both operands bfloat16.
extern "C" {
std::int64_t soft_room(std::int64_t rows, std::int64_t columns) { return pyelastic::soft_amx::gemm.room(rows, columns); }
void soft_gemm(const void* a, std::int64_t a_row, std::int64_t a_column, const void* b, std::int64_t b_row,
               std::int64_t b_column, float* c, std::int64_t rows, std::int64_t columns, std::int64_t depth, int add, void* room,
               int threads) {
  using pyelastic::Dtype;
  pyelastic::soft_amx::gemm.run({a, Dtype::bfloat16, a_row, a_column}, {b, Dtype::bfloat16, b_row, b_column}, c, rows, columns,
                                depth, add != 0, room, threads);
}
}
