// Launches: a grid of blocks, run to its end before launch() returns.
#pragma once

#include <utility>
#include <vector>

#include "types.h"

// The kernel in the compiler's words.
template <auto kKernel>
const char* kernel_name() {
  return __PRETTY_FUNCTION__;
}

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

// A kernel as a driver knows it: by name, launched with the address of each argument.
struct NamedKernel {
  const char* name;  // what kernel_name() says
  void (*launch)(dim3 grid, dim3 block, size_t shared_bytes, void** arguments);
};

// All that a library launches anywhere.
inline std::vector<NamedKernel>& named_kernels() {
  static std::vector<NamedKernel> all;
  return all;
}

template <auto kKernel, typename = decltype(kKernel)>
struct Named;

template <auto kKernel, typename... Arguments>
void launch(dim3 grid, dim3 block, size_t shared_bytes, Arguments... arguments) {
  (void)Named<kKernel>::listed;
  thread_local_anchor = 0;
  auto body = [&] { kKernel(arguments...); };
  run({reinterpret_cast<const void*>(kKernel), grid, block, shared_bytes, call_body<decltype(body)>, &body});
}

template <auto kKernel, typename... Parameters>
struct Named<kKernel, void (*)(Parameters...)> {
  template <size_t... kIndices>
  static void unpack(dim3 grid, dim3 block, size_t shared_bytes, void** arguments, std::index_sequence<kIndices...>) {
    cuda_on_cpu::launch<kKernel>(grid, block, shared_bytes, *static_cast<Parameters*>(arguments[kIndices])...);
  }
  static void launch(dim3 grid, dim3 block, size_t shared_bytes, void** arguments) {
    unpack(grid, block, shared_bytes, arguments, std::index_sequence_for<Parameters...>());
  }
  static inline const bool listed = (named_kernels().push_back({kernel_name<kKernel>(), launch}), true);
};

// An address that a 16-byte access takes, or a report.
void check_aligned16(const void* address, const char* what);

}  // namespace cuda_on_cpu

// An error as long as there is a report; cudaGetLastError tells of each once.
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char* cudaGetErrorString(cudaError_t error);
