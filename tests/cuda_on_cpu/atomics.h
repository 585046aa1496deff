// Atomic operations. Only one thread runs at a time, so they are plain ones; the checker hears that they are atomic.
#pragma once

#include <type_traits>

#include "site.h"
#include "types.h"

// The checker must not see the plain reads and writes of which an atomic operation is made here.
#define CUDA_ON_CPU_UNWATCHED __attribute__((noinline, no_sanitize("thread")))

namespace cuda_on_cpu {

// Tells the checker, where there is one. Reports an address that is no multiple of the size.
void atomic_access(const void* address, int bytes, const void* caller);

template <typename T, typename Operation>
CUDA_ON_CPU_UNWATCHED T update(T* address, Operation operation) {
  atomic_access(address, sizeof(T), __builtin_return_address(0));
  const T before = *address;
  *address = operation(before);
  return before;
}

}  // namespace cuda_on_cpu

template <typename T>
CUDA_ON_CPU_INLINE T atomicAdd(T* address, std::common_type_t<T> value) {
  return cuda_on_cpu::update(address, [=](T old) { return T(old + value); });
}
template <typename T>
CUDA_ON_CPU_INLINE T atomicSub(T* address, std::common_type_t<T> value) {
  return cuda_on_cpu::update(address, [=](T old) { return T(old - value); });
}
template <typename T>
CUDA_ON_CPU_INLINE T atomicMax(T* address, std::common_type_t<T> value) {
  return cuda_on_cpu::update(address, [=](T old) { return old < value ? value : old; });
}
template <typename T>
CUDA_ON_CPU_INLINE T atomicMin(T* address, std::common_type_t<T> value) {
  return cuda_on_cpu::update(address, [=](T old) { return value < old ? value : old; });
}
template <typename T>
CUDA_ON_CPU_INLINE T atomicExch(T* address, std::common_type_t<T> value) {
  return cuda_on_cpu::update(address, [=](T) { return value; });
}
template <typename T>
CUDA_ON_CPU_INLINE T atomicAnd(T* address, std::common_type_t<T> value) {
  return cuda_on_cpu::update(address, [=](T old) { return T(old & value); });
}
template <typename T>
CUDA_ON_CPU_INLINE T atomicOr(T* address, std::common_type_t<T> value) {
  return cuda_on_cpu::update(address, [=](T old) { return T(old | value); });
}
template <typename T>
CUDA_ON_CPU_INLINE T atomicXor(T* address, std::common_type_t<T> value) {
  return cuda_on_cpu::update(address, [=](T old) { return T(old ^ value); });
}
CUDA_ON_CPU_INLINE unsigned atomicInc(unsigned* address, unsigned largest) {
  return cuda_on_cpu::update(address, [=](unsigned old) { return old >= largest ? 0 : old + 1; });
}
template <typename T>
CUDA_ON_CPU_INLINE T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> value) {
  return cuda_on_cpu::update(address, [=](T old) { return old == expected ? value : old; });
}
