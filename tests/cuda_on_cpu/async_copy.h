// Asynchronous copies from global to shared memory (cp.async).
//
// On a GPU the bytes land at some time between the copy and the wait. Here they land at one end or the other, by the
// order under test: in even ones at the wait, so that a read before it sees what was there; in odd ones at once, so
// that a slow thread's old data is overwritten at the earliest.
#pragma once

#include "site.h"
#include "types.h"

namespace cuda_on_cpu {

// Without `valid`, sixteen zero bytes: the source is not read. Both addresses are multiples of 16.
void copy_async16(void* shared, const void* source, bool valid);
void copy_async_commit();
// Waits for this thread's copies of all but the last `groups` commits.
void copy_async_wait(int groups, Site site);

}  // namespace cuda_on_cpu
