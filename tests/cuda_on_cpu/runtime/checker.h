// What the machine tells the checker: which memory is touched, and what orders it. Only the build "checker" has one.
#pragma once

namespace cuda_on_cpu {

enum class Access {
  read,
  write,
  atomic,
  copy_begins,  // an asynchronous copy: from here on nobody may touch its target,
  copy_ends,    // until the thread that asked for it has waited; then it is that thread's write
};

#if defined(CUDA_ON_CPU_CHECKER)
void watch(const void* address, int bytes, Access access, const void* caller);
void checker_starts_launch();
void checker_starts_block();
void checker_orders_block();                // __syncthreads
void checker_orders_lanes(unsigned lanes);  // __syncwarp, of the warp that runs
void checker_fences();                      // __threadfence, by the thread that runs
#else
inline void watch(const void*, int, Access, const void*) {}
inline void checker_starts_launch() {}
inline void checker_starts_block() {}
inline void checker_orders_block() {}
inline void checker_orders_lanes(unsigned) {}
inline void checker_fences() {}
#endif

}  // namespace cuda_on_cpu
