// The face of the C++ ops towards PyTorch. Each op's schemas, checks and autograd are in ops/<op>.h; the work is in
// cpu/<op>.cpp.
//
// An op is made of a forward and a backward operator (names with an underscore), each with a Meta version that knows
// only shapes. That is all that torch.compile needs to trace it.
#include <mutex>
#include <set>
#include <thread>

#include "ops/common.h"
#include "ops/gae.h"
#include "ops/gather_logprobs.h"
#include "ops/logits_ppo_loss.h"
#include "ops/masked_whiten.h"
#include "ops/ppo_loss.h"
#include "ops/shaped_gae.h"
#include "ops/value_loss.h"

namespace rlhf_fast {
namespace {

std::string instruction_set() {
  return isa() == Isa::avx512 ? "avx512" : isa() == Isa::avx2 ? "avx2" : "baseline";
}

// How many threads of the operating system share a parallel_for. One on a machine of many cores: OpenMP is off.
int64_t num_threads() {
  std::mutex mutex;
  std::set<std::thread::id> threads;
  at::parallel_for(0, 64 * at::get_num_threads(), 1, [&](int64_t, int64_t) {
    const std::lock_guard<std::mutex> lock(mutex);
    threads.insert(std::this_thread::get_id());
  });
  return int64_t(threads.size());
}

}  // namespace

TORCH_LIBRARY(rlhf_fast, m) {
  m.def("instruction_set() -> str", &instruction_set);
  m.def("num_threads() -> int", &num_threads);
  define_gae(m);
  define_gather_logprobs(m);
  define_logits_ppo_loss(m);
  define_masked_whiten(m);
  define_ppo_loss(m);
  define_shaped_gae(m);
  define_value_loss(m);
}

TORCH_LIBRARY_IMPL(rlhf_fast, CPU, m) {
  implement_gae_cpu(m);
  implement_gather_logprobs_cpu(m);
  implement_logits_ppo_loss_cpu(m);
  implement_masked_whiten_cpu(m);
  implement_ppo_loss_cpu(m);
  implement_shaped_gae_cpu(m);
  implement_value_loss_cpu(m);
}

TORCH_LIBRARY_IMPL(rlhf_fast, Meta, m) {
  implement_gae_meta(m);
  implement_gather_logprobs_meta(m);
  implement_logits_ppo_loss_meta(m);
  implement_masked_whiten_meta(m);
  implement_ppo_loss_meta(m);
  implement_shaped_gae_meta(m);
  implement_value_loss_meta(m);
}

}  // namespace rlhf_fast
