// Signals that a kernel's code raises end the launch with a report, not the process.
#pragma once

namespace cuda_on_cpu {

void run_guarded(void (*body)(void*), void* argument);

template <typename Body>
void run_guarded(Body body) {
  run_guarded([](void* argument) { (*static_cast<Body*>(argument))(); }, &body);
}

}  // namespace cuda_on_cpu
