#include "device.h"
#include "kernels.h"

namespace rlhf_fast::cuda {

const char* last_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace rlhf_fast::cuda
