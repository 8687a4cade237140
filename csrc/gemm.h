// C = A B or C += A B in float32, for what torch's BLAS is slow at. CPUs with AVX2 or AVX-512 only.
#pragma once

#include <cstdint>

namespace pyelastic {

// [rows, columns] with element (i, j) at i row + j column, one of which is 1.
struct GemmOperand {
  const float* data;
  std::int64_t row, column;
};

struct Gemm {
  // Bytes that `run` wants as `room`, on a 64-byte boundary.
  std::int64_t (*room)(std::int64_t rows, std::int64_t columns);
  // c [rows, columns] contiguous, a [rows, depth], b [depth, columns]. `add`: to what c holds. The bits depend on neither the
  // thread count nor `room`; c aliases nothing.
  void (*run)(GemmOperand a, GemmOperand b, float* c, std::int64_t rows, std::int64_t columns, std::int64_t depth, bool add,
              void* room, int threads);
};

namespace avx2 {
extern const Gemm gemm;
}
namespace avx512 {
extern const Gemm gemm;
}

}  // namespace pyelastic
