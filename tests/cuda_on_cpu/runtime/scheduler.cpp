// Runs blocks one after another, and a block's threads in turn.
#include <algorithm>
#include <numeric>

#include "barriers.h"
#include "checker.h"
#include "machine.h"
#include "memory.h"
#include "sanitizers.h"
#include "signals.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_cpu {

Machine machine;

namespace {

uint64_t random_state = 1;

uint64_t random_bits() {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return random_state * 0x2545F4914F6CDD1D >> 32;
}

template <typename T>
void arrange(T* first, T* last) {
  if (machine.order == 1) std::reverse(first, last);
  if (machine.order <= 1) return;
  for (auto count = unsigned(last - first); count > 1; --count) std::swap(first[count - 1], first[random_below(count)]);
}

void resume(Thread& thread) {
  machine.current = &thread;
  threadIdx = thread.index;
}

void thread_main() {
  fiber_started();
  machine.launch->call(machine.launch->arguments);
  check_sanitizers();
  Thread& self = *machine.current;
  if (!self.copies.empty()) fail("returned with %zu asynchronous copies not waited for", self.copies.size());
  self.finished = true;
  machine.unfinished--;
  machine.warps[self.warp()].finished |= 1u << self.lane();
  thread_finished();
  give_way();
  __builtin_unreachable();
}

void set_up_block() {
  machine.count = machine.unfinished = int(blockDim.x * blockDim.y * blockDim.z);
  machine.at_barrier = 0;
  machine.ready.clear();
  const int warps = (machine.count + kWarpThreads - 1) / kWarpThreads;
  for (int w = 0; w < warps; ++w) {
    Warp& warp = machine.warps[w];
    const int lanes = std::min(machine.count - w * kWarpThreads, kWarpThreads);
    warp.lanes = lanes == kWarpThreads ? ~0u : (1u << lanes) - 1;
    warp.finished = 0;
    warp.open = 0;
  }
  for (int i = 0; i < machine.count; ++i) {
    Thread& thread = machine.threads[i];
    thread.id = i;
    thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    thread.finished = false;
    thread.waits_in = nullptr;
    thread.copies.clear();
    thread.commits.clear();
    prepare(thread.fiber, i, thread_main);
  }
  forget_shared_memory();
  checker_starts_block();
}

void run_block() {
  set_up_block();
  static int ids[kMostThreads];
  std::iota(ids, ids + machine.count, 0);
  make_ready(ids, machine.count);
  Thread& first = machine.threads[machine.ready.back()];
  machine.ready.pop_back();
  resume(first);
  machine.running = true;
  enter_from_launcher(first.fiber);
  machine.running = false;
  machine.current = nullptr;
  if (machine.report.empty() && machine.unfinished > 0) report_deadlock();
  if (machine.report.empty()) check_shared_memory_end();
}

void run_blocks(const dim3& grid) {
  const uint64_t count = uint64_t(grid.x) * grid.y * grid.z;
  static std::vector<uint32_t> numbers;
  numbers.resize(count);
  std::iota(numbers.begin(), numbers.end(), 0);
  arrange(numbers.data(), numbers.data() + count);
  for (const uint32_t i : numbers) {
    blockIdx = {i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)};
    run_block();
    if (!machine.report.empty()) return;
  }
}

bool accepts(const Launch& launch) {
  const dim3 grid = launch.grid, block = launch.block;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads < 1 || threads > kMostThreads || block.z > 64) {
    refuse("launch refused: a block of %u x %u x %u threads", block.x, block.y, block.z);
  } else if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
    refuse("launch refused: a grid of %u x %u x %u blocks", grid.x, grid.y, grid.z);
  } else if (launch.shared_bytes > kMostSharedBytes) {
    refuse("launch refused: %zu bytes of dynamic shared memory", launch.shared_bytes);
  } else {
    return true;
  }
  return false;
}

}  // namespace

unsigned random_below(unsigned bound) { return unsigned(random_bits() * bound >> 32); }

void set_order(int order) {
  machine.order = order;
  random_state = 0x9E3779B97F4A7C15 * uint64_t(order + 1);
}

void make_ready(const int* ids, int count) {
  const size_t before = machine.ready.size();
  machine.ready.insert(machine.ready.end(), std::make_reverse_iterator(ids + count), std::make_reverse_iterator(ids));
  arrange(machine.ready.data() + before, machine.ready.data() + machine.ready.size());
}

void give_way() {
  Thread& self = *machine.current;
  if (machine.ready.empty()) {
    return_to_launcher(self.fiber);  // done, or nobody can run
    __builtin_trap();
  }
  Thread& next = machine.threads[machine.ready.back()];
  machine.ready.pop_back();
  if (&next == &self) return;
  resume(next);
  switch_fiber(self.fiber, next.fiber);
}

void run(const Launch& launch) {
  if (!machine.report.empty()) return;
  machine.launch = &launch;
  if (accepts(launch)) {
    gridDim = launch.grid;
    blockDim = launch.block;
    find_shared_memory(launch);
    checker_starts_launch();
    run_guarded([&] { run_blocks(launch.grid); });
    machine.running = false;
    machine.current = nullptr;
    check_buffers();
    if (!machine.report.empty()) clean_stacks();
    forget_sanitizers();
  }
  machine.launch = nullptr;
}

}  // namespace cuda_on_cpu
