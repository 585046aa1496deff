// Launches of kernels that NVRTC has compiled, by the driver's library.
#pragma once

#include <type_traits>
#include <utility>
#include <vector>

#include "cuda_runtime_api.h"

// The kernel in g++'s words; rlhf_fast/nvrtc.py finds them in the object file. It is outside of all namespaces, or g++
// would leave these out.
template <auto kKernel>
const char* kernel_name() {
  return __PRETTY_FUNCTION__;
}

namespace rlhf_fast::cuda {

// What NVRTC made of a .cu file: a cubin, and of each kernel in it what kernel_name() says and its name in the cubin. A
// static variable, made by rlhf_fast/nvrtc.py.
struct Image {
  Image(const void* cubin, std::vector<std::pair<const char*, const char*>> kernels);

  const void* cubin;
  std::vector<std::pair<const char*, const char*>> kernels;
};

// A kernel by its kernel_name().
class Kernel {
 public:
  explicit Kernel(const char* name);
  // A refused launch is what cudaGetLastError() tells. `arguments`: the address of each.
  void launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, void** arguments) const;

 private:
  void* handle_;  // a CUkernel, or null
};

template <typename... Parameters>
void launch(const Kernel& kernel, void (*)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, std::type_identity_t<Parameters>... arguments) {
  void* addresses[] = {&arguments...};
  kernel.launch(grid, block, shared_bytes, stream, addresses);
}

template <auto kKernel, typename... Arguments>
void launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, Arguments... arguments) {
  static const Kernel kernel(kernel_name<kKernel>());
  launch(kernel, static_cast<decltype(kKernel)>(nullptr), grid, block, shared_bytes, stream, arguments...);
}

}  // namespace rlhf_fast::cuda
