// What the scheduler tells the barriers.
#pragma once

namespace cuda_on_cpu {

// A thread has returned: those that wait for the block may be all that are left, or wait for it in vain.
void thread_finished();

}  // namespace cuda_on_cpu
