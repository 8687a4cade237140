// Bugs the emulator must catch, each beside a clean kernel of the same shape. tests/test_emulator.py says which
// build must catch which. On a GPU, compute-sanitizer must catch those it can (make gpu).
//
// row_sum: out[row] = sum of x[row, :], one block a row; the bug is a template argument.
#include <utility>

#include "../../csrc/common/device.cuh"
#include "../../csrc/common/ptx.cuh"

namespace pyelastic {
namespace planted {

enum Bug : int {
  kClean,
  kMissingBarrier,        // 1: the warps' sums are read before they are all written
  kSharedPastEnd,         // 2: one element past a shared array
  kWriteAfterRead,        // 3: shared memory is used again without a barrier
  kGlobalPastEnd,         // 4: reads past the tensor
  kDivergentBarrier,      // 5: a barrier that some threads skip
  kShuffleExited,         // 6: a shuffle with lanes that have exited
  kPlainGlobalAdd,        // 7: += of one word from all blocks
  kAllStoreOneWord,       // 8: every thread stores its own value to one word
  kUninitialisedShared,   // 9: part of a shared array is read unwritten
  kMissingSyncwarp,       // 10: lanes read what other lanes of the warp wrote, without __syncwarp
  kLostUpdate,            // 11: s[0] += 1 by all threads of a block
  kShuffleOutsideMask,    // 12: the source lane of a shuffle is not in its mask
  kMisalignedVector,      // 13: a float4 at an address that is no multiple of 16
  kMissingWait,           // 14: cp.async without the wait before the data is used
  kWriteAfterManyReads,   // 15: the write is ordered after the reads of its own warp, not after those of others
  kNoFenceBefore,         // 16: the last block to come reads what others wrote without a fence before their atomics
  kNoFenceAfter,          // 17: nor one after its own
  kNoBarrierBefore,       // 18: the fence is not after a barrier, so only of one thread's writes
};

constexpr int kThreads = 128;

template <int kBug>
__global__ void row_sum(const float* x /* [rows, columns] */, int columns, float* out /* [rows] */) {
  SHARED(float, partial, kThreads / 32 + 1);
  SHARED(float, staged, kThreads);
  const int row = blockIdx.x, t = threadIdx.x, lane = t % 32, warp = t / 32;
  const int end = columns + (kBug == kGlobalPastEnd && row + 1 == static_cast<int>(gridDim.x) ? 1 : 0);
  float sum = 0;
  for (int j = t; j < end; j += kThreads) sum += x[row * columns + j];

  if (kBug == kUninitialisedShared) {
    if (t < kThreads - 1) staged[t] = sum;
  } else {
    staged[kBug == kSharedPastEnd ? t + 1 : t] = sum;
  }
  if (kBug != kMissingSyncwarp) __syncwarp();
  sum = staged[kBug == kSharedPastEnd ? t + 1 : t / 32 * 32 + (lane + 1) % 32];  // another lane's, so the sum stays
  if (kBug == kDivergentBarrier) {
    if (t >= 24) __syncthreads();
  } else {
    __syncthreads();
  }
  if (kBug == kShuffleExited && t >= kThreads - 5) return;
  if (kBug == kShuffleOutsideMask) {
    if (lane < 16) sum += __shfl_sync(0x0000ffffu, sum, 20);
  } else {
    sum = warp_sum(sum);
  }
  if (lane == 0) partial[warp] = sum;
  if (kBug != kMissingBarrier) __syncthreads();
  float total = 0;
  for (int w = 0; w < kThreads / 32; ++w) total += partial[w];
  if (kBug == kWriteAfterRead) {
    if (lane == 0) partial[warp] = 0;  // the next round's; other warps may still be reading
  }
  if (kBug == kWriteAfterManyReads && row == 0) {  // in one block: many would hide a miss
    __syncthreads();
    if (t < 2 || t == 32) staged[t] = partial[0];
    __syncwarp();
    if (t == 0) partial[0] = 0;
  }
  if (kBug == kLostUpdate) {
    if (t == 0) staged[0] = 0;
    __syncthreads();
    staged[0] += 1;
    __syncthreads();
    total += staged[0] - kThreads;
  }
  if (kBug == kPlainGlobalAdd) {
    if (t == 0) out[0] += total;
  } else if (kBug == kAllStoreOneWord) {
    out[row] = total + t;
  } else if (t == 0) {
    out[row] = total;
  }
}

template <int kBug>
__global__ void first_four(const float* x /* [4] */, float* out /* [1] */) {
  SHARED(float, staged, 4);
  if (threadIdx.x != 0) return;
  if (kBug == kMisalignedVector) {
    const float4 v = *reinterpret_cast<const float4*>(x + 1);
    *out = v.x + v.y + v.z + v.w;
    return;
  }
  cp_async_16(staged, x, true);
  cp_async_commit();
  if (kBug != kMissingWait) cp_async_wait<0>();
  *out = staged[0] + staged[1] + staged[2] + staged[3];
  cp_async_wait<0>();
}

// out[0] = sum of x, by the last block to come: a row a block, the ticket is 0 before and after.
template <int kBug>
__global__ void last_block_sum(const float* x /* [rows, columns] */, int columns, float* sums /* [rows, kThreads] */,
                               unsigned* ticket, float* out /* [1] */) {
  SHARED(float, partial, kThreads / 32);
  SHARED(int, last, 1);
  const int t = threadIdx.x;
  float sum = 0;
  for (int j = t; j < columns; j += kThreads) sum += x[blockIdx.x * columns + j];
  sums[blockIdx.x * kThreads + t] = sum;
  if (kBug != kNoBarrierBefore) __syncthreads();
  if (t == 0) {
    if (kBug != kNoFenceBefore) __threadfence();
    *last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
    if (kBug != kNoFenceAfter) __threadfence();
  }
  __syncthreads();
  if (!*last) return;
  sum = 0;
  for (unsigned row = 0; row < gridDim.x; ++row) sum += sums[row * kThreads + t];
  sum = block_sum<kThreads>(sum, partial);
  if (t == 0) out[0] = sum;
}

template <int kBug>
bool run(int bug, const float* x, int rows, int columns, float* out, void* stream) {
  if (bug != kBug) return false;
  if (kBug == kMisalignedVector || kBug == kMissingWait) {
    LAUNCH((first_four<kBug>), 1, 32, 0, stream, x, out);
  } else {
    LAUNCH((row_sum<kBug>), static_cast<unsigned>(rows), kThreads, 0, stream, x, columns, out);
  }
  return true;
}

template <int... kBugs>
void run_any(int bug, const float* x, int rows, int columns, float* out, void* stream,
             std::integer_sequence<int, kBugs...>) {
  (run<kBugs>(bug, x, rows, columns, out, stream) || ...);
}

// By number, as below: a bug of last_block_sum, or none.
void last_block_sum_with(int bug, const float* x, int rows, int columns, float* sums, unsigned* ticket, float* out,
                         void* stream) {
  const auto launch = [&](auto kernel) {
    LAUNCH((kernel), static_cast<unsigned>(rows), kThreads, 0, stream, x, columns, sums, ticket, out);
  };
  if (bug == kNoFenceBefore) return launch(last_block_sum<kNoFenceBefore>);
  if (bug == kNoFenceAfter) return launch(last_block_sum<kNoFenceAfter>);
  if (bug == kNoBarrierBefore) return launch(last_block_sum<kNoBarrierBefore>);
  launch(last_block_sum<kClean>);
}

void row_sum_with(int bug, const float* x, int rows, int columns, float* out, void* stream) {
  run_any(bug, x, rows, columns, out, stream, std::make_integer_sequence<int, kWriteAfterManyReads + 1>());
}

// Clean, and what a copy without a bug needs: the first four by cp.async.
void first_four_clean(const float* x, float* out, void* stream) {
  LAUNCH((first_four<kClean>), 1, 32, 0, stream, x, out);
}

// out [16, 8] += a [16, 16] b [8, 16]^T, for the layout of the fragments; one warp.
template <class Type>
__global__ void fragments(const std::uint16_t* a, const std::uint16_t* b, float* out) {
  SHARED(std::uint16_t, buffer, 24 * 24);  // rows of 48 bytes: multiples of 16
  const int lane = threadIdx.x;
  for (int i = lane; i < 24 * 16; i += 32) {
    const int row = i / 16, k = i % 16;
    buffer[row * 24 + k] = row < 16 ? a[row * 16 + k] : b[(row - 16) * 16 + k];
  }
  __syncwarp();
  std::uint32_t fa[4], fb[4];
  ldmatrix_x4(fa, buffer + lane % 16 * 24 + lane / 16 * 8);
  ldmatrix_x4(fb, buffer + (16 + lane % 8) * 24 + lane / 8 % 2 * 8);  // matrices 2 and 3 repeat 0 and 1
  const std::uint32_t pair[2] = {fb[0], fb[1]};
  float d[4] = {};
  mma_m16n8k16(d, fa, pair, Type{});
  for (int e = 0; e < 4; ++e) out[(lane / 4 + e / 2 * 8) * 8 + lane % 4 * 2 + e % 2] += d[e];
}

void multiply_fragments(bool bfloat16, const std::uint16_t* a, const std::uint16_t* b, float* out, void* stream) {
  if (bfloat16) {
    LAUNCH((fragments<BF16>), 1, 32, 0, stream, a, b, out);
  } else {
    LAUNCH((fragments<F16>), 1, 32, 0, stream, a, b, out);
  }
}

// counts[0] += 1 from every thread by an atomic; clean.
__global__ void count(int* counts) { atomicAdd(counts, 1); }
void count_threads(int* counts, int blocks, void* stream) {
  LAUNCH((count), static_cast<unsigned>(blocks), 64, 0, stream, counts);
}

}  // namespace planted
}  // namespace pyelastic
