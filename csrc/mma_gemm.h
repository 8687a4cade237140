// C = A B (or C += A B) with float16 operands and float32 sums, on tensor cores (sm_80 and newer).
//
// A [m, k] and B [k, n]; `k_major` says that k is the fast dimension of an operand in memory, else m or n
// is. lda, ldb are multiples of 8, the data 16-byte aligned; a k-major operand is zero between k and the next
// multiple of 8. C [splits, m, ldc] float: the sum over k is cut into `splits` parts, each with a C of
// its own, which the caller adds: enough blocks for a small m x n, and no atomics.
#pragma once

#include <cstdint>

namespace pyelastic {
namespace cuda {

struct GemmOperand {
  const void* data;
  std::int64_t ld;
  bool k_major;
};

void mma_gemm(const GemmOperand& a, const GemmOperand& b, std::int64_t m, std::int64_t n, std::int64_t k, float* c,
              std::int64_t ldc, int splits, bool add, void* stream);

}  // namespace cuda
}  // namespace pyelastic
