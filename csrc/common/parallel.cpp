#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace pyelastic {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<GompParallel> gomp_parallel{nullptr};

struct Job {
  std::int64_t count, share;
  const void* context;
  void (*body)(const void*, std::int64_t, std::int64_t);
  std::atomic<std::int64_t> next{0};
};

// Takes ranges until none is left, so that any number of workers, even one, finishes the job.
void work(void* argument) {
  Job& job = *static_cast<Job*>(argument);
  for (;;) {
    const std::int64_t begin = job.next.fetch_add(job.share);
    if (begin >= job.count) return;
    job.body(job.context, begin, std::min(begin + job.share, job.count));
  }
}

}  // namespace

void use_openmp(void* address) { gomp_parallel = reinterpret_cast<GompParallel>(address); }

void parallel_for(std::int64_t count, std::int64_t grain, int threads, const void* context,
                  void (*body)(const void* context, std::int64_t begin, std::int64_t end)) {
  if (count <= 0) return;
  const std::int64_t units = (count + grain - 1) / grain;
  const std::int64_t workers = std::max<std::int64_t>(1, std::min<std::int64_t>(threads, units));
  if (workers == 1) return body(context, 0, count);
  // Four ranges per worker even out a core that is shared with somebody else.
  const std::int64_t ranges = std::min(units, 4 * workers);
  Job job{count, (units + ranges - 1) / ranges * grain, context, body};
  if (const GompParallel openmp = gomp_parallel) {
    openmp(work, &job, static_cast<unsigned>(workers), 0);
    return;
  }
  std::vector<std::thread> pool;
  for (std::int64_t worker = 1; worker < workers; ++worker) {
    try {
      pool.emplace_back(work, &job);
    } catch (const std::system_error&) {
      break;  // no more threads to be had: those there are do the work
    }
  }
  work(&job);
  for (std::thread& thread : pool) thread.join();
}

void* thread_scratch(std::size_t bytes) {
  struct Scratch {
    void* data = nullptr;
    std::size_t bytes = 0;
    ~Scratch() { std::free(data); }
  };
  thread_local Scratch scratch;
  if (scratch.bytes < bytes) {
    std::free(scratch.data);
    scratch.data = nullptr;
    scratch.bytes = 0;
    void* data = nullptr;
    if (posix_memalign(&data, 64, bytes) != 0) throw std::bad_alloc();
    scratch.data = data;
    scratch.bytes = bytes;
  }
  return scratch.data;
}

}  // namespace pyelastic
