// C = A B or C += A B with float32 sums, for what torch's BLAS is slow at. CPUs with AVX2 or AVX-512 only.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace pyelastic {

// [rows, columns] with element (i, j) at i row + j column, one of which is 1. float32, bfloat16 or float16.
struct GemmOperand {
  const void* data;
  Dtype dtype;
  std::int64_t row, column;
};

struct Gemm {
  // Bytes that `run` wants as `room`, on a 64-byte boundary.
  std::int64_t (*room)(std::int64_t rows, std::int64_t columns);
  // c [rows, columns] contiguous, a [rows, depth], b [depth, columns]. `add`: to what c holds. The bits depend on neither the
  // thread count nor `room`; c aliases nothing. With AVX-512-BF16 or AMX two bfloat16 operands are multiplied as they are,
  // which takes subnormal ones for 0; all else is converted to float.
  void (*run)(GemmOperand a, GemmOperand b, float* c, std::int64_t rows, std::int64_t columns, std::int64_t depth, bool add,
              void* room, int threads);
};

namespace avx2 {
extern const Gemm gemm;
}
namespace avx512 {
extern const Gemm gemm;
}
namespace avx512bf16 {
extern const Gemm gemm;
}
namespace amx {
extern const Gemm gemm;
}

}  // namespace pyelastic
