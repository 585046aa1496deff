// Finds races, uninitialised reads and accesses out of bounds: every access of a kernel comes here, by the calls that
// the compiler puts in for ThreadSanitizer. That sanitizer's own library knows nothing of blocks and warps.
#include "checker.h"

#if defined(CUDA_ON_CPU_CHECKER)

#include "machine.h"
#include "memory.h"
#include "order.h"
#include "shadow.h"

namespace cuda_on_cpu {
namespace {

Order order;
Shadow shadow;

// Memory of one kind, and where in it an address lies.
struct Place {
  const char* name;
  Region region;
  bool shared;
  Buffer* buffer;  // or null
};

Place place_of(const void* address) {
  const SharedMemory& memory = shared_memory;
  if (memory.dynamic.contains(address)) return {"dynamic shared memory", memory.dynamic, true, nullptr};
  if (memory.fixed.contains(address)) return {"a __shared__ variable", {}, true, nullptr};
  ShadowPage& page = shadow.page(reinterpret_cast<uintptr_t>(address));
  if (page.generation != buffers_generation()) {
    page.generation = buffers_generation();
    page.buffer = buffer_at(address);
  }
  if (page.buffer) return {"a buffer", page.buffer->region, false, page.buffer};
  return {"memory", {}, false, nullptr};
}

std::string text_of(const Place& place, const void* address) {
  const ptrdiff_t offset = static_cast<const char*>(address) - place.region.begin;
  if (!place.region.begin) return place.name;
  const std::string size = std::to_string(place.region.bytes);
  return std::string(place.name) + " (" + size + " bytes), offset " + std::to_string(offset);
}

const char* verb(Access access) {
  if (access == Access::read) return "read";
  if (access == Access::write) return "write";
  return access == Access::atomic ? "atomic operation" : "asynchronous copy";
}

std::string who_of(const Record& record) {
  std::string text;
  switch (record.who) {
    case Record::some_of_a_warp: text = "threads of warp " + std::to_string(record.thread / kWarpThreads); break;
    case Record::some_of_a_block: text = "several threads"; break;
    default: text = "thread " + std::to_string(record.thread);
  }
  return order.in_this_block(record) ? text : text + " of another block";
}

[[noreturn]] void report_race(const Place& place, const void* address, Access access, const void* caller,
                              const char* before, const Record& record) {
  fail("race on %s: %s at %s; %s by %s at %s, and nothing orders the two", text_of(place, address).c_str(),
       verb(access), where(caller).c_str(), before, who_of(record).c_str(), where(record.caller).c_str());
}

void check_bounds(const Place& place, const void* address, int bytes, Access access, const void* caller) {
  const char* const first = static_cast<const char*>(address);
  if (!place.region.begin) return;
  if (first >= place.region.begin && first + bytes <= place.region.begin + place.region.bytes) return;
  fail("out of bounds: %s of %d bytes at %s, in %s", verb(access), bytes, where(caller).c_str(),
       text_of(place, address).c_str());
}

void check_cell(Cell& cell, const Place& place, const char* address, Access access, const void* caller) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  const bool reads = access == Access::read, writes = !reads;
  if (access == Access::copy_ends) {
    cell.copied_in_block = 0;
    cell.write = order.now(caller);
    return;
  }
  if (place.shared && cell.copied_in_block == order.block_start()) {
    fail("asynchronous copy: %s at %s of %s, to which a copy of thread %d from %s is still under way", verb(access),
         where(caller).c_str(), text_of(place, address).c_str(), cell.write.thread, where(cell.write.caller).c_str());
  }
  const bool written = cell.write.who != Record::nobody && order.in_this_block(cell.write);
  if ((reads || access == Access::atomic) && place.shared && !written) {
    fail("uninitialised: %s at %s of %s", verb(access), where(caller).c_str(), text_of(place, address).c_str());
  }
  // What a block before left in shared memory is gone, and no race.
  const bool old_write = place.shared && !order.in_this_block(cell.write);
  const bool old_read = place.shared && !order.in_this_block(cell.read);
  const bool both_atomic = access == Access::atomic && cell.write.atomic;
  if (!old_write && !both_atomic && !order.before_now(cell.write, at)) {
    report_race(place, address, access, caller, cell.write.atomic ? "changed" : "written", cell.write);
  }
  if (writes && !old_read && !order.before_now(cell.read, at)) {
    report_race(place, address, access, caller, "read", cell.read);
  }
  if (reads) return order.add_reader(cell.read, caller);
  cell.write = order.now(caller);
  cell.write.atomic = access == Access::atomic;
  if (access == Access::copy_begins) cell.copied_in_block = order.block_start();
}

// Reads of a buffer that no kernel has written, where the test said that it holds nothing.
void check_written(const Place& place, const char* address, int bytes, Access access, const void* caller) {
  if (!place.buffer || place.buffer->written.empty()) return;
  std::vector<bool>& written = place.buffer->written;
  const size_t first = size_t(address - place.region.begin);
  for (size_t i = first; i < first + size_t(bytes); ++i) {
    if (access != Access::write && access != Access::copy_ends && !written[i]) {
      fail("uninitialised: %s at %s of %s", verb(access), where(caller).c_str(), text_of(place, address).c_str());
    }
    written[i] = written[i] || access != Access::read;
  }
}

}  // namespace

void watch(const void* address, int bytes, Access access, const void* caller) {
  if (!machine.running || in_stacks(address)) return;
  machine.last_access = caller;
  const char* const first = static_cast<const char*>(address);
  const Place place = place_of(address);
  check_bounds(place, address, bytes, access, caller);
  check_written(place, first, bytes, access, caller);
  shadow.visit(reinterpret_cast<uintptr_t>(address), bytes,
               [&](Cell& cell, int offset) { check_cell(cell, place, first + offset, access, caller); });
  if (access == Access::atomic && !place.shared) order.atomic(reinterpret_cast<uintptr_t>(address));
}

void checker_starts_launch() {
  shadow.trim();
  order.start_launch();
}
void checker_starts_block() { order.start_block(); }
void checker_orders_block() { order.block_barrier(); }
void checker_orders_lanes(unsigned lanes) { order.warp_barrier(lanes); }
void checker_fences() { order.fence(); }

}  // namespace cuda_on_cpu

// What ThreadSanitizer's instrumentation calls.
#define CUDA_ON_CPU_ACCESSES(bytes)                                                                              \
  void __tsan_read##bytes(void* p) { watch(p, bytes, Access::read, __builtin_return_address(0)); }               \
  void __tsan_write##bytes(void* p) { watch(p, bytes, Access::write, __builtin_return_address(0)); }             \
  void __tsan_unaligned_read##bytes(void* p) { watch(p, bytes, Access::read, __builtin_return_address(0)); }     \
  void __tsan_unaligned_write##bytes(void* p) { watch(p, bytes, Access::write, __builtin_return_address(0)); }   \
  void __tsan_volatile_read##bytes(void* p) { watch(p, bytes, Access::read, __builtin_return_address(0)); }      \
  void __tsan_volatile_write##bytes(void* p) { watch(p, bytes, Access::write, __builtin_return_address(0)); }

extern "C" {

using cuda_on_cpu::Access;
using cuda_on_cpu::watch;

CUDA_ON_CPU_ACCESSES(1)
CUDA_ON_CPU_ACCESSES(2)
CUDA_ON_CPU_ACCESSES(4)
CUDA_ON_CPU_ACCESSES(8)
CUDA_ON_CPU_ACCESSES(16)
void __tsan_read_range(void* p, size_t bytes) { watch(p, int(bytes), Access::read, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t bytes) { watch(p, int(bytes), Access::write, __builtin_return_address(0)); }

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}

// Of host code in the same file: guards of static variables, reference counts.
char __tsan_atomic8_load(const volatile char* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
int __tsan_atomic32_load(const volatile int* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
int __tsan_atomic32_fetch_add(volatile int* p, int v, int) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }

}  // extern "C"

#endif
