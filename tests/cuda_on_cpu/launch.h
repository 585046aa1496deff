// Launches: a grid of blocks, run to its end before launch() returns.
#pragma once

#include "types.h"

namespace cuda_on_cpu {

// The most dynamic shared memory of a block on sm_90 and sm_100; sm_80 has 163 KiB.
constexpr size_t kMostSharedBytes = 227 << 10;

struct Launch {
  const void* kernel;  // for its name
  dim3 grid, block;
  size_t shared_bytes;
  void (*call)(void*);  // runs the kernel once, as one thread
  void* arguments;
};

// What goes wrong is kept as a report, and until it is taken further launches do nothing, as on a device.
void run(const Launch& launch);

void* dynamic_shared();

// The report, or an empty string; taking it clears it.
const char* take_report();

template <typename Body>
void call_body(void* body) { (*static_cast<Body*>(body))(); }

// Makes the library's thread-local variables, shared memory among them, exist before the scheduler looks for them.
static thread_local volatile char thread_local_anchor;

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Arguments... arguments) {
  thread_local_anchor = 0;
  auto body = [&] { kernel(static_cast<Parameters>(arguments)...); };
  run({reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, call_body<decltype(body)>, &body});
}

// An address that a 16-byte access takes, or a report.
void check_aligned16(const void* address, const char* what);

}  // namespace cuda_on_cpu

// An error as long as there is a report; cudaGetLastError tells of each once.
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char* cudaGetErrorString(cudaError_t error);
