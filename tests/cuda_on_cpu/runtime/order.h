// What comes before what: barriers order a block's threads, __syncwarp a warp's. Two blocks are ordered as PTX's memory
// model says: write, fence, atomic operation in the one; atomic operation on the same address, fence, read in the other
// (the "last block" pattern). Within a block, barriers may lead from one thread's step to the next thread's.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "machine.h"
#include "shadow.h"

namespace cuda_on_cpu {

class Order {
 public:
  void start_launch();
  void start_block();
  void block_barrier();
  void warp_barrier(unsigned lanes);
  void fence();
  void atomic(uintptr_t address);

  // An access by the thread that runs, now.
  Record now(const void* caller) const;
  // Adds the reader to those that a cell remembers.
  void add_reader(Record& readers, const void* caller) const;
  // Whether all of the record comes before whatever the running thread does now. `address` is where.
  bool before_now(const Record& record, uintptr_t address) const;

  uint32_t block_start() const { return block_start_; }
  bool in_this_block(const Record& record) const { return record.epoch >= block_start_; }
  bool in_this_launch(const Record& record) const { return record.epoch >= launch_start_; }

 private:
  struct Moment {
    uint32_t epoch = 0, clock = 0;
  };
  // What a block made known by an atomic operation: each thread's writes up to its last fence, if a barrier or the
  // program's order led from there to the operation.
  struct Publication {
    uintptr_t address;
    int thread;
    Moment at;
    std::vector<Moment> fences;  // of each thread
  };
  // This block's first atomic operation on an address, and in which epoch a fence first followed it, or 0.
  struct Acquisition {
    int thread;
    Moment at;
    uint32_t fenced;
  };
  // seen[a][b]: lane a comes after lane b's accesses up to that clock; seen[b][b] is lane b's clock.
  struct Clocks {
    uint32_t seen[kWarpThreads][kWarpThreads];
    bool moved;
  };

  bool in_the_block_before(const Record& record) const;
  bool in_another_block_before(const Record& record, uintptr_t address) const;
  bool acquired(uintptr_t address) const;
  bool published(const Publication& publication, const Record& record) const;
  // Whether a fence by that thread, at that moment, follows the operation.
  static bool follows(int thread, Moment fence, const Acquisition& operation);
  void reset(Clocks& clocks);

  uint32_t epoch_ = 0, launch_start_ = 0, block_start_ = 0;
  Clocks clocks_[kMostWarps] = {};
  std::vector<Moment> fences_;                                                // of this block's threads; empty: none
  std::unordered_map<uintptr_t, Acquisition> acquired_;                       // by this block
  std::unordered_map<uint32_t, std::vector<Publication>> published_;          // by a block's first epoch
  std::vector<uint32_t> block_starts_;                                        // of this launch, rising
};

}  // namespace cuda_on_cpu
