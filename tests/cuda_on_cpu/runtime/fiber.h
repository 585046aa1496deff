// A fiber: a stack of its own, and a switch that saves the six registers that a call keeps. It takes a few nanoseconds,
// where ucontext's asks the operating system about signals each time.
#pragma once

#include <cstddef>

namespace cuda_on_cpu {

constexpr int kMostFibers = 1024;
constexpr size_t kStackBytes = 64 << 10;

struct Fiber {
  char* stack = nullptr;  // its lowest byte; below it lies a page that cannot be touched
  void* saved = nullptr;  // stack pointer while it does not run
  void* shadow = nullptr;  // AddressSanitizer's
};

// Whether the address lies in a fiber's stack, and whether below one.
bool in_stacks(const void* address);
bool below_a_stack(const void* address);

// Gives the fiber the stack of that number, to start in `entry`, which must not return.
void prepare(Fiber& fiber, int number, void (*entry)());

// The launcher's stack goes on when fibers are done.
void enter_from_launcher(Fiber& to);
void switch_fiber(Fiber& from, Fiber& to);
void return_to_launcher(Fiber& from);
// First thing on a new fiber.
void fiber_started();
// The launcher's stack goes on after a jump out of a fiber that a signal ended.
void left_by_jump();
// Clears the marks that abandoned fibers left in their stacks.
void clean_stacks();

}  // namespace cuda_on_cpu
