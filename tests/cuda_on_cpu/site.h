// Where in a source file a kernel waits. As a default argument, Site::here() is the place of the call.
#pragma once

#include <cstring>

namespace cuda_on_cpu {

struct Site {
  const char* file = "";
  int line = 0;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }

  bool operator==(const Site& other) const {
    return line == other.line && (file == other.file || strcmp(file, other.file) == 0);
  }
  bool operator!=(const Site& other) const { return !(*this == other); }
};

}  // namespace cuda_on_cpu
