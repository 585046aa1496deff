// A kernel of correct.cu or faulty.cu, of 64 threads a block, and the function by which Python runs it. It is to write
// out[i] = i; x[i] is i.
#pragma once

#include "device.h"

using namespace rlhf_fast::cuda;

struct Arguments {
  float* out;      // [64], unwritten
  const float* x;  // [64]
  float* scratch;  // [64], unwritten
  int* counter;    // [2], zeros
};

#define KERNEL(name)                                                                                     \
  __global__ void name(Arguments a);                                                                     \
  extern "C" void run_##name(float* out, const float* x, float* scratch, int* counter, int64_t blocks) { \
    launch<name>(dim3(unsigned(blocks)), dim3(64), 64 * sizeof(float), nullptr,                          \
                 Arguments{out, x, scratch, counter});                                                   \
  }                                                                                                      \
  __global__ void name(Arguments a)
