// Fibers: a stack and a saved stack pointer. x86-64 by hand (about 10 ns a switch), ucontext elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace pyelastic {
namespace emulator {

class Fiber {
 public:
  static constexpr std::size_t kStackBytes = 256 << 10;  // AddressSanitizer's frames are large

  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next `resume` calls entry(); entry never returns.
  void prepare(void (*entry)());
  void resume();         // from the scheduler into the fiber
  void suspend();        // from the fiber back to the scheduler
  void entered() const;  // first thing a fiber does
  bool on_stack(const void* p) const {
    const auto address = reinterpret_cast<std::uintptr_t>(p), base = reinterpret_cast<std::uintptr_t>(stack_);
    return address - base < kStackBytes;
  }

 private:
  unsigned char* stack_;
#if defined(__x86_64__)
  void* sp_ = nullptr;
#else
  ucontext_t context_;
#endif
  void* fake_stack_ = nullptr;  // AddressSanitizer's
};

}  // namespace emulator
}  // namespace pyelastic
