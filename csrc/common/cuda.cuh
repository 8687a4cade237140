// What every .cu includes: CUDA under nvcc, the emulator under the host compiler (tests), and the three things that
// are spelled differently in the two: shared memory and launches.
#pragma once

#if defined(PYELASTIC_EMULATOR)

#include "../emulator/emulator.h"

#define SHARED(T, name, N) \
  static const char name##_key = 0; \
  T* const name = static_cast<T*>(::pyelastic::emulator::shared_memory(&name##_key, sizeof(T) * (N)))
#define DYN_SHARED(T, name) T* const name = static_cast<T*>(::pyelastic::emulator::dynamic_shared_memory())

namespace pyelastic {

// Bytes of shared memory that a block can ask for; here as on sm_90.
inline std::size_t shared_limit() { return 227u << 10; }

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared, void*, A... a) {
  const std::tuple<P...> arguments(a...);
  emulator::launch(name, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared,
                   [&] { std::apply(kernel, arguments); });
}

}  // namespace pyelastic

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#define SHARED(T, name, N) __shared__ T name[N]
#define DYN_SHARED(T, name)                                       \
  extern __shared__ __align__(128) unsigned char dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(dynamic_shared)

namespace pyelastic {

inline void check(const char* name, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
}

inline std::size_t shared_limit() {
  int device = 0, bytes = 0;
  check("shared_limit", cudaGetDevice(&device));
  check("shared_limit", cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return static_cast<std::size_t>(bytes);
}

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared, void* stream, A... a) {
  if (shared > (48u << 10)) {  // more than that has to be asked for
    const auto most = cudaFuncAttributeMaxDynamicSharedMemorySize;
    check(name, cudaFuncSetAttribute(kernel, most, static_cast<int>(shared)));
  }
  kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(a...);
  check(name, cudaGetLastError());
}

}  // namespace pyelastic

#endif

// The kernel in parentheses, so that commas between its template arguments survive. Raises std::runtime_error.
#define LAUNCH(kernel, grid, block, shared, stream, ...) \
  ::pyelastic::launch(#kernel, kernel, grid, block, shared, stream, __VA_ARGS__)
