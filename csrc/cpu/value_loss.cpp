#include "value_loss.h"

#include "lanes.h"
#include "token_blocks.h"

namespace rlhf_fast::RLHF_FAST_ISA {
namespace {

template <typename T>
void block(const ValueLoss<T>& args, int64_t first, int64_t last, double* sums) {
  using N = Lanes<T>;
  constexpr int64_t width = LanesOf<T>::width;
  const N zero = all<N>(0), half = all<N>(0.5), one = all<N>(1), scale = all<N>(1 / args.num_tokens);
  const N range = all<N>(args.cliprange_value);
  for (int i = 0; i < kValueLossSums; ++i) sums[i] = 0;
  for (int64_t start = first; start < last; start += kVectors * width) {
    const int64_t stop = start + kVectors * width < last ? start + kVectors * width : last;
    N loss = zero, clipped = zero;
    for (int64_t j = start; j < stop; j += width) {
      const int64_t count = stop - j;
      const N inside = load_mask<T>(args.mask + j, count);
      const auto get = [&](const T* x) __attribute__((always_inline)) {
        return greater(inside, zero, load_some(x + j, count), zero);
      };
      const N value = get(args.values), old_value = get(args.old_values), target = get(args.returns);
      const N low = old_value - range, high = old_value + range, near_old = clamp(value, low, high);
      const N d = value - target, clipped_d = near_old - target, error = d * d, clipped_error = clipped_d * clipped_d;
      // At a tie each side gets half of the derivative, and the ends of a clamp count as inside: as autograd has it.
      const N from_clipped = outside(value, low, high, zero, clipped_d);
      const N gradient = greater(clipped_error, error, from_clipped,
                                 greater(error, clipped_error, d, half * (d + from_clipped)));
      loss = loss + half * greater(clipped_error, error, clipped_error, error);
      clipped = clipped + greater(clipped_error, error, one, zero);
      if (args.grad_values) store_some(args.grad_values + j, gradient * scale, count);
    }
    sums[kValueLoss] += add_lanes(loss);
    sums[kValueClipped] += add_lanes(clipped);
  }
}

}  // namespace

void value_loss(const ValueLoss<float>& args, int64_t begin, int64_t end) {
  for_each_block(args, kValueLossSums, begin, end, block<float>);
}
void value_loss(const ValueLoss<double>& args, int64_t begin, int64_t end) {
  for_each_block(args, kValueLossSums, begin, end, block<double>);
}

}  // namespace rlhf_fast::RLHF_FAST_ISA
