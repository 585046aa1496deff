// Launches, and CUDA's runtime as far as cuda_runtime_api.h goes, on the driver's library. That is looked for when it
// is first needed, so that what is built loads where no driver is.
#include <dlfcn.h>

#include <cstring>
#include <string_view>
#include <unordered_map>

#include "launch.h"

#if !defined(RLHF_FAST_LIBCUDA)
#define RLHF_FAST_LIBCUDA "libcuda.so.1"
#endif

namespace rlhf_fast::cuda {
namespace {

// Besides the driver's own errors, which are positive.
constexpr auto kNoDriver = cudaError_t(-1), kOldDriver = cudaError_t(-2), kNoKernel = cudaError_t(-3);

std::vector<const Image*>& images() {
  static std::vector<const Image*> all;
  return all;
}

// The driver's functions, as its header cuda.h declares them; handles are void*, a result is 0 or an error.
struct Functions {
  int (*cuInit)(unsigned flags);
  int (*cuDeviceGetCount)(int* count);
  int (*cuCtxGetDevice)(int* device);
  int (*cuGetErrorString)(int error, const char** text);
  int (*cuMemcpyAsync)(const void* to, const void* from, size_t bytes, cudaStream_t stream);
  int (*cuStreamSynchronize)(cudaStream_t stream);
  int (*cuLibraryLoadData)(void** library, const void* code, void* options, void* values, unsigned count,
                           void* library_options, void* library_values, unsigned library_count);
  int (*cuLibraryGetKernel)(void** kernel, void* library, const char* symbol);
  int (*cuKernelSetAttribute)(int attribute, int value, void* kernel, int device);
  int (*cuLaunchKernel)(void* kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared_bytes, cudaStream_t stream,
                        void** arguments, void** extra);
};
constexpr int kMaxDynamicSharedBytes = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

struct Driver {
  Functions call{};
  std::unordered_map<std::string_view, void*> kernels;  // by kernel_name()
  int devices = 0;
  cudaError_t problem = open();  // why nothing works, or cudaSuccess

  cudaError_t open() {
    void* const library = dlopen(RLHF_FAST_LIBCUDA, RTLD_NOW);
    if (!library) return kNoDriver;
    bool all = true;
    const auto find = [&](auto& function, const char* name) {
      void* const address = dlsym(library, name);
      std::memcpy(&function, &address, sizeof address);
      all = all && address;
    };
#define FIND(name) find(call.name, #name)
    FIND(cuInit), FIND(cuDeviceGetCount), FIND(cuCtxGetDevice), FIND(cuGetErrorString), FIND(cuMemcpyAsync);
    FIND(cuStreamSynchronize), FIND(cuLibraryLoadData), FIND(cuLibraryGetKernel), FIND(cuKernelSetAttribute);
    FIND(cuLaunchKernel);
#undef FIND
    if (!all) return kOldDriver;
    int error = call.cuInit(0);
    if (!error) error = call.cuDeviceGetCount(&devices);
    // Kernels of a library belong to no device: each takes them to itself when it first launches them. All are loaded
    // now, as a CUDA graph that is recorded may launch one that was not launched before.
    for (const Image* image : images()) {
      void* code = nullptr;
      if (!error) error = call.cuLibraryLoadData(&code, image->cubin, nullptr, nullptr, 0, nullptr, nullptr, 0);
      for (const auto& [name, symbol] : image->kernels) {
        if (!error) error = call.cuLibraryGetKernel(&kernels[name], code, symbol);
      }
    }
    return cudaError_t(error);
  }
};

Driver& driver() {
  static Driver one;
  return one;
}

thread_local cudaError_t last = cudaSuccess;

// Calls run(the driver's functions) unless there is no driver. They work in the thread's current context, which is
// PyTorch's: its own calls, which fill the decoder's memory, have made it so.
template <typename Run>
cudaError_t attempt(Run run) {
  const cudaError_t error = driver().problem ? driver().problem : cudaError_t(run(driver().call));
  if (error) last = error;
  return error;
}

}  // namespace

Image::Image(const void* cubin, std::vector<std::pair<const char*, const char*>> kernels)
    : cubin(cubin), kernels(std::move(kernels)) {
  images().push_back(this);
}

Kernel::Kernel(const char* name) {
  const auto found = driver().kernels.find(name);
  handle_ = found == driver().kernels.end() ? nullptr : found->second;
}

void Kernel::launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, void** arguments) const {
  attempt([&](const Functions& call) -> int {
    if (!handle_) return kNoKernel;
    if (shared_bytes > 48 * 1024) {  // more than that is given to who asks
      int device = 0, error = call.cuCtxGetDevice(&device);
      if (!error) error = call.cuKernelSetAttribute(kMaxDynamicSharedBytes, int(shared_bytes), handle_, device);
      if (error) return error;
    }
    return call.cuLaunchKernel(handle_, grid.x, grid.y, grid.z, block.x, block.y, block.z, unsigned(shared_bytes),
                               stream, arguments, nullptr);
  });
}

}  // namespace rlhf_fast::cuda

using namespace rlhf_fast::cuda;

cudaError_t cudaGetLastError() { return std::exchange(last, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t error) {
  if (error == kNoDriver) return "no NVIDIA driver: there is no " RLHF_FAST_LIBCUDA;
  if (error == kOldDriver) return "the NVIDIA driver is older than CUDA 12";
  if (error == kNoKernel) return "a kernel that NVRTC did not compile";
  const char* text = nullptr;
  driver().call.cuGetErrorString(error, &text);
  return text ? text : "an error that the driver has no words for";
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = driver().devices;
  return driver().problem;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  return attempt([&](const Functions& call) { return call.cuMemcpyAsync(to, from, bytes, stream); });
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return attempt([&](const Functions& call) { return call.cuStreamSynchronize(stream); });
}
