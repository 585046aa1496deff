// The machine: one block's threads and warps, the launch that they belong to, and whose turn it is.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../launch.h"
#include "../site.h"
#include "../types.h"
#include "fiber.h"

namespace cuda_on_cpu {

constexpr int kWarpThreads = 32;
constexpr int kMostThreads = kMostFibers;  // of a block
constexpr int kMostWarps = kMostThreads / kWarpThreads;

struct AsyncCopy {
  void* to;
  const void* from;  // null: zeros
  const void* caller;
};

struct Thread {
  Fiber fiber;
  int id = 0;
  uint3 index{};
  bool finished = false;

  // What it waits in, or null.
  const char* waits_in = nullptr;
  Site site;
  unsigned mask = 0;  // of a warp's meeting; 0 at a block's barrier
  int predicate = 0;

  std::vector<AsyncCopy> copies;     // not waited for, oldest first
  std::vector<size_t> commits;       // how many of them each commit closed, oldest first

  int warp() const { return id / kWarpThreads; }
  int lane() const { return id % kWarpThreads; }
};

// Lanes that meet in one call.
struct Meeting {
  const char* name;
  Site site;
  unsigned mask, arrived;
  int to_leave;  // once all have arrived
  uint64_t values[kWarpThreads];
};

struct Warp {
  unsigned lanes = 0;  // that the block has
  unsigned finished = 0;
  Meeting meetings[kWarpThreads];  // lanes of disjoint masks may meet at the same time
  unsigned open = 0;               // which of these go on: until all lanes have taken their value
};

struct Machine {
  // Settings
  int order = 0;  // 0: threads and blocks by rising number, 1: falling, others: the seed of a random order
  Site dropped;   // this barrier does nothing; its file is the end of a path
  int most_milliseconds = 60000;  // of the processor, for a launch
  bool record_sites = false;
  std::vector<Site> sites;  // of barriers that were met, while recording

  // The launch
  const Launch* launch = nullptr;
  bool running = false;  // a kernel's code is
  const void* last_access = nullptr;  // that the checker has seen
  std::string report;    // the first thing that went wrong
  bool report_told = false;  // to cudaGetLastError

  // The block
  Thread threads[kMostThreads];
  Warp warps[kMostWarps];
  int count = 0, unfinished = 0, at_barrier = 0;
  Thread* current = nullptr;
  std::vector<int> ready;  // the last one runs next
  int barrier_result = 0;
};

extern Machine machine;

// Scheduler.
void set_order(int order);
// Makes threads runnable, to run in the order under test and before those that are runnable already: a
// warp runs ahead as far as it can.
void make_ready(const int* ids, int count);
// Gives the processor to the next runnable thread.
void give_way();
// A number below `bound`, from the order's seed.
unsigned random_below(unsigned bound);

// Reports. fail() ends the launch from inside a kernel, refuse() from outside.
[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...);
[[gnu::format(printf, 1, 2)]] void refuse(const char* format, ...);
void report_deadlock();

// "file:line" of the call, or of the instruction before the address: in the kernel, where it is part of one.
std::string where(const Site& site);
std::string where(const void* address);

// Notes the barrier and returns whether it is dropped.
bool dropped(const Site& site);

}  // namespace cuda_on_cpu
