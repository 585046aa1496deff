#include "memory.h"

#include <link.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include "../async_copy.h"
#include "../atomics.h"
#include "checker.h"
#include "machine.h"

#if defined(CUDA_ON_CPU_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace cuda_on_cpu {

SharedMemory shared_memory;

namespace {

constexpr size_t kPage = 4096;

// For AddressSanitizer: memory that belongs to nobody, or to somebody again.
#if defined(CUDA_ON_CPU_ASAN)
void forbid(const char* begin, const char* end) { __asan_poison_memory_region(begin, size_t(end - begin)); }
void allow(Region region) { __asan_unpoison_memory_region(region.begin, region.bytes); }
#else
void forbid(const char*, const char*) {}
void allow(Region) {}
#endif

size_t up_to(size_t bytes, size_t multiple) { return (bytes + multiple - 1) / multiple * multiple; }

// Pages between two that cannot be touched.
Region map_pages(size_t bytes) {
  const size_t inside = up_to(bytes, kPage);
  void* const memory = mmap(nullptr, inside + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    perror("cuda_on_cpu: no memory");
    abort();
  }
  char* const begin = static_cast<char*>(memory) + kPage;
  mprotect(begin, inside, PROT_READ | PROT_WRITE);
  return {begin, inside};
}

// The thread-local variables of the library that holds the kernel.
int find_thread_locals(dl_phdr_info* library, size_t, void* kernel) {
  Region thread_locals;
  bool holds = false;
  for (int i = 0; i < library->dlpi_phnum; ++i) {
    const auto& header = library->dlpi_phdr[i];
    char* const begin = reinterpret_cast<char*>(library->dlpi_addr) + header.p_vaddr;
    if (header.p_type == PT_LOAD) holds |= Region{begin, header.p_memsz}.contains(kernel);
    if (header.p_type == PT_TLS) thread_locals = {static_cast<char*>(library->dlpi_tls_data), header.p_memsz};
  }
  if (holds) shared_memory.fixed = thread_locals;
  return holds;
}

std::map<const char*, Buffer> buffers;  // by where they begin
uint64_t generation = 1;

void forget(Region region) {
  if (region.begin) memset(region.begin, kPoison, region.bytes);
}

// The first byte that is no longer what forget() left, or null.
char* changed(char* begin, char* end) {
  if (begin == end) return nullptr;
  const bool all_alike = memcmp(begin, begin + 1, size_t(end - begin) - 1) == 0;
  if (static_cast<unsigned char>(*begin) == kPoison && all_alike) return nullptr;
  while (static_cast<unsigned char>(*begin) == kPoison) ++begin;
  return begin;
}

}  // namespace

void find_shared_memory(const Launch& launch) {
  static const Region pages = map_pages(kMostSharedBytes);
  shared_memory.fixed = {};
#if !defined(CUDA_ON_CPU_ASAN)
  dl_iterate_phdr(find_thread_locals, const_cast<void*>(launch.kernel));
#endif
  allow(pages);
  char* const end = pages.begin + pages.bytes;
  shared_memory.dynamic = {end - up_to(launch.shared_bytes, 16), launch.shared_bytes};
  forbid(pages.begin, shared_memory.dynamic.begin);
  char* const dynamic_end = shared_memory.dynamic.begin + launch.shared_bytes;
  memset(dynamic_end, kPoison, size_t(end - dynamic_end));
  forbid(dynamic_end, end);
}

void forget_shared_memory() {
  forget(shared_memory.fixed);
  forget(shared_memory.dynamic);
}

// Under AddressSanitizer the library above has reported it.
void check_shared_memory_end() {
#if !defined(CUDA_ON_CPU_ASAN)
  const Region dynamic = shared_memory.dynamic;
  if (changed(dynamic.begin + dynamic.bytes, dynamic.begin + up_to(dynamic.bytes, 16))) {
    refuse("wrote beyond the %zu bytes of dynamic shared memory", dynamic.bytes);
  }
#endif
}

void* dynamic_shared() { return shared_memory.dynamic.begin; }

void* allocate(size_t bytes, size_t offset, bool unwritten) {
  Buffer buffer;
  buffer.pages = map_pages(bytes + offset + 16);
  memset(buffer.pages.begin, kPoison, buffer.pages.bytes);
  char* const end = buffer.pages.begin + buffer.pages.bytes;
  char* const begin = end - up_to(bytes + offset, 16) + offset;
  buffer.region = {begin, bytes};
  if (unwritten) buffer.written.resize(bytes);
  forbid(buffer.pages.begin, begin);
  forbid(begin + bytes, end);
  buffers[begin] = std::move(buffer);
  ++generation;
  return begin;
}

void release(void* data) {
  const auto found = buffers.find(static_cast<char*>(data));
  if (found == buffers.end()) return;
  const Region pages = found->second.pages;
  allow(pages);
  buffers.erase(found);
  ++generation;
  munmap(pages.begin - kPage, pages.bytes + 2 * kPage);
}

Buffer* buffer_at(const void* address) {
  const char* const at = static_cast<const char*>(address);
  auto next = buffers.upper_bound(at);  // the first that begins beyond it
  if (next != buffers.end() && at >= next->second.pages.begin - kPage) return &next->second;
  if (next == buffers.begin()) return nullptr;
  Buffer& before = (--next)->second;
  return at < before.pages.begin + before.pages.bytes + kPage ? &before : nullptr;
}

std::string described(const void* address) {
  const char* const at = static_cast<const char*>(address);
  const Region dynamic = shared_memory.dynamic;
  char text[200];
  if (const Buffer* const buffer = buffer_at(at)) {
    snprintf(text, sizeof text, "offset %td of a buffer of %zu bytes", at - buffer->region.begin, buffer->region.bytes);
  } else if (at >= dynamic.begin - kMostSharedBytes && at < dynamic.begin + dynamic.bytes + kPage) {
    snprintf(text, sizeof text, "offset %td of %zu bytes of dynamic shared memory", at - dynamic.begin, dynamic.bytes);
  } else {
    snprintf(text, sizeof text, "address %p", address);
  }
  return text;
}

uint64_t buffers_generation() { return generation; }

void check_buffers() {
#if !defined(CUDA_ON_CPU_ASAN)
  for (const auto& entry : buffers) {
    const Buffer& buffer = entry.second;
    char *const begin = buffer.region.begin, *const end = begin + buffer.region.bytes;
    char* wrong = changed(buffer.pages.begin, begin);
    if (!wrong) wrong = changed(end, buffer.pages.begin + buffer.pages.bytes);
    if (!wrong) continue;
    const ptrdiff_t offset = wrong - begin;
    forget(buffer.region.begin > wrong ? Region{buffer.pages.begin, size_t(begin - buffer.pages.begin)}
                                       : Region{end, size_t(buffer.pages.begin + buffer.pages.bytes - end)});
    refuse("out of bounds: wrote at offset %td of a buffer of %zu bytes", offset, buffer.region.bytes);
  }
#endif
}

void check_aligned16(const void* address, const char* what) {
  check_aligned16(address, what, __builtin_return_address(0));
}

void check_aligned16(const void* address, const char* what, const void* caller) {
  if (reinterpret_cast<uintptr_t>(address) % 16 == 0) return;
  fail("misaligned: %s at %s, of 16 bytes at an address that is no multiple of 16", what, where(caller).c_str());
}

void atomic_access(const void* address, int bytes, const void* caller) {
  if (reinterpret_cast<uintptr_t>(address) % unsigned(bytes)) {
    fail("misaligned: an atomic operation at %s, of %d bytes", where(caller).c_str(), bytes);
  }
  watch(address, bytes, Access::atomic, caller);
}

// Asynchronous copies.

namespace {

void land(const AsyncCopy& copy) {
  if (copy.from) {
    memcpy(copy.to, copy.from, 16);
  } else {
    memset(copy.to, 0, 16);
  }
}

}  // namespace

void copy_async16(void* shared, const void* source, bool valid) {
  const void* const caller = __builtin_return_address(0);
  check_aligned16(shared, "an asynchronous copy's target", caller);
  if (valid) {
    check_aligned16(source, "an asynchronous copy's source", caller);
    watch(source, 16, Access::read, caller);
  }
  watch(shared, 16, Access::copy_begins, caller);
  const AsyncCopy copy{shared, valid ? source : nullptr, caller};
  if (machine.order % 2) land(copy);
  machine.current->copies.push_back(copy);
}

void copy_async_commit() {
  Thread& self = *machine.current;
  size_t committed = 0;
  for (const size_t count : self.commits) committed += count;
  self.commits.push_back(self.copies.size() - committed);
}

void copy_async_wait(int groups, Site site) {
  if (dropped(site)) return;
  Thread& self = *machine.current;
  while (self.commits.size() > size_t(groups)) {
    const size_t count = self.commits.front();
    for (size_t i = 0; i < count; ++i) {
      const AsyncCopy& copy = self.copies[i];
      if (machine.order % 2 == 0) land(copy);
      watch(copy.to, 16, Access::copy_ends, copy.caller);
    }
    self.copies.erase(self.copies.begin(), self.copies.begin() + ptrdiff_t(count));
    self.commits.erase(self.commits.begin());
  }
}

}  // namespace cuda_on_cpu
