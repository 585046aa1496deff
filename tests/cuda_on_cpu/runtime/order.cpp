#include "order.h"

#include <algorithm>

namespace cuda_on_cpu {

void Order::start_launch() {
  launch_start_ = epoch_ + 1;
  published_.clear();
  block_starts_.clear();
}

void Order::start_block() {
  block_start_ = ++epoch_;
  block_starts_.push_back(block_start_);
  fences_.clear();
  acquired_.clear();
  for (Clocks& clocks : clocks_) reset(clocks);
}

void Order::block_barrier() {
  ++epoch_;
  for (Clocks& clocks : clocks_) reset(clocks);
}

void Order::reset(Clocks& clocks) {
  if (!clocks.moved && clocks.seen[0][0]) return;
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    std::fill_n(clocks.seen[lane], kWarpThreads, 0);
    clocks.seen[lane][lane] = 1;
  }
  clocks.moved = false;
}

void Order::warp_barrier(unsigned lanes) {
  Clocks& clocks = clocks_[machine.current->warp()];
  clocks.moved = true;
  uint32_t joined[kWarpThreads] = {};
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    for (int other = 0; other < kWarpThreads; ++other) {
      joined[other] = std::max(joined[other], clocks.seen[lane][other]);
    }
  }
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    std::copy_n(joined, kWarpThreads, clocks.seen[lane]);
    clocks.seen[lane][lane]++;
  }
}

void Order::fence() {
  const Thread& self = *machine.current;
  Clocks& clocks = clocks_[self.warp()];
  if (fences_.empty()) fences_.resize(size_t(machine.count));
  const Moment now{epoch_, clocks.seen[self.lane()][self.lane()]};
  fences_[size_t(self.id)] = now;
  for (auto& entry : acquired_) {
    Acquisition& operation = entry.second;
    if (!operation.fenced && follows(self.id, now, operation)) operation.fenced = epoch_;
  }
  clocks.seen[self.lane()][self.lane()]++;
  clocks.moved = true;
}

void Order::atomic(uintptr_t address) {
  const int thread = machine.current->id;
  const Record record = now(nullptr);
  const Moment at{record.epoch, record.clock};
  if (!fences_.empty()) published_[block_start_].push_back({address, thread, at, fences_});
  acquired_.try_emplace(address, Acquisition{thread, at, 0});
}

Record Order::now(const void* caller) const {
  const Thread& self = *machine.current;
  Record record;
  record.epoch = epoch_;
  record.clock = clocks_[self.warp()].seen[self.lane()][self.lane()];
  record.thread = uint16_t(self.id);
  record.who = Record::one;
  record.caller = caller;
  return record;
}

void Order::add_reader(Record& readers, const void* caller) const {
  const Record self = now(caller);
  const bool same_warp = readers.thread / kWarpThreads == self.thread / kWarpThreads;
  const bool alone = readers.epoch != epoch_ || (readers.who == Record::one && readers.thread == self.thread);
  if (alone) {
    readers = self;
  } else if (readers.who == Record::some_of_a_block || !same_warp) {
    readers.who = Record::some_of_a_block;
  } else if (readers.clock != self.clock) {
    readers = self;  // the others may be forgotten, never invented
  } else {
    if (readers.who == Record::one) readers.lanes = 1u << readers.thread % kWarpThreads;
    readers.lanes |= 1u << self.thread % kWarpThreads;
    readers.who = Record::some_of_a_warp;
  }
}

bool Order::before_now(const Record& record, uintptr_t address) const {
  if (record.who == Record::nobody || !in_this_launch(record)) return true;
  return in_this_block(record) ? in_the_block_before(record) : in_another_block_before(record, address);
}

bool Order::in_the_block_before(const Record& record) const {
  if (record.epoch < epoch_) return true;
  const Thread& self = *machine.current;
  if (record.who == Record::some_of_a_block) return false;
  if (record.thread / kWarpThreads != self.warp()) return false;
  const unsigned lanes = record.who == Record::one ? 1u << record.thread % kWarpThreads : record.lanes;
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    const bool other = (lanes >> lane & 1) && lane != self.lane();
    if (other && record.clock > clocks_[self.warp()].seen[self.lane()][lane]) return false;
  }
  return true;
}

bool Order::in_another_block_before(const Record& record, uintptr_t address) const {
  if (record.atomic && acquired(address)) return true;
  const auto next = std::upper_bound(block_starts_.begin(), block_starts_.end(), record.epoch);
  const auto found = published_.find(*(next - 1));
  if (found == published_.end()) return false;
  const auto reaches = [&](const Publication& publication) {
    return acquired(publication.address) && published(publication, record);
  };
  return std::any_of(found->second.begin(), found->second.end(), reaches);
}

bool Order::acquired(uintptr_t address) const {
  const auto found = acquired_.find(address);
  if (found == acquired_.end() || !found->second.fenced) return false;
  const int self = machine.current->id;
  return found->second.fenced < epoch_ || follows(self, fences_[size_t(self)], found->second);
}

bool Order::follows(int thread, Moment fence, const Acquisition& operation) {
  if (fence.epoch != operation.at.epoch) return fence.epoch > operation.at.epoch;
  return thread == operation.thread && fence.clock >= operation.at.clock;
}

bool Order::published(const Publication& publication, const Record& record) const {
  // A barrier led from the access to the fence of the thread that has the operation,
  const Moment fence = publication.fences[size_t(publication.thread)];
  if (record.epoch < fence.epoch) return true;
  // or the thread itself had a fence, and the operation then or after a barrier.
  if (record.who != Record::one) return false;
  const Moment own = publication.fences[record.thread];
  const bool fenced = record.epoch < own.epoch || (record.epoch == own.epoch && record.clock <= own.clock);
  return fenced && (record.thread == publication.thread || own.epoch < publication.at.epoch);
}

}  // namespace cuda_on_cpu
