#include "runtime.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <random>
#include <stdexcept>

#include "state.h"

namespace pyelastic {
namespace emulator {

Index3 thread_index, block_index, block_size, grid_size;
Launch* launch_now = nullptr;
Thread* thread_now = nullptr;
double preemption = 0;

namespace {

std::mt19937_64 order;
std::recursive_mutex one_launch;  // the bindings release the GIL; recursive: a nested launch gets its message
std::vector<std::unique_ptr<Thread>> threads;  // kept from launch to launch: stacks are expensive
constexpr unsigned char kGuardByte = 0xA5, kPoison = 0xFF;

Index3 unflatten(std::uint64_t i, const Index3& size) {
  return {static_cast<unsigned>(i % size.x), static_cast<unsigned>(i / size.x % size.y),
          static_cast<unsigned>(i / size.x / size.y)};
}

std::string where(const Thread& t) {
  return std::string(launch_now->kernel) + ", block " + std::to_string(launch_now->block) + ", thread " +
         std::to_string(t.id);
}

void entry() {
  thread_now->fiber.entered();
  launch_now->body();
  if (!thread_now->copies.empty()) fail("a thread ended with asynchronous copies that nobody waited for");
  thread_now->state = Thread::State::kDone;
  for (;;) thread_now->fiber.suspend();
}

void wait(Thread::State state, const char* file, int line, const char* what, unsigned mask) {
  Thread* self = thread_now;
  self->state = state;
  self->file = file;
  self->line = line;
  self->what = what;
  self->mask = mask;
  self->fiber.suspend();
}

// AddressSanitizer watches the end of an allocation itself; the other builds leave a band of known bytes on both sides.
void* allocate(const void* key, std::size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  const std::size_t before = 0, after = 0;
#else
  const std::size_t before = 2 * kGuard, after = kGuard;
#endif
  void* base = nullptr;
  if (posix_memalign(&base, 128, before + bytes + after) != 0) throw std::bad_alloc();
  auto* data = static_cast<unsigned char*>(base) + before;
  std::memset(base, kGuardByte, before);
  std::memset(data, kPoison, bytes);
  std::memset(data + bytes, kGuardByte, after);
  launch_now->shared.push_back({key, data, bytes, std::shared_ptr<void>(base, std::free)});
  return data;
}

void check_guards() {
#if !defined(__SANITIZE_ADDRESS__)
  for (const SharedBlock& block : launch_now->shared) {
    for (std::size_t i = 0; i < kGuard; ++i) {
      if (block.data[block.bytes + i] == kGuardByte && block.data[-1 - static_cast<std::ptrdiff_t>(i)] == kGuardByte)
        continue;
      throw std::runtime_error(std::string(launch_now->kernel) + ", block " + std::to_string(launch_now->block) +
                               ": wrote outside of an array in shared memory");
    }
  }
#endif
}

// All threads wait: release a barrier or a collective that is complete, or say why nothing can go on.
void release() {
  const unsigned count = launch_now->threads;
  unsigned live = 0, at_barrier = 0;
  const Thread* first = nullptr;
  for (unsigned i = 0; i < count; ++i) {
    const Thread& t = *threads[i];
    if (t.state == Thread::State::kDone) continue;
    ++live;
    if (t.state != Thread::State::kAtBarrier) continue;
    ++at_barrier;
    if (first == nullptr) first = &t;
    if (t.line != first->line || std::strcmp(t.file, first->file) != 0) {
      throw std::runtime_error(where(t) + ": __syncthreads at line " + std::to_string(t.line) +
                               " while thread " + std::to_string(first->id) + " is at that of line " +
                               std::to_string(first->line));
    }
  }
  if (live == 0) return;
  if (at_barrier == 0) {
    const Thread* stuck = nullptr;
    for (unsigned i = 0; i < count && stuck == nullptr; ++i) {
      if (threads[i]->state == Thread::State::kAtWarp) stuck = threads[i].get();
    }
    throw std::runtime_error(where(*stuck) + ": deadlock at " + stuck->what + ", line " +
                             std::to_string(stuck->line) + ": lanes of its mask wait elsewhere");
  }
  if (at_barrier != count) {
    throw std::runtime_error(where(*first) + ": __syncthreads at line " + std::to_string(first->line) + " reached by " +
                             std::to_string(at_barrier) + " of " + std::to_string(count) + " threads, " +
                             std::to_string(live) + " of them live");
  }
  ++launch_now->block_clock;
  for (unsigned i = 0; i < count; ++i) threads[i]->state = Thread::State::kReady;
}

void run_block(const Index3& grid) {
  launch_now->shared.clear();
  launch_now->block_clock = 0;
  launch_now->warps.assign((launch_now->threads + 31) / 32, Warp());
  block_index = unflatten(launch_now->block, grid);
  std::vector<unsigned> ready;
  for (unsigned i = 0; i < launch_now->threads; ++i) {
    Thread& t = *threads[i];
    t.id = i;
    t.state = Thread::State::kReady;
    t.copies.clear();
    t.group = t.deposits = 0;
    std::memset(t.synced, 0, sizeof(t.synced));
    t.fence = 0;
    t.atomic = nullptr;
    t.fiber.prepare(entry);
  }
  if (launch_now->dynamic_bytes > 0) allocate(launch_now, launch_now->dynamic_bytes);
  for (;;) {
    ready.clear();
    bool alive = false;
    for (unsigned i = 0; i < launch_now->threads; ++i) {
      alive |= threads[i]->state != Thread::State::kDone;
      if (threads[i]->state == Thread::State::kReady) ready.push_back(i);
    }
    if (!alive) break;
    if (ready.empty()) {
      release();
      continue;
    }
    // One pass over the ready threads in random order: cheaper than drawing anew at each switch.
    std::shuffle(ready.begin(), ready.end(), order);
    for (unsigned i : ready) {
      if (threads[i]->state != Thread::State::kReady) continue;
      thread_now = threads[i].get();
      thread_index = unflatten(i, block_size);
      thread_now->fiber.resume();
      if (!launch_now->error.empty()) throw std::runtime_error(launch_now->error);
    }
  }
  check_guards();
  for (const SharedBlock& block : launch_now->shared) forget(block.data, block.bytes);
}

// Checks a collective's mask and, if this thread is the last to come, releases the others.
void meet(unsigned mask, const char* what, int line) {
  Thread* self = thread_now;
  const unsigned first = self->id / 32 * 32, own = self->id % 32;
  if ((mask >> own & 1u) == 0) fail(std::string(what) + ": the calling lane is not in its own mask");
  bool complete = true;
  for (unsigned l = 0; l < 32; ++l) {
    if ((mask >> l & 1u) == 0 || l == own) continue;
    if (first + l >= launch_now->threads || threads[first + l]->state == Thread::State::kDone) {
      fail(std::string(what) + ": the mask names lane " + std::to_string(l) + ", which has exited");
    }
    const Thread& other = *threads[first + l];
    const bool here = other.state == Thread::State::kAtWarp && other.mask == mask && other.line == line &&
                      std::strcmp(other.what, what) == 0;
    complete = complete && here;
  }
  if (!complete) {
    wait(Thread::State::kAtWarp, "", line, what, mask);
    return;
  }
  Warp& warp = launch_now->warps[first / 32];
  ++warp.clock;
  for (unsigned l = 0; l < 32; ++l) {
    if ((mask >> l & 1u) == 0) continue;
    Thread& t = *threads[first + l];
    for (unsigned from = 0; from < 32; ++from) {
      if ((mask >> from & 1u) == 0) continue;
      t.gathered[from] = threads[first + from]->value;
      t.synced[from] = warp.clock;
    }
    t.state = Thread::State::kReady;
  }
}

}  // namespace

void set_seed(std::uint64_t seed) { order.seed(seed); }
void set_preemption(double probability) { preemption = probability; }
bool chance(double probability) { return static_cast<double>(order() >> 11) * 0x1p-53 < probability; }
void yield_to_others() { thread_now->fiber.suspend(); }
unsigned lane() { return thread_now->id % 32; }

void fail(const std::string& what) {
  if (launch_now == nullptr) throw std::runtime_error(what);
  launch_now->error = where(*thread_now) + ": " + what;
  for (;;) thread_now->fiber.suspend();
}

void launch(const char* kernel, Index3 grid, Index3 block, std::size_t dynamic_shared,
            const std::function<void()>& body) {
  const std::lock_guard<std::recursive_mutex> lock(one_launch);
  const std::uint64_t blocks = std::uint64_t{grid.x} * grid.y * grid.z;
  const std::uint64_t size = std::uint64_t{block.x} * block.y * block.z;
  const bool wrong = blocks == 0 || size == 0 || size > 1024 || grid.y > 65535 || grid.z > 65535;
  if (wrong || grid.x > 0x7fffffffu || dynamic_shared > (227u << 10)) {
    throw std::runtime_error(std::string(kernel) + ": invalid launch configuration");
  }
  if (launch_now != nullptr) throw std::runtime_error("a kernel launched a kernel");
  Launch here;
  here.kernel = kernel;
  here.body = body;
  here.threads = static_cast<unsigned>(size);
  here.dynamic_bytes = dynamic_shared;
  while (threads.size() < size) threads.push_back(std::make_unique<Thread>());
  block_size = block;
  grid_size = grid;
  std::vector<std::uint64_t> sequence(blocks);
  for (std::uint64_t b = 0; b < blocks; ++b) sequence[b] = b;
  std::shuffle(sequence.begin(), sequence.end(), order);
  launch_now = &here;
  begin_race_check();
  try {
    for (const std::uint64_t b : sequence) {
      here.block = b;
      run_block(grid);
    }
  } catch (...) {
    launch_now = nullptr;
    thread_now = nullptr;
    throw;
  }
  launch_now = nullptr;
  thread_now = nullptr;
}

void* shared_memory(const void* key, std::size_t bytes) {
  for (const SharedBlock& block : launch_now->shared) {
    if (block.key == key) return block.data;
  }
  return allocate(key, bytes);
}

void* dynamic_shared_memory() {
  if (launch_now->dynamic_bytes == 0) fail("dynamic shared memory is used, but none was asked for at the launch");
  return launch_now->shared.front().data;
}

void sync_threads(const char* file, int line) { wait(Thread::State::kAtBarrier, file, line, "__syncthreads", 0); }

const std::uint64_t* warp_exchange(unsigned mask, std::uint64_t value, const char* what, int line) {
  Thread* self = thread_now;
  self->value = value;
  meet(mask, what, line);
  return self->gathered;
}

const unsigned char* warp_deposit(const void* value, std::size_t size, const char* what, int line) {
  Thread* self = thread_now;
  Warp& warp = launch_now->warps[self->id / 32];
  auto& turn = warp.deposits[self->deposits++ % 2];
  std::memcpy(turn[self->id % 32], value, size);
  meet(0xffffffffu, what, line);
  return turn[0];
}

std::uint64_t atomic_begin(const void* at, std::size_t size) {
  check_access(at, size, true, true);
  std::uint64_t bits = 0;
  std::memcpy(&bits, at, size);
  return bits;
}

void atomic_end(void* at, std::uint64_t bits, std::size_t size) {
  std::memcpy(at, &bits, size);
  note_atomic(at);
}

void copy_async(void* shared, const void* global, bool valid) {
  if (reinterpret_cast<std::uintptr_t>(shared) % 16 != 0 || reinterpret_cast<std::uintptr_t>(global) % 16 != 0) {
    fail("cp.async: addresses must be multiples of 16 bytes");
  }
  AsyncCopy copy{shared, {}, thread_now->group};
  if (valid) {
    check_access(global, 16, false, false);
    std::memcpy(copy.value, global, 16);
  }
  check_access(shared, 16, true, false);
  std::memset(shared, kPoison, 16);
  thread_now->copies.push_back(copy);
}

void copy_async_commit() { ++thread_now->group; }

void copy_async_wait(int newest_left) {
  std::vector<AsyncCopy>& copies = thread_now->copies;
  std::size_t kept = 0;
  for (const AsyncCopy& copy : copies) {
    if (copy.group >= thread_now->group - newest_left) {
      copies[kept++] = copy;
      continue;
    }
    check_access(copy.to, 16, true, false);
    std::memcpy(copy.to, copy.value, 16);
  }
  copies.resize(kept);
}

}  // namespace emulator
}  // namespace pyelastic
