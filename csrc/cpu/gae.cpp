#include "gae.h"

namespace rlhf_fast::RLHF_FAST_ISA {
namespace {

template <typename R>
void run(const Gae& args, int64_t begin, int64_t end) {
  scan_rows<R>(args, begin, end, [&](int64_t row, int64_t first, int64_t count, R* out) {
    const R* const rewards = row_of<R>(args.rewards, row) + first;
    const uint8_t* const mask = row_of<uint8_t>(args.mask, row) + first;
    fill_masked(mask, out, count, [=](int64_t t) { return rewards[t]; });
  });
}

}  // namespace

void gae(const Gae& args, int64_t begin, int64_t end) {
  args.float64 ? run<double>(args, begin, end) : run<float>(args, begin, end);
}

}  // namespace rlhf_fast::RLHF_FAST_ISA
