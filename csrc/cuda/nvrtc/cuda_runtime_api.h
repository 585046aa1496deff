// What the decoder's host code uses of CUDA's runtime, for the build without nvcc: driver.cpp has it on the driver's
// own library. pip's CUDA builds of PyTorch bring the runtime, but not all of its headers.
#pragma once

#include <cstddef>

struct CUstream_st;
using cudaStream_t = CUstream_st*;

enum cudaError_t : int { cudaSuccess = 0 };  // else the driver's CUresult, or a number of driver.cpp's own
enum cudaMemcpyKind { cudaMemcpyDefault = 4 };

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
