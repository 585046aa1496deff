// CUDA for a C++ compiler: with this header a .cu file compiles with g++ and its kernels run on the CPU.
//
// Each CUDA thread of a block is a fiber, a stack of its own that gives up the processor only where the thread waits
// for others. Blocks run one after another. docs/cuda_on_cpu.md says what is found that way and what is not.
//
// This file is the language. What a kernel calls lies beside it, an idea a file; what
// runs them (fibers, scheduler, barriers, memory, reports, checker) is a library, compiled once.
#pragma once

#include "types.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))

// One copy will do, since one block runs at a time. All of a library's thread-local variables lie in one piece, which
// the scheduler finds and fills with NaN before each block. AddressSanitizer guards the ends of static variables only.
#if defined(__SANITIZE_ADDRESS__)
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

#include "collectives.h"
#include "atomics.h"
#include "async_copy.h"
#include "matrix.h"
#include "device_math.h"
#include "launch.h"
