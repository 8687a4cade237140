// Every PTX instruction our kernels use, behind a name, with its emulated twin. Fragment layouts: PTX ISA 8.x, section
// "Matrix fragments for mma.m16n8k16" and "ldmatrix".
#pragma once

#include "cuda.cuh"

namespace pyelastic {

struct F16 {};
struct BF16 {};

#if defined(PYELASTIC_EMULATOR)

inline void cp_async_16(void* shared, const void* global, bool valid) {
  emulator::copy_async(shared, global, valid);
}
inline void cp_async_commit() { emulator::copy_async_commit(); }
template <int kNewestLeft>
void cp_async_wait() {
  emulator::copy_async_wait(kNewestLeft);
}

inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;  // subnormals are flushed; NaN is not below
}

// The larger; NaN if either is.
inline float max_nan(float a, float b) { return a > b || a != a ? a : b; }

inline float decode(std::uint16_t bits, F16) { return __half2float(__half{bits}); }
inline float decode(std::uint16_t bits, BF16) { return __bfloat162float(__nv_bfloat16{bits}); }
inline std::uint32_t pack(float low, float high, F16) {
  return __float2half_rn(low).bits | static_cast<std::uint32_t>(__float2half_rn(high).bits) << 16;
}
inline std::uint32_t pack(float low, float high, BF16) {
  return __float2bfloat16_rn(low).bits | static_cast<std::uint32_t>(__float2bfloat16_rn(high).bits) << 16;
}

// Lane l gives the address of row l % 8 of matrix l / 8, and gets of each matrix the pair at row l / 4, columns
// 2 (l % 4) and the next; transposed, the pair at rows 2 (l % 4) and the next, column l / 4.
inline void ldmatrix(std::uint32_t (&r)[4], const void* row, bool transposed) {
  if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0) emulator::fail("ldmatrix: addresses must be multiples of 16 bytes");
  const unsigned char* all = emulator::warp_deposit(&row, sizeof(row), "ldmatrix", 0);
  const unsigned l = emulator::lane();
  for (unsigned q = 0; q < 4; ++q) {
    std::uint16_t pair[2];
    for (unsigned i = 0; i < 2; ++i) {
      const unsigned from = transposed ? 2 * (l % 4) + i : l / 4, column = transposed ? l / 4 : 2 * (l % 4) + i;
      const std::uint16_t* address;
      std::memcpy(&address, all + (8 * q + from) * emulator::kDeposit, sizeof(address));
      emulator::check_access(address + column, 2, false, false);
      std::memcpy(&pair[i], address + column, 2);
    }
    r[q] = pair[0] | static_cast<std::uint32_t>(pair[1]) << 16;
  }
}
inline void ldmatrix_x4(std::uint32_t (&r)[4], const void* row) { ldmatrix(r, row, false); }
inline void ldmatrix_x4_trans(std::uint32_t (&r)[4], const void* row) { ldmatrix(r, row, true); }

// Registers of A: rows g, g + 8, g, g + 8 and k 2 t, 2 t, 2 t + 8, 2 t + 8 (g = lane / 4, t = lane % 4); of B: column g,
// k 2 t and 2 t + 8; of d: rows g, g, g + 8, g + 8 and columns 2 t, 2 t + 1, 2 t, 2 t + 1.
template <class Type>
void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], Type type) {
  float own[12];
  for (int i = 0; i < 12; ++i) {
    const std::uint32_t pair = i < 8 ? a[i / 2] : b[(i - 8) / 2];
    own[i] = decode(static_cast<std::uint16_t>(pair >> (i % 2 * 16)), type);
  }
  const unsigned char* all = emulator::warp_deposit(own, sizeof(own), "mma", 0);
  const unsigned g = emulator::lane() / 4, t = emulator::lane() % 4;
  for (unsigned e = 0; e < 4; ++e) {
    double sum = 0;
    for (unsigned from = 0; from < 4; ++from) {  // holds k = 2 from, 2 from + 1 and those plus 8
      float left[8], right[4];
      std::memcpy(left, all + (g * 4 + from) * emulator::kDeposit, sizeof(left));
      std::memcpy(right, all + ((2 * t + e % 2) * 4 + from) * emulator::kDeposit + sizeof(left), sizeof(right));
      const unsigned row = e / 2 * 2;  // registers 1 and 3 hold row g + 8
      for (unsigned i = 0; i < 2; ++i) {
        sum += static_cast<double>(left[row + i]) * right[i] + static_cast<double>(left[4 + row + i]) * right[2 + i];
      }
    }
    d[e] = static_cast<float>(d[e] + sum);
  }
}

#else

__device__ __forceinline__ std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory, asynchronously; zeros where not valid (the address is then unused).
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int kNewestLeft>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kNewestLeft) : "memory");
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float max_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

__device__ __forceinline__ std::uint32_t pack(float low, float high, F16) {
  std::uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ std::uint32_t pack(float low, float high, BF16) {
  std::uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

__device__ __forceinline__ void ldmatrix_x4(std::uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(std::uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b, 16 x 8 x 16.
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                                             F16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                                             BF16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif

}  // namespace pyelastic
