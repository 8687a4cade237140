// Race detection. The race build compiles kernels with -fsanitize=thread but links these hooks instead of
// ThreadSanitizer's library: they see every load and store of every fiber.
//
// Two accesses to a byte conflict if one writes, not both are atomic, they come from different threads, and no
// barrier lies between: __syncthreads orders threads of a block, a warp collective those lanes that took
// part, and of blocks only a fence on either side of atomics on one address: what a thread's block wrote before a
// barrier before its __threadfence is then seen by a thread that changes the address later and has a __threadfence after
// it, and by its block after the next barrier (the last block to come sums what all have written). Chains over several
// addresses are not followed: they raise an alarm. Per byte the last write and a summary of the reads since are kept: which lanes of which
// warp of which block, or that more than one warp or block has read, when every write without a barrier conflicts.
#include "state.h"

#if !defined(PYELASTIC_EMULATOR_RACE)

namespace pyelastic {
namespace emulator {

void begin_race_check() {}
void forget(const void*, std::size_t) {}
void check_access(const void*, std::size_t, bool, bool) {}
void note_atomic(const void*) {}
void thread_fence() {}

}  // namespace emulator
}  // namespace pyelastic

#else

#include <algorithm>
#include <array>
#include <unordered_map>

namespace pyelastic {
namespace emulator {
namespace {

struct Access {
  std::uint32_t block = 0, thread = 0;
  std::uint32_t block_clock = 0, warp_clock = 0;
  bool there = false, atomic = false;
};

// Writes that fences have ordered. By address of an atomic: of each block, the clock before which its writes are released.
// Of the running block: what it has acquired of each other, by which thread and when.
using Clocks = std::unordered_map<std::uint32_t, std::uint64_t>;
std::unordered_map<const void*, Clocks> released;
struct Acquired {
  std::uint64_t before;  // of the other block's clock
  std::uint32_t thread;
  std::uint64_t at;
};
std::unordered_map<std::uint32_t, Acquired> acquired;
std::uint64_t acquirer = 0;  // the block that did

bool fenced(const Access& before) {
  if (acquirer != launch_now->block) return false;
  const auto found = acquired.find(before.block);
  if (found == acquired.end() || before.block_clock >= found->second.before) return false;
  return found->second.thread == thread_now->id || found->second.at < launch_now->block_clock;
}

constexpr std::uint32_t kSeveral = ~std::uint32_t{0};

struct Readers {
  std::uint32_t block = 0, warp = 0;  // or kSeveral
  std::uint32_t block_clock = 0, warp_clock = 0;
  std::uint32_t lanes = 0;  // 0: nobody
};

struct Cell {
  Access write;
  Readers readers;
};

constexpr std::size_t kPage = 1024;
using Page = std::array<Cell, kPage>;
std::unordered_map<std::uintptr_t, std::unique_ptr<Page>> pages;
std::uintptr_t last_number = ~std::uintptr_t{0};
Page* last_page = nullptr;

Cell& cell(std::uintptr_t address) {
  const std::uintptr_t number = address / kPage;
  if (number != last_number) {
    std::unique_ptr<Page>& page = pages[number];
    if (page == nullptr) page = std::make_unique<Page>();
    last_number = number;
    last_page = page.get();
  }
  return (*last_page)[address % kPage];
}

bool ordered(const Access& before, const Access& now) {
  if (!before.there) return true;
  if (before.block != now.block) return fenced(before);
  if (before.thread == now.thread || before.block_clock < now.block_clock) return true;
  return before.thread / 32 == now.thread / 32 && thread_now->synced[before.thread % 32] > before.warp_clock;
}

std::string describe(std::uintptr_t address) {
  for (const SharedBlock& block : launch_now->shared) {
    const std::uintptr_t offset = address - reinterpret_cast<std::uintptr_t>(block.data);
    if (offset < block.bytes) return "byte " + std::to_string(offset) + " of an array in shared memory";
  }
  return "global memory";
}

// Those lanes whose reads nothing orders before what this thread does now.
std::uint32_t unordered_lanes(const Readers& readers) {
  std::uint32_t left = readers.lanes & ~(1u << (thread_now->id % 32));
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (thread_now->synced[lane] > readers.warp_clock) left &= ~(1u << lane);
  }
  return left;
}

bool ordered(const Readers& before, const Access& now) {
  if (before.lanes == 0) return true;
  if (before.block != now.block) return false;
  if (before.block_clock < now.block_clock) return true;
  return before.warp == now.thread / 32 && unordered_lanes(before) == 0;
}

void add(Readers& readers, const Access& now) {
  const std::uint32_t warp = now.thread / 32, own = 1u << (now.thread % 32);
  if (readers.lanes != 0 && readers.block != now.block) {
    readers.block = kSeveral;
  } else if (readers.lanes == 0 || readers.block_clock < now.block_clock) {
    readers = {now.block, warp, now.block_clock, now.warp_clock, own};
  } else if (readers.warp != warp) {
    readers.warp = kSeveral;
  } else {
    // Who is ordered before this lane is, through it, ordered before all that this lane is.
    readers.lanes = unordered_lanes(readers) | own;
    readers.warp_clock = now.warp_clock;
  }
}

std::string name(const Access& access) {
  return std::string(access.atomic ? "an atomic" : "a write") + " by block " + std::to_string(access.block) +
         ", thread " + std::to_string(access.thread);
}

std::string name(const Readers& readers) {
  if (readers.block == kSeveral) return "reads by several blocks";
  const std::string block = " by block " + std::to_string(readers.block) + ", ";
  return readers.warp == kSeveral ? "reads" + block + "several warps" : "a read" + block + "warp " +
                                                                            std::to_string(readers.warp);
}

[[noreturn]] void report(const std::string& theirs, const char* our, std::uintptr_t address) {
  fail(std::string("race: ") + our + " of " + describe(address) + " and " + theirs + " with no barrier between");
}

void check_bounds(std::uintptr_t address, std::size_t size) {
  for (const SharedBlock& block : launch_now->shared) {
    const std::uintptr_t low = reinterpret_cast<std::uintptr_t>(block.data), high = low + block.bytes;
    if ((address < low && address + size > low - kGuard) || (address + size > high && address < high + kGuard)) {
      fail("access outside of an array in shared memory");
    }
  }
}

}  // namespace

void begin_race_check() {
  pages.clear();
  last_number = ~std::uintptr_t{0};
  released.clear();
  acquired.clear();
}

void note_atomic(const void* at) {
  if (thread_now->fence > 0) {
    std::uint64_t& clock = released[at][static_cast<std::uint32_t>(launch_now->block)];
    clock = std::max(clock, thread_now->fence);
  }
  thread_now->atomic = at;
}

void thread_fence() {
  if (acquirer != launch_now->block) {
    acquirer = launch_now->block;
    acquired.clear();
  }
  if (thread_now->atomic != nullptr) {
    for (const auto& [block, clock] : released[thread_now->atomic]) {
      Acquired& mine = acquired[block];  // by the latest thread alone: another needs a barrier of its own
      if (mine.before <= clock) mine = {clock, thread_now->id, launch_now->block_clock};
    }
  }
  thread_now->fence = launch_now->block_clock;
}

void forget(const void* data, std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; ++i) cell(reinterpret_cast<std::uintptr_t>(data) + i) = Cell();
}

void check_access(const void* p, std::size_t size, bool is_write, bool is_atomic) {
  if (launch_now == nullptr || thread_now == nullptr || thread_now->fiber.on_stack(p)) return;
  const auto address = reinterpret_cast<std::uintptr_t>(p);
  check_bounds(address, size);
  const unsigned warp = thread_now->id / 32;
  Access now;
  now.block = static_cast<std::uint32_t>(launch_now->block);
  now.thread = thread_now->id;
  now.block_clock = static_cast<std::uint32_t>(launch_now->block_clock);
  now.warp_clock = static_cast<std::uint32_t>(launch_now->warps[warp].clock);
  now.there = true;
  now.atomic = is_atomic;
  for (std::uintptr_t byte = address; byte < address + size; ++byte) {
    Cell& c = cell(byte);
    if (!(is_atomic && c.write.atomic) && !ordered(c.write, now)) {
      report(name(c.write), is_write ? "write" : "read", byte);
    }
    if (!is_write) {
      add(c.readers, now);
      continue;
    }
    if (!ordered(c.readers, now)) report(name(c.readers), "write", byte);
    c.write = now;
    c.readers = Readers();
  }
  if (preemption > 0 && chance(preemption)) yield_to_others();
}

}  // namespace emulator
}  // namespace pyelastic

// The entry points gcc's instrumentation calls.
using pyelastic::emulator::check_access;

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
#define PYELASTIC_HOOKS(N)                                                     \
  void __tsan_read##N(void* p) { check_access(p, N, false, false); }           \
  void __tsan_write##N(void* p) { check_access(p, N, true, false); }           \
  void __tsan_volatile_read##N(void* p) { check_access(p, N, false, false); }  \
  void __tsan_volatile_write##N(void* p) { check_access(p, N, true, false); }  \
  void __tsan_unaligned_read##N(void* p) { check_access(p, N, false, false); } \
  void __tsan_unaligned_write##N(void* p) { check_access(p, N, true, false); }
PYELASTIC_HOOKS(1)
PYELASTIC_HOOKS(2)
PYELASTIC_HOOKS(4)
PYELASTIC_HOOKS(8)
PYELASTIC_HOOKS(16)
#undef PYELASTIC_HOOKS
void __tsan_read_range(void* p, unsigned long size) { check_access(p, size, false, false); }
void __tsan_write_range(void* p, unsigned long size) { check_access(p, size, true, false); }
}

#endif
