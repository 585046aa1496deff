// What AddressSanitizer has found. Only the build "asan" has one.
#pragma once

namespace cuda_on_cpu {

#if defined(CUDA_ON_CPU_ASAN)
// Ends the launch with a report, if there is one.
void check_sanitizers();
void forget_sanitizers();
#else
inline void check_sanitizers() {}
inline void forget_sanitizers() {}
#endif

}  // namespace cuda_on_cpu
