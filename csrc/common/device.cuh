// Small device helpers: element conversion, and sums and maxima over a warp or a block in a fixed order.
#pragma once

#include "cuda.cuh"
#include "dtype.h"

namespace pyelastic {

constexpr unsigned kAllLanes = 0xffffffffu;

template <class T>
struct As {
  using type = T;
};

// Calls f(As<T>{}) with the element type of a dtype. Double is left out: no kernel on a GPU takes it.
template <class F>
void visit_dtype(Dtype dtype, F f) {
  if (dtype == Dtype::bfloat16) return f(As<__nv_bfloat16>{});
  if (dtype == Dtype::float16) return f(As<__half>{});
  f(As<float>{});
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// The butterfly gives every lane the same bits: addition and maximum commute.
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

// A NaN anywhere gives NaN, which fmaxf would drop.
__device__ __forceinline__ float max_or_nan(float a, float b) { return a > b || a != a ? a : b; }

template <int kThreads>
__device__ __forceinline__ float block_max(float x, float* shared) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x = max_or_nan(x, __shfl_xor_sync(kAllLanes, x, offset));
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  x = shared[0];
  for (int w = 1; w < kThreads / 32; ++w) x = max_or_nan(x, shared[w]);
  __syncthreads();  // shared may be used again at once
  return x;
}

template <int kThreads, class T>
__device__ __forceinline__ T block_sum(T x, T* shared) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  x = shared[0];
  for (int w = 1; w < kThreads / 32; ++w) x += shared[w];
  __syncthreads();
  return x;
}

// Whether this is the last of `blocks` blocks to come here; it then sees what the others wrote before. Blocks that share
// `ticket`, 0 before and after, call it once. Holds barriers: for all threads of a block.
__device__ __forceinline__ bool is_last_block(unsigned* ticket, unsigned blocks) {
  SHARED(int, last, 1);
  __syncthreads();  // the fence of one thread then covers the writes of all
  if (threadIdx.x == 0) {
    __threadfence();
    *last = atomicInc(ticket, blocks - 1) == blocks - 1;
    __threadfence();
  }
  __syncthreads();
  return *last != 0;
}

}  // namespace pyelastic
