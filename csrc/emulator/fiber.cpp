#include "fiber.h"

#include <sys/mman.h>

#include <new>

#if defined(__x86_64__)
// Saves the callee's registers on the stack it leaves, and takes those of the stack it enters.
asm(R"(
.text
.type pyelastic_switch_stack, @function
pyelastic_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size pyelastic_switch_stack, .-pyelastic_switch_stack
)");
extern "C" void pyelastic_switch_stack(void** from, void* to);
#endif

namespace pyelastic {
namespace emulator {
namespace {

#if defined(__x86_64__)
void* scheduler_sp;
#else
ucontext_t scheduler_context;
#endif
#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack = nullptr;
std::size_t scheduler_stack_bytes = 0;
#endif

}  // namespace

Fiber::Fiber() {
  void* p = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  stack_ = static_cast<unsigned char*>(p);
}

Fiber::~Fiber() { munmap(stack_, kStackBytes); }

void Fiber::prepare(void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
  // An abandoned fiber leaves its frames' red zones behind.
  ASAN_UNPOISON_MEMORY_REGION(stack_, kStackBytes);
  fake_stack_ = nullptr;
#endif
#if defined(__x86_64__)
  auto** top = reinterpret_cast<void**>(stack_ + kStackBytes);
  // A return address below the entry keeps the stack aligned as after a call; six registers lie below.
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  sp_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = kStackBytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#endif
}

void Fiber::resume() {
#if defined(__SANITIZE_ADDRESS__)
  void* own_fake = nullptr;
  __sanitizer_start_switch_fiber(&own_fake, stack_, kStackBytes);
#endif
#if defined(__x86_64__)
  pyelastic_switch_stack(&scheduler_sp, sp_);
#else
  swapcontext(&scheduler_context, &context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(own_fake, nullptr, nullptr);
#endif
}

void Fiber::suspend() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fake_stack_, scheduler_stack, scheduler_stack_bytes);
#endif
#if defined(__x86_64__)
  pyelastic_switch_stack(&sp_, scheduler_sp);
#else
  swapcontext(&context_, &scheduler_context);
#endif
  entered();
}

void Fiber::entered() const {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack_, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

}  // namespace emulator
}  // namespace pyelastic
