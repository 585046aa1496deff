#include "memory.h"

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace rlhf_fast::cuda {
namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

}  // namespace

void copy(void* to, const void* from, int64_t bytes, Stream stream) {
  check(cudaMemcpyAsync(to, from, size_t(bytes), cudaMemcpyDefault, stream));
}

void wait(Stream stream) { check(cudaStreamSynchronize(stream)); }

const char* problem() {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace rlhf_fast::cuda
