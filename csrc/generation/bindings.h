// What the parts of the Python module share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace rlhf_fast {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind_decoder(pybind11::module_& m);  // in decoder_bindings.cpp

}  // namespace rlhf_fast
