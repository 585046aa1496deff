// Where in a source file a kernel waits. As a default argument, Site::here() is the place of the call.
#pragma once

// What a kernel calls is part of the kernel, so that the address at which it calls the machine is in a line of its own.
#define CUDA_ON_CPU_INLINE inline __attribute__((always_inline))

#include <cstring>

namespace cuda_on_cpu {

struct Site {
  const char* file = "";
  int line = 0;
  const void* caller = nullptr;  // the instruction behind the call; the machine fills it in

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line, nullptr};
  }

  // Not by the instruction: a compiler may make several of a line.
  bool operator==(const Site& other) const {
    return line == other.line && (file == other.file || strcmp(file, other.file) == 0);
  }
  bool operator!=(const Site& other) const { return !(*this == other); }
};

}  // namespace cuda_on_cpu
