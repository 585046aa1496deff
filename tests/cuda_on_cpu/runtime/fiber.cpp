#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstdio>

#if defined(CUDA_ON_CPU_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__) || !defined(__linux__)
#error "cuda_on_cpu switches fibers with x86-64 instructions, on Linux"
#endif

extern "C" void cuda_on_cpu_switch(void** save, void* load);
asm(R"(
.text
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
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
.size cuda_on_cpu_switch, . - cuda_on_cpu_switch
)");

namespace cuda_on_cpu {
namespace {

constexpr size_t kGuardBytes = 4096;
constexpr size_t kStride = kStackBytes + kGuardBytes;
constexpr size_t kStacksBytes = kStride * kMostFibers;

char* make_stacks() {
  void* const memory = mmap(nullptr, kStacksBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    perror("cuda_on_cpu: no memory for the stacks of a block's threads");
    abort();
  }
  for (int i = 0; i < kMostFibers; ++i) {
    mprotect(static_cast<char*>(memory) + kStride * size_t(i), kGuardBytes, PROT_NONE);
  }
  return static_cast<char*>(memory);
}

char* const stacks = make_stacks();
Fiber launcher;

// AddressSanitizer has to know which stack is in use. The first switch away from the launcher's says its bounds.
#if defined(CUDA_ON_CPU_ASAN)
const void* launcher_bottom = nullptr;
size_t launcher_bytes = 0;

void before_switch(Fiber& from, const Fiber& to) {
  const bool home = &to == &launcher;
  __sanitizer_start_switch_fiber(&from.shadow, home ? launcher_bottom : to.stack, home ? launcher_bytes : kStackBytes);
}
void after_switch(Fiber& self) { __sanitizer_finish_switch_fiber(self.shadow, nullptr, nullptr); }
void first_switch(bool from_launcher) {
  __sanitizer_finish_switch_fiber(nullptr, from_launcher ? &launcher_bottom : nullptr,
                                  from_launcher ? &launcher_bytes : nullptr);
}
#else
void before_switch(Fiber&, const Fiber&) {}
void after_switch(Fiber&) {}
void first_switch(bool) {}
#endif

bool launcher_left = false;  // and no fiber has started since

void switch_to(Fiber& from, Fiber& to) {
  before_switch(from, to);
  cuda_on_cpu_switch(&from.saved, to.saved);
  after_switch(from);
}

}  // namespace

bool in_stacks(const void* address) { return size_t(static_cast<const char*>(address) - stacks) < kStacksBytes; }

bool below_a_stack(const void* address) {
  return in_stacks(address) && size_t(static_cast<const char*>(address) - stacks) % kStride < kGuardBytes;
}

void prepare(Fiber& fiber, int number, void (*entry)()) {
  fiber.stack = stacks + kStride * size_t(number) + kGuardBytes;
  // Were all tops a power of two apart, they would share a few lines of the cache.
  auto** top = reinterpret_cast<void**>(fiber.stack + kStackBytes - number % 29 * 128);
  *--top = nullptr;  // a return address for entry, which has none: its stack is aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  fiber.saved = top - 6;  // what the switch pops
  fiber.shadow = nullptr;
}

void enter_from_launcher(Fiber& to) {
  launcher_left = true;
  switch_to(launcher, to);
}

void switch_fiber(Fiber& from, Fiber& to) { switch_to(from, to); }

void return_to_launcher(Fiber& from) { switch_to(from, launcher); }

void fiber_started() {
  first_switch(launcher_left);
  launcher_left = false;
}

void left_by_jump() {
#if defined(CUDA_ON_CPU_ASAN)
  __sanitizer_start_switch_fiber(nullptr, launcher_bottom, launcher_bytes);
  after_switch(launcher);
#endif
}

void clean_stacks() {
#if defined(CUDA_ON_CPU_ASAN)
  for (int i = 0; i < kMostFibers; ++i) {
    __asan_unpoison_memory_region(stacks + kStride * size_t(i) + kGuardBytes, kStackBytes);
  }
#endif
}

}  // namespace cuda_on_cpu
