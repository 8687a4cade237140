// What the scheduler and the race detector know of the launch in progress.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "fiber.h"
#include "runtime.h"

namespace pyelastic {
namespace emulator {

struct SharedBlock {
  const void* key;
  unsigned char* data;
  std::size_t bytes;
  std::shared_ptr<void> owner;
};

struct AsyncCopy {
  void* to;
  unsigned char value[16];
  int group;
};

struct Thread {
  enum class State { kReady, kAtBarrier, kAtWarp, kDone };
  Fiber fiber;
  State state;
  unsigned id;  // in the block
  // Where it waits.
  const char* file;
  int line;
  const char* what;
  unsigned mask;
  // Its deposit in a collective, and the result.
  std::uint64_t value;
  std::uint64_t gathered[32];
  int deposits;
  // Asynchronous copies under way.
  std::vector<AsyncCopy> copies;
  int group;
  // Race detection: the warp's clock when this thread last synchronised with each lane; barriers passed at its last
  // __threadfence (0: none that orders anything), and the address of its last atomic.
  std::uint64_t synced[32];
  std::uint64_t fence;
  const void* atomic;
};

struct Warp {
  std::uint64_t clock = 1;
  alignas(64) unsigned char deposits[2][32][kDeposit];  // two, used in turn: a lane may be one call ahead
};

struct Launch {
  const char* kernel;
  std::function<void()> body;
  std::uint64_t block;       // flat index
  std::uint64_t block_clock;  // barriers passed
  unsigned threads;
  std::size_t dynamic_bytes;
  std::vector<SharedBlock> shared;
  std::vector<Warp> warps;
  std::string error;
};

extern Launch* launch_now;  // null outside of kernels
extern Thread* thread_now;
constexpr std::size_t kGuard = 64;  // bytes watched on either side of shared memory

// Race detector: forget everything (a launch begins); drop what lies in freed shared memory.
void begin_race_check();
void forget(const void* data, std::size_t bytes);
// After an atomic of this thread.
void note_atomic(const void* at);
// Lets another thread run; for preemption.
void yield_to_others();
bool chance(double probability);
extern double preemption;

}  // namespace emulator
}  // namespace pyelastic
