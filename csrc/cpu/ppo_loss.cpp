#include "ppo_loss.h"

#include "ppo_token.h"
#include "token_blocks.h"

namespace rlhf_fast::RLHF_FAST_ISA {
namespace {

template <typename T>
void block(const PPOLoss<T>& args, int64_t first, int64_t last, double* sums) {
  using N = Lanes<T>;
  constexpr int64_t width = LanesOf<T>::width;
  const N zero = all<N>(0), scale = all<N>(1 / args.num_tokens);
  N ratio_max = zero;
  for (int i = 0; i < kPPOLossSums; ++i) sums[i] = 0;
  for (int64_t start = first; start < last; start += kVectors * width) {
    const int64_t stop = start + kVectors * width < last ? start + kVectors * width : last;
    N loss = zero, approx_kl = zero, clipped = zero, entropies = zero;
    for (int64_t j = start; j < stop; j += width) {
      const int64_t count = stop - j;
      const N inside = load_mask<T>(args.mask + j, count);
      const auto get = [&](const T* x) __attribute__((always_inline)) {
        return greater(inside, zero, load_some(x + j, count), zero);
      };
      const N entropy = args.entropy ? get(args.entropy) : zero;
      const auto token =
          ppo_token(get(args.logprobs), get(args.old_logprobs), get(args.advantages),
                    args.weights ? get(args.weights) : inside, args.ref_logprobs != nullptr,
                    args.ref_logprobs ? get(args.ref_logprobs) : zero, entropy, *args.options);
      loss = loss + token.loss;  // 0 outside the mask, like all but the ratio
      approx_kl = approx_kl + token.approx_kl;
      clipped = clipped + token.clipped;
      entropies = entropies + entropy;
      const N ratio = greater(inside, zero, token.ratio, zero);
      ratio_max = greater(ratio, ratio_max, ratio, ratio_max);
      if (args.grad_logprobs) store_some(args.grad_logprobs + j, token.dlogprob * scale, count);
      if (args.grad_entropy) store_some(args.grad_entropy + j, token.dentropy * scale, count);
    }
    sums[kPolicyLoss] += add_lanes(loss);
    sums[kApproxKL] += add_lanes(approx_kl);
    sums[kClipped] += add_lanes(clipped);
    sums[kEntropy] += add_lanes(entropies);
  }
  sums[kRatioMax] = largest_lane(ratio_max);
}

}  // namespace

void ppo_loss(const PPOLoss<float>& args, int64_t begin, int64_t end) {
  for_each_block(args, kPPOLossSums, begin, end, block<float>);
}
void ppo_loss(const PPOLoss<double>& args, int64_t begin, int64_t end) {
  for_each_block(args, kPPOLossSums, begin, end, block<double>);
}

}  // namespace rlhf_fast::RLHF_FAST_ISA
