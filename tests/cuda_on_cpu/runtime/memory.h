// Memory that tests and kernels use: the block's shared memory, and global buffers between pages that cannot be
// touched.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../launch.h"

namespace cuda_on_cpu {

// All bytes 0xff: every floating-point type's NaN, and an index that leads nowhere.
constexpr unsigned char kPoison = 0xff;

struct Region {
  char* begin = nullptr;
  size_t bytes = 0;

  bool contains(const void* address) const {
    return size_t(static_cast<const char*>(address) - begin) < bytes;
  }
};

struct SharedMemory {
  Region fixed;    // all __shared__ variables of the kernel's library
  Region dynamic;  // ends where its mapping does, but for up to 15 bytes
};

extern SharedMemory shared_memory;

// For the launch: finds the library's variables, and places the dynamic part.
void find_shared_memory(const Launch& launch);
// For the block: nothing is left of the one before.
void forget_shared_memory();
void check_shared_memory_end();

struct Buffer {
  Region region;
  Region pages;                     // that can be touched: the region is in them
  std::vector<bool> written;  // each byte, by a kernel; empty: all of it was, by the host
};

// `offset` bytes after a multiple of 16, as near to the upper page that cannot be touched as that allows. With
// `unwritten` the checker reports what a kernel reads before any has written it.
void* allocate(size_t bytes, size_t offset, bool unwritten);
void release(void* data);
// The buffer in whose pages, or within a page of them, the address lies.
Buffer* buffer_at(const void* address);
// "offset 12 of a buffer of 8 bytes", as far as the address lies near something known.
std::string described(const void* address);
uint64_t buffers_generation();  // another number once a buffer comes or goes
// Reports bytes before and behind the buffers, within their pages, that a kernel has overwritten, and restores them.
void check_buffers();

void check_aligned16(const void* address, const char* what, const void* caller);

}  // namespace cuda_on_cpu
