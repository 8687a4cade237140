// The SIMT emulator: runs the threads of a CUDA kernel as fibers on one CPU thread. Tests only.
//
// Order: blocks one after the other in a seeded random order; of a block's threads, the next to run is drawn at
// random whenever one stops at a barrier, at a warp collective, or (race build) is preempted. What depends on
// the order of threads thus shows as a result that changes with the seed.
//
// An error in device code abandons the launch's fibers and is thrown as std::runtime_error by `launch`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace pyelastic {
namespace emulator {

struct Index3 {
  unsigned x, y, z;
};

// Of the running thread; set at every switch, so that kernels read them like CUDA's own variables.
extern Index3 thread_index, block_index, block_size, grid_size;

// --- called by tests ---
void set_seed(std::uint64_t seed);
// Probability that a memory access of a kernel is followed by a switch to another thread (race build only).
void set_preemption(double probability);

// --- called by the stand-ins for CUDA's functions ---
void launch(const char* kernel, Index3 grid, Index3 block, std::size_t dynamic_shared,
            const std::function<void()>& body);
// Fails the launch with a message that names kernel, block and thread; does not return.
[[noreturn]] void fail(const std::string& what);
// Memory of the block, one allocation per key, filled with 0xFF: NaN in every floating type.
void* shared_memory(const void* key, std::size_t bytes);
void* dynamic_shared_memory();

void sync_threads(const char* file, int line);

// Waits until every lane of `mask` has come to the same call, then returns all their values, by lane. The
// array is the caller's own until its next collective.
const std::uint64_t* warp_exchange(unsigned mask, std::uint64_t value, const char* what, int line);

// The same for a full warp and larger values: deposit `size` bytes, get all 32 deposits, kDeposit apart. Valid until
// the next but one such call of the warp.
constexpr std::size_t kDeposit = 64;
const unsigned char* warp_deposit(const void* value, std::size_t size, const char* what, int line);

unsigned lane();

// The value at an address, counted as an atomic access; and its new value.
std::uint64_t atomic_begin(const void* at, std::size_t size);
void atomic_end(void* at, std::uint64_t bits, std::size_t size);

// Asynchronous copies of 16 bytes: the destination is poison until the wait that covers the copy.
void copy_async(void* shared, const void* global, bool valid);
void copy_async_commit();
void copy_async_wait(int newest_left);

// --- race detection (race.cpp; does nothing unless the kernel was compiled for it) ---
void thread_fence();
void check_access(const void* address, std::size_t size, bool is_write, bool is_atomic);

}  // namespace emulator
}  // namespace pyelastic
