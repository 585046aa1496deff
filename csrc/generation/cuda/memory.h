// Copies between the host and the device, in the order of a stream.
#pragma once

#include <cstdint>

#include "../../cuda/kernels.h"

namespace rlhf_fast::cuda {

// Either side may be host or device memory. Host memory that is pinned must stay as it is until the copy is done.
void copy(void* to, const void* from, int64_t bytes, Stream stream);

// Until all that the stream was given is done.
void wait(Stream stream);

// Why CUDA does not run on this machine, or null: no driver, one too old for the runtime, no GPU.
const char* problem();

}  // namespace rlhf_fast::cuda
