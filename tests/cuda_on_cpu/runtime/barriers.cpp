// Where threads wait for each other: the block's barrier, and meetings of a warp's lanes.
//
// What CUDA leaves undefined is an error here: a barrier that some threads meet in another line or not at all, lanes of
// one warp in different calls, a mask that names a lane which has returned or does not name the caller.
#include "barriers.h"

#include "../collectives.h"
#include "checker.h"
#include "machine.h"
#include "sanitizers.h"

namespace cuda_on_cpu {
namespace {

void wait(const char* name, unsigned mask, Site site) {
  Thread& self = *machine.current;
  self.waits_in = name;
  self.mask = mask;
  self.site = site;
}

void check_same_site() {
  const Thread* first = nullptr;
  for (int i = 0; i < machine.count; ++i) {
    const Thread& thread = machine.threads[i];
    if (thread.finished) continue;
    if (!first) first = &thread;
    if (thread.site == first->site) continue;
    fail("divergent barrier: thread %d is in %s at %s, thread %d in %s at %s", first->id, first->waits_in,
         where(first->site).c_str(), thread.id, thread.waits_in, where(thread.site).c_str());
  }
  if (machine.unfinished < machine.count) {
    fail("%s at %s is reached by %d of %d threads: the others have returned", first->waits_in,
         where(first->site).c_str(), machine.unfinished, machine.count);
  }
}

void open_barrier(Vote vote) {
  check_same_site();
  static int ids[kMostThreads];
  int count = 0, votes = 0;
  for (int i = 0; i < machine.count; ++i) {
    Thread& thread = machine.threads[i];
    thread.waits_in = nullptr;
    votes += thread.predicate != 0;
    ids[count++] = i;
  }
  machine.barrier_result = vote == Vote::count ? votes : vote == Vote::all ? votes == count : votes > 0;
  machine.at_barrier = 0;
  checker_orders_block();
  make_ready(ids, count);
}

Meeting& join(Warp& warp, const char* name, unsigned mask, Site site) {
  const Thread& self = *machine.current;
  for (unsigned rest = warp.open; rest; rest &= rest - 1) {
    Meeting& meeting = warp.meetings[__builtin_ctz(rest)];
    if (meeting.to_leave > 0 || meeting.mask != mask || meeting.arrived >> self.lane() & 1) continue;
    if (meeting.site == site) return meeting;
    fail("lanes of one warp meet in different calls: %s at %s and %s at %s", meeting.name, where(meeting.site).c_str(),
         name, where(site).c_str());
  }
  if (!~warp.open) fail("%s at %s: too many meetings of one warp at once", name, where(site).c_str());
  const int number = __builtin_ctz(~warp.open);
  warp.open |= 1u << number;
  Meeting& meeting = warp.meetings[number];
  meeting.name = name;
  meeting.site = site;
  meeting.mask = mask;
  meeting.arrived = 0;
  meeting.to_leave = 0;
  return meeting;
}

unsigned checked_mask(const char* name, unsigned mask, Site site) {
  const Thread& self = *machine.current;
  const Warp& warp = machine.warps[self.warp()];
  if (mask == ~0u) mask = warp.lanes;  // a full mask in a block's last warp means the lanes that it has
  const unsigned missing = mask & ~warp.lanes, finished = mask & warp.finished;
  if (!(mask >> self.lane() & 1)) {
    fail("%s at %s: lane %d calls with mask %08x, which does not name it", name, where(site).c_str(), self.lane(),
         mask);
  }
  if (missing) {
    fail("%s at %s: mask %08x names lanes %08x, which the block does not have", name, where(site).c_str(), mask,
         missing);
  }
  if (finished) {
    fail("%s at %s: mask %08x names lanes %08x, which have returned", name, where(site).c_str(), mask, finished);
  }
  return mask;
}

void open_meeting(Meeting& meeting, Finish finish) {
  const int first = machine.current->warp() * kWarpThreads;
  if (finish) finish(meeting.values, meeting.mask);
  int ids[kWarpThreads], count = 0;
  for (int i = 0; i < kWarpThreads; ++i) {
    if (!(meeting.mask >> i & 1)) continue;
    machine.threads[first + i].waits_in = nullptr;
    ids[count++] = first + i;
  }
  meeting.to_leave = count;
  make_ready(ids, count);
}

}  // namespace

bool dropped(const Site& site) {
  if (machine.record_sites) {
    bool known = false;
    for (const Site& other : machine.sites) known |= other == site;
    if (!known) machine.sites.push_back(site);
  }
  if (machine.dropped.line != site.line) return false;
  const size_t length = strlen(site.file), end = strlen(machine.dropped.file);
  return end <= length && strcmp(site.file + length - end, machine.dropped.file) == 0;
}

int lane() { return machine.current->lane(); }

int block_barrier(const char* name, int predicate, Vote vote, Site site) {
  site.caller = __builtin_return_address(0);
  if (dropped(site)) return predicate;
  check_sanitizers();
  Thread& self = *machine.current;
  wait(name, 0, site);
  self.predicate = predicate;
  if (++machine.at_barrier == machine.unfinished) open_barrier(vote);
  give_way();
  return machine.barrier_result;
}

void thread_finished() {
  if (machine.unfinished > 0 && machine.at_barrier == machine.unfinished) check_same_site();
}

uint64_t meet(const char* name, unsigned mask, uint64_t value, int source, Site site, Finish finish) {
  if (!site.caller) site.caller = __builtin_return_address(0);
  check_sanitizers();
  mask = checked_mask(name, mask, site);
  if (!(mask >> source & 1)) {
    fail("%s at %s: lane %d reads lane %d, which is not in mask %08x", name, where(site).c_str(), lane(), source, mask);
  }
  const int self = lane();
  Warp& warp = machine.warps[machine.current->warp()];
  Meeting& meeting = join(warp, name, mask, site);
  meeting.values[self] = value;
  meeting.arrived |= 1u << self;
  wait(name, mask, site);
  if (meeting.arrived == mask) open_meeting(meeting, finish);
  give_way();
  const uint64_t result = meeting.values[source];
  if (--meeting.to_leave == 0) warp.open &= ~(1u << (&meeting - warp.meetings));
  return result;
}

void warp_barrier(unsigned mask, Site site) {
  site.caller = __builtin_return_address(0);
  if (dropped(site)) return;
  meet("__syncwarp", mask, 0, lane(), site, [](uint64_t*, unsigned lanes) { checker_orders_lanes(lanes); });
}

void ballot(uint64_t* values, unsigned mask) {
  unsigned votes = 0;
  for (int i = 0; i < kWarpThreads; ++i) votes |= unsigned((mask >> i & 1) && values[i]) << i;
  for (int i = 0; i < kWarpThreads; ++i) values[i] = votes;
}

void thread_fence(Site site) {
  if (!dropped(site)) checker_fences();
}

}  // namespace cuda_on_cpu
