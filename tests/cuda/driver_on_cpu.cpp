// The driver's library libcuda.so.1, as much of it as csrc/cuda/nvrtc/driver.cpp calls, for a device that is the CPU:
// a kernel that is launched runs as its own source says, emulated. It is part of the library of emulated kernels.
#include <cxxabi.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include "cuda_on_cpu.h"

namespace {

constexpr int kInvalidValue = 1, kNotFound = 500, kLaunchFailure = 719;

std::string without(std::string text, const std::string& part) {
  for (size_t at; (at = text.find(part)) != std::string::npos;) text.erase(at, part.size());
  return text;
}

// "rlhf_fast::cuda::norm_kernel<float, true>" of what kernel_name() says, or of a symbol in a cubin.
std::string plain(const std::string& said) {
  const std::string begin = "kKernel = ";
  const size_t at = said.find(begin) + begin.size();
  return without(said.substr(at, said.rfind(']') - at), "{anonymous}::");
}

std::string demangled(const char* symbol) {
  char* const text = abi::__cxa_demangle(symbol, nullptr, nullptr, nullptr);
  if (!text) return symbol;
  std::string name = without(text, "(anonymous namespace)::");
  std::free(text);
  if (name.rfind("void ", 0) == 0) name.erase(0, 5);  // a template's symbol has the type of the result
  return name.substr(0, name.find('('));
}

const std::map<std::string, const cuda_on_cpu::NamedKernel*>& kernels() {
  static const auto all = [] {
    std::map<std::string, const cuda_on_cpu::NamedKernel*> found;
    for (const auto& kernel : cuda_on_cpu::named_kernels()) found[plain(kernel.name)] = &kernel;
    return found;
  }();
  return all;
}

std::map<const void*, int> shared_bytes_allowed;

}  // namespace

extern "C" {

int launches = 0;  // so far, for tests

int cuInit(unsigned) { return 0; }
int cuDeviceGetCount(int* count) { return *count = 1, 0; }
int cuCtxGetDevice(int* device) { return *device = 0, 0; }
int cuGetErrorString(int, const char** text) { return *text = "the driver's words", 0; }
int cuMemcpyAsync(void* to, const void* from, size_t bytes, void*) { return std::memcpy(to, from, bytes), 0; }
int cuStreamSynchronize(void*) { return 0; }

int cuLibraryLoadData(void** library, const void* code, void*, void*, unsigned, void*, void*, unsigned) {
  *library = const_cast<void*>(code);
  return std::memcmp(code, "\177ELF", 4) == 0 ? 0 : kInvalidValue;
}

int cuLibraryGetKernel(void** kernel, void*, const char* symbol) {
  const auto found = kernels().find(demangled(symbol));
  if (found == kernels().end()) return kNotFound;
  *kernel = const_cast<cuda_on_cpu::NamedKernel*>(found->second);
  return 0;
}

int cuKernelSetAttribute(int attribute, int value, void* kernel, int device) {
  if (attribute != 8 || device != 0) return kInvalidValue;
  shared_bytes_allowed[kernel] = value;
  return 0;
}

int cuLaunchKernel(void* handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                   unsigned block_z, unsigned shared_bytes, void*, void** arguments, void** extra) {
  if (extra || (shared_bytes > 48 * 1024 && int(shared_bytes) > shared_bytes_allowed[handle])) return kInvalidValue;
  const auto* const kernel = static_cast<const cuda_on_cpu::NamedKernel*>(handle);
  kernel->launch(dim3(grid_x, grid_y, grid_z), dim3(block_x, block_y, block_z), shared_bytes, arguments);
  ++launches;
  return cudaPeekAtLastError() == cudaSuccess ? 0 : kLaunchFailure;
}
}
